"""What comes as files to copy: stand-ins of the same structure."""

from __future__ import annotations

import math
from typing import Any

import bias_models as biased
import changed_models as changed
import descendant_models as descendants
import microsoft_models as official
import torch
import video_models as videos
import weather_models as weather
from torch import Tensor, nn

from zoo.entries import Call, entry


class Blocks(nn.Module):
    """Blocks in turn, on the same further arguments."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *args: Any) -> Any:
        for block in self.blocks:
            x = block(x, *args)
        return x


def tokens(batch: int, size: tuple[int, int], dim: int) -> Tensor:
    return torch.randn(batch, size[0] * size[1], dim)


for _title, _v2 in (("Swin", False), ("SwinV2", True)):

    @entry("Microsoft", _title)
    def _microsoft(real: bool, batch: int, v2: bool = _v2) -> Call:
        dim, heads, size, window = (256, 8, (28, 28), 7) if real else (16, 2, (8, 8), 4)
        kind = official.SwinTransformerBlock
        blocks = (kind(dim, size, heads, window, shift, v2=v2) for shift in (0, window // 2))
        return Call(Blocks(*blocks), (tokens(batch, size, dim),))


@entry("Microsoft", "Swin-MoE")
def _moe(real: bool, batch: int) -> Call:
    dim, heads, size, window = (384, 12, (14, 14), 7) if real else (16, 2, (8, 8), 4)
    kind = descendants.MoEBlock
    blocks = kind(dim, size, heads, window), kind(dim, size, heads, window, window // 2, is_moe=True)
    return Call(Blocks(*blocks), (tokens(batch, size, dim),))


for _title, _v2 in (("SwinIR", False), ("Swin2SR", True)):

    @entry("Restoration", _title)
    def _swinir(real: bool, batch: int, v2: bool = _v2) -> Call:
        dim, heads, size, window = (180, 6, (64, 64), 8) if real else (12, 2, (8, 8), 4)
        blocks = (descendants.SwinIRBlock(dim, size, heads, window, shift, 2, v2=v2) for shift in (0, window // 2))
        size = size if real else (8, 12)
        return Call(Blocks(*blocks), (tokens(batch, size, dim), size))


@entry("Restoration", "HAT")
def _hat(real: bool, batch: int) -> Call:
    dim, heads, size, window = (180, 6, (64, 64), 16) if real else (12, 2, (8, 12), 4)
    return Call(descendants.HatStage(dim, size, heads, window), (tokens(batch, size, dim), size))


@entry("Detection", "block with `mask_matrix`, `H` and `W`")
def _detection(real: bool, batch: int) -> Call:
    dim, heads, size, window = (192, 6, (100, 168), 7) if real else (16, 2, (9, 10), 4)
    return Call(descendants.DetectionStage(dim, heads, window), (tokens(batch, size, dim), *size))


@entry("BiRefNet", "block with `scaled_dot_product_attention`")
def _birefnet(real: bool, batch: int) -> Call:
    dim, heads, size, window = (192, 6, (128, 128), 12) if real else (16, 2, (9, 10), 4)
    return Call(changed.SdpaStage(dim, heads, window), (tokens(batch, size, dim), *size))


@entry("CLAP (HTSAT)", "block that returns attention weights")
def _htsat(real: bool, batch: int) -> Call:
    dim, heads, size, window = (192, 8, (32, 32), 8) if real else (16, 2, (8, 8), 4)
    return Call(changed.Unread(changed.WeightsStage(dim, size, heads, window)), (tokens(batch, size, dim),))


@entry("Restoration", "GRL, attention that rolls")
def _grl(real: bool, batch: int) -> Call:
    dim, heads, size, window = (180, 6, (64, 64), 8) if real else (12, 2, (8, 8), 4)
    blocks = (changed.RollingAttention(dim, size, heads, window, shift) for shift in (0, window // 2))
    return Call(Blocks(*blocks), (tokens(batch, size, dim), size))


@entry("Restoration", "DAT and RGT, halves in rectangular windows")
def _halves(real: bool, batch: int) -> Call:
    dim, heads, size, window = (180, 6, (64, 64), (8, 32)) if real else (16, 4, (7, 9), (2, 4))
    blocks = (biased.HalvesAttention(dim, heads, window, shifted) for shifted in (False, True))
    return Call(Blocks(*blocks), (tokens(batch, size, dim), *size))


@entry("MinerU", "UniMER-Swin layer")
def _unimer(real: bool, batch: int) -> Call:
    dim, heads, size, window = (256, 8, (48, 168), 7) if real else (16, 2, (9, 10), 4)
    layers = (changed.UnimerLayer(dim, heads, window, shift) for shift in (0, window // 2))
    return Call(changed.First(*layers), (tokens(batch, size, dim), size))


for _title, _kind in (
    ("Uformer `win_size`, `to_q`, `to_kv`", "UformerAttention"),
    ("VRT `qkv_self`", "VrtAttention"),
    ("SwinV2 with `rpe_mlp`", "FirstV2Attention"),
):

    @entry("Unknown block", _title)
    def _renamed(real: bool, batch: int, kind: str = _kind) -> Call:
        dim, heads, size, window = (256, 8, (28, 28), 7) if real else (16, 2, (8, 8), 4)
        made = getattr(changed, kind)
        blocks = (descendants.UnknownBlock(dim, heads, window, shift, kind=made) for shift in (0, window // 2))
        return Call(nn.Sequential(*blocks), (torch.randn(batch, dim, *size),))


@entry("Unknown block", "VRT `qkv_self` and `qkv_mut`")
def _mutual(real: bool, batch: int) -> Call:
    dim, heads, windows, window = (120, 6, 64, (2, 8, 8)) if real else (16, 2, 4, (2, 3, 4))
    blocks = (changed.MutualAttention(dim, window, heads) for _ in range(2))
    return Call(Blocks(*blocks), (torch.randn(batch * windows, math.prod(window), dim),))


@entry("Video Swin", "block of three axes")
def _video(real: bool, batch: int) -> Call:
    dim, heads, size, window = (96, 3, (16, 56, 56), (8, 7, 7)) if real else (16, 2, (5, 9, 6), (2, 4, 4))
    return Call(videos.BasicLayer(dim, heads, window), (torch.randn(batch, dim, *size),))


@entry("Weather", "Aurora")
def _aurora(real: bool, batch: int) -> Call:
    dim, heads, size, window = (512, 8, (4, 90, 180), (2, 6, 12)) if real else (16, 2, (3, 7, 9), (2, 3, 4))
    model = weather.AuroraLayer(dim, heads, window, lora_steps=2, rank=8)
    return Call(model, (torch.randn(batch, math.prod(size), dim), torch.randn(batch, 6), size, 1))


@entry("Weather", "Pangu's `EarthAttention3D`")
def _pangu(real: bool, batch: int) -> Call:
    dim, heads, size, window = (192, 6, (8, 181, 360), (2, 6, 12)) if real else (16, 2, (3, 7, 9), (2, 3, 4))
    blocks = (
        weather.EarthBlock(dim, size, heads, window, shift)
        for shift in ((0, 0, 0), tuple(side // 2 for side in window))
    )
    return Call(nn.Sequential(*blocks), (torch.randn(batch, math.prod(size), dim),))


for _title, _options in (("mmdet", {}), ("mmpretrain", {"pad_small_map": False}), ("mmpretrain V2", {"v2": True})):

    @entry("OpenMMLab", f"{_title} `ShiftWindowMSA`")
    def _openmmlab(real: bool, batch: int, options: Any = _options) -> Call:
        dim, heads, size, window = (192, 6, (100, 168), 7) if real else (16, 2, (9, 10), 4)
        blocks = (descendants.SwinBlock(dim, heads, window, shift, **options) for shift in (False, True))
        return Call(Blocks(*blocks), (tokens(batch, size, dim), size))


for _title, _kind in (("V1", official.WindowAttention), ("V2", official.WindowAttentionV2)):

    @entry("Unknown block", f"official `WindowAttention`, {_title}")
    def _unknown(real: bool, batch: int, kind: Any = _kind) -> Call:
        dim, heads, size, window = (256, 8, (28, 28), 7) if real else (16, 2, (8, 8), 4)
        blocks = (descendants.UnknownBlock(dim, heads, window, shift, kind=kind) for shift in (0, window // 2))
        return Call(nn.Sequential(*blocks), (torch.randn(batch, dim, *size),))
