"""Stand in for the window kernels: the forms that they take, and the same numbers in plain PyTorch where one failed."""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul
from typing import Any

import torch
from torch import Tensor

from ..backends.triton.checks import lse_shape
from ..backends.triton.launches import first_line
from ..backends.triton.problem import are_heads_apart, is_small
from ..backends.triton.traced import expected
from ..config import env_strict
from ..errors import ArgumentError, KernelError
from ..spec import reference
from ..spec.window import Geometry
from .failures import failures


def geometry_of(qkv: Tensor, window: Sequence[int], shift: Sequence[int], roll_first: bool) -> Geometry:
    axes = len(window)
    if axes not in (2, 3) or len(shift) != axes or min(window) < 1 or qkv.dim() not in (axes + 2, axes + 3):
        raise ArgumentError(
            "window must be two or three numbers of 1 or more, shift as many, and qkv an image of so many axes, "
            f"(B, H, W, channels) if two; got {tuple(window)}, {tuple(shift)} and {tuple(qkv.shape)}"
        )
    return Geometry(tuple(qkv.shape[1 : 1 + axes]), tuple(window), tuple(shift), roll_first)


def options_of(
    num_heads: int,
    table: Tensor | None,
    index: Tensor | None,
    padding: Tensor | None,
    mask: Tensor | None,
    mask_value: float,
    scale: float,
    logit_scale: Tensor | None,
) -> dict[str, Any]:
    """Return what the backend's functions and the reference's take by name."""
    return {
        "num_heads": num_heads,
        "table": table,
        "index": _contiguous(index),
        "padding": _contiguous(padding),
        "mask": _contiguous(mask),
        "mask_value": mask_value,
        "scale": scale,
        "logit_scale": _contiguous(logit_scale),
    }


def head_dim_of(qkv: Tensor, k: Tensor | None, num_heads: int, geometry: Geometry) -> int:
    if are_heads_apart(qkv, geometry):
        return qkv.shape[-1]
    return qkv.shape[-1] // num_heads // (3 if k is None else 1)


def reference_of(
    qkv: Tensor, k: Tensor | None, v: Tensor | None, geometry: Geometry, options: dict[str, Any]
) -> Tensor:
    """Return the same in plain PyTorch, for tokens of every form."""
    if k is None or v is None:
        q, k, v = qkv.chunk(3, dim=-1)
        return reference.shifted_window_attention(q, k, v, geometry, **options)
    if not are_heads_apart(qkv, geometry):
        return reference.shifted_window_attention(qkv, k, v, geometry, **options)
    out = reference.shifted_window_attention(qkv.flatten(-2), k.flatten(-2), v.flatten(-2), geometry, **options)
    return out.unflatten(-1, qkv.shape[-2:])


def note_failure(error: Exception, q: Tensor, geometry: Geometry, head_dim: int, cosine: bool, dropout: float) -> None:
    """Remember that a kernel failed on such a problem; raise where plain PyTorch cannot stand in for it now."""
    reason = failures.record(problem(q.device, q.dtype, geometry, head_dim, cosine), first_line(error))
    if env_strict() or dropout:  # what was dropped is known to the kernels only
        raise KernelError(reason) from error


def lse_shape_of(
    qkv: Tensor, geometry: Geometry, num_heads: int, head_dim: int, has_mask: bool, for_backward: bool
) -> tuple[int, ...]:
    if not for_backward or is_small(qkv.device, qkv.dtype, geometry.tokens, head_dim):
        return (0,)
    return lse_shape(qkv.shape[0], geometry, num_heads, has_mask)


def reference_gradients(
    grad: Tensor,
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    geometry: Geometry,
    options: dict[str, Any],
    create_graph: bool,
) -> list[Tensor | None]:
    """Return gradients of (qkv, k, v, table, padding, logit_scale) by PyTorch's own, which have gradients in turn."""
    with torch.enable_grad():
        names = ("table", "padding", "logit_scale")
        inputs = [t if t is None else t.view_as(t) for t in (qkv, k, v, *(options[name] for name in names))]
        if not create_graph:
            inputs = [t if t is None else t.detach().requires_grad_() for t in inputs]
        qkv, k, v, *rest = inputs  # type: ignore[assignment]
        out = reference_of(qkv, k, v, geometry, {**options, **dict(zip(names, rest, strict=True))})
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=create_graph, allow_unused=True))
        return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def dense(image: Tensor, geometry: Geometry) -> Tensor:
    """Return an image in memory as outputs are: without gaps, heads before the last axis of the image."""
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
