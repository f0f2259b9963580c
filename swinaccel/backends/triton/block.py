"""Launches what stands around the attention: norms with residual sums, GELU with a product, the MLP, embeddings.

All tensors are contiguous and on one device; but for `run_norm` they are of one dtype, and no gradient is recorded. Any
failure to compile or launch is a `LaunchError`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from . import devices
from .launches import DescribedLaunch, Launch, first_line, keep, launches

Affine = tuple[Tensor | None, Tensor | None, float]  # weight, bias and eps of a norm
NORM, ADD_NORM, NORM_ADD, ADD = range(4)  # modes of `kernels.pointwise._norm_kernel`


class LaunchError(RuntimeError):
    """A kernel could not be compiled or launched."""


def _launch(key: tuple, plan: Callable[..., Any], *tensors: Tensor | None) -> None:
    """Run the launch that is kept under a key: the plan's name, and what is planned from."""
    try:
        launch = launches.get(key) or keep(key, plan(*key[1:]))
        launch(*tensors)
    except torch.OutOfMemoryError:  # which says nothing of the kernel
        raise
    except Exception as error:
        raise LaunchError(first_line(error)) from error


def _plan_norm(device: torch.device, rows: int, sample_rows: int, channels: int, eps: float, mode: int) -> Any:
    from ...kernels import fusion_launch, pointwise

    shape = fusion_launch.rows(channels)
    return Launch(
        pointwise._norm_kernel,
        (-(-rows // shape.rows),),
        (rows, sample_rows, eps, channels, mode, shape.block_c, shape.rows),
        num_warps=fusion_launch.NORM_WARPS,
    )


def sample_rows(rows: int, scale: Tensor | None) -> int:
    """How many rows one factor of `scale` is for."""
    return 1 if scale is None else rows // scale.numel()


def run_norm(
    mode: int,
    x: Tensor,
    branch: Tensor | None,
    affine: Affine,
    *,
    out: Tensor | None = None,
    total: Tensor | None = None,
    stats: Tensor | None = None,
    scale: Tensor | None = None,
    total_bias: Tensor | None = None,
) -> None:
    """`kernels.pointwise._norm_kernel`, whose modes and operands these are."""
    channels, (weight, bias, eps) = x.shape[-1], affine
    rows = x.numel() // channels
    if rows:
        key = ("norm", x.device, rows, sample_rows(rows, scale), channels, eps, mode)
        _launch(key, _plan_norm, x, out, total, stats, branch, scale, weight, bias, total_bias)


def norm(x: Tensor, affine: Affine) -> Tensor:
    """Layer norm of the last axis; statistics in fp32."""
    out = torch.empty_like(x)
    run_norm(NORM, x, None, affine, out=out)
    return out


def add_norm(x: Tensor, branch: Tensor, affine: Affine, total_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x + branch + total_bias, and the layer norm of x + branch, which is not rounded before."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    run_norm(ADD_NORM, x, branch, affine, out=out, total=total, total_bias=total_bias)
    return total, out


def norm_add(x: Tensor, branch: Tensor, affine: Affine) -> Tensor:
    """x + the layer norm of branch, which is not rounded before."""
    out = torch.empty_like(x)
    run_norm(NORM_ADD, x, branch, affine, out=out)
    return out


def merge(x: Tensor, affine: Affine | None) -> Tensor:
    """(B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 4 * C): each four neighbours, or their layer norm."""
    batch, height, width, channels = x.shape
    out = x.new_empty((batch, (height + 1) // 2, (width + 1) // 2, 4 * channels))
    if out.numel():
        weight, bias, eps = (None, None, None) if affine is None else affine
        _launch(("merge", x.device, batch, height, width, channels, eps), _plan_merge, out, x, weight, bias)
    return out


def _plan_merge(device: torch.device, batch: int, height: int, width: int, channels: int, eps: float | None) -> Any:
    from ...kernels import fusion_launch, pointwise

    rows, shape = batch * ((height + 1) // 2) * ((width + 1) // 2), fusion_launch.rows(4 * channels)
    numbers = rows, height, width, 0.0 if eps is None else eps, channels, eps is not None
    return Launch(
        pointwise._merge_kernel,
        (-(-rows // shape.rows),),
        (*numbers, shape.block_c, shape.rows),
        num_warps=fusion_launch.MERGE_WARPS,
    )


@lru_cache(maxsize=256)
def embed_launch(channels: int, numbers: int) -> Any:
    """How `embed` would run for patches of so many numbers, or None where it is not to."""
    from ...kernels import fusion_launch

    return fusion_launch.embed(channels=channels, numbers=numbers)


def embed(x: Tensor, weight: Tensor, bias: Tensor | None, affine: Affine | None) -> Tensor:
    """(B, C_in, H, W) to (B, H / p, W / q, C): each patch times the weight (C, C_in, p, q), and the norm of that.

    Args:
        x: its sides are multiples of the patch's, and it has less than 2^31 - 64 patches.
        affine: of the norm; None: there is none.
    """
    (batch, _, height, width), (channels, _, *patch) = x.shape, weight.shape
    down, across = height // patch[0], width // patch[1]
    out = x.new_empty((batch, down, across, channels))
    if out.numel():
        norm_weight, norm_bias, eps = (None, None, None) if affine is None else affine
        key = ("embed", x.device, batch, down, across, weight.shape, eps)
        _launch(key, _plan_embed, out, x, weight, bias, norm_weight, norm_bias)
    return out


def _plan_embed(device: torch.device, batch: int, down: int, across: int, weight: torch.Size, eps: float | None) -> Any:
    from ...kernels import embedding

    channels, inputs, *patch = weight
    rows, numbers = batch * down * across, inputs * patch[0] * patch[1]
    shape = embed_launch(channels, numbers)
    return Launch(
        embedding._embed_kernel,
        (-(-rows // shape.block_m),),
        (
            rows,
            down,
            across,
            0.0 if eps is None else eps,
            channels,
            numbers,
            *patch,
            eps is not None,
            shape.block_m,
            shape.block_c,
            shape.block_k,
        ),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )


def gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Exact GELU of 16-bit numbers; `out` may be x."""
    out, numbers = torch.empty_like(x) if out is None else out, x.numel()
    if numbers:
        _launch(("gelu", x.device, numbers), _plan_gelu, out, x)
    return out


def _plan_gelu(device: torch.device, numbers: int) -> Any:
    from ...kernels import fusion_launch, mlp

    block = fusion_launch.GELU_BLOCK
    return Launch(mlp._gelu_kernel, (-(-numbers // block),), (numbers, block), num_warps=fusion_launch.GELU_WARPS)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """GELU(x weightᵀ + bias), exact, of 16-bit numbers; None where PyTorch's product is to be preferred.

    Args:
        x, weight: (..., K) and (N, K).
    """
    (hidden, channels), device = weight.shape, x.device
    rows = x.numel() // channels
    how = None if devices.shared_memory_override else _linear_gelu_launch(device, rows, channels, hidden)
    if how is None or (x.data_ptr() | weight.data_ptr()) & 15:  # which a descriptor cannot start from
        return None
    out = x.new_empty((*x.shape[:-1], hidden))
    _launch(("linear gelu", device, rows, channels, hidden, *how), _plan_linear_gelu, out, x, weight, bias)
    return out


@lru_cache(maxsize=256)
def _linear_gelu_launch(device: torch.device, rows: int, channels: int, hidden: int) -> Any:
    if not devices.has_copy_engine(device):
        return None
    from ...kernels import fusion_launch

    multiprocessors = devices.multiprocessors(device)
    return fusion_launch.linear_gelu(rows=rows, channels=channels, hidden=hidden, multiprocessors=multiprocessors)


def _plan_linear_gelu(
    device: torch.device, rows: int, channels: int, hidden: int, shape: Any, programs: int
) -> Any:  # fmt: skip
    from ...kernels import fusion_launch, mlp

    block_m, block_n, block_k = shape[:3]
    tiles = (block_m, block_n // 2), (block_m, block_k), (block_n, block_k)  # of the output, x and the weight
    return DescribedLaunch(
        {place: partial(fusion_launch.describe, block=tile) for place, tile in enumerate(tiles)},
        mlp._linear_gelu_kernel,
        (programs,),
        (rows, hidden, channels, block_m, block_n, block_k, shape.group),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )


def is_one_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether `mlp` is to be preferred to products of their own, for (..., C) and the first weight (hidden, C)."""
    hidden, channels = weight.shape
    launch = mlp_launch(x.device, x.dtype, channels, hidden)
    # A program goes through all hidden channels, which pays where each multiprocessor has one.
    return launch is not None and x.numel() >= channels * launch.block_m * devices.multiprocessors(x.device)


def mlp_launch(device: torch.device, dtype: torch.dtype, channels: int, hidden: int) -> Any:
    """How `mlp` would run, or None where it cannot, or never is to."""
    shared_memory = devices.shared_memory(device)
    return _mlp_launch(channels, hidden, dtype.itemsize, shared_memory)


@lru_cache(maxsize=256)
def _mlp_launch(channels: int, hidden: int, element_size: int, shared_memory: int) -> Any:
    from ...kernels import fusion_launch

    return fusion_launch.mlp(channels=channels, hidden=hidden, element_size=element_size, shared_memory=shared_memory)


def mlp(
    x: Tensor,
    branch: Tensor | None,
    affine: Affine,
    fc1: tuple[Tensor, Tensor | None],
    fc2: tuple[Tensor, Tensor | None],
) -> Tensor:
    """All of a block after its attention, where `mlp_launch` has a launch.

    Args:
        branch: the attention's output: with total = x + branch, total + mlp(norm(total)). None: x + norm(mlp(x)).
        fc1, fc2: weight and bias.
    """
    (hidden, channels), (weight, bias, eps) = fc1[0].shape, affine
    rows, out = x.numel() // channels, torch.empty_like(x)
    if rows:
        is_residual = branch is not None
        key = ("mlp", x.device, rows, channels, hidden, eps, is_residual, x.dtype, devices.shared_memory_override)
        _launch(key, _plan_mlp, out, x, branch, weight, bias, *fc1, *fc2)
    return out


def _plan_mlp(
    device: torch.device,
    rows: int,
    channels: int,
    hidden: int,
    eps: float,
    is_residual: bool,
    dtype: torch.dtype,
    shared_memory: int | None,
) -> Any:
    from ...kernels import mlp

    shape = mlp_launch(device, dtype, channels, hidden)
    return Launch(
        mlp._mlp_kernel,
        (-(-rows // shape.block_m),),
        (rows, eps, channels, hidden, is_residual, shape.block_m, shape.block_c, shape.block_h),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
