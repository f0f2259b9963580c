"""Launches what writes rows and weights in 8 bits, each row with a scale of its own."""

from __future__ import annotations

from typing import Any

import torch

from .block import kept
from .launches import Launch

PLAIN, GELU, NORM, ADD_NORM, NORM_ADD = range(5)  # modes of `kernels.quantise._quantise_kernel`


def rows_launch(mode: int, device: torch.device, rows: int, channels: int, eps: float = 0.0) -> Any:
    """Return the launch of `kernels.quantise._quantise_kernel` for tensors of so many rows.

    Raises:
        LaunchError: it cannot be planned.
    """
    return kept(("quantise", device, rows, channels, eps, mode), _plan_rows)


def _plan_rows(device: torch.device, rows: int, channels: int, eps: float, mode: int) -> Any:
    from ...kernels import fusion_launch, quantise

    shape = fusion_launch.rows(channels)
    return Launch(
        quantise._quantise_kernel,
        (-(-rows // shape.rows),),
        (rows, eps, channels, mode, shape.block_c, shape.rows),
        num_warps=fusion_launch.quantise_warps(shape.block_c),
    )


def weights_launch(device: torch.device, channels: int, qkv: int, width: int, hidden: int, projects: bool = True) -> Any:
    """Return the launch of `kernels.quantise._quantise_weights_kernel`: qkv rows, heads' width and hidden channels.

    Raises:
        LaunchError: it cannot be planned.
    """
    return kept(("quantise weights", device, channels, qkv, width, hidden, projects), _plan_weights)


def _plan_weights(device: torch.device, channels: int, qkv: int, width: int, hidden: int, projects: bool = True) -> Any:
    from ...kernels import fusion_launch, quantise

    own, wide, deep = map(fusion_launch.rows, (channels, width, hidden))
    programs = -(-qkv // own.rows) - (-channels // wide.rows) * projects - (-hidden // own.rows) - (-channels // deep.rows)
    blocks, rows = zip(*((shape.block_c, shape.rows) for shape in (own, wide, deep)), strict=True)
    return Launch(
        quantise._quantise_weights_kernel,
        (programs,),
        (channels, qkv, width, hidden, *blocks, *rows),
        num_warps=fusion_launch.quantise_warps(max(blocks)),
    )
