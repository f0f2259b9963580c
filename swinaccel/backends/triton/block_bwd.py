"""Launches of the gradients of what stands around the attention. Tensors are contiguous and on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import devices
from .block import NORM, _launch, are_describable, sample_rows, training_launch
from .launches import DescribedLaunch, Launch


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
    return sums.sum(0)


def _plan_norm(device: torch.device, rows: int, sample_rows: int, channels: int, mode: int, programs: int) -> Any:
    from ...kernels import fusion_launch, pointwise_bwd

    shape = fusion_launch.rows(channels)
    return Launch(
        pointwise_bwd._norm_bwd_kernel,
        (programs,),
        (rows, sample_rows, channels, mode, shape.block_c, shape.rows),
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


def linear_gelu(grad_out: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the gradients of GELU(hidden) weightᵀ, or None where PyTorch's product and `gelu` are to be preferred.

    Args:
        grad_out, weight, hidden: (rows, C), (C, N) and (rows, N), of 16-bit numbers.
    Returns:
        As `gelu`, of hidden.
    """
    (rows, channels), numbers = grad_out.shape, hidden.shape[1]
    how = training_launch(hidden.device, rows, channels, numbers, True)
    given = grad_out, weight, hidden
    if how is None or not all(one.is_contiguous() and are_describable(one, one) for one in given):
        return None
    grad_hidden, out = torch.empty_like(hidden), torch.empty_like(hidden)
    sums = torch.empty((-(-rows // how[0].block_m), numbers), dtype=torch.float32, device=hidden.device)
    key = ("linear gelu backward", hidden.device, rows, channels, numbers, *how)
    _launch(key, _plan_linear_gelu, sums, grad_hidden, out, hidden, grad_out, weight)
    return grad_hidden, out, sums.sum(0)


def _plan_linear_gelu(
    device: torch.device, rows: int, channels: int, hidden: int, shape: Any, programs: int
) -> DescribedLaunch:
    from ...kernels import fusion_launch, mlp

    block_m, block_n, block_k = shape[:3]
    half = block_m, block_n // 2
    tiles = {1: half, 2: half, 3: half, 4: (block_m, block_k), 5: (block_k, block_n)}
    return DescribedLaunch(
        fusion_launch.describers(tiles),
        mlp._linear_gelu_bwd_kernel,
        (programs,),
        (rows, hidden, channels, block_m, block_n, block_k, shape.group),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )


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
    return sums.sum(0)


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
