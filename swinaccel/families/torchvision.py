"""torchvision's `ShiftedWindowAttention` and `ShiftedWindowAttentionV2`, (B, H, W, C) in and out.

Window and shift live on the attention module as lists that all blocks share; the shift, not the window, is clamped
at run time, axis by axis. Both projections are read as weights past their modules, and V2 zeroes the k part of the
qkv bias at every call, so the values there mean nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec import Geometry, Section, WindowSpec
from ._common import is_position_mlp, is_table, pair, position_bias


class Torchvision:
    name = "torchvision"
    method = "forward"

    def match(self, module: Any) -> WindowSpec | None:
        window, shift = pair(getattr(module, "window_size", None)), pair(getattr(module, "shift_size", None))
        if window is None or shift is None or not callable(getattr(module, "get_relative_position_bias", None)):
            return None
        if not isinstance(module.attention_dropout, float) or not isinstance(module.dropout, float):
            return None
        heads, cosine = module.num_heads, hasattr(module, "logit_scale")
        if cosine:
            if not is_position_mlp(module.cpb_mlp, heads) or module.logit_scale.numel() != heads:
                return None
        elif not is_table(module.relative_position_bias_table, module.relative_position_index, window, heads):
            return None
        return WindowSpec(self.name, window, shift, heads, module.qkv.in_features // heads, cosine)

    def attention(self, module: Any) -> nn.Module:
        return module

    def section(self, module: Any, x: Tensor) -> Section | str:
        if x.dim() != 4:
            return f"torchvision's window attention takes (B, H, W, C), not {x.dim()} axes"
        heads, window = module.num_heads, tuple(module.window_size)
        unclamped = Geometry((x.shape[1], x.shape[2]), window)
        shift_h, shift_w = module.shift_size
        if window[0] >= unclamped.padded[0]:
            shift_h = 0
        if window[1] >= unclamped.padded[1]:
            shift_w = 0
        cosine = hasattr(module, "logit_scale")
        if cosine:
            bias = {
                **position_bias(module.cpb_mlp, module.relative_coords_table, heads),
                "logit_scale": module.logit_scale,
            }
        else:
            bias = {
                "table": lambda: module.relative_position_bias_table,
                "sources": (module.relative_position_bias_table,),
                "scale": (x.shape[-1] // heads) ** -0.5,
            }
        return Section(
            geometry=Geometry(unclamped.size, window, (shift_h, shift_w)),
            num_heads=heads,
            head_dim=x.shape[-1] // heads,
            project=lambda y: F.linear(y, module.qkv.weight, _qkv_bias(module, cosine)),
            output=lambda y: F.dropout(
                F.linear(y, module.proj.weight, module.proj.bias), p=module.dropout, training=module.training
            ),
            padding=lambda: _qkv_bias(module, cosine),
            index=module.relative_position_index.view(window[0] * window[1], -1),
            dropout=module.attention_dropout if module.training else 0.0,
            **bias,
        )

    def forward(self, module: Any, attend: Any, x: Tensor) -> Tensor:
        return attend(x)

    def example(self, module: Any) -> tuple[Any, ...]:
        height, width = (2 * size - 1 for size in module.window_size)  # padded on both axes
        return (torch.Size((2, height, width, module.qkv.in_features)),)


def _qkv_bias(module: Any, cosine: bool) -> Tensor | None:
    bias = module.qkv.bias
    if bias is None or not cosine:
        return bias
    q_bias, k_bias, v_bias = bias.chunk(3)
    return torch.cat((q_bias, torch.zeros_like(k_bias), v_bias))
