"""Launches linear layers with what follows them, where that is faster than PyTorch's product: GELU, or a sum.

All tensors are of one dtype of 16 bits and on one device, and no gradient is recorded. Any failure to compile or launch
is a `LaunchError`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import devices
from .block import planned, run
from .launches import DescribedLaunch, Launch


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None = None, *, gelu: bool = False
) -> Tensor | None:
    """Return x weightᵀ + bias, plus `added`, or its exact GELU; None where PyTorch's product is to be preferred.

    Args:
        x, weight: (..., K) and (N, K).
        added: (..., N), contiguous.
    """
    launch = _launch_of(x, weight, gelu=gelu, adds=added is not None)
    if launch is None or (added is not None and not are_describable(added)):
        return None
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    run(launch, out, x, weight, bias, None, added)
    return out


def linear_gelu_kept(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return x weightᵀ + bias and its GELU, as `linear` does, for a backward."""
    launch = _launch_of(x, weight, gelu=True, keeps=True)
    if launch is None:
        return None
    before, out = (x.new_empty((*x.shape[:-1], weight.shape[0])) for _ in range(2))
    run(launch, out, x, weight, bias, before, None)
    return before, out


def _launch_of(x: Tensor, weight: Tensor, **ways: bool) -> Any:
    outputs, channels = weight.shape
    launch = linear_launch(x.device, x.numel() // channels, channels, outputs, **ways)
    if launch is None or not (x.is_contiguous() and weight.is_contiguous() and are_describable(x, weight)):
        return None
    return launch


def is_worth(device: torch.device, rows: int, channels: int) -> bool:
    """Return True if the projections of so many tokens may be faster than PyTorch's."""
    if devices.are_few(device, rows, channels):
        return True
    return any(_how(device, rows, channels, outputs, False, False) for outputs in (channels, 3 * channels))


def linear_launch(
    device: torch.device,
    rows: int,
    channels: int,
    outputs: int,
    gelu: bool = False,
    keeps: bool = False,
    adds: bool = False,
) -> Any:
    """Return the launch of a linear layer, or None where PyTorch's product is to be preferred.

    Args:
        gelu: its GELU is wanted.
        keeps: it also writes what GELU is computed of.
        adds: it adds another tensor.
    """
    if not (gelu or adds) and devices.are_few(device, rows, channels):
        return _few_launch(device, rows, channels, outputs)
    how = _how(device, rows, channels, outputs, gelu, keeps)
    if how is None:
        return None
    shape, programs = how
    return _plan(device, rows, channels, outputs, shape, programs, gelu, keeps, adds)


def parted_launch(device: torch.device, rows: int, channels: int, outputs: int) -> tuple[Any, int]:
    """Return the launch of a product of few rows that leaves its sums in parts, and how many: None and 1 without."""
    are_few = devices.are_few(device, rows, outputs)
    launch = _few_launch(device, rows, channels, outputs, may_part=True) if are_few else None
    return (None, 1) if launch is None else (launch, launch.grid[1])


@planned
def _few_launch(device: torch.device, rows: int, channels: int, outputs: int, may_part: bool = False) -> Any:
    from ...kernels import fusion_launch, linear_few

    how = fusion_launch.few(rows=rows, channels=channels, outputs=outputs, may_part=may_part)
    if how is None or (may_part and how[0].parts == 1):
        return None
    shape, tiles = how
    return Launch(
        linear_few._linear_few_kernel,
        (tiles, shape.parts),
        (rows, outputs, channels, shape.parts, shape.block_m, shape.block_n, shape.block_k),
        dependent=devices.are_dependent(device, rows, min(channels, outputs)),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )


def are_describable(*tensors: Tensor) -> bool:
    """Return True if all tensors begin where a descriptor can."""
    return not any(one.data_ptr() & 15 for one in tensors)


@lru_cache(maxsize=256)
def _how(device: torch.device, rows: int, channels: int, outputs: int, gelu: bool, keeps: bool) -> Any:
    if not devices.has_copy_engine(device):
        return None
    from ...kernels import fusion_launch

    sizes = {"rows": rows, "channels": channels, "outputs": outputs}
    multiprocessors = devices.multiprocessors(device)
    if gelu:
        return fusion_launch.linear_gelu(**sizes, multiprocessors=multiprocessors, keeps=keeps)
    return fusion_launch.linear(**sizes, multiprocessors=multiprocessors)


@planned
def _plan(
    device: torch.device,
    rows: int,
    channels: int,
    outputs: int,
    shape: Any,
    programs: int,
    gelu: bool,
    keeps: bool,
    adds: bool,
) -> Any:
    from ...kernels import fusion_launch, linear

    block_m, block_n, block_k = shape[:3]
    half = block_m, block_n // 2
    tiles = {0: half, 1: (block_m, block_k), 2: (block_n, block_k)}  # of the output, x and the weight
    more = {4: half} if keeps else {5: half} if adds else {}
    return DescribedLaunch(
        fusion_launch.describers({**tiles, **more}),
        linear._linear_kernel,
        (programs,),
        (rows, outputs, channels, gelu, block_m, block_n, block_k, shape.group),
        dependent=devices.are_dependent(device, rows, channels),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
