"""Stand-ins for Video Swin, which comes as files to copy: windows of three axes that shrink to the image at run time.

Written for the tests, like those of microsoft_models.py: the names of attributes and arguments and the arithmetic are
those of the project, since that is what it is recognised by; the code is not.
"""

from __future__ import annotations

import math

import microsoft_models as official
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def to_windows(image: Tensor, window) -> Tensor:
    """(B, depth, H, W, C) to (B * M, N, C), an axis at a time from the last."""
    for axis in (3, 2, 1):
        image = image.unflatten(axis, (-1, window[axis - 1]))
    return image.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, math.prod(window), image.shape[-1])


def from_windows(windows: Tensor, window, size) -> Tensor:
    """Undo `to_windows`."""
    grid = [length // side for length, side in zip(size, window, strict=True)]
    tiles = windows.view(-1, *grid, *window, windows.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return tiles.reshape(-1, *size, windows.shape[-1])


def clamped(size, window, shift):
    """Window and shift on an image of that size."""
    pairs = [
        (length, 0) if length <= side else (side, step) for length, side, step in zip(size, window, shift, strict=True)
    ]
    return tuple(zip(*pairs, strict=True))


def padded(size, window):
    return tuple(length + -length % side for length, side in zip(size, window, strict=True))


def stage_mask(size, window, shift) -> Tensor:
    """(M, N, N), of the stage: -100 between what only the roll brought together."""
    window, shift = clamped(size, window, shift)
    region = torch.zeros(())
    for length, side, step in zip(padded(size, window), window, shift, strict=True):
        place = torch.arange(length)
        wrapped = (place >= length - side).float() + (place >= length - step).float() * (step > 0)
        region = 4 * region[..., None] + wrapped
    windows = to_windows(region[None, ..., None], window)
    return -100.0 * (windows != windows.mT)


class WindowAttention3D(official.WindowAttention):
    """Of windows of fewer tokens it takes the first rows and columns of the index."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.scale) @ k.mT + self.bias(q.shape[-2])

    def bias(self, tokens: int) -> Tensor:
        index = self.relative_position_index[:tokens, :tokens]
        return self.relative_position_bias_table[index].permute(2, 0, 1)


class SwinTransformerBlock3D(nn.Module):
    def __init__(self, dim, num_heads, window_size, shift_size=(0, 0, 0), use_checkpoint=False, **attn):
        super().__init__()
        self.dim, self.num_heads, self.use_checkpoint = dim, num_heads, use_checkpoint
        self.window_size, self.shift_size = window_size, shift_size
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention3D(dim, window_size, num_heads, **attn)
        self.drop_path = nn.Identity()
        self.mlp = official.Mlp(dim, 2 * dim)

    def forward_part1(self, x, mask_matrix):
        size = x.shape[1:-1]
        window, shift = clamped(size, self.window_size, self.shift_size)
        missing = [
            extra for length, side in zip(size[::-1], window[::-1], strict=True) for extra in (0, -length % side)
        ]
        image = F.pad(self.norm1(x), (0, 0, *missing)).roll([-step for step in shift], (1, 2, 3))
        windows = self.attn(to_windows(image, window), mask=mask_matrix if any(shift) else None)
        image = from_windows(windows, window, image.shape[1:-1]).roll(shift, (1, 2, 3))
        return image[:, : size[0], : size[1], : size[2]]

    def forward_part2(self, x):
        return self.drop_path(self.mlp(self.norm2(x)))

    def forward(self, x, mask_matrix):
        def run(part, *args):
            return checkpoint(part, *args, use_reentrant=False) if self.use_checkpoint else part(*args)

        x = x + self.drop_path(run(self.forward_part1, x, mask_matrix))
        return x + run(self.forward_part2, x)


class BasicLayer(nn.Module):
    """Two blocks on (B, C, depth, H, W), and the mask that both are given."""

    def __init__(self, dim, num_heads, window_size, **options):
        super().__init__()
        self.window_size, self.shift_size = window_size, tuple(side // 2 for side in window_size)
        self.blocks = nn.ModuleList(
            SwinTransformerBlock3D(dim, num_heads, window_size, shift, **options)
            for shift in ((0, 0, 0), self.shift_size)
        )

    def forward(self, x):
        x = x.permute(0, 2, 3, 4, 1)
        mask = stage_mask(x.shape[1:-1], self.window_size, self.shift_size).to(x.device)
        for block in self.blocks:
            x = block(x, mask)
        return x.permute(0, 4, 1, 2, 3)
