"""Run the rest of a block after its attention, on CPUs: as much of the MLP at a time as stays in cache.

The hidden channels are four times as many as the block's, and writing them all to memory and reading them back, twice,
costs more than GELU itself; large tensors also come as fresh pages from the system, each time. So rows go through both
products in parts, over one piece of memory, and the second product adds to the sum in place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

hidden_numbers = 1 << 19  # in one part: 2 MiB, what a core's or two cores' second-level caches hold
fewest_rows = 1024  # in one part: with fewer, products slow down
_gelu_ = torch.ops.aten.gelu_.default


def is_worth(x: Tensor) -> bool:
    """Return True if x has enough rows for more than one part, in a dtype in which sums in place round as little."""
    rows = x.numel() // max(1, x.shape[-1])
    return x.device.type == "cpu" and x.dtype == torch.float32 and 2 * rows >= 3 * _part(4 * x.shape[-1])


def _part(hidden: int) -> int:
    return max(fewest_rows, hidden_numbers // hidden)


def rest(x: Tensor, branch: Tensor, block: Any) -> Tensor:
    """Return x + branch, and what a block adds to that.

    Args:
        x, branch: (..., C), block's input and what its attention gave.
        block: `spec.block.Block` of plain modules, without gradients to record.
    """
    channels, hidden = x.shape[-1], block.fc1.out_features
    rows = x.numel() // channels
    parts = max(1, round(rows / _part(hidden)))
    size = -(-rows // parts)
    buffer = x.new_empty(size, hidden)
    out = torch.empty_like(x)
    flat = (tensor.reshape(rows, channels).split(size) for tensor in (x, branch, out))
    for before, attended, after in zip(*flat, strict=True):
        if block.post_norm:
            torch.add(before, block.norm1(attended), out=after)
            after.add_(block.norm2(F.linear(_activated(block, after, buffer[: len(after)]), *_parameters(block.fc2))))
        else:
            torch.add(before, attended, out=after)
            y = block.norm2(after)
            if block.fc2.bias is not None:
                after.add_(block.fc2.bias)
            after.addmm_(_activated(block, y, buffer[: len(y)]), block.fc2.weight.t())
    return out


def _activated(block: Any, y: Tensor, buffer: Tensor) -> Tensor:
    """Return activation(fc1(y)), in a buffer."""
    weight, bias = _parameters(block.fc1)
    torch.mm(y, weight.t(), out=buffer) if bias is None else torch.addmm(bias, y, weight.t(), out=buffer)
    return _gelu_(buffer)


def _parameters(linear: Any) -> tuple[Tensor, Tensor | None]:
    return linear.weight, linear.bias
