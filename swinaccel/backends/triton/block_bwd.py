"""Launches of the gradients of what stands around the attention. Tensors are contiguous and on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import devices
from .block import NORM, planned, run, sample_rows
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
    launch = _norm_launch(device, rows, sample_rows(rows, scale), channels, mode, programs)
    run(launch, sums, grad_x, grad_branch, grad_out, grad_total, source, stats, scale, weight)
    return _add_parts(sums)


@planned
def _norm_launch(device: torch.device, rows: int, sample_rows: int, channels: int, mode: int, programs: int) -> Any:
    from ...kernels import fusion_launch, pointwise_bwd

    shape = fusion_launch.rows(channels)
    return Launch(
        pointwise_bwd._norm_bwd_kernel,
        (programs,),
        (rows, sample_rows, channels, mode, shape.block_c, shape.rows),
        num_warps=fusion_launch.BACKWARD_WARPS,
    )


def merge(
    grad_out: Tensor,
    shape: torch.Size,
    dtype: torch.dtype,
    kept: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of merging an image (B, H, W, C), with a norm where something is kept of that.

    Args:
        shape, dtype: of the image.
        kept: see `block.merge`.

    Returns:
        The gradient of the image, and those of the norm's weight and bias, (2, 4 * C), fp32.
    """
    from ...kernels import fusion_launch

    (_, height, width, channels), device, (_, stats) = shape, grad_out.device, kept
    grad_x, rows = grad_out.new_empty(shape, dtype=dtype), grad_out.numel() // (4 * channels)
    if not rows:
        return grad_x, torch.zeros((2, 4 * channels), dtype=torch.float32, device=device)
    tiles = -(-rows // fusion_launch.merged_rows(rows, channels).rows)
    programs = fusion_launch.backward_programs(tiles, devices.multiprocessors(device))
    sums = None if stats is None else torch.empty((programs, 2, 4 * channels), dtype=torch.float32, device=device)
    launch = _merge_launch(device, rows, height, width, channels, stats is not None, programs)
    run(launch, grad_x, sums, grad_out, *kept, weight)
    return grad_x, torch.empty((2, 0)) if sums is None else _add_parts(sums)


@planned
def _merge_launch(
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
    sums = _columns(_gelu_launch, x, None, (grad_x, out), (grad_out, x))
    return grad_x, out, sums


def scaled_columns(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x (rows, C) in a dtype, each sample multiplied by its factor, and the sums of its columns, (C,), fp32."""
    scaled = None if scale is None and dtype is x.dtype else torch.empty_like(x, dtype=dtype)
    sums = _columns(_sums_launch, x, scale, (scaled,), (x, scale))
    return x if scaled is None else scaled, sums


def _columns(
    launch_of: Callable[..., Any],
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
    run(launch_of(device, rows, sample_rows(rows, scale), channels, programs), sums, *results, *operands)
    return _add_parts(sums)


@planned
def _gelu_launch(device: torch.device, rows: int, _: int, channels: int, programs: int) -> Any:
    from ...kernels import pointwise_bwd

    return _plan_columns(pointwise_bwd._gelu_bwd_kernel, (rows,), channels, programs)


@planned
def _sums_launch(device: torch.device, rows: int, sample_rows: int, channels: int, programs: int) -> Any:
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
    run(_parts_launch(parts.device, parts.shape[0], columns), sums, parts)
    return sums


@planned
def _parts_launch(device: torch.device, parts: int, columns: int) -> Any:
    from ...kernels import fusion_launch, pointwise_bwd

    return Launch(
        pointwise_bwd._add_parts_kernel,
        (-(-columns // fusion_launch.PARTS_COLUMNS),),
        (parts, columns, fusion_launch.PARTS_COLUMNS, fusion_launch.PARTS_ROWS),
        num_warps=fusion_launch.PARTS_WARPS,
    )
