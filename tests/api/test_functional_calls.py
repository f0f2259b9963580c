"""Functions of windows as PyTorch calls them, where a kernel fails, and where what they are given is refused."""

from __future__ import annotations

import logging
from typing import Any

import helpers
import pytest
import torch
from gradients import exactly
from torch import Tensor
from window_problems import BOTH, WINDOWS, Case, call, differentiate, oracle

import swinaccel
from swinaccel import functional, ops
from swinaccel.backends.triton import bias as bias_launches
from swinaccel.backends.triton import window as window_launches
from swinaccel.backends.triton import window_bwd as window_bwd_launches
from swinaccel.config import env_interpret
from swinaccel.errors import KernelError
from swinaccel.ops import position
from swinaccel.ops import window as window_ops


def test_operator_passes_opcheck(monkeypatch):
    """With what `window_attention` hands to it: a dense bias as a table, q, k and v apart."""
    inputs = Case(16, windows=2, heads=1, masks=2, cosine=True).make()
    seen: list[tuple] = []
    original = torch.ops.swinaccel.shifted_window_attention

    class Recorded:
        def __call__(self, *args: Any) -> Any:
            seen.append(args)
            return original(*args)

    monkeypatch.setattr(window_ops, "is_observed", lambda: True)  # or short calls go past the dispatcher
    torch.ops.swinaccel.shifted_window_attention = Recorded()
    try:
        differentiate(call, inputs, WINDOWS)
    finally:
        torch.ops.swinaccel.shifted_window_attention = original
    (arguments,) = seen
    arguments = tuple(
        t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in arguments
    )
    torch.library.opcheck(original.default, arguments)


@BOTH
def test_compiles_into_one_graph(backend):
    def both(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, logit_scale: Tensor) -> Tensor:
        out = functional.window_attention(q, k, v, bias, mask)
        out = out + functional.cosine_window_attention(q, k, v, logit_scale, bias, mask)
        image = torch.cat([t.transpose(1, 2).flatten(2).view(-1, 8, 8, 24) for t in (q, k, v)], -1)
        image = functional.shifted_window_attention(image, 4, 2, (2, 1), bias=bias, logit_scale=logit_scale)
        return out + image.view(-1, 16, 2, 12).transpose(1, 2)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    inputs = Case(16, 4, heads=2, masks=2, cosine=True).make(device=backend)
    found = differentiate(compiled, inputs, WINDOWS)
    for name, expected in differentiate(both, inputs, WINDOWS).items():
        helpers.assert_close(found[name], expected, 1e-5)


@BOTH
def test_autocast(backend):
    """Tokens in autocast's dtype, parameters as they are."""
    inputs = Case(20, cosine=True, masks=1, dim=16).make(device=backend)
    dtype = torch.float16 if backend == "cuda" or env_interpret() else torch.bfloat16
    with torch.autocast(backend, dtype):
        found = differentiate(call, inputs, WINDOWS)
    halves = {**inputs, **{name: inputs[name].to(dtype) for name in ("q", "k", "v")}}
    exact = differentiate(oracle, halves, WINDOWS, change=exactly)
    assert found["out"].dtype == dtype
    for name, expected in exact.items():
        assert name == "out" or found[name].dtype == torch.float32
        helpers.assert_close(found[name].double(), expected, 16 * torch.finfo(dtype).eps)


def test_transforms_of_functions():
    """torch.func and forward-mode differentiation go through PyTorch, which has them."""
    inputs = Case(9, windows=2, masks=2).make()
    tokens = [inputs[name] for name in "qkv"]

    def loss(bias: Tensor) -> Tensor:
        return functional.window_attention(*tokens, bias, inputs["mask"]).square().sum()

    gradient = torch.func.grad(loss)(inputs["bias"])
    leaf = inputs["bias"].clone().requires_grad_()
    helpers.assert_close(gradient, torch.autograd.grad(loss(leaf), leaf)[0], 1e-5)
    _, tangent = torch.func.jvp(loss, (inputs["bias"],), (torch.ones_like(inputs["bias"]),))
    assert abs(tangent) < 1e-3 * loss(inputs["bias"])  # a softmax does not see a constant
    many = torch.func.vmap(lambda bias: functional.window_attention(*tokens, bias))(torch.stack([leaf, leaf + 1]))
    helpers.assert_close(many[1], functional.window_attention(*tokens, leaf + 1), 1e-5)


def test_numbers_that_lie_in_memory_with_the_other_sign():
    """As the imaginary part of a conjugate does; in gradients too."""
    shape, device = (4, 2, 16, 8), helpers.TRITON_DEVICE
    tokens = {name: torch.randn(shape, device=device) for name in "qkv"}
    grad = torch.randn(shape, device=device)
    windows = {"bias": torch.randn(2, 16, 16), "mask": torch.randn(2, 16, 16)}
    factors = {name: torch.randn(2, 16, 4) for name in ("q_factor", "k_factor")}
    for attend, others in (functional.window_attention, windows), (functional.factored_bias_attention, factors):
        given = {**tokens, **{name: one.to(device) for name, one in others.items()}}
        found = []
        for turned in (None, *given, "grad"):
            now = {name: torch._neg_view(-one) if name == turned else one.clone() for name, one in given.items()}
            leaves = [one.requires_grad_() for name, one in now.items() if name != "mask"]
            above = torch._neg_view(-grad) if turned == "grad" else grad
            out = attend(**now)
            found.append((out, *torch.autograd.grad(out, leaves, above)))
        for ours in found[1:]:
            for one, other in zip(ours, found[0], strict=True):
                helpers.assert_close(one, other)


def test_second_derivatives():
    inputs = Case(9, windows=2, cosine=True).make()

    def penalty(attend: Any, change: Any) -> tuple[Tensor, ...]:
        leaves = {name: change(inputs[name]).clone().requires_grad_() for name in WINDOWS}
        first = torch.autograd.grad(attend(**leaves).square().sum(), tuple(leaves.values()), create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in first), tuple(leaves.values()))

    for one, other in zip(penalty(call, lambda t: t), penalty(oracle, exactly), strict=True):
        helpers.assert_close(one.double(), other, 1e-3)


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_a_kernel_that_fails(rate, monkeypatch, caplog):
    """Plain PyTorch gives the numbers, and says so once; strict mode raises."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of resource: shared memory\nand much more")

    inputs = Case(9).make()
    monkeypatch.setattr(window_launches, "shifted_window_attention", broken)
    with caplog.at_level(logging.WARNING, "swinaccel"):
        for _ in range(2):
            out = call(**inputs, dropout=rate)
            if not rate:
                helpers.assert_close(out.double(), oracle(**inputs).double())
            assert bool(torch.isfinite(out).all())
    assert len(caplog.records) == 1
    monkeypatch.setenv("SWINACCEL_STRICT", "1")
    with pytest.raises(KernelError, match="out of resource"):
        call(**inputs, dropout=rate)


@pytest.mark.parametrize(
    ("owner", "place"),
    [(window_launches, "shifted_window_attention"), (window_bwd_launches, "shifted_window_attention_backward")],
    ids=["forward", "backward"],
)
def test_out_of_memory_is_no_failure(owner, place, monkeypatch, caplog):
    """It comes through as it is, so that a caller can try a smaller batch, which the kernels then run."""

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    inputs = Case(9).make()

    def step() -> None:
        call(**{**inputs, "v": inputs["v"].detach().requires_grad_()}).sum().backward()

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "swinaccel"):
        patch.setattr(owner, place, full)
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            step()
    assert not ops.has_failures()
    assert not caplog.records
    monkeypatch.setenv("SWINACCEL_STRICT", "1")
    step()


def test_out_of_memory_of_the_bias_table(monkeypatch):
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(bias_launches, "position_table", full)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        position.position_table(torch.randn(9, 2), torch.randn(4, 2), torch.randn(4), torch.randn(1, 4))
    assert not ops.has_failures()


# What is not accepted.


def bad(change: Any, kind: type, words: str, name: str) -> Any:
    return pytest.param(change, kind, words, id=name)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        bad({"q": [1.0]}, TypeError, "q must be a tensor; got list", "q-list"),
        bad({"k": torch.zeros(2, 2, 9, 8).int()}, TypeError, "k must be floating point; got torch.int32", "k-int"),
        bad({"q": torch.zeros(2, 9, 8)}, ValueError,
            "q must have shape (windows, heads, tokens, head_dim); got (2, 9, 8)", "q-3d"),
        bad({"v": torch.zeros(2, 2, 9, 4)}, ValueError,
            "v must have q's shape, (2, 2, 9, 8); got (2, 2, 9, 4)", "v-shape"),
        bad({"k": torch.zeros(2, 2, 9, 8).half()}, TypeError,
            "k must have q's dtype, torch.float32; got torch.float16", "k-half"),
        bad({"k": torch.zeros(2, 2, 9, 8, device="meta")}, ValueError,
            "k must be on q's device, cpu; got meta", "k-meta"),
        bad({"bias": torch.zeros(1, 9, 9)}, ValueError,
            "bias must have shape (heads, tokens, tokens), (2, 9, 9); got (1, 9, 9)", "bias"),
        bad({"bias": torch.zeros(3, 1, 9, 9)}, ValueError,
            "bias must have shape (rows, heads, tokens, tokens), (3, 2, 9, 9), one for each row of windows; got"
            " (3, 1, 9, 9)", "bias-rows"),
        bad({"bias": torch.zeros(0, 2, 9, 9)}, ValueError, "(1, 2, 9, 9), one for each row of windows; got", "no-rows"),
        bad({"bias": 1.0}, TypeError, "bias must be a tensor; got float", "bias-float"),
        bad({"bias": torch.zeros(2, 9, 9, device="meta")}, ValueError,
            "bias must be on q's device, cpu; got meta", "bias-meta"),
        bad({"mask": torch.zeros(9, 9)}, ValueError,
            "mask must have shape (masks, 9, 9), 1 mask or more; got (9, 9)", "mask-2d"),
        bad({"mask": torch.zeros(0, 9, 9)}, ValueError, "1 mask or more; got (0, 9, 9)", "no-masks"),
        bad({"mask": torch.zeros(1, 9, 9).bool()}, TypeError,
            "mask must be floating point; got torch.bool", "bool-mask"),
        bad({"mask": torch.zeros(1, 9, 9).requires_grad_()}, ValueError,
            "mask takes no gradient: detach it, or give what is to be learned as bias", "mask-grad"),
        bad({"scale": "1"}, TypeError, "scale must be None or a number; got '1'", "scale"),
        bad({"scale": float("nan")}, ValueError, "scale must be finite; got nan", "scale-nan"),
        bad({"dropout": 1.0}, ValueError, "dropout must lie in [0, 1); got 1.0", "dropout"),
        bad({"dropout": None}, TypeError, "dropout must be a number; got None", "dropout-none"),
        bad({"logit_scale": torch.zeros(3)}, ValueError,
            "logit_scale must have shape (2,) or (2, 1, 1), one number a head; got (3,)", "logit"),
        bad({"logit_scale": 2.0}, TypeError, "logit_scale must be a tensor; got float", "logit-float"),
    ],
)  # fmt: skip
def test_bad_windows(change, kind, words):
    inputs = {name: torch.zeros(2, 2, 9, 8) for name in ("q", "k", "v")}
    with pytest.raises(kind) as caught:
        call(**{**inputs, **change})
    assert words in str(caught.value)


def test_cosine_attention_needs_its_scale():
    q = torch.zeros(2, 2, 9, 8)
    with pytest.raises(TypeError, match="logit_scale must be a tensor; got None"):
        functional.cosine_window_attention(q, q, q, None)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        bad({"qkv": None}, TypeError, "qkv must be a tensor or three of them; got NoneType", "none"),
        bad({"qkv": (torch.zeros(1, 8, 8, 16),) * 2}, TypeError, "three of them; got tuple of 2", "two"),
        bad({"qkv": (torch.zeros(1, 8, 8, 16),)}, TypeError, "three of them; got tuple of 1", "one"),
        bad({"qkv": torch.zeros(8, 8, 48)}, ValueError,
            "qkv must have shape (B, H, W, channels), or (B, depth, H, W, channels); got (8, 8, 48)", "3d"),
        bad({"qkv": torch.zeros(1, 8, 8, 47)}, ValueError,
            "(B, H, W, 3 * num_heads * head_dim), num_heads 2; got (1, 8, 8, 47)", "channels"),
        bad({"qkv": torch.zeros(1, 8, 8, 45)}, ValueError, "num_heads 2; got (1, 8, 8, 45)", "heads"),
        bad({"qkv": (torch.zeros(1, 8, 8, 16), torch.zeros(1, 8, 8, 8), torch.zeros(1, 8, 8, 16))}, ValueError,
            "three tensors of one shape; got (1, 8, 8, 16), (1, 8, 8, 8)", "shapes"),
        bad({"num_heads": 0}, ValueError, "num_heads must be 1 or more; got 0", "no-heads"),
        bad({"num_heads": 2.0}, TypeError, "num_heads must be an integer; got 2.0", "float-heads"),
        bad({"window_size": 0}, ValueError, "window_size must be 2 integers of 1 or more; got 0", "window"),
        bad({"window_size": (4, 4, 4)}, ValueError,
            "window_size must be 2 integers of 1 or more; got (4, 4, 4)", "window3"),
        bad({"window_size": 4.0}, TypeError, "window_size must be an integer or 2 of them; got 4.0", "window-float"),
        bad({"shift_size": 4}, ValueError, "shift_size must be less than window_size, (4, 4); got 4", "shift"),
        bad({"shift_size": (-1, 0)}, ValueError, "shift_size must be 2 integers of 0 or more; got (-1, 0)", "negative"),
        bad({"index": None}, ValueError, "index must be given where table is", "no-index"),
        bad({"table": None}, ValueError, "table must be given where index is", "no-table"),
        bad({"table": torch.zeros(49, 3)}, ValueError,
            "table must have shape (rows, heads), 2 heads; got (49, 3)", "table"),
        bad({"index": torch.zeros(16, 16)}, TypeError, "index must be torch.int64; got torch.float32", "float-index"),
        bad({"index": torch.zeros(15, 16).long()}, ValueError,
            "index must have shape (16, 16), or (256,), for a window of 16 tokens; got (15, 16)", "index"),
        bad({"bias": torch.zeros(2, 16, 16)}, ValueError,
            "bias must not be given together with table and index; got both", "both"),
        bad({"padding": torch.zeros(16)}, ValueError,
            "padding must have shape (48,), q, k and v; got (16,)", "padding"),
        bad({"mask": torch.zeros(3, 16, 16)}, ValueError,
            "mask must have shape (4, 16, 16), one for each window of an image; got (3, 16, 16)", "mask"),
        bad({"mask_value": None}, TypeError, "mask_value must be a number; got None", "mask-value"),
        bad({"mask_value": float("-inf")}, ValueError, "mask_value must be finite; got -inf", "infinite"),
        bad({"scale": 1.0, "logit_scale": torch.zeros(2)}, ValueError,
            "scale must be None where logit_scale is given; got 1.0", "scales"),
        bad({"dropout": -0.1}, ValueError, "dropout must lie in [0, 1); got -0.1", "dropout"),
        bad({"roll_first": 1}, TypeError, "roll_first must be True or False; got 1", "roll"),
    ],
)  # fmt: skip
def test_bad_images(change, kind, words):
    inputs: dict[str, Any] = {
        "qkv": torch.zeros(1, 8, 8, 48), "window_size": 4, "num_heads": 2, "shift_size": 2,
        "table": torch.zeros(49, 2), "index": helpers.position_index((4, 4)),
    }  # fmt: skip
    with pytest.raises(kind) as caught:
        functional.shifted_window_attention(**{**inputs, **change})
    assert words in str(caught.value)


def test_public_names():
    assert swinaccel.functional is functional
    assert all(getattr(functional, name).__doc__ for name in functional.__all__)
