"""Launches linear layers of 8 bits, with GELU or a sum behind them, where that is faster than PyTorch's product."""

from __future__ import annotations

from typing import Any

import torch

from . import devices
from .block import kept
from .launches import DescribedLaunch


def gelu_launch(device: torch.device, rows: int, channels: int, outputs: int) -> Any:
    """Return the launch of a product with GELU, in 8 bits with a scale for each row and each 128 channels, or None.

    Raises:
        LaunchError: it cannot be planned.
    """
    return _launch(device, rows, channels, outputs, True)


def sum_launch(device: torch.device, rows: int, channels: int, outputs: int, adds: bool) -> Any:
    """Return the launch of a product of what `gelu_launch` gives, plus another tensor where it adds one.

    Raises:
        LaunchError: it cannot be planned.
    """
    return _launch(device, rows, channels, outputs, False, adds)


def _launch(device: torch.device, rows: int, channels: int, outputs: int, gelu: bool, adds: bool = False) -> Any:
    how = _how(device, rows, channels, outputs, gelu)
    return None if how is None else kept(("linear8", device, rows, channels, outputs, *how, gelu, adds), _plan)


def _how(device: torch.device, rows: int, channels: int, outputs: int, gelu: bool) -> Any:
    if devices.shared_memory_override or not devices.has_copy_engine(device):
        return None
    from ...kernels import fusion_launch

    sizes = {"rows": rows, "channels": channels, "outputs": outputs}
    choose = fusion_launch.linear8_gelu if gelu else fusion_launch.linear8_sum
    return choose(**sizes, multiprocessors=devices.multiprocessors(device))


def _plan(
    device: torch.device,
    rows: int,
    channels: int,
    outputs: int,
    shape: Any,
    programs: int,
    gelu: bool,
    adds: bool,
) -> Any:
    from ...kernels import fusion_launch, linear8

    block_m, block_n, block_k = shape[:3]
    out = block_m, fusion_launch.CHANNELS8 if gelu else block_n // 4
    tiles = {0: out, 2: (block_m, block_k), 4: (block_n, block_k)}  # of the output, x and the weight
    if adds:
        tiles[7] = out
    return DescribedLaunch(
        fusion_launch.describers(tiles),
        linear8._linear8_kernel,
        (programs,),
        (rows, outputs, channels, 0 if gelu else fusion_launch.SCALES, False, 5, 4, fusion_launch.CHANNELS8, block_m, block_n, block_k, shape.group),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **({"maxnreg": shape.registers} if shape.registers else {}),
    )
