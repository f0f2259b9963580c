"""Stand-ins, as in changed_models.py, without a bias, or with one that an MLP draws for windows that stand and lie."""

from __future__ import annotations

import microsoft_models as official
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cr_without_bias(dim, num_heads, size, window_size, shift_size=0):
    """A block of timm's SwinV2-CR whose attention has no bias, as weather models have it."""
    from timm.models import swin_transformer_v2_cr as library

    class Unplaced(library.WindowMultiHeadAttention):
        def __init__(self, *args):
            super().__init__(*args)
            del self.meta_mlp, self.relative_coordinates_log

        def _relative_positional_encodings(self):
            return 0.0

    sides = (window_size, window_size)
    block = library.SwinTransformerV2CrBlock(dim, num_heads, size, sides, (shift_size, shift_size))
    block.attn = Unplaced(dim, num_heads, sides)
    return block


class DynamicBias(nn.Module):
    """CrossFormer's MLP from positions to biases."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.pos_proj = nn.Linear(2, dim)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(dim), nn.ReLU(inplace=True), nn.Linear(dim, width))
            for width in (dim, dim, num_heads)
        )

    def forward(self, biases):
        return self.pos3(self.pos2(self.pos1(self.pos_proj(biases))))


class SpatialAttention(nn.Module):
    """DAT's, of one half of the channels: it is handed q, k and v, and has no projections."""

    def __init__(self, dim, window, num_heads, attn_drop=0.0):
        super().__init__()
        self.dim, self.num_heads, self.scale, self.position_bias = dim, num_heads, (dim // num_heads) ** -0.5, True
        self.H_sp, self.W_sp = window
        self.pos = DynamicBias(4, num_heads)
        grid = torch.meshgrid(*(torch.arange(1 - side, side) for side in window), indexing="ij")
        self.register_buffer("rpe_biases", torch.stack(grid, -1).flatten(0, 1).float())
        self.register_buffer("relative_position_index", official.position_index(window))
        self.attn_drop = nn.Dropout(attn_drop)

    def windows(self, x: Tensor, H: int, W: int) -> Tensor:
        """(B, H * W, C) to (windows, heads, N, D)."""
        x = x.unflatten(1, (H // self.H_sp, self.H_sp, W // self.W_sp, self.W_sp)).transpose(2, 3)
        return x.flatten(3, 4).flatten(0, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, qkv, H, W, mask=None):
        q, k, v = (self.windows(one, H, W) for one in qkv)
        scores = q * self.scale @ k.mT
        if self.position_bias:
            scores = scores + self.pos(self.rpe_biases)[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        mixed = self.attn_drop(scores.softmax(-1, dtype=scores.dtype)) @ v
        image = mixed.transpose(1, 2).flatten(2)
        grid = -1, H // self.H_sp, W // self.W_sp, self.H_sp, self.W_sp
        return image.unflatten(0, grid[:3]).unflatten(3, grid[3:]).transpose(2, 3).flatten(1, 2).flatten(2, 3)


class HalvesAttention(nn.Module):
    """What is around two of them: a projection, padding, a roll, and two halves of the channels."""

    def __init__(self, dim, num_heads, split_size, shifted, **options):
        super().__init__()
        self.split_size, self.shift = split_size, tuple(side // 2 for side in split_size) if shifted else (0, 0)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attns = nn.ModuleList(
            SpatialAttention(dim // 2, window, num_heads // 2, **options) for window in (split_size, split_size[::-1])
        )

    def forward(self, x, H, W):
        side = max(self.split_size)
        qkv = self.qkv(x).unflatten(-1, (3, -1)).movedim(2, 0).unflatten(2, (H, W))
        qkv = F.pad(qkv, (0, 0, 0, -W % side, 0, -H % side))
        found = []
        for place, half in enumerate(qkv.chunk(2, -1)):
            window, shift = ((self.split_size, self.shift), (self.split_size[::-1], self.shift[::-1]))[place]
            size = half.shape[2:4]
            rolled = half.roll((-shift[0], -shift[1]), (2, 3)).flatten(2, 3)
            mask = rectangular_mask(size, window, shift)
            image = self.attns[place](rolled, *size, mask=None if mask is None else mask.to(x))
            found.append(image.roll(shift, (1, 2))[:, :H, :W])
        return self.proj(torch.cat(found, -1).flatten(1, 2))


def rectangular_mask(size, window, shift) -> Tensor | None:
    """(M, N, N); None without a shift."""
    if not any(shift):
        return None
    axes = zip(size, window, shift, strict=True)
    rows, cols = ((torch.arange(n) >= n - w).long() + (torch.arange(n) >= n - s) for n, w, s in axes)
    regions = 3 * rows[:, None] + cols
    (height, width), (h, w) = size, window
    regions = regions.view(height // h, h, width // w, w).transpose(1, 2).reshape(-1, 1, h * w)
    return -100.0 * (regions != regions.mT)
