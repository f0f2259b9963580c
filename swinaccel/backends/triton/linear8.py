"""Launches linear layers of 8 bits, with GELU, which is of 8 bits again, or with a sum, or with neither."""

from __future__ import annotations

from typing import Any

import torch

from . import devices
from .block import planned
from .launches import DescribedLaunch


@planned
def linear8_launch(
    device: torch.device, rows: int, channels: int, outputs: int, gelu: bool = False, adds: bool = False
) -> Any:
    """Return the launch of `kernels.linear8._linear8_kernel` for tensors of so many rows."""
    from ...kernels import fusion_launch, linear8

    shape = fusion_launch.LINEAR8
    block_m, block_n, block_k = shape[:3]
    out = block_m, block_n if gelu else block_n // 4
    tiles = {0: out, 2: (block_m, block_k), 4: (block_n, block_k)}  # of the output, x and the weight
    if adds:
        tiles[7] = out
    programs = min(-(-rows // block_m) * -(-outputs // block_n), shape.programs * devices.multiprocessors(device))
    return DescribedLaunch(
        fusion_launch.describers(tiles),
        linear8._linear8_kernel,
        (programs,),
        (rows, outputs, channels, block_m, block_n, block_k, shape.group),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        maxnreg=fusion_launch.LINEAR8_REGISTERS,
    )
