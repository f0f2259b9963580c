"""Check what the kernels are given, where launches are planned and compiled, which costs later calls nothing.

Kernels read tensors by numbers that follow from a problem: of another shape, they would read beyond them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...spec.window import Geometry

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FLOATS = (*DTYPES, torch.float64)
_TOKENS = ("q", "qkv", "k", "v", "out", "grad")
_ACCEPTED = {"index": (torch.int64, torch.int32), "seed": (torch.int64,), "lse": (torch.float32,)}


def lse_shape(batch: int, geometry: Geometry, num_heads: int, has_mask: bool) -> tuple[int, ...]:
    """Return the shape of what the forward of large windows keeps of the softmax: see `kernels.softmax`."""
    return (batch, geometry.num_windows, num_heads, *((2,) if has_mask else ()), geometry.tokens)


def check_shapes(problem: Any) -> None:
    """Raise where a tensor does not have the shape that a problem, a `problem.Problem`, takes."""
    geometry, heads, channels = problem.geometry, problem.num_heads, problem.channels
    tokens = geometry.tokens
    if heads < 1 or channels < 1 or channels % heads:
        raise ArgumentError(f"num_heads must divide the {channels} channels; got {heads}")
    inside = (0 <= step < side for step, side in zip(geometry.shift, geometry.window, strict=True))
    if min(geometry.window) < 1 or not all(inside):
        raise ArgumentError(f"shift must lie within the window, {geometry.window}; got {geometry.shift}")
    if (problem.index_shape is None) != (problem.table_shape is None):
        raise ArgumentError("table and index, or a bias (heads, N, N) in their place, must be given; got another")
    if problem.dropout and problem.seed_shape is None:
        raise ArgumentError("seed must be given where dropout is; got None")
    image = (problem.batch, *geometry.size)
    token = (heads, problem.head_dim) if problem.heads_apart else ((3 if problem.packed else 1) * channels,)
    _expect("qkv", problem.shape, (*image, *token))
    for name, part in zip(("k", "v"), problem.parts or (), strict=False):
        _expect(name, part or (), problem.shape)
    if problem.is_dense:  # each of its numbers a row
        _expect("bias, as rows of (heads, N, N),", problem.table_shape, (tokens**2, problem.bias_rows * heads))
    elif problem.table_shape is not None:
        _expect("table", problem.table_shape, (*problem.table_shape[:1], problem.bias_rows * heads))
    if problem.bias_rows < 1 or math.prod(geometry.grid[:-1]) % problem.bias_rows:
        raise ArgumentError(f"biases in turn must divide the rows of windows, {geometry.grid}; got {problem.bias_rows}")
    if problem.bias_rows > 1 and problem.factors:
        raise ArgumentError("factors must be None where rows of windows have biases of their own; got some")
    _expect("index", problem.index_shape, (tokens, tokens))
    _expect("padding", problem.padding_shape, (3 * channels,))
    _expect("mask", problem.mask_shape, (geometry.num_windows, tokens, tokens))
    _expect("logit_scale", problem.logit_scale_shape, (heads,))
    _expect("seed", problem.seed_shape, (1,))
    for one in problem.factors or ():
        _expect("a factor", one, (heads, tokens, problem.rank))
    if problem.kept:
        grad, out, lse = problem.kept
        _expect("grad", grad, (*image, *(token if problem.heads_apart else (channels,))))
        if not problem.is_small:
            _expect("out", out or (), grad)
            _expect("lse", lse, lse_shape(problem.batch, geometry, heads, problem.has_mask))
    table = zip(problem.table_shape or (), problem.table_strides or (), strict=True)
    if sum((length - 1) * stride for length, stride in table) >= 2**31:
        raise ValueError("the bias table spans 2^31 numbers or more")


def _expect(name: str, shape: Sequence[int] | None, expected: Any) -> None:
    if shape is not None and tuple(shape) != tuple(expected):
        raise ArgumentError(f"{name} must have shape {tuple(expected)}; got {tuple(shape)}")


def check_position(
    coords: torch.Size, hidden_weight: torch.Size, hidden_bias: torch.Size, weight: torch.Size
) -> tuple[int, int, int]:
    """Return rows, heads and hidden channels of a position MLP; raise where its tensors do not go together."""
    hidden, heads = (one[0] if one else 0 for one in (hidden_weight, weight))
    _expect("coords", coords, (*coords[:-1], 2))
    _expect("hidden_weight", hidden_weight, (hidden, 2))
    _expect("hidden_bias", hidden_bias, (hidden,))
    _expect("weight", weight, (heads, hidden))
    if not coords.numel() or not hidden or not heads:
        raise ArgumentError(f"weight must have one head and one hidden channel or more; got {tuple(weight)}")
    return coords.numel() // 2, heads, hidden


def check_sequence(
    q: torch.Size, shapes: Sequence[torch.Size | None], problem: Any, lse_shape: tuple[int, ...] = ()
) -> None:
    """Raise where a tensor of attention over a sequence does not have the shape that q and the problem ask for.

    Args:
        shapes: of k, v, q_factor, k_factor and mask; of a backward also of grad, out and what is kept of the softmax.
        problem: a `sequence.Problem`.
    """
    k, v, q_factor, k_factor, mask, *kept = shapes
    if len(q) != 4 or not q[-1]:
        raise ArgumentError(f"q must have shape (batch, heads, tokens, head_dim); got {tuple(q)}")
    batch, heads, tokens, _ = q
    for name, one in zip(("k", "v", "grad", "out"), (k, v, *kept[:2]), strict=False):
        _expect(name, one, q)
    if (q_factor is None) != (k_factor is None):
        raise ArgumentError("q_factor and k_factor must be given together; got one of them")
    for name, factor in (("q_factor", q_factor), ("k_factor", k_factor)):
        if factor is not None and q_factor is not None:
            _expect(name, factor, (*(batch,) * (len(factor) == 4), heads, tokens, q_factor[-1] if q_factor else 0))
            if not factor[-1]:
                raise ArgumentError(f"{name} must have a rank of 1 or more; got {tuple(factor)}")
    if mask is not None:
        _expect("mask", mask, (mask[0] if mask else 0, tokens, tokens))
        if not mask[0]:
            raise ArgumentError(f"mask must have one row or more; got {tuple(mask)}")
    if kept:
        _expect("lse", kept[2], lse_shape)
    if not problem.scale > 0:
        raise ArgumentError(f"scale must be above 0; got {problem.scale}")
    if problem.block_size < 0 or (problem.block_size and problem.window_blocks < 1):
        raise ArgumentError(
            f"block_size and window_blocks must be 1 or more; got {problem.block_size}, {problem.window_blocks}"
        )
    if problem.causal and problem.block_size:
        raise ArgumentError("causal must be False where block_size is given; got True")


def check_dtypes(names: tuple[str, ...], tensors: tuple[Tensor | None, ...]) -> None:
    """Raise where a tensor lies elsewhere than the first one named, or is of no dtype that the kernels take for it.

    Args:
        names: of the tensors, in order, "" for what is not to be looked at. Tokens are all of the first one's dtype.
    """
    named = [(name, one) for name, one in zip(names, tensors, strict=False) if name and one is not None]
    for name, one in named:
        of, first = named[0]
        if one.device != first.device:
            raise ArgumentError(f"{name} must be on {of}'s device, {first.device}; got {one.device}")
        expected = _ACCEPTED.get(name, _FLOATS)
        if name in _TOKENS:
            expected = DTYPES if one is first else (first.dtype,)
        if one.dtype not in expected:
            kinds = " or ".join(str(dtype) for dtype in expected)
            raise ArgumentError(f"{name} must be of {kinds}; got {one.dtype}")
