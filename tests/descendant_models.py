"""Stand-ins for blocks that grew from the official one: restoration, detection, OpenMMLab, mixture of experts.

Written for the tests, like those of microsoft_models.py: the names of attributes and arguments and the arithmetic are
those of the projects named, since that is what they are recognised by; the code is not.
"""

from __future__ import annotations

import microsoft_models as official
import torch
import torch.nn.functional as F
from microsoft_models import from_windows, to_windows
from torch import Tensor, nn


def shift_mask(height: int, width: int, size: int, shift: int) -> Tensor | None:
    """(M, N, N), fp32; None without a shift."""
    if not shift:
        return None
    rows, cols = ((torch.arange(n) >= n - size).long() + (torch.arange(n) >= n - shift) for n in (height, width))
    regions = to_windows((3 * rows[:, None] + cols)[None, :, :, None], size)
    return -100.0 * (regions != regions.mT)


def attend(image: Tensor, size: int, shift: int, attention) -> Tensor:
    """`attention` over the shifted windows of an image (B, H, W, C) that they divide."""
    windows = attention(to_windows(image.roll((-shift, -shift), (1, 2)), size))
    return from_windows(windows, size, *image.shape[1:3]).roll((shift, shift), (1, 2))


def attend_padded(image: Tensor, size: int, shift: int, attention) -> Tensor:
    height, width = image.shape[1:3]
    image = F.pad(image, (0, 0, 0, -width % size, 0, -height % size))
    return attend(image, size, shift, attention)[:, :height, :width]


class SwinIRBlock(official.SwinTransformerBlock):
    """SwinIR's (V1) and Swin2SR's (V2) block: told the size, and holding the mask of the size it was made for."""

    def calculate_mask(self, x_size) -> Tensor:
        if self.shift_size:
            return shift_mask(*x_size, self.window_size, self.shift_size)
        rows, cols = (side // self.window_size for side in x_size)
        return torch.zeros(rows * cols, self.window_size**2, self.window_size**2)

    def forward(self, x, x_size):
        mask = self.attn_mask if self.input_resolution == x_size else self.calculate_mask(x_size).to(x.device)

        def branch(x: Tensor) -> Tensor:
            image = x.view(x.shape[0], *x_size, -1)
            return attend(image, self.window_size, self.shift_size, lambda w: self.attn(w, mask=mask)).reshape(x.shape)

        if self.v2:
            x = x + self.drop_path(self.norm1(branch(x)))
            return x + self.drop_path(self.norm2(self.mlp(x)))
        x = x + self.drop_path(branch(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class HatAttention(official.WindowAttention):
    """The index of the biases is an argument."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        del self.relative_position_index

    def forward(self, x, rpi, mask=None):
        self.relative_position_index = rpi.view(x.shape[1], x.shape[1])
        try:
            return super().forward(x, mask)
        finally:
            del self.relative_position_index


class HAB(nn.Module):
    """HAT's block: a branch of convolutions beside the attention."""

    def __init__(self, dim, input_resolution, num_heads, window_size, shift_size=0, conv_scale=0.3, **attn):
        super().__init__()
        if min(input_resolution) <= window_size:
            window_size, shift_size = min(input_resolution), 0
        self.dim, self.input_resolution, self.conv_scale = dim, input_resolution, conv_scale
        self.window_size, self.shift_size = window_size, shift_size
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = HatAttention(dim, (window_size, window_size), num_heads, **attn)
        self.conv_block = nn.Sequential(nn.Conv2d(dim, dim // 2, 3, 1, 1), nn.GELU(), nn.Conv2d(dim // 2, dim, 3, 1, 1))
        self.drop_path = nn.Identity()
        self.mlp = official.Mlp(dim, 2 * dim)

    def forward(self, x, x_size, rpi_sa, attn_mask):
        image = self.norm1(x).view(x.shape[0], *x_size, -1)
        local = self.conv_block(image.movedim(-1, 1)).movedim(1, -1).reshape(x.shape)
        mask = attn_mask if self.shift_size else None
        mixed = attend(image, self.window_size, self.shift_size, lambda w: self.attn(w, rpi=rpi_sa, mask=mask))
        x = x + self.drop_path(mixed.reshape(x.shape)) + self.conv_scale * local
        return x + self.drop_path(self.mlp(self.norm2(x)))


class HatStage(nn.Module):
    """Two blocks, and what HAT computes for them once a call."""

    def __init__(self, dim, input_resolution, num_heads, window_size):
        super().__init__()
        self.window_size = window_size
        self.blocks = nn.ModuleList(
            HAB(dim, input_resolution, num_heads, window_size, shift) for shift in (0, window_size // 2)
        )

    def forward(self, x, x_size):
        index = official.position_index((self.window_size, self.window_size)).to(x.device)
        mask = shift_mask(*x_size, self.window_size, self.window_size // 2).to(x.device)
        for block in self.blocks:
            x = block(x, x_size, index, mask)
        return x


class OCAB(nn.Module):
    """HAT's overlapping cross attention: a window's queries ask the keys of a larger one around it."""

    def __init__(self, dim, input_resolution, window_size, overlap_ratio, num_heads):
        super().__init__()
        self.dim, self.input_resolution = dim, input_resolution
        self.window_size, self.num_heads = window_size, num_heads
        self.scale, self.overlap_win_size = (dim // num_heads) ** -0.5, window_size + int(window_size * overlap_ratio)
        side, margin = self.overlap_win_size, (self.overlap_win_size - window_size) // 2
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), official.Mlp(dim, 2 * dim)
        self.qkv, self.proj, self.softmax = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Softmax(dim=-1)
        self.unfold = nn.Unfold(kernel_size=(side, side), stride=window_size, padding=margin)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((window_size + side - 1) ** 2, num_heads))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """(windows, heads, queries, D) of q, and of k and v with their keys, and the bias (heads, queries, keys)."""
        return self.softmax(q * self.scale @ k.mT + bias) @ v

    def forward(self, x, x_size, rpi):
        image = self.qkv(self.norm1(x)).view(x.shape[0], *x_size, -1)
        q = to_windows(image[..., : self.dim], self.window_size)
        around = self.unfold(image[..., self.dim :].movedim(-1, 1)).unflatten(1, (2, self.dim, -1))
        k, v = around.permute(1, 0, 4, 3, 2).flatten(1, 2)
        q, k, v = (one.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for one in (q, k, v))
        bias = self.relative_position_bias_table[rpi].permute(2, 0, 1)
        windows = self.mixed(q, k, v, bias).transpose(1, 2).flatten(2)
        x = x + self.proj(from_windows(windows, self.window_size, *x_size).flatten(1, 2))
        return x + self.mlp(self.norm2(x))


def overlapping_index(side: int, window_size: int) -> Tensor:
    """(queries, keys): row of the bias table."""
    keys, queries = torch.arange(side), torch.arange(window_size)
    along = keys[None, :] - queries[:, None] + window_size - 1
    index = along[:, None, :, None] * (side + window_size - 1) + along[None, :, None, :]
    return index.flatten(2).flatten(0, 1)


class MoEAttention(official.WindowAttentionV2):
    """Swin-MoE's: V2's MLP for the biases without its sigmoid, V1's scores, a whole bias of qkv."""

    def __init__(self, dim, window_size, num_heads, qkv_bias=True, qk_scale=None, **options):
        super().__init__(dim, window_size, num_heads, False, **options)
        del self.logit_scale, self.q_bias, self.v_bias
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.scale = qk_scale or (dim // num_heads) ** -0.5

    def packed(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.scale) @ k.mT + self.bias()

    def bias(self) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return table[self.relative_position_index].permute(2, 0, 1)


class Experts(nn.Module):
    """A token goes to one of two MLPs; the second output is a balancing loss."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.gate = nn.Linear(dim, 2)
        self.experts = nn.ModuleList(official.Mlp(dim, hidden) for _ in range(2))

    def forward(self, x):
        share = self.gate(x).softmax(-1)
        best = share.argmax(-1, keepdim=True)
        out = torch.where(best == 0, self.experts[0](x), self.experts[1](x))
        return out * share.gather(-1, best), share.flatten(0, -2).mean(0).square().sum()


class MoEBlock(official.SwinTransformerBlock):
    def __init__(self, dim, input_resolution, num_heads, window_size=7, shift_size=0, is_moe=False, **attn):
        super().__init__(dim, input_resolution, num_heads, window_size, shift_size)
        self.is_moe = is_moe
        self.attn = MoEAttention(dim, (self.window_size, self.window_size), num_heads, **attn)
        if is_moe:
            self.mlp = Experts(dim, 2 * dim)

    def forward(self, x):
        x = x + self.drop_path(self.attend(self.norm1(x)))
        if not self.is_moe:
            return x + self.drop_path(self.mlp(self.norm2(x)))
        mixed, loss = self.mlp(self.norm2(x))
        return x + self.drop_path(mixed), loss


class DetectionBlock(nn.Module):
    """The block of detection and segmentation: H and W are set by the stage, which makes the mask as well."""

    def __init__(self, dim, num_heads, window_size=7, shift_size=0, **attn):
        super().__init__()
        self.dim, self.window_size, self.shift_size = dim, window_size, shift_size
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = official.WindowAttention(dim, (window_size, window_size), num_heads, **attn)
        self.drop_path = nn.Identity()
        self.mlp = official.Mlp(dim, 2 * dim)
        self.H = None
        self.W = None

    def forward(self, x, mask_matrix):
        assert x.shape[1] == self.H * self.W, "input feature has wrong size"
        mask = mask_matrix if self.shift_size else None
        image = self.norm1(x).view(x.shape[0], self.H, self.W, -1)
        mixed = attend_padded(image, self.window_size, self.shift_size, lambda w: self.attn(w, mask=mask))
        x = x + self.drop_path(mixed.reshape(x.shape))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DetectionStage(nn.Module):
    """Two blocks, which both get the mask."""

    def __init__(self, dim, num_heads, window_size):
        super().__init__()
        self.window_size, self.shift_size = window_size, window_size // 2
        self.blocks = nn.ModuleList(
            DetectionBlock(dim, num_heads, window_size, shift) for shift in (0, self.shift_size)
        )

    def forward(self, x, H, W):
        size = self.window_size
        mask = shift_mask(H + -H % size, W + -W % size, size, self.shift_size).to(x.device)
        for block in self.blocks:
            block.H, block.W = H, W
            x = block(x, mask)
        return x


class WindowMSA(official.WindowAttention):
    """OpenMMLab's, with `embed_dims` in place of `dim`."""

    def __init__(self, embed_dims, *args, **options):
        super().__init__(embed_dims, *args, **options)
        self.embed_dims = self.__dict__.pop("dim")


class ShiftWindowMSA(nn.Module):
    """mmdet's; with `pad_small_map` mmpretrain's, which drops the shift, not the window, of a small image."""

    def __init__(self, embed_dims, num_heads, window_size, shift_size=0, pad_small_map=None, v2=False, **attn):
        super().__init__()
        self.window_size, self.shift_size = window_size, shift_size
        if pad_small_map is not None:
            self.pad_small_map = pad_small_map
        kind = official.WindowAttentionV2 if v2 else WindowMSA
        self.w_msa = kind(embed_dims, (window_size, window_size), num_heads, **attn)
        self.drop = nn.Dropout(0.1)

    def forward(self, query, hw_shape):
        height, width = hw_shape
        assert query.shape[1] == height * width, "input feature has wrong size"
        shift, size = self.shift_size, self.window_size
        if not getattr(self, "pad_small_map", True):
            assert min(hw_shape) >= size, "smaller than the window"
            shift = 0 if min(hw_shape) == size else shift
        mask = shift_mask(height + -height % size, width + -width % size, size, shift)
        mask = None if mask is None else mask.to(query.device)
        image = query.view(query.shape[0], height, width, -1)
        return self.drop(attend_padded(image, size, shift, lambda w: self.w_msa(w, mask=mask)).reshape(query.shape))


class SwinBlock(nn.Module):
    """mmdet's block around it."""

    def __init__(self, embed_dims, num_heads, window_size, shift=False, **options):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(embed_dims), nn.LayerNorm(embed_dims)
        self.attn = ShiftWindowMSA(embed_dims, num_heads, window_size, window_size // 2 if shift else 0, **options)
        self.ffn = official.Mlp(embed_dims, 2 * embed_dims)

    def forward(self, x, hw_shape):
        x = x + self.attn(self.norm1(x), hw_shape)
        return x + self.ffn(self.norm2(x))


class UnknownBlock(nn.Module):
    """Nobody's block around an official attention: gated, and on (B, C, H, W)."""

    def __init__(self, dim, num_heads, window_size, shift_size=0, kind=official.WindowAttention, **attn):
        super().__init__()
        self.size, self.shift = window_size, shift_size
        self.gate = nn.Linear(dim, dim)
        self.attn = kind(dim, (window_size, window_size), num_heads, **attn)

    def forward(self, x):
        image = x.movedim(1, -1)
        mask = shift_mask(*image.shape[1:3], self.size, self.shift)
        mask = None if mask is None else mask.to(x)
        mixed = attend(image, self.size, self.shift, lambda w: self.attn(w, mask=mask))
        return x + (mixed * self.gate(image).sigmoid()).movedim(-1, 1)
