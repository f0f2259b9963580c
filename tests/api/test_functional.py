"""Attention of windows as functions: the kernels (interpreted without a GPU) and plain PyTorch, by one oracle."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, replace
from typing import Any

import helpers
import pytest
import test_kernels
import torch
from helpers import TRITON_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from swinaccel.kernels import launch
from torch import Tensor

import swinaccel
from swinaccel import functional, ops
from swinaccel.backends.torch import windows as torch_windows
from swinaccel.backends.triton import bias as bias_launches
from swinaccel.backends.triton import launches
from swinaccel.backends.triton import window as window_launches
from swinaccel.backends.triton import window_bwd as window_bwd_launches
from swinaccel.config import env_interpret
from swinaccel.errors import KernelError
from swinaccel.ops import position
from swinaccel.ops import window as window_ops
from swinaccel.spec import reference
from swinaccel.spec.window import Geometry

WINDOWS = ("q", "k", "v", "bias", "logit_scale")
IMAGES = ("qkv", "table", "bias", "padding", "logit_scale")
BOTH = pytest.mark.parametrize("backend", ["triton", "torch"], indirect=True)
SMALL_AND_LARGE = pytest.mark.parametrize("tokens", [9, 66], ids=["small", "large"])


@pytest.fixture
def backend(request, monkeypatch):
    """Where the functions run. No kernel fails unseen, none leaves memory unwritten, and none is passed by."""
    calls = dict.fromkeys(("triton", "torch"), 0)

    def count(owner, name, key):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            calls[key] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    monkeypatch.setenv("SWINACCEL_STRICT", "1")
    if request.param == "torch":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    count(window_ops, "shifted_window_attention", "triton")
    count(torch_windows, "attention", "torch")
    with helpers.poisoned_empty(monkeypatch):
        yield helpers.DEVICES[request.param]
    other = "torch" if request.param == "triton" else "triton"
    assert calls[request.param], f"nothing ran on {request.param}"
    assert not calls[other], f"some of it ran on {other}"


@dataclass(frozen=True)
class Case:
    """Windows that are cut already; what is not given is random, of a spread that makes weights uneven."""

    tokens: int
    windows: int = 2
    heads: int = 1
    dim: int = 12
    cosine: bool = False
    has_bias: bool = True
    masks: int = 0
    scale: float | None = None
    rows: int = 0

    def __str__(self) -> str:
        parts = [f"{self.windows}x{self.heads}x{self.tokens}x{self.dim}"]
        parts += [f"rows{self.rows}"] if self.rows else []
        parts += ["cosine"] if self.cosine else []
        parts += [] if self.has_bias else ["nobias"]
        parts += [f"masks{self.masks}"] if self.masks else []
        parts += [f"scale{self.scale}"] if self.scale is not None else []
        return "-".join(parts)

    def make(self, dtype: torch.dtype = torch.float32, device: str = TRITON_DEVICE, seed: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed + self.tokens)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        inputs: dict[str, Any] = {
            name: 1.5 * randn(self.windows, self.heads, self.tokens, self.dim) for name in ("q", "k", "v")
        }
        rows = (self.rows,) if self.rows else ()
        inputs["bias"] = randn(*rows, self.heads, self.tokens, self.tokens) if self.has_bias else None
        inputs["logit_scale"] = 1 + randn(self.heads) if self.cosine else None
        mask = torch.rand(self.masks, self.tokens, self.tokens, generator=generator) < 0.3
        inputs["mask"] = -100.0 * mask.to(device, dtype) if self.masks else None
        if self.scale is not None:
            inputs["scale"] = self.scale
        return inputs


def call(q: Tensor, k: Tensor, v: Tensor, logit_scale: Tensor | None = None, **options: Any) -> Tensor:
    if logit_scale is None:
        return functional.window_attention(q, k, v, **options)
    return functional.cosine_window_attention(q, k, v, logit_scale, **options)


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """`reference.attention` with a mask, and where there are rows of them a bias, for every window."""
    options.setdefault("scale", q.shape[-1] ** -0.5)
    bias = options.get("bias")
    if bias is not None and bias.dim() == 4:
        options["bias"] = bias[torch.arange(q.shape[0], device=bias.device) % bias.shape[0]]
    if mask is not None:
        mask = mask[torch.arange(q.shape[0], device=mask.device) % mask.shape[0]]
    return reference.attention(q, k, v, mask=mask, **options)


def differentiate(
    attend: Any, inputs: dict[str, Any], names: tuple[str, ...], grad: Tensor | None = None, change: Any = lambda t: t
) -> dict[str, Tensor]:
    """Output and gradients by name."""
    leaves = {name: change(value.detach()) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    leaves |= {name: leaves[name].clone().requires_grad_() for name in names if leaves.get(name) is not None}
    out = attend(**leaves)
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    wanted = {name: leaves[name] for name in names if leaves.get(name) is not None}
    found = torch.autograd.grad(out, tuple(wanted.values()), grad.to(out))
    return {"out": out.detach(), **dict(zip(wanted, found, strict=True))}


def exactly(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def compare(inputs: dict[str, Any], attend: Any = call, exact: Any = oracle, names: tuple[str, ...] = WINDOWS) -> None:
    """Output and every gradient: fp32 against fp64, lower precision by its errors beside plain PyTorch's."""
    found = differentiate(attend, inputs, names)
    truth = differentiate(exact, inputs, names, change=exactly)
    theirs = differentiate(exact, inputs, names)
    for name, expected in truth.items():
        one = found[name]
        source = inputs["q" if "q" in inputs else "qkv"] if name == "out" else inputs[name]
        assert one.shape == expected.shape, name
        assert one.dtype == source.dtype, name
        assert bool(torch.isfinite(one).all()), f"{name}: unwritten or overflown"
        own = (theirs[name].double() - expected).abs().max()
        if one.dtype == torch.float64:
            helpers.assert_close(one, expected, 1e-12)
        elif one.dtype == torch.float32:
            # Of a gradient that vanishes, what is left of its terms is no more than their roundings.
            error = (one.double() - expected).abs().max()
            times = 6 if expected.numel() < 16 else 2  # of few values, two largest errors are not alike
            allowed = max(helpers.FP32 * expected.abs().max().clamp_min(1.0), times * own)
            assert error <= allowed, f"{name} is off by {error:.1e}, {allowed:.1e} is allowed"
        elif expected.numel() < 16:  # too few for statistics
            allowed = 6 * max(own, torch.finfo(one.dtype).eps * expected.abs().max())
            assert (one.double() - expected).abs().max() <= allowed, name
        else:
            try:
                helpers.assert_no_worse(one, theirs[name], expected, one.dtype)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None


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


# From image to image.


def image_call(qkv: Any, geometry: Geometry, num_heads: int, **options: Any) -> Tensor:
    if options.get("logit_scale") is not None:
        options["scale"] = None
    return functional.shifted_window_attention(
        qkv, geometry.window, num_heads, geometry.shift, roll_first=geometry.roll_first, **options
    )


def row_oracle(
    qkv: Any, geometry: Geometry, bias: Tensor, num_heads: int, mask_value: float, padding: Any, **options: Any
) -> Tensor:
    """Each window with its own bias: that of the row of windows which it stands in."""
    del options["table"], options["index"]
    biases = torch.stack([bias[number // geometry.grid[-1]] for number in range(geometry.num_windows)])
    pads = (None,) * 3 if padding is None else padding.chunk(3)
    cut = [reference.cut(one, geometry, pad) for one, pad in zip(qkv.chunk(3, dim=-1), pads, strict=True)]
    q, k, v = (reference.split_heads(one, num_heads) for one in cut)
    if options.get("mask") is None and geometry.is_shifted and mask_value:
        options["mask"] = reference.shift_mask(geometry, mask_value, device=qkv.device)
    out = reference.attention(q, k, v, bias=biases, **options)
    return reference.join(out.transpose(1, 2).flatten(2), geometry)


def image_oracle(qkv: Any, geometry: Geometry, bias: Tensor | None = None, **options: Any) -> Tensor:
    if bias is not None and bias.dim() == 4:
        return row_oracle(qkv, geometry, bias, **options)
    if bias is not None:
        tokens = geometry.tokens
        options["table"] = bias.flatten(1).t()
        options["index"] = torch.arange(tokens * tokens, device=bias.device).view(tokens, tokens)
    q, k, v = qkv.chunk(3, dim=-1) if isinstance(qkv, Tensor) else qkv
    return reference.shifted_window_attention(q, k, v, geometry, **options)


GEOMETRIES = [
    test_kernels.Case((4, 4), (8, 12), (2, 1), dim=6, heads=1, batch=2),
    test_kernels.Case((4, 4), (9, 7), (1, 3), cosine=True),
    test_kernels.Case((7, 7), (7, 14), (0, 3), dim=10, heads=1),
    test_kernels.Case((3, 5), (7, 4), (2, 2), heads=3),
    test_kernels.Case((4, 4), (9, 5), (2, 3), roll_first=True),
    test_kernels.Case((4, 4), (10, 10), (2, 2), mask_value=0.0),
    test_kernels.Case((9, 8), (13, 8), (4, 0), heads=1, cosine=True),
    test_kernels.Case((1, 1), (3, 2), dim=7),
]


@BOTH
@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, "table") for case in GEOMETRIES] + list(itertools.product(GEOMETRIES[1::5], ["bias", "no-bias", "rows"])),
    ids=str,
)
def test_images(case, kind, backend):
    qkv, options = case.make(torch.float32, backend)
    if kind != "table":
        options["bias"] = None if kind == "no-bias" else reference.bias_from_table(options["table"], options["index"])
        if kind == "rows":
            factors = torch.linspace(-1, 2, case.geometry.grid[0]).view(-1, 1, 1, 1)
            options["bias"] = options["bias"] * factors.to(backend)
        options["table"] = options["index"] = None
    compare({"qkv": qkv, "geometry": case.geometry, **options}, image_call, image_oracle, IMAGES)


@BOTH
@pytest.mark.parametrize("biases", [(), (4,)], ids=["one-bias", "rows"])
def test_volumes(biases, backend):
    """A depth before the rows; along it windows are cut, shifted and padded as along the others."""
    geometry = Geometry((3, 4, 5), (2, 2, 3), (1, 0, 2))
    generator = torch.Generator().manual_seed(1)
    inputs: dict[str, Any] = {"geometry": geometry, "num_heads": 2}
    inputs["qkv"] = 1.5 * torch.randn(2, 3, 4, 5, 36, generator=generator).to(backend)
    inputs["padding"] = torch.randn(36, generator=generator).to(backend)
    inputs["bias"] = torch.randn(*biases, 2, 12, 12, generator=generator).to(backend)
    inputs["scale"] = 0.4
    if biases:
        inputs |= {"table": None, "index": None, "mask_value": -100.0}
    compare(inputs, image_call, image_oracle, IMAGES)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("programs", [1, 12])
@SMALL_AND_LARGE
def test_programs_of_the_backward_take_many_windows_of_a_row(tokens, programs, backend, monkeypatch):
    """Of one bias: windows next to each other in an image, and apart where windows are cut already."""
    monkeypatch.setattr(launch, "_BACKWARD_PROGRAMS", programs)
    monkeypatch.setattr(launches, "launches", {})
    compare(Case(tokens, windows=12, heads=1, dim=8, rows=2, masks=6).make(device=backend))
    geometry = Geometry((3 * 3, 5 * tokens // 3), (3, tokens // 3), (1, 0))
    generator = torch.Generator().manual_seed(2)
    inputs: dict[str, Any] = {"geometry": geometry, "num_heads": 1, "table": None, "index": None, "mask_value": -100.0}
    inputs["qkv"] = torch.randn(2, *geometry.size, 24, generator=generator).to(backend)
    inputs["bias"] = torch.randn(3, 1, tokens, tokens, generator=generator).to(backend)
    compare({**inputs, "padding": None, "scale": 0.4}, image_call, image_oracle, IMAGES)


@BOTH
def test_images_in_three_parts(backend):
    case = GEOMETRIES[1]
    qkv, options = case.make(torch.float32, backend)
    q, k, v = qkv.chunk(3, dim=-1)
    whole = image_call(qkv, case.geometry, **options)
    apart = image_call((q, k.contiguous(), v), case.geometry, **options)
    helpers.assert_close(apart, whole, 1e-6)


@BOTH
@pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])
def test_images_with_a_mask(window, backend):
    """In place of the one that the shift implies; a flattened index, as torchvision's, is as good as a square one."""
    case = test_kernels.Case(window, (2 * window[0], window[1]), (1, 0), heads=1)
    qkv, options = case.make(torch.float32, backend)
    options["mask"] = torch.randn(2, case.geometry.tokens, case.geometry.tokens, device=backend)
    inputs = {"qkv": qkv, "geometry": case.geometry, **options}
    compare(inputs, image_call, image_oracle, IMAGES)
    flat = {**inputs, "index": options["index"].flatten()}
    helpers.assert_close(image_call(**flat), image_call(**inputs), 1e-6)


@BOTH
def test_images_with_dropout(backend):
    case = test_kernels.Case((4, 4), (8, 8), (2, 2), dim=16, batch=4)
    qkv, options = case.make(torch.float32, backend)
    qkv[..., -32:] = 1.0
    sums = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sums.append(image_call(qkv, case.geometry, **options, dropout=0.25))
    assert torch.equal(sums[0], sums[1])
    assert not torch.equal(sums[0], sums[2])
    assert abs(sums[0].mean().item() - 1) < 0.1
    assert sums[0].std() > 0.05


@BOTH
@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
def test_image_and_windows_agree(cosine, backend):
    case = test_kernels.Case((4, 4), (8, 8), (2, 2), cosine=cosine)
    qkv, options = case.make(torch.float32, backend)
    q, k, v = (reference.split_heads(reference.cut(p, case.geometry), 2) for p in qkv.chunk(3, dim=-1))
    bias = reference.bias_from_table(options["table"], options["index"])
    mask = reference.shift_mask(case.geometry, -100.0, device=backend)
    out = call(q, k, v, bias=bias, mask=mask, logit_scale=options.get("logit_scale"))
    out = reference.join(out.transpose(1, 2).flatten(2), case.geometry)
    helpers.assert_close(out, image_call(qkv, case.geometry, **options))


# PyTorch around it.


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
