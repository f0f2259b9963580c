"""Whole blocks in inference (`fuse="auto"`) against their originals, and everything that must leave a block alone."""

from __future__ import annotations

import copy
import warnings

import helpers
import pytest
import torch
from blocks import AROUND, DTYPES, HALVES, block
from helpers import TRITON_DEVICE
from torch import nn
from whole_models import MODELS

import swinaccel
from swinaccel import ops, patching
from swinaccel.backends.triton import block as kernels
from swinaccel.backends.triton import launches
from swinaccel.ops import block as block_ops
from swinaccel.runtime.plan import state_of

KEEPS_VERDICTS = True


pytestmark = pytest.mark.usefixtures("kernels_that_run")


def accelerated(model, **options):
    return swinaccel.accelerate(copy.deepcopy(model).to(TRITON_DEVICE), backend="triton", **options)


def outputs(model, x):
    with torch.no_grad():
        return model(x.to(TRITON_DEVICE))


WHOLE = {
    "timm-v1": ["norm", "add_norm"] * 2 + ["merge"] + ["norm", "add_norm"],
    "timm-v2": ["norm_add", "norm_add"] * 2 + ["merge", "norm"] + ["norm_add", "norm_add"],
    "torchvision-v1-padded": ["norm", "add_norm"] * 2 + ["merge"] + ["norm", "add_norm"] * 2,
    "torchvision-v2": ["norm_add", "norm_add"] * 2 + ["merge", "norm"] + ["norm_add", "norm_add"] * 2,
    "hf-swin-padded": ["norm", "add_norm"] * 2 + ["merge"] + ["norm", "add_norm"] * 2,
    "hf-swinv2": ["norm_add", "norm_add"] * 2 + ["merge", "norm"] + ["norm_add", "norm_add"] * 2,
    "hf-donut": ["norm", "add_norm"] * 2 + ["merge"] + ["norm", "add_norm"] * 2,
    "microsoft-v1": ["norm", "add_norm"] * 2,
    "microsoft-v2": ["norm_add", "norm_add"] * 2,
}


@pytest.mark.parametrize("name", WHOLE)
def test_model_equals_its_original(name, launched):
    make, example, count = MODELS[name]
    model, x = make(), example()[:1]
    twin = accelerated(model)
    found = outputs(twin, x)
    assert launched == WHOLE[name]
    helpers.assert_accelerated(twin, count)
    helpers.assert_close(found, outputs(model.to(TRITON_DEVICE), x))


@pytest.mark.parametrize("name", ["timm-v1", "torchvision-v2", "microsoft-v1"])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(name, dtype, launched):
    make, example, count = MODELS[name]
    model, x = make(), example()
    expected = helpers.tensors(outputs(copy.deepcopy(model).double().to(TRITON_DEVICE), x.double()))[0]
    model, x = model.to(TRITON_DEVICE, dtype), x.to(dtype)
    twin = accelerated(model)
    found, own = (helpers.tensors(outputs(one, x))[0] for one in (twin, model))
    assert launched.count("mlp") == count
    assert found.dtype == own.dtype
    error, originals = ((one.double() - expected).abs().mean() for one in (found, own))
    assert error <= 1.5 * originals  # of a handful of numbers, so that the mean itself is noisy


X = torch.randn(2, 8, 8, 16, generator=torch.Generator().manual_seed(3))


def test_one_entry_for_each_attention():
    make, example, count = MODELS["torchvision-v1"]
    twin = accelerated(make())
    outputs(twin, example())
    helpers.assert_accelerated(twin, count)


@pytest.mark.parametrize("name", ["timm-v1", "torchvision-v2", "hf-swin", "microsoft-v1"])
def test_restore_is_exact(name):
    model = MODELS[name][0]()
    before = {part: dict(vars(part)) for part in model.modules()}
    classes = {type(part): dict(vars(type(part))) for part in model.modules()}
    swinaccel.accelerate(model, backend="triton")
    assert any(patching.marker(part) for part in model.modules())
    swinaccel.restore(model)
    assert all(dict(vars(part)) == attributes for part, attributes in before.items())
    for cls, attributes in classes.items():
        assert vars(cls) == attributes


@pytest.mark.parametrize("name", ["timm-v1", "torchvision-v1", "hf-swin"])
def test_attention_only(name, launched):
    make, example, count = MODELS[name]
    model, x = make(), example()[:1]
    twin = accelerated(model)
    swinaccel.accelerate(twin, backend="triton", fuse="attention")
    helpers.assert_close(outputs(twin, x), outputs(model.to(TRITON_DEVICE), x))
    assert launched == []
    helpers.assert_accelerated(twin, count)


def test_what_the_code_does_not_read_changes_nothing(launched):
    model = accelerated(block())
    expected = outputs(model, X)
    model.register_parameter("gamma", nn.Parameter(torch.ones(16, device=TRITON_DEVICE)))
    launched.clear()
    helpers.assert_close(outputs(model, X), expected)
    assert launched
    model.add_module("adapter", nn.Identity())  # with which nothing was proven yet
    launched.clear()
    helpers.assert_close(outputs(model, X), expected)
    assert not launched
    swinaccel.accelerate(model, backend="triton")
    helpers.assert_close(outputs(model, X), expected)
    assert launched


def test_recorded_gradients_are_the_originals(launched):
    model, plain = accelerated(block()), block().to(TRITON_DEVICE)
    gradients = []
    for one in (model, plain):
        x = X.clone().to(TRITON_DEVICE).requires_grad_()
        one(x).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in one.parameters())])
    assert "add" in launched  # of the kernels with gradients alone
    launched.clear()
    helpers.assert_close(gradients[0], gradients[1], 1e-4)
    for parameter in model.parameters():  # and frozen, but for one
        parameter.requires_grad_(parameter is model.mlp.fc2.bias)
    assert model(X.to(TRITON_DEVICE)).requires_grad
    assert "add" in launched
    launched.clear()
    model.requires_grad_(False)
    model(X.to(TRITON_DEVICE))
    assert launched == ["norm", "add_norm"]
    model.attn.qkv.weight.requires_grad_()
    assert model(X.to(TRITON_DEVICE)).requires_grad


def test_other_layouts_of_memory(launched):
    model = accelerated(block())
    x = X.transpose(1, 2)
    found = outputs(model, x)
    assert launched == []
    with swinaccel.disabled():
        helpers.assert_close(found, outputs(model, x))


def check_attention_alone(cls, launched):
    """Check that of a class of blocks only the attention is accelerated."""
    model = accelerated(
        helpers.randomize(cls(dim=16, input_resolution=(8, 8), num_heads=2, window_size=4, shift_size=2))
    )
    found = outputs(model, X)
    assert launched == []
    with swinaccel.disabled():
        helpers.assert_close(found, outputs(model, X))
    helpers.assert_accelerated(model, 1)


def test_layer_scale_is_no_known_block(launched):
    from timm.models.swin_transformer import SwinTransformerBlock

    class LayerScaled(SwinTransformerBlock):
        def __init__(self, **options):
            super().__init__(**options)
            self.gamma = nn.Parameter(torch.ones(16))

        def forward(self, x):
            x = x + self.gamma * self._attn(self.norm1(x))
            return x + self.gamma * self.mlp(self.norm2(x))

    check_attention_alone(LayerScaled, launched)


def test_block_of_another_order_is_no_known_block(launched):
    from timm.models.swin_transformer import SwinTransformerBlock

    class Swapped(SwinTransformerBlock):
        def forward(self, x):
            x = x + self._attn(self.norm2(x))
            return x + self.mlp(self.norm1(x))

    check_attention_alone(Swapped, launched)


def test_merging_in_another_order_is_not_known(launched):
    model = helpers.timm_v1(window=4, img_size=64)
    merging = next(part for part in model.modules() if type(part).__name__ == "PatchMerging")

    class Rows(type(merging)):
        def forward(self, x):
            parts = [x[:, row::2, col::2] for row in (0, 1) for col in (0, 1)]
            return self.reduction(self.norm(torch.cat(parts, -1)))

    merging.__class__ = Rows
    twin = accelerated(model)
    x = torch.randn(1, 3, 64, 64)
    helpers.assert_close(outputs(twin, x), outputs(model.to(TRITON_DEVICE), x))
    assert "norm" in launched
    assert "merge" not in launched


def test_a_filter_is_asked_of_attention_only():
    model = MODELS["torchvision-v1"][0]()
    swinaccel.accelerate(
        model, backend="triton", graphs=False, filter=lambda name, module: name.startswith("features.1")
    )
    marked = [name for name, part in model.named_modules() if patching.marker(part)]
    assert marked == ["features.1.0", "features.1.0.attn", "features.1.1", "features.1.1.attn"]


def break_launches(monkeypatch):
    """Let every kernel around the attention fail."""
    run = launches.Launch.__call__

    def fail(self, *tensors):
        if self.kernel.__name__ in AROUND:
            raise RuntimeError("no registers")
        run(self, *tensors)

    monkeypatch.setattr(launches.Launch, "__call__", fail)


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_kernels_that_fail(v2, monkeypatch, caplog):
    model = accelerated(block(v2=v2))

    break_launches(monkeypatch)
    with pytest.warns(
        UserWarning, match="only the attention is accelerated .* the Triton kernel failed: RuntimeError: no regis"
    ):
        found = outputs(model, X)
    again = outputs(model, X)
    assert [record.message for record in caplog.records if "no registers" in record.message]
    (entry,) = swinaccel.report(model)
    assert entry.reason == "its attention only, because the Triton kernel failed: RuntimeError: no registers"
    assert entry.status == "accelerated"
    ops.forget_failures()
    assert [entry.reason for entry in swinaccel.report(model)] == [None]
    with swinaccel.disabled():
        expected = outputs(model, X)
    helpers.assert_close(found, expected)
    helpers.assert_close(again, expected)


@pytest.mark.parametrize("name", ["timm-v1", "torchvision-v1", "hf-swin"])
def test_kernels_that_fail_are_errors_where_strict(name, monkeypatch):
    """Of the call in which one fails, and of all later ones."""
    make, example, _ = MODELS[name]
    model, x = accelerated(make()), example()
    monkeypatch.setenv("SWINACCEL_STRICT", "1")

    break_launches(monkeypatch)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(
                swinaccel.FallbackError, match="own layers: the Triton kernel failed: RuntimeError: no registers"
            ):
                outputs(model, x)
    ops.forget_failures()


def test_memory_that_runs_out_is_no_failure_of_a_kernel(monkeypatch):
    model = accelerated(block())
    outputs(model, X)
    run = launches.Launch.__call__

    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(launches.Launch, "__call__", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        kernels.norm(X, (None, None, 1e-5))
    monkeypatch.setattr(launches.Launch, "__call__", run)
    assert not ops.has_failures()


@pytest.fixture
def after_attention(monkeypatch):
    """The dtypes of what the operator was given."""
    dtypes, plain = [], block_ops._check

    def run(x, *rest):
        dtypes.append(x.dtype)
        return plain(x, *rest)

    monkeypatch.setattr(block_ops, "_check", run)
    return dtypes


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["timm-v1", "timm-v2", "torchvision-v1-padded", "torchvision-v2", "hf-swin-padded", "hf-swinv2"]
)
def test_compiled_models(name, dtype, after_attention):
    """What follows the attention is one operator, in half precision; in fp32 the compiler's own."""
    model, x = (one.to(TRITON_DEVICE, dtype) for one in helpers.small_model(name, depths=(1, 1)))
    twin = accelerated(model)
    with torch.no_grad():
        found = helpers.tensors(compiled(twin)(x))[0]
    assert after_attention == ([] if dtype == torch.float32 else [dtype] * 2)
    exact = helpers.tensors(outputs(copy.deepcopy(model).double(), x.double()))[0]
    own = helpers.tensors(outputs(model, x))[0]
    errors = [(one.double() - exact).abs().mean() for one in (found, own)]
    assert errors[0] <= 1.5 * errors[1] + 1e-6


def test_training_is_the_compilers(after_attention):
    model = accelerated(block().to(HALVES[0]))
    x = X.to(TRITON_DEVICE, HALVES[0])
    compiled(model)(x).sum().backward()
    with torch.no_grad(), torch.autocast(TRITON_DEVICE, HALVES[0]):
        compiled(model.float())(x.float())
    assert after_attention == []


def test_the_operator():
    model = block()
    linears = [(one.weight.data, one.bias.data) for one in (model.mlp.fc1, model.mlp.fc2)]
    norms = [(one.weight.data, one.bias.data, one.eps) for one in (model.norm1, model.norm2)]
    for post_norm in (False, True):
        arguments = X, X.flip(0), *norms[0], *norms[1], *linears[0], *linears[1], post_norm
        arguments = [one.to(TRITON_DEVICE) if torch.is_tensor(one) else one for one in arguments]
        torch.library.opcheck(torch.ops.swinaccel.after_attention.default, tuple(arguments))
        found = torch.ops.swinaccel.after_attention(*arguments)
        norm, linear = (arguments[2:5], arguments[5:8]), (arguments[8:10], arguments[10:12])
        helpers.assert_close(found, block_ops._plain(*arguments[:2], norm, linear, post_norm))


def test_nothing_keeps_a_block_alive():
    import gc
    import weakref

    model = accelerated(block())
    outputs(model, X)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_what_no_longer_holds_is_forgotten():
    """A part that has come to know its block would keep it alive through what is remembered of the part."""
    model = accelerated(block())
    outputs(model, X)
    assert state_of(model).block.plans
    model.norm1.block = [model]
    outputs(model, X)
    scope = state_of(model).block
    assert scope.facts is scope.guard is None
    assert not scope.plans
