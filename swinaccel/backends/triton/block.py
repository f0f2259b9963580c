"""Launches what stands around the attention: norms with residual sums, GELU, the MLP, mergings, embeddings.

All tensors are contiguous and on one device; but for `run_norm` they are of one dtype, and no gradient is recorded. Any
failure to compile or launch is a `LaunchError`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import devices
from .launches import Launch, first_line, keep, launches

_Plan = TypeVar("_Plan", bound=Callable[..., Any])

Affine = tuple[Tensor | None, Tensor | None, float]  # weight, bias and eps of a norm
NORM, ADD_NORM, NORM_ADD, ADD = range(4)  # modes of `kernels.pointwise._norm_kernel`


class LaunchError(RuntimeError):
    """A kernel could not be compiled or launched."""


def planned(plan: _Plan) -> _Plan:
    """Keep the launches that a function plans, by its arguments, on which they depend.

    Raises:
        LaunchError: a launch cannot be planned.
    """

    @wraps(plan)
    def launch(*arguments: Any, **ways: Any) -> Any:
        key = plan, *arguments, *ways.items()
        try:
            return launches.get(key) or keep(key, plan(*arguments, **ways))
        except Exception as error:
            if any(isinstance(one, torch.SymInt) for one in arguments):  # which no key is made of
                return plan(*arguments, **ways)
            raise LaunchError(first_line(error)) from error

    return cast(_Plan, launch)


def run(launch: Any, *tensors: Tensor | None) -> None:
    """Run a launch; what fails is a `LaunchError`."""
    try:
        launch(*tensors)
    except torch.OutOfMemoryError:  # which says nothing of the kernel
        raise
    except Exception as error:
        raise LaunchError(first_line(error)) from error


def sample_rows(rows: int, scale: Tensor | None) -> int:
    """Return how many rows one factor of `scale` is for."""
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
    more_bias: Tensor | None = None,
) -> None:
    """Run `kernels.pointwise._norm_kernel`, whose modes and operands these are."""
    channels, (weight, bias, eps) = x.shape[-1], affine
    rows = x.numel() // channels
    if rows:
        launch = norm_launch(mode, x.device, rows, channels, eps, sample_rows(rows, scale))
        run(launch, x, out, total, stats, branch, scale, weight, bias, more_bias)


@planned
def norm_launch(
    mode: int, device: torch.device, rows: int, channels: int, eps: float, sample_rows: int = 1, parts: int = 1
) -> Any:
    """Return the launch of `kernels.pointwise._norm_kernel` for tensors of so many rows, and a branch in parts."""
    from ...kernels import fusion_launch, pointwise

    shape = fusion_launch.rows(channels)
    return Launch(
        pointwise._norm_kernel,
        (-(-rows // shape.rows),),
        (rows, sample_rows, eps, channels, mode, parts, shape.block_c, shape.rows),
        dependent=devices.are_dependent(device, rows, channels),
        num_warps=fusion_launch.NORM_WARPS,
    )


def norm(x: Tensor, affine: Affine) -> Tensor:
    """Return the layer norm of the last axis; statistics in fp32."""
    out = torch.empty_like(x)
    run_norm(NORM, x, None, affine, out=out)
    return out


def merge(
    x: Tensor,
    affine: Affine | None,
    dtype: torch.dtype | None = None,
    kept: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
) -> Tensor:
    """Merge (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 4 * C): each four neighbours, or their layer norm.

    Args:
        dtype: of the result; None: that of x.
        kept: room for what the backward of a norm needs: the neighbours in the dtype of x, as the result; and
            (2, tokens), fp32, for means and 1 / sqrt(variance + eps).
    """
    batch, height, width, channels = x.shape
    out = x.new_empty((batch, (height + 1) // 2, (width + 1) // 2, 4 * channels), dtype=dtype or x.dtype)
    if out.numel():
        weight, bias, eps = (None, None, None) if affine is None else affine
        run(_merge_launch(x.device, batch, height, width, channels, eps), out, x, *kept, weight, bias)
    return out


@planned
def _merge_launch(device: torch.device, batch: int, height: int, width: int, channels: int, eps: float | None) -> Any:
    from ...kernels import fusion_launch, pointwise

    rows = batch * ((height + 1) // 2) * ((width + 1) // 2)
    shape = fusion_launch.merged_rows(rows, channels)
    numbers = rows, height, width, 0.0 if eps is None else eps, channels, eps is not None
    return Launch(
        pointwise._merge_kernel,
        (-(-rows // shape.rows),),
        (*numbers, shape.block_c, shape.rows),
        num_warps=fusion_launch.MERGE_WARPS,
    )


def embed_launch(channels: int, numbers: int) -> Any:
    """Return how `embed` would run for patches of so many numbers, or None where it is not to."""
    from ...kernels import fusion_launch

    return fusion_launch.embed(channels=channels, numbers=numbers)


def embed(x: Tensor, weight: Tensor, bias: Tensor | None, affine: Affine | None) -> Tensor:
    """Embed (B, C_in, H, W) to (B, H / p, W / q, C): each patch times the weight (C, C_in, p, q), and its norm.

    Args:
        x: its sides are multiples of the patch's, and it has less than 2^31 - 64 patches.
        affine: of the norm; None: there is none.
    """
    (batch, _, height, width), (channels, _, *patch) = x.shape, weight.shape
    down, across = height // patch[0], width // patch[1]
    out = x.new_empty((batch, down, across, channels))
    if out.numel():
        norm_weight, norm_bias, eps = (None, None, None) if affine is None else affine
        launch = _embed_launch(x.device, batch, down, across, weight.shape, eps)
        run(launch, out, x, weight, bias, norm_weight, norm_bias)
    return out


@planned
def _embed_launch(
    device: torch.device, batch: int, down: int, across: int, weight: torch.Size, eps: float | None
) -> Any:
    from ...kernels import embedding

    channels, inputs, *patch = weight
    rows, numbers = batch * down * across, inputs * patch[0] * patch[1]
    shape = embed_launch(channels, numbers)
    return Launch(
        embedding._embed_kernel,
        (-(-rows // shape.block_m),),
        (
            rows, down, across, 0.0 if eps is None else eps, channels, numbers, *patch, eps is not None, shape.block_m,
            shape.block_c, shape.block_k,
        ),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )  # fmt: skip


def gelu(x: Tensor) -> Tensor:
    """Return exact GELU of 16-bit numbers."""
    out, numbers = torch.empty_like(x), x.numel()
    if numbers:
        run(gelu_launch(x.device, numbers), out, x)
    return out


@planned
def gelu_launch(device: torch.device, numbers: int) -> Any:
    """Return the launch of GELU for so many numbers, which writes to its first tensor."""
    from ...kernels import fusion_launch, mlp

    block = fusion_launch.GELU_BLOCK
    return Launch(mlp._gelu_kernel, (-(-numbers // block),), (numbers, block), num_warps=fusion_launch.GELU_WARPS)


def pays_in_one(device: torch.device, dtype: torch.dtype, rows: int, channels: int, hidden: int) -> bool:
    """Return True if so many rows are enough for one kernel, of which a program goes through all hidden channels."""
    launch = mlp_launch(device, dtype, channels, hidden)
    return launch is not None and rows >= launch.block_m * devices.multiprocessors(device)


def mlp_launch(device: torch.device, dtype: torch.dtype, channels: int, hidden: int) -> Any:
    """Return how all of a block after its attention would run as one kernel; None where it cannot, or never is to."""
    from ...kernels import fusion_launch

    shared_memory = devices.shared_memory(device)
    return fusion_launch.mlp(channels=channels, hidden=hidden, element_size=dtype.itemsize, shared_memory=shared_memory)


@planned
def whole_mlp_launch(
    device: torch.device, dtype: torch.dtype, rows: int, channels: int, hidden: int, eps: float, is_residual: bool
) -> Any:
    """Return the launch of all of a block after its attention, where `mlp_launch` has one, for so many rows.

    Args:
        is_residual: with total = x + the attention's output, it gives total + mlp(norm(total)); else x + norm(mlp(x)).
    """
    from ...kernels import mlp

    shape = mlp_launch(device, dtype, channels, hidden)
    return Launch(
        mlp._mlp_kernel,
        (-(-rows // shape.block_m),),
        (rows, eps, channels, hidden, is_residual, shape.block_m, shape.block_c, shape.block_h),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
