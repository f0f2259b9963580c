"""timm's Swin and SwinV2: `SwinTransformerBlock._attn` and `SwinTransformerV2Block._attn`, (B, H, W, C) in and out.

timm rolls before it pads, keeps its shift mask in a buffer unless `dynamic_mask`, and lets the head dim differ
from C / heads. V2 reads `qkv.weight` past the module unless its bias is separate or absent.
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


class Timm:
    name = "timm"
    method = "_attn"

    def match(self, module: Any) -> WindowSpec | None:
        attn = getattr(module, "attn", None)
        window, shift = pair(getattr(module, "window_size", None)), pair(getattr(module, "shift_size", None))
        if attn is None or window is None or shift is None:
            return None
        if not hasattr(module, "target_shift_size") or not callable(getattr(module, "_attn", None)):
            return None
        heads, cosine = attn.num_heads, hasattr(attn, "logit_scale")
        if cosine:
            if not is_position_mlp(attn.cpb_mlp, heads) or attn.logit_scale.numel() != heads:
                return None
        elif not is_table(attn.relative_position_bias_table, attn.relative_position_index, window, heads):
            return None
        return WindowSpec(self.name, window, shift, heads, attn.proj.in_features // heads, cosine)

    def attention(self, module: Any) -> nn.Module:
        return module.attn

    def section(self, module: Any, x: Tensor) -> Section | str:
        attn, heads = module.attn, module.attn.num_heads
        dynamic = getattr(module, "dynamic_mask", False)
        common: dict[str, Any] = {
            "geometry": Geometry(
                (x.shape[1], x.shape[2]), tuple(module.window_size), tuple(module.shift_size), roll_first=True
            ),
            "num_heads": heads,
            "head_dim": attn.proj.in_features // heads,
            "output": lambda y: attn.proj_drop(attn.proj(y)),
            "index": attn.relative_position_index,
            "mask": None if dynamic else module.attn_mask,
            "mask_value": SHIFT_MASK_VALUE if dynamic or module.attn_mask is not None else 0.0,
            "dropout": attn.attn_drop.p if attn.training else 0.0,
        }
        if hasattr(attn, "logit_scale"):
            return Section(
                project=lambda y: _project_v2(attn, y),
                padding=_padding_v2(attn),
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
        return attend(x)

    def example(self, module: Any) -> tuple[Any, ...]:
        return (torch.Size((2, *module.input_resolution, module.dim)),)


def _calls_qkv(attn: Any) -> bool:
    return attn.q_bias is None or getattr(attn, "qkv_bias_separate", False)


def _project_v2(attn: Any, x: Tensor) -> Tensor:
    bias = separate_bias(attn)
    if not _calls_qkv(attn):
        return F.linear(x, attn.qkv.weight, bias)
    return attn.qkv(x) if bias is None else attn.qkv(x) + bias


def _padding_v2(attn: Any) -> Any:
    if _calls_qkv(attn) and not is_plain_linear(attn.qkv):
        return None

    def padding() -> Tensor | None:
        bias = separate_bias(attn)
        own = zero_token(attn.qkv) if _calls_qkv(attn) else None
        return bias if own is None else own if bias is None else own + bias

    return padding
