"""Any call of the functions: forward and backward, on the kernels and in plain PyTorch, against fp64.

Numbers are NaN and infinite as well, tensors are strided, expanded and empty, and memory that a kernel leaves unwritten
reads as NaN.
"""

from __future__ import annotations

import math
from typing import Any

import helpers
import pytest
import torch
from calls import BACKENDS, DTYPES, MASKS, SPREADS, Case, cases, dtypes_beside, forms, scales, window_sizes
from hypothesis import strategies as st
from judging import EACH_LENGTH, explore
from torch import Tensor

from swinaccel import functional
from swinaccel.ops.failures import failures
from swinaccel.spec import reference
from swinaccel.spec.window import Geometry

COUNTS = {"triton": 45, "torch": 120}  # of each property; the interpreter is slow
DIMS = [1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128]


@pytest.fixture
def backend(request, monkeypatch, strict_kernels):
    if request.param == "torch":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield request.param
    assert not failures, f"kernels failed: {failures._reasons}"


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
