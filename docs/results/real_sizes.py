"""Attentions and blocks that were found in public code, at the sizes that their users have.

Each is code of the same structure (tests/changed_models.py and its like): an attention, or a block with a shift.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinaccel import functional

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tests"))

import bias_models as biased
import changed_models as changed
import descendant_models as descendants
import microsoft_models as official
import video_models as videos
import weather_models as weather

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # a module, and a call's arguments


class NnFormerAttention(videos.WindowAttention3D):
    """nnFormer's, which has an argument that is None."""

    def forward(self, x: Tensor, mask: Tensor | None = None, pos_embed: Tensor | None = None) -> Tensor:
        """Attend, as its base does."""
        return super().forward(x, mask)


class PaddedQueries(descendants.OCAB):
    """HAT's overlapping attention by our function, which takes as many queries as keys."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Attend with queries of zeros below the others."""
        rest = (0, 0, 0, k.shape[2] - q.shape[2])
        out = functional.window_attention(F.pad(q, rest), k, v, F.pad(bias, rest), scale=self.scale)
        return out[:, :, : q.shape[2]]


class BySdpa(descendants.OCAB):
    """The same by PyTorch's function."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Attend with the bias for a mask."""
        return F.scaled_dot_product_attention(q, k, v, bias[None].expand(len(q), -1, -1, -1), scale=self.scale)


class Row(NamedTuple):
    """What is timed: `make(row)` gives it, and where `by_hand` is given that class stands for what accelerate does."""

    name: str
    make: Callable[[Row], Made]
    dim: int
    heads: int
    size: tuple[int, ...]
    window: tuple[int, ...]
    batch: int
    by_hand: type | None = None

    @property
    def shift(self) -> tuple[int, ...]:
        """Return half a window, along the axes that hold more than one."""
        return tuple(side // 2 if length > side else 0 for length, side in zip(self.size, self.window, strict=True))

    def mask(self) -> Tensor | None:
        """Return that of the shift, (M, N, N)."""
        if not any(self.shift):
            return None
        make: Any = biased.rectangular_mask if len(self.window) == 2 else videos.stage_mask
        return make(self.size, self.window, self.shift)

    def small(self) -> Row:
        """Return it with few and small windows, for a CPU."""
        is_square = len(set(self.window)) == 1
        window = tuple(min(side, 4 if is_square else 2 + place) for place, side in enumerate(self.window, 1))
        size, heads = tuple(2 * side for side in window), min(self.heads, 2)
        return self._replace(dim=8 * heads, heads=heads, size=size, window=window, batch=1)


def alone(row: Row, kind: Callable[..., nn.Module], mask: str = "mask", side: bool = False, **keywords: Any) -> Made:
    """Make an attention that is given windows and their mask; `side`: its window is one number."""
    padded = [-(-length // one) for length, one in zip(row.size, row.window, strict=True)]
    windows = torch.randn(row.batch * math.prod(padded), math.prod(row.window), row.dim)
    model = kind(row.dim, row.window[0] if side else row.window, row.heads)
    found = row._replace(size=tuple(n * one for n, one in zip(padded, row.window, strict=True))).mask()
    return model, (windows,), {mask: found, **keywords}


def birefnet(row: Row) -> Made:
    """Make a block of BiRefNet's, which is handed the mask of every window."""
    side = row.window[0]
    block = changed.SdpaBlock(row.dim, row.heads, side, row.shift[0])
    block.H, block.W = row.size
    padded = tuple(length + -length % side for length in row.size)
    mask = row._replace(size=padded).mask()
    mask = None if mask is None else mask.masked_fill(mask != 0, -math.inf)
    return block, (torch.randn(row.batch, math.prod(row.size), row.dim), mask), {}


def volume(row: Row) -> Made:
    """Make a block on (B, depth, H, W, C)."""
    block = videos.SwinTransformerBlock3D(row.dim, row.heads, row.window, row.shift)
    return block, (torch.randn(row.batch, *row.size, row.dim), row.mask()), {}


def hat(row: Row) -> Made:
    """Make a hybrid attention block."""
    block = descendants.HAB(row.dim, row.size, row.heads, row.window[0], row.shift[0])
    x = torch.randn(row.batch, math.prod(row.size), row.dim)
    return block, (x, row.size, official.position_index(row.window), row.mask()), {}


def overlapping(row: Row) -> Made:
    """Make a block of HAT's with overlapping cross attention."""
    block = descendants.OCAB(row.dim, row.size, row.window[0], 0.5, row.heads)
    index = descendants.overlapping_index(block.overlap_win_size, row.window[0])
    return block, (torch.randn(row.batch, math.prod(row.size), row.dim), row.size, index), {}


def grl(row: Row) -> Made:
    """Make an attention that rolls and cuts for itself."""
    model = changed.RollingAttention(row.dim, row.size, row.heads, row.window[0], row.shift[0])
    return model, (torch.randn(row.batch, math.prod(row.size), row.dim), row.size), {}


def cr(row: Row) -> Made:
    """Make a block of SwinV2-CR without a bias."""
    block = biased.cr_without_bias(row.dim, row.heads, row.size, row.window[0], row.shift[0])
    return block, (torch.randn(row.batch, *row.size, row.dim),), {}


def htsat(row: Row) -> Made:
    """Make two blocks that hand on their attention weights, which nobody reads."""
    stage = changed.WeightsStage(row.dim, row.size, row.heads, row.window[0])
    return changed.Unread(stage), (torch.randn(row.batch, math.prod(row.size), row.dim),), {}


def pangu(row: Row) -> Made:
    """Make Pangu's attention with the mask of its shifted block."""
    block = weather.EarthBlock(row.dim, row.size, row.heads, row.window, row.shift)
    kept = math.prod(length // side for length, side in zip(block.padded[:2], row.window[:2], strict=True))
    columns = block.padded[2] // row.window[2]
    x = torch.randn(row.batch * columns, kept, math.prod(row.window), row.dim)
    return block.attn, (x,), {"mask": block.attn_mask}


def half(row: Row) -> Made:
    """Make one half of DAT's and RGT's, which is handed q, k and v."""
    model = biased.SpatialAttention(row.dim, row.window, row.heads)
    return model, (torch.randn(3, row.batch, math.prod(row.size), row.dim), *row.size, row.mask()), {}


def of(kind: Any) -> Callable[[Row], Made]:
    """Return what makes an attention of a class."""
    return partial(alone, kind=kind)


separate: Any = partial(alone, kind=changed.SeparateAttention, mask="attention_mask", side=True)
aurora: Any = partial(alone, kind=partial(weather.AuroraAttention, lora_steps=2, rank=8), rollout_step=1)

ROWS = (  # dear ones in the middle, which come alone where there are 16 processes
    Row("BiRefNet, SDPA, block of stage 1", birefnet, 192, 6, (256, 256), (12, 12), 1),
    Row("BiRefNet, SDPA, block of stage 3", birefnet, 768, 24, (64, 64), (12, 12), 1),
    Row("UniMER-Swin, separate q, k, v, attention", separate, 256, 8, (24, 84), (7, 7), 16),
    Row("nnFormer, attention", of(NnFormerAttention), 192, 6, (32, 32, 32), (4, 4, 4), 2),
    Row("Feature-Distillation rpe_mlp, attention", of(changed.FirstV2Attention), 256, 8, (28, 28), (14, 14), 32),
    Row("GRL, attention that rolls", grl, 180, 6, (64, 64), (8, 8), 8),
    Row("SwinUNETR 7x7x7, block, 48 channels", volume, 48, 3, (48, 48, 48), (7, 7, 7), 2),
    Row("SwinUNETR 7x7x7, block, 96 channels", volume, 96, 6, (24, 24, 24), (7, 7, 7), 4),
    Row("SwinUNETR 7x7x7, block, 192 channels", volume, 192, 12, (12, 12, 12), (7, 7, 7), 4),
    Row("SwinUNETR 7x7x7, block, 384 channels", volume, 384, 24, (14, 14, 14), (7, 7, 7), 4),
    Row("MONAI, flash branch, attention", of(changed.OwnScaleAttention), 48, 3, (48, 48, 48), (7, 7, 7), 1),
    Row("VRT self, attention", of(changed.VrtAttention), 120, 6, (6, 64, 64), (6, 8, 8), 2),
    Row("VRT self and mutual, attention", of(changed.MutualAttention), 120, 6, (6, 64, 64), (2, 8, 8), 2),
    Row("Aurora with LoRA, attention", aurora, 512, 8, (4, 90, 180), (2, 6, 12), 1),
    Row("Pangu EarthAttention3D, attention", pangu, 192, 6, (8, 181, 360), (2, 6, 12), 1),
    Row("HAT, block", hat, 180, 6, (64, 64), (16, 16), 4),
    Row("Uformer, attention, 1 head", of(changed.UformerAttention), 32, 1, (256, 256), (8, 8), 2),
    Row("Uformer, attention, 8 heads", of(changed.UformerAttention), 256, 8, (32, 32), (8, 8), 16),
    Row("SwinV2-CR without its bias, block", cr, 256, 8, (28, 28), (7, 7), 32),
    Row("HTSAT, two blocks of stage 1", htsat, 96, 4, (64, 64), (8, 8), 16),
    Row("DAT and RGT, half 8x32, attention", half, 90, 3, (64, 64), (8, 32), 8),
    Row("DAT and RGT, half 32x8, attention", half, 90, 3, (64, 64), (32, 8), 8),
    Row("HAT OCAB, not accelerated: padded queries", overlapping, 180, 6, (64, 64), (16, 16), 4, PaddedQueries),
    Row("HAT OCAB, not accelerated: PyTorch's SDPA", overlapping, 180, 6, (64, 64), (16, 16), 4, BySdpa),
)
