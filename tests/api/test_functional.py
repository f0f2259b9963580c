"""Attention of windows as functions: the kernels (interpreted without a GPU) and plain PyTorch, by one oracle."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import helpers
import pytest
import torch
from gradients import exactly
from helpers import TRITON_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from window_problems import BOTH, SMALL_AND_LARGE, WINDOWS, Case, call, compare, differentiate, oracle

from swinaccel import functional
from swinaccel.ops import window as window_ops

CASES = [
    Case(16, windows=3, heads=2),
    Case(49, windows=4, masks=2, dim=32, heads=2),
    Case(49, windows=3, masks=3, cosine=True),
    Case(1),
    Case(2, masks=1, cosine=True),
    Case(13, windows=1, has_bias=False, scale=0.7),
    Case(20, scale=-0.3),
    Case(20, scale=0.0, masks=3),
    Case(64, cosine=True, has_bias=False),
    Case(65, windows=3, masks=3),
    Case(256, windows=1, dim=8),
    Case(130, windows=1, cosine=True),
    Case(16, windows=6, heads=2, rows=3),
    Case(9, windows=5, heads=2, rows=2, cosine=True),
    Case(20, windows=12, heads=2, rows=2, masks=3),
    Case(66, windows=4, heads=2, rows=2),
    Case(66, windows=6, heads=2, rows=6, masks=3, cosine=True),
]


@BOTH
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case, backend):
    compare(case.make(device=backend))


@BOTH
@pytest.mark.parametrize("dim", [1, 10, 30, 128])
@SMALL_AND_LARGE
def test_head_dims(tokens, dim, backend):
    compare(Case(tokens, windows=1, dim=dim, cosine=dim == 30, masks=min(1, dim % 4)).make(device=backend))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("triton", torch.float16),
        pytest.param("triton", torch.bfloat16, marks=pytest.mark.gpu),
        ("torch", torch.float16),
        ("torch", torch.bfloat16),
        ("torch", torch.float64),
    ],
    indirect=["backend"],
    ids=str,
)
@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@SMALL_AND_LARGE
def test_dtypes(tokens, cosine, backend, dtype):
    compare(Case(tokens, masks=2, dim=24, cosine=cosine).make(dtype, backend, seed=1))


@BOTH
def test_parameters_of_another_precision(backend):
    """Half-precision tokens beside fp32 parameters, as autocast gives them; nothing is rounded to the former."""
    inputs = Case(20, cosine=True, masks=1).make(torch.float16, backend)
    inputs |= {name: inputs[name].float() for name in ("bias", "logit_scale", "mask")}
    inputs["bias"] = inputs["bias"] + 1e-4 * torch.randn_like(inputs["bias"])
    inputs["logit_scale"] = inputs["logit_scale"].view(-1, 1, 1)
    found = differentiate(call, inputs, WINDOWS)
    exact = differentiate(oracle, inputs, WINDOWS, change=exactly)
    for name, tolerance in {"out": 3e-3, "bias": 5e-3, "logit_scale": 2e-2, "v": 3e-3}.items():
        assert name == "out" or found[name].dtype == inputs[name].dtype
        helpers.assert_close(found[name].double(), exact[name], tolerance)


@pytest.mark.parametrize("windows", [1, 4])
@BOTH
@SMALL_AND_LARGE
def test_masks_repeat(tokens, windows, backend):
    """Window i has row i mod M, whether or not M divides the windows."""
    inputs = Case(tokens, windows, masks=3).make(device=backend)
    out = call(**inputs)
    helpers.assert_close(
        out.double(), oracle(**{name: exactly(value) for name, value in inputs.items() if value is not None})
    )
    for window in range(windows) if tokens < 64 else [windows - 1]:
        one = {name: inputs[name][window : window + 1] for name in ("q", "k", "v")}
        alone = call(**one, bias=inputs["bias"], mask=inputs["mask"][window % 3][None])
        helpers.assert_close(alone[0], out[window], 1e-5)


@BOTH
@SMALL_AND_LARGE
def test_infinite_masks(tokens, backend):
    inputs = Case(tokens, masks=2).make(device=backend)
    inputs["mask"][0, :, ::3] = float("-inf")
    compare(inputs)


LOWEST = {torch.float16: -6e4, torch.bfloat16: -3e38, torch.float32: -3e38, torch.float64: -1e300}


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("triton", torch.float32), ("triton", torch.float16), *(("torch", dtype) for dtype in LOWEST)],
    indirect=["backend"],
    ids=str,
)
def test_masks_and_biases_of_any_dtype(backend, dtype):
    """Beside tokens of any; what stands in for -inf in the widest is finite in the narrowest too."""
    others = (torch.float64, torch.float16) * 2
    for tokens, ((mask_dtype, low), other) in itertools.product((9, 66), zip(LOWEST.items(), others, strict=True)):
        inputs = Case(tokens, masks=2, cosine=tokens == 9).make(dtype, backend)
        mask = torch.zeros(2, tokens, tokens, dtype=torch.float64)
        mask[0, :, 3], mask[1, :, 1::2], mask[1, 2] = float("-inf"), -9.0, low
        inputs["mask"] = mask.to(backend, mask_dtype)
        inputs |= {name: inputs[name].to(other) for name in ("bias", "logit_scale") if inputs[name] is not None}
        found = differentiate(call, inputs, WINDOWS)
        exact = differentiate(oracle, inputs, WINDOWS, change=exactly)
        # Of a query with nothing but lowest numbers, fp64 and the widest masks tell scores apart, or do not.
        seen = [place for place in range(tokens) if place != 2]
        tolerance = 16 * max(torch.finfo(dtype).eps, 1e-6 * (dtype != torch.float64))
        helpers.assert_close(found["out"][:, :, seen].double(), exact["out"][:, :, seen], tolerance)
        if low < -1e10:
            helpers.assert_close(found["out"][1::2, :, 2], inputs["v"][1::2].mean(2), tolerance)
        assert found["out"].dtype == dtype
        for name, one in found.items():
            assert bool(one.isfinite().all())
            assert name == "out" or one.dtype == inputs[name].dtype


@BOTH
@SMALL_AND_LARGE
def test_masks_of_large_finite_values(tokens, backend):
    """What stands in for -inf is a number: a query that sees nothing else takes the mean of all keys."""
    inputs = Case(tokens, masks=1).make(device=backend)
    inputs["mask"].zero_()
    inputs["mask"][0, :, ::2] = torch.finfo(torch.float32).min
    inputs["mask"][0, 3] = torch.finfo(torch.float32).min
    grad = torch.randn_like(inputs["q"])
    found = differentiate(call, inputs, ("q", "k", "v"), grad)
    expected = differentiate(oracle, inputs, ("q", "k", "v"), grad)  # fp64 would tell those scores apart
    helpers.assert_close(found["out"][:, :, 3], inputs["v"].mean(2), 1e-5)
    for name in expected:
        helpers.assert_close(found[name], expected[name], 1e-4)


@BOTH
@SMALL_AND_LARGE
def test_normalisation(tokens, backend):
    """By max(‖x‖, 1e-12): a constant below, no sum under the root; and nothing is divided by zero."""
    inputs = Case(tokens, cosine=True).make(device=backend)
    for name in ("q", "k"):
        inputs[name][:, :, 3] = 0
        inputs[name][:, :, 4] *= 1e-14
        inputs[name][:, :, 5] *= 1e-9
    found = differentiate(call, inputs, WINDOWS)
    exact = differentiate(oracle, inputs, WINDOWS, change=exactly)
    plain = [place for place in range(tokens) if place not in (3, 4, 5)]
    for name in ("q", "k"):
        for rows in (plain, [3], [4], [5]):
            helpers.assert_close(found[name][:, :, rows].double(), exact[name][:, :, rows], 1e-4)
    for name in ("out", "v", "bias", "logit_scale"):
        helpers.assert_close(found[name].double(), exact[name], 1e-4)


@BOTH
@SMALL_AND_LARGE
def test_clamp_of_logit_scale(tokens, backend):
    """At ln 100 from above, where the gradient ends, and never from below."""
    inputs = Case(tokens, windows=1, heads=3, cosine=True).make(device=backend)
    inputs["logit_scale"] = torch.tensor([10.0, -5.0, 2.0], device=backend)
    found = differentiate(call, inputs, WINDOWS)
    exact = differentiate(oracle, inputs, WINDOWS, change=exactly)
    assert found["logit_scale"][0] == 0
    for name, expected in exact.items():
        helpers.assert_close(found[name].double(), expected, 1e-4)


@BOTH
@SMALL_AND_LARGE
@pytest.mark.parametrize("kind", ["projection", "different-strides", "expanded", "channels-first", "expanded-gradient"])
def test_forms_of_the_operands(tokens, kind, backend):
    case = Case(tokens, masks=2, heads=2 if tokens < 64 else 1)
    inputs = case.make(device=backend)

    def attend(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        if kind == "projection":  # (windows, N, 3, heads, D), as models have it
            q, k, v = torch.stack((q, k, v), 2).permute(0, 3, 2, 1, 4).contiguous().permute(2, 0, 3, 1, 4)
        elif kind == "different-strides":
            k, v = k.transpose(1, 2).contiguous().transpose(1, 2), v.mT.contiguous().mT
        elif kind == "expanded":
            k = k[:1].expand_as(q)
        elif kind == "channels-first":
            q, k, v = (t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in (q, k, v))
        return call(q, k, v, **rest)

    def exact(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        return oracle(q, k[:1].expand_as(q) if kind == "expanded" else k, v, **rest)

    if kind == "expanded-gradient":
        grad = torch.randn(1, 1, 1, case.dim, device=backend).expand_as(inputs["q"])
        found = differentiate(attend, inputs, WINDOWS, grad)
        for name, expected in differentiate(exact, inputs, WINDOWS, grad, change=exactly).items():
            helpers.assert_close(found[name].double(), expected)
    else:
        compare(inputs, attend, exact)


@pytest.mark.parametrize("kind", ["contiguous", "projection"])
@SMALL_AND_LARGE
def test_nothing_is_copied_or_kept(tokens, kind, monkeypatch):
    """The kernels read q, k and v where they are, the output lies as q does, and no score outlives the call."""
    read: list[int] = []
    direct = window_ops.shifted_window_attention
    monkeypatch.setattr(
        window_ops,
        "shifted_window_attention",
        lambda qkv, *args, **options: read.extend(t.data_ptr() for t in qkv) or direct(qkv, *args, **options),
    )
    inputs = Case(tokens, windows=4, masks=2, heads=2).make()
    if kind == "projection":
        packed = torch.stack([inputs[name].transpose(1, 2) for name in "qkv"], 2)
        inputs |= dict(zip("qkv", packed.permute(2, 0, 3, 1, 4), strict=True))
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("q", "k", "v", "bias")}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = functional.window_attention(**leaves, mask=inputs["mask"])
    assert read == [leaves[name].data_ptr() for name in "qkv"]
    assert (out if kind == "contiguous" else out.transpose(1, 2)).is_contiguous()
    given = {value.data_ptr() for value in (*leaves.values(), inputs["mask"])}
    beyond = sum(t.numel() for t in kept if t is not None and t.data_ptr() not in given)
    assert beyond == (0 if tokens < 64 else out.numel() + 2 * 4 * 2 * tokens)  # the output, and two numbers a query


@BOTH
@SMALL_AND_LARGE
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=5))[1::8], ids=str)
def test_subsets_of_gradients(tokens, needed, backend):
    inputs = Case(tokens, cosine=True).make(device=backend)
    grad = torch.randn(2, 1, tokens, 12, device=backend)
    every = differentiate(call, inputs, WINDOWS, grad)
    leaves = {name: inputs[name].clone().requires_grad_(n) for name, n in zip(WINDOWS, needed, strict=True)}
    call(**{**inputs, **leaves}).backward(grad)
    for name, needs in zip(WINDOWS, needed, strict=True):
        if needs:
            helpers.assert_close(leaves[name].grad, every[name])
        else:
            assert leaves[name].grad is None, name


@pytest.mark.parametrize("shape", [(0, 2, 9, 8), (2, 0, 9, 8), (2, 2, 0, 8)], ids=str)
@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
def test_empty(shape, cosine):
    leaves = [torch.randn(shape, device=TRITON_DEVICE, requires_grad=True) for _ in range(3)]
    leaves.append(torch.randn(shape[1], shape[2], shape[2], device=TRITON_DEVICE, requires_grad=True))
    mask = torch.zeros(2, shape[2], shape[2], device=TRITON_DEVICE)
    options: dict[str, Any] = {"bias": leaves[3], "mask": mask}
    if cosine:
        leaves.append(torch.randn(shape[1], device=TRITON_DEVICE, requires_grad=True))
        options["logit_scale"] = leaves[4]
    out = call(*leaves[:3], **options)
    assert out.shape == shape
    for gradient, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
@pytest.mark.parametrize("case", [Case(1025, 1, 1, 3), Case(9, dim=129)], ids=str)
def test_what_the_kernels_do_not_take(case, backend, monkeypatch):
    if TRITON_DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    compare(case.make(device=TRITON_DEVICE))


@given(data=st.data())
@settings(max_examples=6)
@BOTH
def test_any_problem(data, backend):
    masks = data.draw(st.integers(0, 3), "masks")
    case = Case(
        tokens=data.draw(st.integers(1, 70), "tokens"),
        windows=data.draw(st.integers(1, 4), "windows"),
        heads=data.draw(st.integers(1, 2), "heads"),
        dim=data.draw(st.integers(1, 40), "dim"),
        cosine=data.draw(st.booleans(), "cosine"),
        has_bias=data.draw(st.booleans(), "has_bias"),
        masks=masks,
    )
    compare(case.make(device=backend, seed=data.draw(st.integers(0, 9), "seed")))


# Attention dropout.


def dropped(tokens: int, rate: float, seed: int, device: str, cosine: bool = False) -> tuple[Tensor, Tensor]:
    """Weights after dropout, and before; the values are unit vectors."""
    inputs = Case(tokens, heads=2 if tokens < 64 else 1, dim=tokens, masks=2, cosine=cosine).make(device=device)
    inputs["mask"] = 0.01 * inputs["mask"]
    inputs["v"] = torch.eye(tokens, device=device).expand_as(inputs["v"])
    torch.manual_seed(seed)
    return call(**inputs, dropout=rate), call(**inputs)


@BOTH
@SMALL_AND_LARGE
def test_dropout_drops_at_its_rate(tokens, backend):
    found, weights = dropped(tokens, 0.3, 1, backend)
    kept = found != 0
    assert abs(0.7 - kept.float().mean().item()) < 4 * (0.21 / kept.numel()) ** 0.5
    helpers.assert_close(found, weights * kept / 0.7, 1e-5)
    for axis in [axis for axis in range(4) if kept.shape[axis] > 1]:
        assert 0.2 < (kept != kept.roll(1, axis)).float().mean().item() < 0.6, axis


@BOTH
@SMALL_AND_LARGE
def test_dropout_follows_the_generator(tokens, backend):
    one, again, other = (dropped(tokens, 0.5, seed, backend)[0] for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@BOTH
@SMALL_AND_LARGE
@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
def test_gradients_with_dropout(tokens, cosine, backend):
    """Against plain PyTorch with the very weights dropped."""
    kept = dropped(tokens, 0.4, 7, backend, cosine)[0] != 0
    inputs = Case(tokens, heads=2 if tokens < 64 else 1, dim=tokens, masks=2, cosine=cosine).make(device=backend)
    inputs["mask"] = 0.01 * inputs["mask"]

    def attend(**leaves: Any) -> Tensor:
        torch.manual_seed(7)
        return call(**leaves, dropout=0.4)

    def exact(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        places = torch.eye(tokens, dtype=v.dtype, device=v.device).expand(2, kept.shape[1], -1, -1)
        return (oracle(q, k, places, **rest) * kept / 0.6) @ v

    compare(inputs, attend, exact)


# On the GPU all of the above runs compiled; what follows is only worth it there.


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(49, windows=512, masks=64, heads=4, dim=32),
        Case(49, windows=100, heads=3, dim=30),
        Case(64, windows=256, masks=64, heads=4, dim=32, cosine=True),
        Case(144, windows=64, masks=16, heads=4, dim=32, cosine=True),
        Case(256, windows=32, masks=4, heads=3, dim=128),
        Case(400, windows=8, masks=2, heads=2, dim=10),
        Case(576, windows=8, masks=4, heads=4, dim=32, cosine=True),
        Case(1024, windows=2, heads=2, dim=64),
    ],
    ids=str,
)
def test_full_sizes(case, dtype, backend):
    compare(case.make(dtype))
    if dtype != torch.float32:
        compare(replace(case, has_bias=False).make(dtype))
