"""Launches what writes rows and weights in 8 bits, each row with a scale of its own."""

from __future__ import annotations

from typing import Any

import torch

from .block import planned
from .launches import Launch

PLAIN, NORM, ADD_NORM, NORM_ADD = range(4)  # modes of `kernels.quantise._quantise_kernel`


@planned
def rows_launch(
    mode: int, device: torch.device, rows: int, channels: int, hidden: int, eps: float = 0.0, limits: bool = False
) -> Any:
    """Return the launch of `kernels.quantise._quantise_kernel` for tensors of so many rows.

    Args:
        hidden: channels of the MLP.
        limits: it takes the limits of the MLP's hidden numbers.
    """
    from ...kernels import fusion_launch, quantise

    shape = fusion_launch.rows(channels)
    return Launch(
        quantise._quantise_kernel,
        (-(-rows // shape.rows) + limits,),
        (rows, eps, channels, hidden, mode, shape.block_c, fusion_launch.rows(hidden).block_c, shape.rows),
        num_warps=fusion_launch.quantise_warps(shape.block_c),
    )


@planned
def weights_launch(device: torch.device, channels: int, qkv: int, hidden: int) -> Any:
    """Return the launch of `kernels.quantise._quantise_weights_kernel`: rows of q, k and v, and hidden channels."""
    from ...kernels import fusion_launch, quantise

    own, deep = fusion_launch.rows(channels), fusion_launch.rows(hidden)
    return Launch(
        quantise._quantise_weights_kernel,
        (-(-qkv // own.rows) - (-hidden // own.rows) - (-channels // deep.rows),),
        (channels, qkv, hidden, own.block_c, deep.block_c, own.rows, deep.rows),
        num_warps=fusion_launch.quantise_warps(max(own.block_c, deep.block_c)),
    )
