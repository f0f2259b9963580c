"""Any call of the functions: forward and backward, on the kernels and in plain PyTorch, against fp64.

Numbers are NaN and infinite as well, tensors are strided, expanded and empty, and memory that a kernel leaves unwritten
reads as NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import helpers
import pytest
import torch
from hypothesis import strategies as st
from judging import EACH_LENGTH, Results, differentiate, explore, judge
from torch import Tensor

from swinaccel import functional
from swinaccel.ops.failures import failures
from swinaccel.spec import reference
from swinaccel.spec.window import Geometry

COUNTS = {"triton": 45, "torch": 120}  # of each property; the interpreter is slow
BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"], indirect=True)
HALVES = [torch.float16] + ([torch.bfloat16] if helpers.TRITON_DEVICE == "cuda" else [])
DTYPES = {"triton": [torch.float32, *HALVES], "torch": [torch.float32, torch.float16, torch.bfloat16, torch.float64]}
DIMS = [1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128]


@pytest.fixture
def backend(request, monkeypatch, strict_kernels):
    if request.param == "torch":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield request.param
    assert not failures, f"kernels failed: {failures._reasons}"


# Inputs.


@dataclass(frozen=True)
class Form:
    """Shape, dtype, spread and layout of an input, and the one of its numbers that is none."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    spread: float = 1.0
    layout: str = "dense"
    odd: float | None = None
    whole: bool = False  # all of them are

    def make(self, generator: torch.Generator, device: str) -> Tensor:
        """A leaf, of which `view` is the input."""
        shape = list(self.shape)
        if self.layout == "gaps":
            shape[-1] *= 2
        elif self.layout == "every second":
            shape[0] *= 2
        elif self.layout == "transposed":
            shape[-2:] = reversed(shape[-2:])
        elif self.layout == "expanded":
            shape[0] = min(1, shape[0])
        leaf = self.spread * torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.odd is not None and leaf.numel():
            place = slice(None) if self.whole else int(torch.randint(leaf.numel(), (1,), generator=generator))
            leaf.view(-1)[place] = self.odd
        return leaf.to(device, self.dtype)

    def view(self, leaf: Tensor) -> Tensor:
        if self.layout == "gaps":
            return leaf[..., ::2]
        if self.layout == "every second":
            return leaf[::2]
        if self.layout == "transposed":
            return leaf.transpose(-1, -2)
        if self.layout == "expanded":
            return leaf.expand(self.shape)
        return leaf


LAYOUTS = ["dense", "dense", "dense", "gaps", "every second", "transposed", "expanded"]
ODD = [None] * 6 + [math.nan, math.inf, -math.inf]


@st.composite
def forms(draw, shape: tuple[int, ...], dtypes: list[torch.dtype], spread: float = 1.0) -> Form:
    layouts = LAYOUTS if len(shape) > 1 else ["dense", "gaps"]
    odd, layout = draw(st.sampled_from(ODD)), draw(st.sampled_from(layouts))
    return Form(shape, draw(st.sampled_from(dtypes)), spread, layout, odd, odd is not None and draw(st.booleans()))


@dataclass(frozen=True)
class Case:
    """A call: what it is given, by name, beside options; and whether gradients are wanted."""

    backend: str
    forms: dict[str, Form]
    options: dict[str, Any]
    backward: bool
    grad: str
    mask: str | None = None

    @property
    def tokens(self) -> int:
        return (
            math.prod(self.options.get("window_size", ()))
            if "window_size" in self.options
            else next(iter(self.forms.values())).shape[2]
        )

    def judge(
        self, ours: Callable[..., Tensor], plain: Callable[..., Tensor], exact: Callable[..., Tensor] | None = None
    ) -> None:
        device = helpers.DEVICES[self.backend]

        def results(seed: int) -> tuple[Results, Results, Results]:
            generator = torch.Generator().manual_seed(seed)
            leaves = {name: form.make(generator, device) for name, form in self.forms.items()}
            if self.mask is not None:
                leaves["mask"] = fill_mask(leaves["mask"], self.mask, generator)

            def by(function: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Results:
                def call(**leaves: Tensor) -> Tensor:
                    return function(
                        **{name: self.forms[name].view(one) for name, one in leaves.items()}, **self.options
                    )

                given = {name: one if dtype is None else one.to(dtype) for name, one in leaves.items()}
                wanted = [name for name in given if name != "mask"]
                return differentiate(call, given, wanted, grad, dtype is not None)

            with torch.no_grad():
                shape = plain(**{name: form.view(leaves[name]) for name, form in self.forms.items()}, **self.options)
            grad = make_grad(shape, self.grad, generator) if self.backward else None
            return by(ours), by(plain), by(exact or plain, torch.float64)

        odd = {self.grad, *(str(form.odd) for form in self.forms.values())}
        judge(
            results, next(iter(self.forms.values())).dtype, bool(odd & {"inf", "-inf"}) or self.mask in ("rows", "some")
        )


def fill_mask(mask: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """A mask of some kind in the memory of another tensor."""
    if kind == "numbers" or not mask.numel():
        return mask
    chosen = (torch.rand(mask.shape, generator=generator) < 0.3).to(mask.device)
    if kind == "rows":  # nothing is left to see
        chosen = chosen[..., :1].expand_as(mask)
    value = {"swin": -100.0, "large": -1e4, "lowest": torch.finfo(mask.dtype).min}.get(kind, -math.inf)
    return torch.where(chosen, value, torch.zeros_like(mask))


def make_grad(like: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    grad = torch.randn(like.shape, generator=generator).to(like)
    if kind == "one":  # that of a sum
        return torch.ones_like(like[..., :1]).expand_as(like)
    if kind == "strided":
        return grad.mT.contiguous().mT
    if kind in ("nan", "inf") and grad.numel():
        grad.view(-1)[int(torch.randint(grad.numel(), (1,), generator=generator))] = float(kind)
    return grad


GRADS = ["random"] * 4 + ["one", "strided", "nan", "inf"]
MASKS = [None, None, "swin", "rows", "some", "large", "lowest", "numbers"]
SPREADS = [1.0, 1.0, 1.0, 0.01, 6.0, 40.0]  # 40: all but one-hot


def dtypes_beside(dtype: torch.dtype, backend: str) -> list[torch.dtype]:
    """What a bias or a mask may be of."""
    return [dtype, dtype, torch.float32, *DTYPES[backend]]


def scales(dim: int) -> Any:
    return st.sampled_from([None, None, dim**-0.5, 1.0, 0.3, 0.0, -0.7])


def window_sizes(axes: int, length: str = "quick") -> Any:
    """Windows of 1 to 32 along an axis: most are small, few are large."""
    most = st.sampled_from([16, 36, 64, 64, 64, 90] if length == "quick" else [16, *[64] * 10, 128, 128, 300, 1024])
    sides = st.lists(st.integers(1, 32), min_size=axes, max_size=axes)

    def shrink(drawn: tuple[list[int], int]) -> tuple[int, ...]:
        window, limit = drawn
        while math.prod(window) > limit:
            longest = window.index(max(window))
            window = [max(1, side * 2 // 3) if axis == longest else side for axis, side in enumerate(window)]
        return tuple(window)

    return st.tuples(sides, most).map(shrink)


@st.composite
def cases(draw, backend: str, given: dict[str, Form], options: dict[str, Any], mask: str | None) -> Case:
    backward = draw(st.booleans())
    if "logit_scale" in given and next(iter(given.values())).shape[-1] < 6:
        backward = False  # one number has no direction: its gradient is nothing but rounding
    return Case(backend, given, options, backward, draw(st.sampled_from(GRADS)), mask)


# Windows that are cut already.


@st.composite
def windows(draw, backend: str) -> Case:
    tokens = draw(st.sampled_from([1, 2, 4, 7, 9, 16, 25, 36, 48, 49, 50, 63, 64, 65, 81, 100]))
    heads, count = draw(st.integers(1, 3 if tokens <= 64 else 1)), draw(st.sampled_from([0, 1, 2, 3, 5]))
    count = min(count, 2) if tokens > 64 else count
    dim, dtype = draw(st.sampled_from(DIMS)), draw(st.sampled_from(DTYPES[backend]))
    beside = dtypes_beside(dtype, backend)
    spread = draw(st.sampled_from(SPREADS))
    given = {name: draw(forms((count, heads, tokens, dim), [dtype], spread)) for name in ("q", "k")}
    given["v"] = draw(forms((count, heads, tokens, dim), [dtype]))
    if draw(st.booleans()):
        given["bias"] = draw(forms((heads, tokens, tokens), beside))
    mask = draw(st.sampled_from(MASKS))
    if mask is not None:
        masks = draw(st.integers(1, 3))
        given["mask"] = draw(forms((masks, tokens, tokens), beside))
    options = {}
    if draw(st.booleans()):
        given["logit_scale"] = draw(forms(draw(st.sampled_from([(heads,), (heads, 1, 1)])), beside, 3.0))
    else:
        options["scale"] = draw(scales(dim))
    return draw(cases(backend, given, options, mask))


def attend_windows(q, k, v, logit_scale=None, **options):
    if logit_scale is None:
        return functional.window_attention(q, k, v, **options)
    options.pop("scale", None)
    return functional.cosine_window_attention(q, k, v, logit_scale, **options)


def plain_windows(q, k, v, mask=None, scale=None, **options):
    if mask is not None:
        mask = mask[torch.arange(q.shape[0], device=mask.device) % mask.shape[0]]
    if q.shape[0] == 0:  # no windows have no number of images
        mask = None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference.attention(q, k, v, mask=mask, scale=scale, **options).to(q.dtype)


@EACH_LENGTH
@BACKENDS
def test_windows(backend, length):
    def check_windows(case: Case) -> None:
        case.judge(attend_windows, plain_windows)

    explore(windows(backend), check_windows, COUNTS[backend], length)


# Images and volumes.


@st.composite
def images(draw, backend: str, length: str) -> Case:
    axes = draw(st.sampled_from([2, 2, 2, 3]))
    window = draw(window_sizes(axes, length))
    tokens = math.prod(window)
    shift = tuple(draw(st.integers(0, side - 1)) for side in window)
    most = 2 if tokens <= 64 and axes == 2 else 1  # windows along an axis, whole ones
    size = tuple(draw(st.integers(1, most * side + 1)) for side in window)
    geometry = Geometry(size, window, shift)
    heads = draw(st.integers(1, 2 if tokens <= 64 else 1))
    batch = draw(st.sampled_from([0, 1, 1, 2, 3] if tokens * geometry.num_windows <= 64 else [0, 1, 1, 1]))
    dim, dtype = draw(st.sampled_from(DIMS)), draw(st.sampled_from(DTYPES[backend]))
    beside = dtypes_beside(dtype, backend)
    spread = draw(st.sampled_from(SPREADS))
    given = {}
    if draw(st.booleans()):
        given["qkv"] = draw(forms((batch, *size, 3 * heads * dim), [dtype], spread))
    else:
        for name in ("q", "k", "v"):
            given[name] = draw(forms((batch, *size, heads * dim), [dtype], 1.0 if name == "v" else spread))
    options = {"window_size": window, "num_heads": heads, "shift_size": shift, "roll_first": draw(st.booleans())}
    bias = draw(st.sampled_from(["none", "table", "rows of a table", "bias"]))
    if bias == "bias":
        given["bias"] = draw(forms((heads, tokens, tokens), beside))
    elif bias != "none":
        rows = helpers.table_rows(window) if bias == "table" else draw(st.integers(1, 9))
        given["table"] = draw(forms((rows, heads), beside))
        options["index"] = rows
    if draw(st.booleans()):
        given["padding"] = draw(forms((3 * heads * dim,), beside))
    mask = draw(st.sampled_from(MASKS))
    if mask is not None:
        given["mask"] = draw(forms((geometry.num_windows, tokens, tokens), beside))
    else:
        options["mask_value"] = draw(st.sampled_from([-100.0, -100.0, 0.0, 2.5, -1e4, -3e38]))
    if draw(st.booleans()):
        given["logit_scale"] = draw(forms(draw(st.sampled_from([(heads,), (heads, 1, 1)])), beside, 3.0))
    else:
        options["scale"] = draw(scales(dim))
    return draw(cases(backend, given, options, mask))


def _index(rows: int, window: tuple[int, ...], device: Any) -> Tensor:
    if rows == helpers.table_rows(window):
        return helpers.position_index(window).to(device)
    pairs = math.prod(window) ** 2
    index = torch.randint(rows, (pairs,), generator=torch.Generator().manual_seed(pairs))
    index[-1] = rows - 1
    return index.view(math.prod(window), -1).to(device)


def _constant_queries(padding: Tensor | None) -> Tensor | None:
    """What padding queries hold has no gradient: originals make zeros or NaN of their outputs, which nobody sees."""
    return None if padding is None else torch.cat((padding.chunk(3)[0].detach(), *padding.chunk(3)[1:]))


def attend_images(q=None, k=None, v=None, qkv=None, index=None, padding=None, **options):
    first = qkv if q is None else q
    options["padding"] = _constant_queries(padding)
    if index is not None:
        options["index"] = _index(index, options["window_size"], first.device)
    return functional.shifted_window_attention((q, k, v) if qkv is None else qkv, **options)


def plain_images(
    window_size, shift_size, roll_first, index=None, bias=None, table=None, q=None, k=None, v=None, qkv=None,
    scale=None, logit_scale=None, num_heads=1, padding=None, **options,
):  # fmt: skip
    q, k, v = (q, k, v) if qkv is None else qkv.chunk(3, dim=-1)
    geometry = Geometry(tuple(q.shape[1:-1]), window_size, shift_size, roll_first)
    index = None if index is None else _index(index, window_size, q.device)
    scale = (q.shape[-1] // num_heads) ** -0.5 if scale is None else scale
    if q.shape[0] == 0:
        return q + k + v
    out = reference.shifted_window_attention(
        q, k, v, geometry, table=table if bias is None else bias, index=index, scale=scale, num_heads=num_heads,
        padding=_constant_queries(padding), logit_scale=None if logit_scale is None else logit_scale.reshape(-1),
        **options,
    )  # fmt: skip
    return out.to(q.dtype)


@EACH_LENGTH
@BACKENDS
def test_images(backend, length):
    def check_images(case: Case) -> None:
        case.judge(attend_images, plain_images)

    explore(images(backend, length), check_images, COUNTS[backend], length)


# Sequences.


@st.composite
def sequences(draw, backend: str) -> Case:
    tokens = draw(st.sampled_from([0, 1, 2, 9, 16, 31, 33, 63, 64, 65, 80, 129]))
    heads, batch = draw(st.integers(1, 2)), draw(st.sampled_from([0, 1, 2, 3]))
    batch = min(batch, 1) if tokens > 64 else batch
    dim, dtype = draw(st.sampled_from(DIMS)), draw(st.sampled_from(DTYPES[backend]))
    beside = dtypes_beside(dtype, backend)
    spread = draw(st.sampled_from(SPREADS))
    given = {name: draw(forms((batch, heads, tokens, dim), [dtype], spread)) for name in ("q", "k")}
    given["v"] = draw(forms((batch, heads, tokens, dim), [dtype]))
    options: dict[str, Any] = {"scale": draw(scales(dim))}
    mask = None
    if draw(st.booleans()):
        options |= {"block_size": draw(st.integers(1, 40)), "window_blocks": draw(st.integers(1, 5))}
    else:
        rank = draw(st.sampled_from([0, 1, 2, 5, 16, 17, 64]))
        for name in ("q_factor", "k_factor"):
            lead = draw(st.sampled_from([(heads,), (1,), (batch, heads), (batch, 1)]))
            given[name] = draw(forms((*lead, tokens, rank), beside))
        options["causal"] = draw(st.booleans())
        mask = draw(st.sampled_from(MASKS))
        if mask is not None:
            given["mask"] = draw(forms((draw(st.integers(1, 3)), tokens, tokens), beside))
    return draw(cases(backend, given, options, mask))


def attend_sequences(**options):
    if "block_size" in options:
        return functional.block_sliding_window_attention(**options)
    return functional.factored_bias_attention(**options)


def exact_sequences(q, k, v, scale=None, q_factor=None, k_factor=None, **options):
    if q.numel() == 0:
        return q + k + v
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q_factor is not None:
        dtype = torch.promote_types(torch.promote_types(q.dtype, q_factor.dtype), k_factor.dtype)
        q_factor, k_factor = q_factor.to(dtype), k_factor.to(dtype)
    out = reference.sequence_attention(q, k, v, q_factor=q_factor, k_factor=k_factor, scale=scale, **options)
    return out.to(q.dtype)


def plain_sequences(q, k, v, causal=False, block_size=0, window_blocks=1, mask=None, **options):
    """The same, queries that see the same keys at a time: a key that is not seen hands on nothing, not even NaN."""
    tokens = q.shape[2]
    if q.numel() == 0 or not (causal or block_size):
        return exact_sequences(q, k, v, mask=mask, **options)
    outs, size = [], 1 if causal else block_size
    for first in range(0, tokens, size):
        end = min(first + size, tokens)
        start = 0 if causal else max(0, first - (window_blocks - 1) * size)
        keys = slice(start, end)
        factors = {name: one[..., keys, :] for name, one in options.items() if name.endswith("factor")}
        part = None if mask is None else mask[:, keys, keys]
        seen = exact_sequences(*(one[:, :, keys] for one in (q, k, v)), mask=part, **{**options, **factors})
        outs.append(seen[:, :, first - start :])
    return torch.cat(outs, 2)


@EACH_LENGTH
@BACKENDS
def test_sequences(backend, length):
    def check_sequences(case: Case) -> None:
        case.judge(attend_sequences, plain_sequences, exact_sequences)

    explore(sequences(backend), check_sequences, COUNTS[backend], length)
