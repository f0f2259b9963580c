"""Launches of the gradients of what stands around the attention. Tensors are contiguous and on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import devices
from .block import NORM, _launch, sample_rows
from .launches import Launch


def norm(
    mode: int,
    grad_out: Tensor,
    grad_total: Tensor | None,
    source: Tensor,
    stats: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    *,
    grad_x: Tensor | None = None,
    grad_branch: Tensor | None = None,
) -> Tensor:
    """Run `kernels.pointwise_bwd._norm_bwd_kernel`, whose operands these are.

    Returns:
        (2 or 3, C), fp32: gradients of the norm's weight and bias, and the sums of the branch's, if there is one.
    """
    from ...kernels import fusion_launch

    channels, device = source.shape[-1], source.device
    rows, kinds = source.numel() // channels, 2 if mode == NORM else 3
    if not rows:
        return torch.zeros((kinds, channels), dtype=torch.float32, device=device)
    shape = fusion_launch.rows(channels)
    programs = fusion_launch.backward_programs(-(-rows // shape.rows), devices.multiprocessors(device))
    sums = torch.empty((programs, kinds, channels), dtype=torch.float32, device=device)
    key = ("norm backward", device, rows, sample_rows(rows, scale), channels, mode, programs)
    _launch(key, _plan_norm, sums, grad_x, grad_branch, grad_out, grad_total, source, stats, scale, weight)
    return _add_parts(sums)


def _plan_norm(device: torch.device, rows: int, sample_rows: int, channels: int, mode: int, programs: int) -> Any:
    from ...kernels import fusion_launch, pointwise_bwd

    shape = fusion_launch.rows(channels)
    return Launch(
        pointwise_bwd._norm_bwd_kernel,
        (programs,),
        (rows, sample_rows, channels, mode, shape.block_c, shape.rows),
        num_warps=fusion_launch.BACKWARD_WARPS,
    )


def merge(grad_out: Tensor, x: Tensor, stats: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of merging x (B, H, W, C), with a norm where there are statistics of it.

    Returns:
        The gradient of x, and those of the norm's weight and bias, (2, 4 * C), fp32.
    """
    from ...kernels import fusion_launch

    (_, height, width, channels), device = x.shape, x.device
    grad_x, rows = torch.empty_like(x), grad_out.numel() // (4 * channels)
    if not rows:
        return grad_x, torch.zeros((2, 4 * channels), dtype=torch.float32, device=device)
    shape = fusion_launch.merged_rows(rows, channels)
    programs = fusion_launch.backward_programs(-(-rows // shape.rows), devices.multiprocessors(device))
    sums = None if stats is None else torch.empty((programs, 2, 4 * channels), dtype=torch.float32, device=device)
    key = ("merge backward", device, rows, height, width, channels, stats is not None, programs)
    _launch(key, _plan_merge, grad_x, sums, grad_out, None if stats is None else x, stats, weight)
    return grad_x, torch.empty((2, 0)) if sums is None else _add_parts(sums)


def _plan_merge(
    device: torch.device, rows: int, height: int, width: int, channels: int, has_norm: bool, programs: int
) -> Any:
    from ...kernels import fusion_launch, pointwise_bwd

    shape = fusion_launch.merged_rows(rows, channels)
    return Launch(
        pointwise_bwd._merge_bwd_kernel,
        (programs,),
        (rows, height, width, channels, has_norm, shape.block_c, shape.rows),
        num_warps=fusion_launch.BACKWARD_WARPS,
    )


def gelu(grad_out: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of exact GELU, of 16-bit numbers (rows, C).

    Returns:
        The gradient of x; GELU(x); and the sums of the gradient's columns (C,), fp32.
    """
    grad_x, out = torch.empty_like(x), torch.empty_like(x)
    sums = _columns(_plan_gelu, x, None, (grad_x, out), (grad_out, x))
    return grad_x, out, sums


def scaled_columns(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x (rows, C) in a dtype, each sample multiplied by its factor, and the sums of its columns, (C,), fp32."""
    scaled = None if scale is None and dtype is x.dtype else torch.empty_like(x, dtype=dtype)
    sums = _columns(_plan_sums, x, scale, (scaled,), (x, scale))
    return x if scaled is None else scaled, sums


def _columns(
    plan: Callable[..., Any],
    x: Tensor,
    scale: Tensor | None,
    results: tuple[Tensor | None, ...],
    operands: tuple[Tensor | None, ...],
) -> Tensor:
    """Run a kernel that sums over rows."""
    from ...kernels import fusion_launch

    (rows, channels), device = x.shape, x.device
    if not rows:
        return torch.zeros(channels, dtype=torch.float32, device=device)
    blocks = -(-channels // fusion_launch.COLUMNS)
    tiles = -(-rows // fusion_launch.COLUMN_ROWS)
    programs = fusion_launch.backward_programs(tiles, -(-devices.multiprocessors(device) // blocks))
    sums = torch.empty((programs, channels), dtype=torch.float32, device=device)
    key = (plan.__name__, device, rows, sample_rows(rows, scale), channels, programs)
    _launch(key, plan, sums, *results, *operands)
    return _add_parts(sums)


def _plan_gelu(device: torch.device, rows: int, _: int, channels: int, programs: int) -> Any:
    from ...kernels import pointwise_bwd

    return _plan_columns(pointwise_bwd._gelu_bwd_kernel, (rows,), channels, programs)


def _plan_sums(device: torch.device, rows: int, sample_rows: int, channels: int, programs: int) -> Any:
    from ...kernels import pointwise_bwd

    return _plan_columns(pointwise_bwd._column_sums_kernel, (rows, sample_rows), channels, programs)


def _plan_columns(kernel: Any, sizes: tuple[int, ...], channels: int, programs: int) -> Any:
    from ...kernels import fusion_launch

    return Launch(
        kernel,
        (programs, -(-channels // fusion_launch.COLUMNS)),
        (*sizes, channels, fusion_launch.COLUMNS, fusion_launch.COLUMN_ROWS),
        num_warps=fusion_launch.BACKWARD_WARPS,
    )


def _add_parts(parts: Tensor) -> Tensor:
    """Return the sum over the first axis of what programs have summed; PyTorch takes twice as long for so few."""
    columns = parts[0].numel()
    sums = parts.new_empty(parts.shape[1:])
    _launch(("add parts", parts.device, parts.shape[0], columns), _plan_parts, sums, parts)
    return sums


def _plan_parts(device: torch.device, parts: int, columns: int) -> Any:
    from ...kernels import fusion_launch, pointwise_bwd

    return Launch(
        pointwise_bwd._add_parts_kernel,
        (-(-columns // fusion_launch.PARTS_COLUMNS),),
        (parts, columns, fusion_launch.PARTS_COLUMNS, fusion_launch.PARTS_ROWS),
        num_warps=fusion_launch.PARTS_WARPS,
    )
