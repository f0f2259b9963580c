"""Stand in for the window kernels: the forms that they take, and the same numbers in plain PyTorch where one failed."""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul
from typing import Any

import torch
from torch import Tensor

from ..backends.triton.checks import lse_shape
from ..backends.triton.launches import first_line
from ..backends.triton.problem import Operands, are_heads_apart, expected, is_small
from ..config import env_strict
from ..errors import ArgumentError, KernelError
from ..spec import reference
from ..spec.window import Geometry
from .failures import failures
from .recomputed import recomputed_gradients


def operands_of(arguments: Sequence[Any], geometry: Geometry | None = None) -> Operands:
    """Return the operands of the operator, contiguous but for the table and, without a geometry, for q, k and v.

    Args:
        arguments: of the operator; what follows the operands is left out.
        geometry: with it, q, k and v are in memory as outputs are.
    """
    tokens = [None if t is None else t.resolve_neg() for t in arguments[:4]]  # kernels read numbers as they lie
    others = [None if t is None else t.contiguous().resolve_neg() for t in arguments[4:8]]
    if geometry is not None:
        tokens[:3] = [None if t is None else dense(t, geometry) for t in tokens[:3]]
    return Operands._make((*tokens, *others, *arguments[8:16]))


def geometry_of(call: Operands) -> Geometry:
    qkv, axes = call.qkv, len(call.window)
    is_image = axes in (2, 3) and qkv.dim() in (axes + 2, axes + 3)
    if not is_image or len(call.shift) != axes or min(call.window) < 1:
        raise ArgumentError(
            "window must be two or three numbers of 1 or more, shift as many, and qkv an image of so many axes, "
            f"(B, H, W, channels) if two; got {tuple(call.window)}, {tuple(call.shift)} and {tuple(qkv.shape)}"
        )
    return Geometry(tuple(qkv.shape[1 : 1 + axes]), tuple(call.window), tuple(call.shift), call.roll_first)


def _head_dim(call: Operands, geometry: Geometry) -> int:
    if are_heads_apart(call.qkv, geometry):
        return call.qkv.shape[-1]
    return call.qkv.shape[-1] // call.num_heads // (3 if call.k is None else 1)


def reference_of(call: Operands, geometry: Geometry) -> Tensor:
    """Return the same in plain PyTorch, for tokens of every form."""
    qkv, k, v = call.qkv, call.k, call.v
    is_apart = are_heads_apart(qkv, geometry)
    q, k, v = qkv.chunk(3, dim=-1) if k is None or v is None else (qkv, k, v)
    if is_apart:
        q, k, v = q.flatten(-2), k.flatten(-2), v.flatten(-2)
    out = reference.shifted_window_attention(
        q, k, v, geometry, num_heads=call.num_heads, table=call.table, index=call.index, padding=call.padding,
        mask=call.mask, mask_value=call.mask_value, scale=call.scale, logit_scale=call.logit_scale,
    )  # fmt: skip
    return out.unflatten(-1, qkv.shape[-2:]) if is_apart else out


def note_failure(error: Exception, call: Operands, geometry: Geometry) -> None:
    """Remember that a kernel failed on such a problem; raise where plain PyTorch cannot stand in for it now."""
    q, is_cosine = call.qkv, call.logit_scale is not None
    key = problem(q.device, q.dtype, geometry, _head_dim(call, geometry), is_cosine)
    reason = failures.record(key, first_line(error))
    if env_strict() or call.dropout:  # what was dropped is known to the kernels only
        raise KernelError(reason) from error


def lse_shape_of(call: Operands, geometry: Geometry, for_backward: bool) -> tuple[int, ...]:
    qkv = call.qkv
    if not for_backward or is_small(qkv.device, qkv.dtype, geometry.tokens, _head_dim(call, geometry)):
        return (0,)
    return lse_shape(qkv.shape[0], geometry, call.num_heads, call.mask is not None)


def reference_gradients(grad: Tensor, call: Operands, geometry: Geometry, twice: bool) -> list[Tensor | None]:
    """Return gradients of (qkv, k, v, table, padding, logit_scale) by PyTorch's own."""

    def function(qkv: Any, k: Any, v: Any, table: Any, padding: Any, logit_scale: Any) -> Tensor:
        now = call._replace(qkv=qkv, k=k, v=v, table=table, padding=padding, logit_scale=logit_scale)
        return reference_of(now, geometry)

    inputs = (call.qkv, call.k, call.v, call.table, call.padding, call.logit_scale)
    return recomputed_gradients(function, inputs, grad, twice)


def dense(image: Tensor, geometry: Geometry) -> Tensor:
    """Return an image in memory as outputs are: without gaps, heads before the last axis of the image."""
    image = image.resolve_neg()
    if not are_heads_apart(image, geometry):
        return image.contiguous()
    return image.transpose(-3, -2).contiguous().transpose(-3, -2)


def is_readable(qkv: Tensor, k: Tensor | None, v: Tensor | None, geometry: Geometry) -> bool:
    """Return True if the kernels find all tokens by their strides."""
    if k is None and qkv.is_contiguous() and expected(qkv.numel()) < 2**31:
        return True
    strides = qkv.stride()
    return (
        strides[-1] == 1
        and sum(map(mul, strides[1:], qkv.shape[1:])) < 2**31  # offsets within an image have 32 bits
        and (k is None or strides == k.stride() == v.stride())  # type: ignore[union-attr]
        and not (strides[-2] % qkv.shape[-1] and are_heads_apart(qkv, geometry))  # they count in heads
    )


def problem(device: torch.device, dtype: torch.dtype, geometry: Geometry, head_dim: int, cosine: bool) -> tuple:
    """Return what failures of the window kernels are kept under."""
    return "window", device.type, device.index, dtype, geometry.window, head_dim, cosine
