"""The official `SwinTransformerBlock`, V1 and V2, and its many copies: (B, H * W, C) in and out.

It takes H and W from `input_resolution`, never pads, keeps its shift mask in a persistent buffer, and writes the
whole block in one forward, so the rest of the block is repeated here with the original's own modules. V1
normalises before the attention and calls `qkv`; V2 normalises after it and reads `qkv.weight`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec import SHIFT_MASK_VALUE, Geometry, Section, WindowSpec
from ._common import (
    is_plain_linear,
    is_position_mlp,
    is_table,
    pair,
    position_bias,
    separate_bias,
    zero_token,
)


class Microsoft:
    name = "microsoft"
    method = "forward"

    def match(self, module: Any) -> WindowSpec | None:
        attn = getattr(module, "attn", None)
        size, shift = getattr(module, "window_size", None), getattr(module, "shift_size", None)
        if attn is None or not isinstance(size, int) or not isinstance(shift, int):
            return None
        if pair(getattr(module, "input_resolution", None)) is None or "attn_mask" not in module._buffers:
            return None
        if pair(attn.window_size) != (size, size) or not all(
            isinstance(getattr(module, name, None), nn.Module) for name in ("norm1", "norm2", "mlp", "drop_path")
        ):
            return None
        heads, cosine = attn.num_heads, hasattr(attn, "logit_scale")
        if cosine:
            if not is_position_mlp(attn.cpb_mlp, heads) or attn.logit_scale.numel() != heads:
                return None
        elif not is_table(attn.relative_position_bias_table, attn.relative_position_index, (size, size), heads):
            return None
        return WindowSpec(self.name, (size, size), (shift, shift), heads, attn.proj.in_features // heads, cosine)

    def attention(self, module: Any) -> nn.Module:
        return module.attn

    def section(self, module: Any, x: Tensor) -> Section | str:
        attn, heads = module.attn, module.attn.num_heads
        height, width = module.input_resolution
        if x.dim() != 3 or x.shape[1] != height * width:
            return f"the input's tokens are not the block's input_resolution {height}x{width}"
        window, shift = module.window_size, module.shift_size
        if height % window or width % window:
            return f"{height}x{width} tokens do not divide into windows of {window}, and the original does not pad"
        common: dict[str, Any] = {
            "geometry": Geometry((height, width), (window, window), (shift, shift)),
            "num_heads": heads,
            "head_dim": attn.proj.in_features // heads,
            "output": lambda y: attn.proj_drop(attn.proj(y)),
            "index": attn.relative_position_index,
            "mask": module.attn_mask,
            "mask_value": 0.0 if module.attn_mask is None else SHIFT_MASK_VALUE,
            "dropout": attn.attn_drop.p if attn.training else 0.0,
        }
        if hasattr(attn, "logit_scale"):
            return Section(
                project=lambda y: F.linear(y, attn.qkv.weight, separate_bias(attn)),
                padding=lambda: separate_bias(attn),
                **position_bias(attn.cpb_mlp, attn.relative_coords_table, heads),
                logit_scale=attn.logit_scale,
                **common,
            )
        return Section(
            project=attn.qkv,
            padding=(lambda: zero_token(attn.qkv)) if is_plain_linear(attn.qkv) else None,
            table=lambda: attn.relative_position_bias_table,
            sources=(attn.relative_position_bias_table,),
            scale=attn.scale,
            **common,
        )

    def forward(self, module: Any, attend: Any, x: Tensor) -> Tensor:
        image = (x.shape[0], *module.input_resolution, x.shape[2])
        if hasattr(module.attn, "logit_scale"):
            x = x + module.drop_path(module.norm1(attend(x.view(image)).view(x.shape)))
            return x + module.drop_path(module.norm2(module.mlp(x)))
        x = x + module.drop_path(attend(module.norm1(x).view(image)).view(x.shape))
        return x + module.drop_path(module.mlp(module.norm2(x)))

    def example(self, module: Any) -> tuple[Any, ...]:
        height, width = module.input_resolution
        return (torch.Size((2, height * width, module.dim)),)
