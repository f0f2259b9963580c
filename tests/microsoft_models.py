"""Stand-ins for the official Swin blocks, which come as files to copy and not as a package.

Written for the tests from the papers and from what checkpoints need: attribute, parameter and buffer names are those
of the official code, since structure is what a model is recognised by; the code is not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def to_windows(image: Tensor, size: int) -> Tensor:
    """(B, H, W, C) to (B * M, size * size, C)."""
    _, height, width, channels = image.shape
    tiles = image.unflatten(1, (height // size, size)).unflatten(3, (width // size, size))
    return tiles.transpose(2, 3).reshape(-1, size * size, channels)


def from_windows(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """Undo `to_windows`."""
    tiles = windows.view(-1, height // size, width // size, size, size, windows.shape[-1])
    return tiles.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


def position_index(window: tuple[int, ...]) -> Tensor:
    """(N, N): row of the bias table for (query, key)."""
    index = torch.zeros((), dtype=torch.long)
    for place, side in zip(torch.meshgrid(*map(torch.arange, window), indexing="ij"), window, strict=True):
        along = place.flatten()
        index = index * (2 * side - 1) + along[:, None] - along[None, :] + side - 1
    return index


def log_coordinates(window: tuple[int, int], pretrained: tuple[int, int]) -> Tensor:
    """(1, 2h - 1, 2w - 1, 2): log-spaced offsets."""
    spans = [(p if pretrained[0] > 0 else w) - 1 for p, w in zip(pretrained, window, strict=True)]
    axes = [torch.arange(1 - w, w) * 8.0 / span for w, span in zip(window, spans, strict=True)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[None]
    return grid.sign() * grid.abs().add(1).log2() / 3


class WindowAttention(nn.Module):
    """V1."""

    def __init__(self, dim, window_size, num_heads, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.dim, self.window_size, self.num_heads = dim, window_size, num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        rows = math.prod(2 * side - 1 for side in window_size)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        self.register_buffer("relative_position_index", position_index(window_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.softmax = nn.Softmax(dim=-1)

    def packed(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.scale) @ k.mT + self.bias()

    def bias(self) -> Tensor:
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.packed(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.scores(q, k)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)
        mixed = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


class WindowAttentionV2(WindowAttention):
    """V2: cosine scores, and a bias from an MLP over coordinates."""

    def __init__(
        self,
        dim,
        window_size,
        num_heads,
        qkv_bias=True,
        attn_drop=0.0,
        proj_drop=0.0,
        pretrained_window_size=(0, 0),
    ):
        super().__init__(dim, window_size, num_heads, False, None, attn_drop, proj_drop)
        del self.relative_position_bias_table, self.scale
        self.pretrained_window_size = pretrained_window_size
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False))
        self.register_buffer("relative_coords_table", log_coordinates(window_size, pretrained_window_size))
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None

    def packed(self, x: Tensor) -> Tensor:
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        return F.linear(x, self.qkv.weight, bias)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        return cosine * self.logit_scale.clamp(max=math.log(100.0)).exp() + self.bias()

    def bias(self) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return 16 * table[self.relative_position_index].permute(2, 0, 1).sigmoid()


class Mlp(nn.Module):
    def __init__(self, dim, hidden, drop=0.0):
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = (
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, dim),
            nn.Dropout(drop),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SwinTransformerBlock(nn.Module):
    """V1, normalised before; with `v2=True` V2, normalised after."""

    def __init__(
        self,
        dim,
        input_resolution,
        num_heads,
        window_size=7,
        shift_size=0,
        mlp_ratio=4.0,
        v2=False,
        drop=0.0,
        **attn,
    ):
        super().__init__()
        self.dim, self.input_resolution, self.num_heads, self.mlp_ratio = (
            dim,
            input_resolution,
            num_heads,
            mlp_ratio,
        )
        if min(input_resolution) <= window_size:
            window_size, shift_size = min(input_resolution), 0
        self.window_size, self.shift_size = window_size, shift_size
        self.v2 = v2
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        kind = WindowAttentionV2 if v2 else WindowAttention
        self.attn = kind(dim, (window_size, window_size), num_heads, proj_drop=drop, **attn)
        self.drop_path = nn.Identity()
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.fused_window_process = False
        self.register_buffer("attn_mask", self.shift_mask() if self.shift_size else None)

    def shift_mask(self) -> Tensor:
        """(M, N, N): -100 between tokens of different regions."""
        size, shift = self.window_size, self.shift_size
        regions = []
        for length in self.input_resolution:
            places = torch.arange(length)
            regions.append((places >= length - size).int() + (places >= length - shift).int())
        windows = to_windows((3 * regions[0][:, None] + regions[1][None, :])[None, :, :, None], size)
        return (windows != windows.mT).float() * -100.0

    def attend(self, x: Tensor) -> Tensor:
        (height, width), shift = self.input_resolution, self.shift_size
        image = x.view(x.shape[0], height, width, -1).roll((-shift, -shift), (1, 2))
        windows = self.attn(to_windows(image, self.window_size), mask=self.attn_mask)
        image = from_windows(windows, self.window_size, height, width)
        return image.roll((shift, shift), (1, 2)).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.input_resolution
        assert x.shape[1] == height * width, "input feature has wrong size"
        if self.v2:
            x = x + self.drop_path(self.norm1(self.attend(x)))
            return x + self.drop_path(self.norm2(self.mlp(x)))
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Patches of an image as rows of channels, with a norm where one is given: (B, C, H, W) to (B, N, dim)."""

    def __init__(self, img_size, patch_size=4, in_chans=3, embed_dim=16, norm_layer=None):
        super().__init__()
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.patches_resolution = [img_size // patch_size] * 2
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = None if norm_layer is None else norm_layer(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        assert tuple(x.shape[2:]) == self.img_size, "the image is not of the model's size"
        x = self.proj(x).flatten(2).mT
        return x if self.norm is None else self.norm(x)
