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
        windows, tokens, _ = x.shape
        # Each frame's keys meet the other frame's queries, all frames in one call.
        frames = module.qkv_mut(x + module.position_bias.repeat(1, 2, 1)).view(2 * windows, tokens // 2, 3, -1)
        q, k, v = frames.unflatten(3, (module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q = q.unflatten(0, (windows, 2)).flip(1).flatten(0, 1)
        if mask is not None:
            mask = mask[:, None, : tokens // 2, : tokens // 2].to(q.dtype)
            mask = mask.repeat(windows // mask.shape[0], 2, 1, 1).flatten(0, 1)[:, None]
        aligned = scaled_dot_product_attention(q, k, v, mask, scale=module.scale).transpose(1, 2)
        return module.proj(torch.cat((aligned.reshape(windows, tokens, -1), mixed), 2))
