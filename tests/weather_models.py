"""Stand-ins for weather models, which come as files to copy: Aurora's Swin of volumes, and Pangu's attention.

Written for the tests, like those of microsoft_models.py: the names of attributes and arguments and the arithmetic are
those of the project, since that is what it is recognised by; the code is not.
"""

from __future__ import annotations

import math

import microsoft_models as official
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from video_models import clamped, from_windows, to_windows


class LoRA(nn.Module):
    def __init__(self, inputs, outputs, rank=2, dropout=0.0):
        super().__init__()
        self.lora_dropout, self.scaling = nn.Dropout(dropout), 4.0 / rank
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(rank, inputs)), nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x):
        return F.linear(F.linear(self.lora_dropout(x), self.lora_A), self.lora_B) * self.scaling


class LoRARollout(nn.Module):
    """One for each of the first steps; none after them."""

    def __init__(self, inputs, outputs, steps, **options):
        super().__init__()
        self.max_steps = steps
        self.loras = nn.ModuleList(LoRA(inputs, outputs, **options) for _ in range(steps))

    def forward(self, x, step):
        return 0 if step >= self.max_steps else self.loras[step](x)


class AuroraAttention(nn.Module):
    def __init__(self, dim, window_size, num_heads, lora_steps=0, attn_drop=0.0, proj_drop=0.0, **lora):
        super().__init__()
        self.dim, self.window_size, self.num_heads, self.head_dim = dim, window_size, num_heads, dim // num_heads
        self.attn_drop = attn_drop
        self.qkv, self.proj, self.proj_drop = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Dropout(proj_drop)
        self.use_fp16_safe_attention = False
        if lora_steps:
            self.lora_proj = LoRARollout(dim, dim, lora_steps, **lora)
            self.lora_qkv = LoRARollout(dim, 3 * dim, lora_steps, **lora)
        else:
            self.lora_proj = self.lora_qkv = lambda *args, **kwargs: 0

    def forward(self, x, mask=None, rollout_step=0):
        qkv = self.qkv(x) + self.lora_qkv(x, rollout_step)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if mask is not None:
            mask = mask[:, None].repeat(len(x) // len(mask), 1, 1, 1)
        rate = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out) + self.lora_proj(out, rollout_step))


def both_sides(size, window, value):
    """How much each side of (depth, rows, columns) is padded, in F.pad's order, and what with."""
    missing = [-length % side for length, side in zip(size[::-1], window[::-1], strict=True)]
    return [0, 0, *(side for extra in missing for side in (extra // 2, extra - extra // 2))], value


def wrapped_mask(size, window, shift) -> Tensor:
    """(M, N, N), -100 between regions, of an image whose left and right meet, and which is padded after the roll."""
    region = torch.zeros(())
    for axis, (length, side, step) in enumerate(zip(size, window, shift, strict=True)):
        place = torch.arange(length)
        along = (place >= length - side).float()
        along += (place >= length - step).float() if axis < 2 else 0  # columns: what is rolled in, and its neighbours
        region = 3 * region[..., None] + along
    missing, value = both_sides(size, window, 99.0)
    windows = to_windows(F.pad(region[None, ..., None], missing, value=value), window)
    return -100.0 * (windows != windows.mT)


class AdaptiveNorm(nn.Module):
    def __init__(self, dim, context):
        super().__init__()
        self.ln, self.ln_modulation = nn.LayerNorm(dim, elementwise_affine=False), nn.Linear(context, 2 * dim)

    def forward(self, x, c):
        shift, scale = self.ln_modulation(F.silu(c))[:, None].chunk(2, -1)
        return self.ln(x) * scale + shift


class AuroraBlock(nn.Module):
    def __init__(self, dim, num_heads, context, window_size, shift_size, **options):
        super().__init__()
        self.window_size, self.shift_size = window_size, shift_size
        self.norm1, self.norm2 = AdaptiveNorm(dim, context), AdaptiveNorm(dim, context)
        self.attn = AuroraAttention(dim, window_size, num_heads, **options)
        self.drop_path, self.mlp = nn.Identity(), official.Mlp(dim, 2 * dim)

    def forward(self, x, c, res, rollout_step):
        window, shift = clamped(res, self.window_size, self.shift_size)
        image, mask = x.view(len(x), *res, x.shape[-1]), None
        if any(shift):
            image = image.roll([-step for step in shift], (1, 2, 3))
            mask = wrapped_mask(res, window, shift).to(x)
        missing, _ = both_sides(res, window, 0.0)
        image = F.pad(image, missing)
        windows = self.attn(to_windows(image, window), mask=mask, rollout_step=rollout_step)
        image = F.pad(from_windows(windows, window, image.shape[1:-1]), [-side for side in missing])
        x = x + self.drop_path(self.norm1(image.roll(shift, (1, 2, 3)).reshape(x.shape), c))
        return x + self.drop_path(self.norm2(self.mlp(x), c))


class AuroraLayer(nn.Module):
    """Two blocks, of which the second one shifts."""

    def __init__(self, dim, num_heads, window_size, context=6, **options):
        super().__init__()
        self.blocks = nn.ModuleList(
            AuroraBlock(dim, num_heads, context, window_size, shift, **options)
            for shift in ((0, 0, 0), tuple(side // 2 for side in window_size))
        )

    def forward(self, x, c, res, rollout_step=0):
        for block in self.blocks:
            x = block(x, c, res, rollout_step)
        return x


def earth_index(window) -> Tensor:
    """(N, N); each pair of places has a row, but for columns, where their distance alone counts."""
    *others, columns = torch.stack(torch.meshgrid(*map(torch.arange, window), indexing="ij")).flatten(1)
    index = columns[:, None] - columns[None, :] + window[-1] - 1
    rows = 2 * window[-1] - 1
    for side, place in zip(window[-2::-1], others[::-1], strict=True):
        index = index + rows * (place[:, None] + side * place[None, :])
        rows *= side**2
    return index


class EarthAttention(nn.Module):
    """Of windows of two or three axes; the bias table has rows of its own for each row of windows."""

    def __init__(self, dim, window_size, num_heads, type_of_windows, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.dim, self.window_size, self.num_heads = dim, window_size, num_heads
        self.type_of_windows, self.scale = type_of_windows, (dim // num_heads) ** -0.5
        rows = math.prod(side**2 for side in window_size[:-1]) * (2 * window_size[-1] - 1)
        self.earth_position_bias_table = nn.Parameter(torch.zeros(rows, type_of_windows, num_heads))
        self.register_buffer("earth_position_index", earth_index(window_size))
        self.qkv, self.attn_drop = nn.Linear(dim, 3 * dim), nn.Dropout(attn_drop)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(proj_drop)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x, mask=None):
        count = self.earth_position_index.shape[0]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        bias = self.earth_position_bias_table[self.earth_position_index.view(-1)]
        bias = bias.view(count, count, self.type_of_windows, -1).permute(3, 2, 0, 1)
        scores = (q * self.scale) @ k.mT + bias
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        out = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(out.permute(0, 2, 3, 1, 4).flatten(-2)))


def globe_windows(image: Tensor, window) -> Tensor:
    """(B, levels, rows, columns, C) to (B * columns of windows, rows of windows, N, C)."""
    windows = to_windows(image, window)
    columns = image.shape[3] // window[2]
    windows = windows.unflatten(0, (len(image), -1, columns)).transpose(1, 2)
    return windows.flatten(0, 1)


def from_globe_windows(windows: Tensor, window, size) -> Tensor:
    """Undo `globe_windows`."""
    windows = windows.unflatten(0, (-1, size[2] // window[2])).transpose(1, 2)
    return from_windows(windows.flatten(0, 2), window, size)


class EarthBlock(nn.Module):
    """Pads on both sides and then shifts; left and right meet."""

    def __init__(self, dim, size, num_heads, window_size, shift_size):
        super().__init__()
        self.size, self.window_size, self.shift_size = size, window_size, shift_size
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.missing, _ = both_sides(size, window_size, 0.0)
        self.padded = tuple(length + -length % side for length, side in zip(size, window_size, strict=True))
        rows = math.prod(length // side for length, side in zip(self.padded[:2], window_size[:2], strict=True))
        self.attn = EarthAttention(dim, window_size, num_heads, rows)
        self.mlp, mask = official.Mlp(dim, 2 * dim), None
        if any(shift_size):
            region = torch.zeros(())
            for axis, (length, side, step) in enumerate(zip(self.padded, window_size, shift_size, strict=True)):
                place = torch.arange(length)
                along = (place >= length - side).float() + (place >= length - step).float()
                region = 3 * region[..., None] + (along if axis < 2 else 0.0 * along)
            region = globe_windows(region[None, ..., None], window_size)
            mask = -100.0 * (region != region.mT)
        self.register_buffer("attn_mask", mask)

    def forward(self, x):
        image = F.pad(self.norm1(x).view(len(x), *self.size, -1), self.missing)
        windows = globe_windows(image.roll([-step for step in self.shift_size], (1, 2, 3)), self.window_size)
        image = from_globe_windows(self.attn(windows, mask=self.attn_mask), self.window_size, self.padded)
        image = F.pad(image.roll(self.shift_size, (1, 2, 3)), [-side for side in self.missing])
        x = x + image.reshape(x.shape)
        return x + self.mlp(self.norm2(x))
