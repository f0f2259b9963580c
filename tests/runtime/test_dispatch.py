"""Each reason for which an original runs, once: in the report, in one warning, and as an error where strict."""

from __future__ import annotations

import contextlib
import copy
import json
import types
import warnings

import helpers
import pytest
import torch
from helpers import BACKENDS, TRITON_DEVICE, check
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import swinaccel
from swinaccel import ops
from swinaccel.backends.torch import window as torch_backend
from swinaccel.backends.triton import bias as bias_launches
from swinaccel.backends.triton import launches
from swinaccel.backends.triton import window as window_launches
from swinaccel.runtime import attention
from swinaccel.spec.window import Geometry

X = torch.randn(2, 8, 8, 16)


def block(**options):
    return helpers.timm_block((8, 8), shift=2, **options)


def run(model, x=X):
    with torch.no_grad():
        return model(x)


def reason_of(model):
    (entry,) = swinaccel.report(model)
    return entry.reason


# Reasons of any backend.


def test_attention_dropout():
    model = swinaccel.accelerate(block(attn_drop=0.1), backend="torch")
    run(model.train())
    assert (
        reason_of(model)
        == "attention dropout is active, and the torch backend has none; call eval(), or set its rate to 0"
    )


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_no_dropout_is_no_reason(mode):
    model = swinaccel.accelerate(block(proj_drop=0.0), backend="torch")
    run(model.train(mode))
    assert reason_of(model) is None


def test_parametrized_projection():
    """Its weight is computed at each access."""
    model = block()
    torch.nn.utils.parametrizations.weight_norm(model.attn.qkv)
    twin, found, expected = helpers.both(model, X)
    helpers.assert_close(found, expected)
    assert helpers.reasons(twin)


def test_forward_of_an_inner_module_replaced_by_hand():
    model = block()
    plain = model.attn.proj.forward
    model.attn.proj.forward = lambda x: plain(x) + 1
    expected = run(model)
    swinaccel.accelerate(model, backend="torch")
    helpers.assert_close(run(model), expected)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["timm", "microsoft", "hf"])
def test_forward_of_the_attention_replaced_by_hand(kind, when):
    """As adapters and visualisers do: the module is not called then, so its own forward would go unheard."""
    inputs = (torch.randn(1, 64, 16),)
    if kind == "timm":
        model, inputs = block(), (X,)
    elif kind == "microsoft":
        model = helpers.microsoft_block((8, 8), shift=2)
    else:
        model, inputs = helpers.huggingface_layer("Swinv2", shift=2), (*inputs, (8, 8))
    swinaccel.plan(model)  # this kind of module is known to be good
    if when == "after":
        swinaccel.accelerate(model, backend="torch")
    attention = model.attention if kind == "hf" else model.attn
    plain = attention.forward

    def replaced(*args, **kwargs):
        out = plain(*args, **kwargs)
        return tuple(2 * part for part in out) if isinstance(out, tuple) else 2 * out

    attention.forward = replaced
    with torch.no_grad():
        with swinaccel.disabled():
            expected = model(*inputs)
        if when == "before":
            swinaccel.accelerate(model, backend="torch")
        helpers.assert_close(model(*inputs), expected)


@pytest.mark.parametrize("edit", ["one-entry", "zeros", "random", "some-inf", "half"])
@pytest.mark.parametrize("batch", [1, 3])
def test_edited_mask_on_the_torch_backend(batch, edit):
    """Window by window, where it is not what the shift implies."""
    model = block()
    x = torch.randn(batch, *X.shape[1:])
    mask = model.attn_mask
    if edit == "one-entry":
        mask[0, 0, 0] = 1.0
    elif edit == "zeros":
        mask.zero_()
    elif edit == "random":
        mask.copy_(3 * torch.randn(mask.shape))
    elif edit == "some-inf":
        mask[-1, :, ::3] = float("-inf")
    else:
        model.attn_mask = (mask / 20).half()
    check(model, x)


def test_training_after_inference_mode_on_the_torch_backend():
    """What is kept between calls may be saved for a backward, whatever the mode it was made in."""
    torch_backend._order.cache_clear()
    torch_backend._shift_masks.cache_clear()
    model = swinaccel.accelerate(block(), backend="torch")
    with torch.inference_mode():
        model(X)
    leaf = X.clone().requires_grad_()
    model(leaf).square().sum().backward()
    with swinaccel.disabled():
        (expected,) = torch.autograd.grad(model(other := X.clone().requires_grad_()).square().sum(), other)
    helpers.assert_close(leaf.grad, expected)


def test_window_of_one_token():
    model = helpers.torchvision_attention(window=(1, 1))
    _, found, expected = helpers.both(model, X)
    helpers.assert_close(found, expected, 1e-6)


def test_input_of_another_rank():
    model = swinaccel.accelerate(helpers.torchvision_attention(), backend="torch")
    with pytest.raises(Exception, match=r"."):
        run(model, torch.randn(2, 64, 16))
    assert "not 3 axes" in reason_of(model)


def test_forward_mode_differentiation():
    model = swinaccel.accelerate(block(), backend="torch")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        tangent = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
        with swinaccel.disabled():
            expected = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
    assert torch.equal(tangent, expected)
    assert "forward-mode" in reason_of(model)


def test_function_transforms():
    model = swinaccel.accelerate(block(), backend="torch")
    stack = torch.randn(3, 1, 8, 8, 16)
    found = torch.func.vmap(lambda x: run(model, x))(stack)
    with swinaccel.disabled():
        expected = torch.stack([run(model, x) for x in stack])
    helpers.assert_close(found, expected)
    assert "torch.func" in reason_of(model)


def test_subclass_of_tensor():
    class Marked(torch.Tensor):
        pass

    model = swinaccel.accelerate(block(), backend="torch")
    found = run(model, X.as_subclass(Marked))
    assert type(found) is Marked
    assert "the input is a Marked" in reason_of(model)


def test_input_on_meta():
    model = swinaccel.accelerate(block(), backend="torch")
    run(copy.deepcopy(model).to("meta"), X.to("meta"))
    with torch.no_grad():
        meta = model.to("meta")
        assert meta(X.to("meta")).is_meta
    assert "meta device" in reason_of(meta)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing():
    model = swinaccel.accelerate(block(), backend="torch")
    torch.jit.trace(model, (X,), check_trace=False)
    assert "traced" in reason_of(model)


def test_input_that_is_no_tensor():
    model = swinaccel.accelerate(block(), backend="torch")
    with pytest.raises(AttributeError):
        model([1, 2, 3])


def test_gradients_are_no_reason_on_the_torch_backend():
    model = swinaccel.accelerate(block(), backend="torch")
    model(X.clone().requires_grad_()).sum().backward()
    assert reason_of(model) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode(backend):
    device = helpers.DEVICES[backend]
    model = swinaccel.accelerate(block().to(device), backend=backend)
    expected = run(model, X.to(device))
    with torch.inference_mode():
        helpers.assert_close(model(X.to(device)), expected, 1e-6)
    helpers.assert_accelerated(model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_made_in_inference_mode(backend):
    """They have no version counter."""
    device = helpers.DEVICES[backend]
    with torch.inference_mode():
        model = helpers.torchvision_attention(window=(9, 8), shift=(4, 4)).to(device)
        expected = model(torch.ones(1, 9, 16, 16, device=device))
        swinaccel.accelerate(model, backend=backend)
        helpers.assert_close(model(torch.ones(1, 9, 16, 16, device=device)), expected)


# Reasons of the kernels.


def on_triton(model):
    return swinaccel.accelerate(model.to(TRITON_DEVICE), backend="triton")


def test_fp64_on_triton():
    model = on_triton(block().double())
    run(model, X.double().to(TRITON_DEVICE))
    assert "torch.float64" in reason_of(model)


def test_head_dim_beyond_the_kernels():
    model = on_triton(block(head_dim=160))
    run(model, X.to(TRITON_DEVICE))
    assert reason_of(model) == "head_dim 160 is larger than 128"


def test_window_beyond_the_kernels():
    model = on_triton(helpers.torchvision_attention(window=(33, 32), dim=4, heads=1))
    run(model, torch.randn(1, 3, 3, 4, device=TRITON_DEVICE))
    assert "more than 1024 tokens" in reason_of(model)


def test_padding_with_a_wrapped_projection():
    class Wrapped(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x)

    model = helpers.timm_block((9, 9), shift=2)
    model.attn.qkv = Wrapped(model.attn.qkv)
    _, found, expected = helpers.both(model, torch.randn(1, 9, 9, 16), backend="triton")
    helpers.assert_close(found, expected)


@pytest.mark.skipif(TRITON_DEVICE == "cuda", reason="concerns the interpreter")
def test_bfloat16_in_the_interpreter(monkeypatch):
    """The interpreter takes the bits of a bfloat16 for an integer: nobody may be handed such products."""
    from triton.runtime import interpreter

    mended = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", mended.plain)
    _, found, expected = helpers.both(block().bfloat16(), X.bfloat16(), backend="triton")
    helpers.assert_close(found, expected, 5e-2)


class Broken(RuntimeError):
    pass


@pytest.fixture
def broken_kernels(monkeypatch):
    """Kernels that fail as real ones do: at their first launch, for want of resources or a compiler."""

    def fail(*args, **kwargs):
        raise Broken("out of resource: shared memory, Required: 300000, Hardware limit: 232448\nmore")

    monkeypatch.setattr(window_launches, "shifted_window_attention", fail)


def test_kernel_failure_gives_the_originals_output(broken_kernels):
    _, found, expected = helpers.both(block(), X, backend="triton")
    helpers.assert_close(found, expected)


def test_kernel_failure_is_reported_and_remembered(broken_kernels, monkeypatch):
    model = on_triton(block())
    for _ in range(3):
        run(model, X.to(TRITON_DEVICE))
    (entry,) = swinaccel.report(model)
    assert (entry.calls, entry.fallbacks) == (3, 3)
    assert entry.reason == (
        "the Triton kernel failed: Broken: out of resource: shared memory, Required: 300000, Hardware limit: 232448"
    )
    assert "\n" not in entry.reason


def test_kernel_failure_is_logged_once(broken_kernels, caplog):
    model = on_triton(block())
    with caplog.at_level("WARNING", logger="swinaccel"):
        for _ in range(3):
            run(model, X.to(TRITON_DEVICE))
    assert len([record for record in caplog.records if "kernel failed" in record.getMessage()]) == 1


def test_kernel_failure_concerns_its_own_problem(monkeypatch):
    """One window size that does not fit does not stop the others."""
    real = window_launches.shifted_window_attention

    def picky(qkv, k, v, geometry, **options):
        if geometry.window == (4, 4):
            raise Broken("no")
        return real(qkv, k, v, geometry, **options)

    monkeypatch.setattr(window_launches, "shifted_window_attention", picky)
    bad, good = on_triton(block()), on_triton(helpers.timm_block((6, 6), window=3, shift=1))
    run(bad, X.to(TRITON_DEVICE))
    run(good, torch.randn(1, 6, 6, 16, device=TRITON_DEVICE))
    assert reason_of(bad) is not None
    helpers.assert_accelerated(good)


def test_kernel_failure_in_strict_mode(broken_kernels):
    model = swinaccel.accelerate(block().to(TRITON_DEVICE), backend="triton", strict=True)
    for _ in range(2):  # the first call meets the failure, the second knows of it
        with pytest.raises(RuntimeError, match="the Triton kernel failed"):
            run(model, X.to(TRITON_DEVICE))


def test_kernel_failure_is_forgotten_on_request(broken_kernels, monkeypatch):
    model = on_triton(block())
    run(model, X.to(TRITON_DEVICE))
    assert ops.has_failures()
    monkeypatch.undo()
    ops.forget_failures()
    run(model, X.to(TRITON_DEVICE))
    (entry,) = swinaccel.report(model)
    assert (entry.calls, entry.fallbacks) == (2, 1)


def test_failure_of_the_position_kernel(monkeypatch):
    """It is no reason to fall back: PyTorch computes that table as well."""

    def fail(*args):
        raise Broken("no")

    monkeypatch.setattr(bias_launches, "position_table", fail)
    helpers.check(block(v2=True), X, backend="triton")


# Strict mode, warnings, counts.


def test_strict_raises_where_an_original_would_run():
    model = swinaccel.accelerate(block(), backend="torch", strict=True)
    run(model)
    model.attn.register_forward_hook(lambda *_: None)
    with pytest.raises(swinaccel.FallbackError, match=r"SwinTransformerBlock would run its original: .*hooks"):
        run(model)


def test_strict_by_environment(monkeypatch):
    model = swinaccel.accelerate(block(), backend="torch")
    model.attn.register_forward_hook(lambda *_: None)
    run(model)
    monkeypatch.setenv("SWINACCEL_STRICT", "on")
    with pytest.raises(swinaccel.FallbackError):
        run(model)


def test_strict_does_not_hinder_disabled():
    model = swinaccel.accelerate(block(), backend="torch", strict=True)
    model.attn.register_forward_hook(lambda *_: None)
    with swinaccel.disabled():
        run(model)


def test_errors_of_the_original_come_through():
    """An error in what the user gave is no reason of ours, and no kernel failure."""
    model = swinaccel.accelerate(block(), backend="torch")
    with pytest.raises(RuntimeError):
        run(model, torch.randn(2, 8, 8, 17))


def test_one_warning_for_each_reason():
    models = [swinaccel.accelerate(block(), backend="torch") for _ in range(2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in models:
            model.attn.register_forward_hook(lambda *_: None)
            for _ in range(3):
                run(model)
        models[0].attn._forward_hooks.clear()
        models[0].attn_mask = torch.zeros(1, 16, 16)
        for _ in range(3):
            with contextlib.suppress(RuntimeError):
                run(models[0])
    texts = [str(warning.message) for warning in caught if "swinaccel" in str(warning.message)]
    assert len(texts) == 2
    assert all(text.startswith("swinaccel: the original runs, and its results are right: ") for text in texts)


def test_no_warning_without_a_reason():
    model = swinaccel.accelerate(block(), backend="torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts(backend):
    device = helpers.DEVICES[backend]
    model = swinaccel.accelerate(block().to(device), backend=backend)
    (entry,) = swinaccel.report(model)
    assert (entry.status, entry.reason, entry.bias, entry.calls, entry.fallbacks) == (
        "accelerated",
        None,
        None,
        0,
        0,
    )
    for _ in range(3):
        run(model, X.to(device))
    (entry,) = swinaccel.report(model)
    assert (entry.calls, entry.fallbacks, entry.bias) == (
        3,
        0,
        "table" if backend == "triton" else entry.bias,
    )
    twin = copy.deepcopy(model)
    (entry,) = swinaccel.report(twin)
    assert entry.calls == 0
    swinaccel.restore(model)
    (entry,) = swinaccel.report(model)
    assert (entry.status, entry.calls) == ("original", 0)


def test_report_of_a_model_never_accelerated():
    (entry,) = swinaccel.report(block())
    assert entry.status == "original"
    assert "accelerate() was not called" in entry.reason


def test_report_is_ready_for_json_and_for_reading():
    model = nn.Sequential(block(), helpers.microsoft_block((8, 8)))
    swinaccel.accelerate(model[0], backend="torch")
    report = swinaccel.report(model)
    content = json.loads(json.dumps(report.to_dict()))
    assert (content["accelerated"], content["original"]) == (1, 1)
    fields = {
        "name", "family", "status", "reason", "window", "shift", "num_heads", "head_dim", "bias", "precision", "calls",
        "fallbacks",
    }  # fmt: skip
    assert [set(entry) for entry in content["entries"]] == [fields, fields]
    assert [entry.name for entry in report.accelerated] == ["0"]
    assert [entry.name for entry in report.original] == ["1"]
    assert "1 of 2 window attentions accelerated" in str(report)
    assert "microsoft" in str(report)
    assert "1 of 2" in repr(report)
    assert "no window attention" in str(swinaccel.report(nn.Linear(1, 1)))


# verify.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accelerated", [True, False], ids=["accelerated", "not-yet"])
def test_verify(backend, accelerated):
    device = helpers.DEVICES[backend]
    model = block().to(device)
    if accelerated:
        swinaccel.accelerate(model, backend=backend)
    result = swinaccel.verify(model, X.to(device), backend=backend)
    assert result.passed, str(result)
    assert result.reference == "float64"
    assert json.loads(json.dumps(result.to_dict()))["passed"] is True
    assert str(result).startswith("passed")
    (entry,) = swinaccel.report(model)
    assert entry.status == ("accelerated" if accelerated else "original")


def test_verify_fails_on_a_wrong_kernel(monkeypatch):
    real = window_launches.shifted_window_attention
    monkeypatch.setattr(
        window_launches, "shifted_window_attention", lambda *args, **kwargs: 1.001 * real(*args, **kwargs)
    )
    model = block().to(TRITON_DEVICE)
    result = swinaccel.verify(model, X.to(TRITON_DEVICE), backend="triton")
    assert not result.passed
    assert str(result).startswith("FAILED")


def test_verify_fails_where_nothing_was_accelerated():
    assert not swinaccel.verify(nn.Linear(4, 4), torch.randn(2, 4)).passed
    model = block()
    model.attn.register_forward_hook(lambda *_: None)
    assert not swinaccel.verify(model, X, backend="torch").passed


def test_verify_restores_the_mode_and_keeps_gradients_away():
    model = block().train()
    model.norm1.eval()
    modes = [module.training for module in model.modules()]
    swinaccel.verify(model, X, backend="torch")
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_verify_needs_inputs():
    with pytest.raises(ValueError, match="verify needs the inputs"):
        swinaccel.verify(block())


def test_recorded_gradients_run_the_original_where_only_pytorch_would_serve(monkeypatch):
    """The torch backend trains slower than the originals, unless it was asked for."""
    monkeypatch.setattr("swinaccel.runtime.context.env_interpret", lambda: False)
    x = X.clone().requires_grad_()
    model = block()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    swinaccel.accelerate(model)
    (found,) = torch.autograd.grad(model(x).square().sum(), x)
    helpers.assert_close(found, expected)
    (entry,) = swinaccel.report(model)
    assert entry.fallbacks == entry.calls == 1
    assert "gradients are recorded" in entry.reason


def test_mask_with_a_gradient():
    model = block()
    model.attn_mask = model.attn_mask.clone().requires_grad_()
    swinaccel.accelerate(model, backend="triton")
    model.to(helpers.TRITON_DEVICE)(X.to(helpers.TRITON_DEVICE))
    assert "the mask records gradients" in reason_of(model)


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, which need not be the one that a model lies on."""
    current, seen = [0], []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.append(current[0])

    class OnSecond:
        dtype = torch.float32

        def get_device(self):
            return 1

        def data_ptr(self):
            return 0

    @contextlib.contextmanager
    def switched(index):
        current[0] = index
        yield
        current[0] = 0

    with monkeypatch.context() as patch:
        patch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
        patch.setattr(torch.cuda, "device", switched)
        launches.Launch(Kernel(), (1,), ())(OnSecond(), None)
    assert seen == [1]
    assert current == [0]


class OnGpu:
    """What a launch asks of a tensor."""

    def __init__(self, pointer, index=0):
        self.pointer, self.index, self.dtype = pointer, index, torch.float32

    def data_ptr(self):
        return self.pointer

    def get_device(self):
        return self.index


@pytest.fixture
def launched(monkeypatch):
    """A launch of two tensors and a number on the first GPU, and what was run of it."""
    seen = []

    class Compiled:
        function, packed_metadata = "function", "metadata"

        def run(self, *arguments):
            seen.append(arguments)

        def __getitem__(self, grid):
            return lambda *arguments: seen.append(("whole", *arguments))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: Compiled()

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: f"stream {index}", raising=False)
    return launches.Launch(Kernel(), (5,), (7,)), seen


def test_compiled_kernels_are_run_with_pointers(launched):
    launch, seen = launched
    for first in (16, 32, 48):
        launch(OnGpu(first), None)
    assert seen == [
        (5, 1, 1, "stream 0", "function", "metadata", None, None, None, first, None, 7) for first in (32, 48)
    ]
    launch(OnGpu(8), None)  # of another alignment: compiled by itself
    assert len(seen) == 2


def test_each_kind_of_tensors_has_its_own_compiled_kernel(launched, monkeypatch):
    """Also where kinds take turns."""
    _, seen = launched
    compiled = []

    class Compiled:
        packed_metadata = "metadata"

        def __init__(self, kind):
            self.function = kind

        def run(self, *arguments):
            seen.append(arguments[4])

        def __getitem__(self, grid):
            return None

    class Kernel:
        def __getitem__(self, grid):
            def compile(*tensors):
                kind = [one and (one.dtype, one.index, one.pointer % 16) for one in tensors]
                compiled.append(kind)
                return Compiled(kind)

            return compile

    launch = launches.Launch(Kernel(), (5,), ())
    half = OnGpu(64)
    half.dtype = torch.float16
    kinds = [(OnGpu(16), OnGpu(32)), (OnGpu(8), OnGpu(32)), (half, OnGpu(32)), (OnGpu(32), None), (OnGpu(16), OnGpu(4))]
    for _ in range(3):
        for tensors in kinds:
            launch(*tensors)
            launch(*tensors)
    turn = [kind for kind in compiled for _ in range(2)]
    assert len(compiled) == len(kinds)
    assert seen == compiled + 2 * turn


@pytest.mark.parametrize("elsewhere", [False, True])
def test_descriptors_are_made_once_and_copied_for_other_tensors(launched, elsewhere):
    launch, seen = launched

    class Descriptor:
        def __init__(self, base, shape):
            self.base, self.shape = base, shape
            if base.data_ptr() % 16:
                raise ValueError("no address of a descriptor")
            made.append(base)

    made, second = [], OnGpu(16, -1 if elsewhere else 0)
    describe = {1: lambda tensor: Descriptor(tensor, [3, 4])}
    described = launches.DescribedLaunch(describe, launch.kernel, (5,), (7,))
    tensors = [(OnGpu(pointer), OnGpu(pointer), second) for pointer in (16, 32, 48)]
    for given in tensors:
        described(*given)
    assert len(made) == (3 if elsewhere else 1)
    for (first, base, last), arguments in zip(tensors[1:], seen, strict=True):
        pointer, descriptor, *rest = arguments[9:]
        assert type(descriptor) is Descriptor
        assert (descriptor.base, descriptor.shape) == (base, [3, 4])
        assert [pointer, *rest] == ([first, last, 7] if elsewhere else [first.pointer, 16, 7])
    with pytest.raises(ValueError, match="no address"):  # and what is not like the first is looked at again
        described(OnGpu(16), OnGpu(8), second)


@pytest.mark.parametrize("index", [-1, 1], ids=["cpu", "another-gpu"])
def test_tensors_elsewhere_are_for_triton_to_judge(index, launched):
    launch, seen = launched
    first, other = OnGpu(16), OnGpu(16, index)
    for _ in range(2):
        launch(first, other)
    assert seen == [(5, 1, 1, "stream 0", "function", "metadata", None, None, None, first, other, 7)]


def test_hooks_of_triton_see_launches(launched):
    from triton import knobs

    launch, seen = launched
    launch(OnGpu(16))
    hook = print
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        launch(OnGpu(16))
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == [("whole", 16, 7)]


# What came after accelerate(), and is seen at the next call.


@pytest.mark.parametrize("way", ["parameter", "data"])
def test_table_that_became_too_small_for_its_index(way, monkeypatch):
    """After a call of the same kind, whose index was found to fit."""

    def change(model):
        attn = model.attn
        small = attn.relative_position_bias_table.detach()[:20].clone()
        if way == "parameter":
            attn.relative_position_bias_table = nn.Parameter(small)
        else:
            attn.relative_position_bias_table.data = small

    model = swinaccel.accelerate(helpers.timm_block((8, 8), shift=2).to(TRITON_DEVICE), backend="triton")
    x = torch.randn(2, 8, 8, 16).to(TRITON_DEVICE)
    with torch.no_grad():
        model(x)
        model(x)
        change(model)
        monkeypatch.setenv("SWINACCEL_STRICT", "1")  # the original's error would take a GPU's process down
        with pytest.raises(swinaccel.FallbackError, match="from 0 to 48, and its table has 20 rows"):
            model(x)


def test_index_that_nobody_looked_through_before_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    section = types.SimpleNamespace(index=types.SimpleNamespace(is_cuda=True), table=lambda: None, table_shape=(4, 2))
    assert "run the model once before" in attention.index_reason(section)


def test_tracing_into_a_graph():
    model = swinaccel.accelerate(helpers.microsoft_block((8, 8), shift=2), backend="torch")
    x = torch.randn(2, 64, 16)
    with torch.no_grad():
        graph = make_fx(model, tracing_mode="real")(x)
    helpers.assert_close(graph(x), run(model, x))


def test_orders_kept_by_the_torch_backend():
    """Those of one model's stages, and no more: images of many sizes would fill the memory with them."""
    cache = torch_backend._order
    cache.cache_clear()
    for side in range(8, 88, 2):
        order = cache(Geometry((side, side), (4, 4), (2, 2)), 2, True, torch.device("cpu"))
        assert order.gather.dtype == order.scatter.dtype == torch.int32
    assert cache.cache_info().currsize <= 16
    for shift in (0, 2):
        for side in (8, 16, 32, 64):
            for batch in (2, 1):  # the last part of a batch may be a smaller one
                for _ in range(2):
                    cache(Geometry((side, side), (4, 4), (shift, shift)), batch, True, torch.device("cpu"))
    before = cache.cache_info().misses
    cache(Geometry((8, 8), (4, 4), (0, 0)), 2, True, torch.device("cpu"))
    assert cache.cache_info().misses == before


def test_blocks_that_are_compiled_one_by_one_share_code():
    blocks = nn.ModuleList(helpers.timm_block((8, 8)) for _ in range(4)).to(TRITON_DEVICE)
    swinaccel.accelerate(blocks, backend="triton")
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    x = torch.randn(1, 8, 8, 16, device=TRITON_DEVICE)
    for block in blocks:
        block.compile(backend="eager")
        with torch.no_grad():
            block(x)
    assert counters["stats"]["unique_graphs"] == 1
