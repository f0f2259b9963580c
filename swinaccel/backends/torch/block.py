"""Run the rest of a block after its attention, on CPUs: as much of the MLP at a time as stays in cache.

The hidden channels are four times as many as the block's, and writing them all to memory and reading them back, twice,
costs more than GELU itself; large tensors also come as fresh pages from the system, each time. So rows go through both
products in parts, over one piece of memory, and the second product adds to the sum in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .products import USES_ONEDNN, linear, linear_gelu

hidden_numbers = 1 << 19  # in one part: 2 MiB, what a core's or two cores' second-level caches hold
fewest_rows = 1024  # in one part: with fewer, products slow down


def is_worth(x: Tensor, has_mlp: bool) -> bool:
    """Return True if products are oneDNN's, or an MLP's have rows for more than one part; in single precision."""
    rows = x.numel() // max(1, x.shape[-1])
    pays_off = USES_ONEDNN or (has_mlp and 2 * rows >= 3 * _part(4 * x.shape[-1]))
    return x.is_cpu and x.dtype == torch.float32 and rows > 0 and pays_off


def _part(hidden: int) -> int:
    return max(fewest_rows, hidden_numbers // hidden)


def rest(x: Tensor, branch: Tensor, block: Any) -> Tensor:
    """Return x + branch, and what a block adds to that.

    Args:
        x, branch: (..., C), block's input and what its attention gave.
        block: `spec.block.Block` of plain modules, without gradients to record.
    """
    channels = x.shape[-1]
    rows = x.numel() // channels
    parts = max(1, round(rows / _part(block.fc1.weight.shape[0])))
    out = torch.empty_like(x)
    flat = (tensor.reshape(rows, channels).split(-(-rows // parts)) for tensor in (x, branch, out))
    for before, attended, after in zip(*flat, strict=True):
        torch.add(before, block.norm1(attended) if block.post_norm else attended, out=after)
        y = after if block.post_norm else block.norm2(after)
        y = linear(linear_gelu(y, *_parameters(block.fc1)), *_parameters(block.fc2))
        after.add_(block.norm2(y) if block.post_norm else y)
    return out


def _parameters(linear: Any) -> tuple[Tensor, Tensor | None]:
    return linear.weight, linear.bias
