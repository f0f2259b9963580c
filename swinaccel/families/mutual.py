"""VRT's attention of windows of two frames, by itself: (windows, N, C) in and out.

Beside the official attention under another name (`qkv_self`) each frame's queries meet the other's keys, with
encodings of positions in place of a bias (`qkv_mut`, `position_bias`), and one projection takes both. The kernels have
the first; the second, whose windows are half as long, is PyTorch's `scaled_dot_product_attention`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._nn import scaled_dot_product_attention

from ..spec.window import Section, WindowSpec
from .renamed import Renamed
from .shared.stacked import window_arguments


class Mutual(Renamed):
    """An attention by other names that also has `qkv_mut`, and `position_bias` for the tokens of one frame."""

    name = "mutual_attention"

    def match(self, module: Any) -> WindowSpec | None:
        spec = self.named(module)
        if spec is None or spec.window[0] != 2 or not isinstance(module.qkv_mut, nn.Module):
            return None
        channels = module.proj.in_features // 2
        tokens = module.relative_position_index.shape[-1] // 2
        if tuple(module.position_bias.shape) != (1, tokens, channels):
            return None
        return dataclasses.replace(spec, head_dim=channels // spec.num_heads)

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        return *super().projections(module), module.qkv_mut

    def section(self, module: Any, *args: Any, **kwargs: Any) -> Section | str:
        section = super().section(module, *args, **kwargs)
        if isinstance(section, str):
            return section
        return dataclasses.replace(section, head_dim=section.head_dim // 2, output=lambda y: y)

    def forward(self, module: Any, attend: Any, *args: Any, **kwargs: Any) -> Tensor:
        x, mask = window_arguments(module, args, kwargs)
        mixed = super().forward(module, attend, *args, **kwargs)
        (q1, q2), (k1, k2), (v1, v2) = (
            one.unflatten(-1, (module.num_heads, -1)).transpose(1, 2).chunk(2, dim=2)
            for one in module.qkv_mut(x + module.position_bias.repeat(1, 2, 1)).chunk(3, dim=-1)
        )
        if mask is not None:
            tokens = x.shape[1] // 2
            mask = mask[:, :tokens, :tokens].to(q1.dtype).repeat(x.shape[0] // mask.shape[0], 1, 1)[:, None]
        aligned = [
            scaled_dot_product_attention(q, k, v, mask, scale=module.scale).transpose(1, 2).flatten(2)
            for q, k, v in ((q2, k1, v1), (q1, k2, v2))
        ]
        return module.proj(torch.cat((torch.cat(aligned, 1), mixed), 2))
