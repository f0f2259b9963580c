"""Each reason for which an original runs, once."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch
from blocks import X, block, run
from helpers import BACKENDS, TRITON_DEVICE, check
from torch import nn

import swinaccel
from swinaccel import ops
from swinaccel.backends.torch import window as torch_backend
from swinaccel.backends.triton import bias as bias_launches
from swinaccel.backends.triton import window as window_launches


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

    def picky(call, geometry, *options):
        if geometry.window == (4, 4):
            raise Broken("no")
        return real(call, geometry, *options)

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
