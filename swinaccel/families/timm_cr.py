"""timm's SwinV2-CR: SwinV2 with a bias of its own, an MLP over every pair of tokens, neither normalised nor bounded.

The dropout in that MLP is active in training whatever the model's rates are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..spec.window import SHIFT_MASK_VALUE, Axes, Geometry, Section, WindowSpec
from .shared.common import drop_rate, fan_in, pair
from .shared.separate import separate_padding
from .timm import Timm, few_windows


class TimmCr(Timm):
    """SwinTransformerV2CrBlock."""

    name = "timm_cr"
    method = "_shifted_window_attn"

    def attention_spec(self, attn: Any, shift: Axes) -> WindowSpec | None:
        window, heads = pair(attn.window_size), attn.num_heads
        if window is None or attn.logit_scale.numel() != heads:
            return None
        if _has_bias(attn):
            if tuple(attn.relative_coordinates_log.shape) != ((window[0] * window[1]) ** 2, 2):
                return None
            if attn.meta_mlp.fc1.in_features != 2 or attn.meta_mlp.fc2.out_features != heads:
                return None
        return WindowSpec(self.name, window, shift, heads, fan_in(attn.proj) // heads)

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        return module.attn.qkv, module.attn.proj

    def attention_section(self, attn: Any, geometry: Geometry, mask: Tensor | None, implied: bool) -> Section | str:
        bias = _bias(attn, geometry.tokens) if _has_bias(attn) else _no_bias(attn, geometry.tokens)
        if isinstance(bias, str):
            return bias
        return Section(
            geometry=geometry,
            num_heads=attn.num_heads,
            head_dim=fan_in(attn.proj) // attn.num_heads,
            project=attn.qkv,
            output=lambda y: attn.proj_drop(attn.proj(y)),
            padding=separate_padding(attn.qkv),
            **bias,
            logit_scale=attn.logit_scale,
            mask=mask,
            mask_value=SHIFT_MASK_VALUE if implied or mask is not None else 0.0,
            dropout=drop_rate(attn.attn_drop),
        )

    def example(self, module: Any) -> tuple[Any, ...]:
        return (torch.Size((2, *few_windows(module, "feat_size"), module.dim)),)


def _has_bias(attn: Any) -> bool:
    """Return False of the attention of some copies, which has none (weather models, `rel_pos=False`)."""
    return hasattr(attn, "meta_mlp") or hasattr(attn, "relative_coordinates_log")


def _bias(attn: Any, tokens: int) -> dict[str, Any] | str:
    coords = attn.relative_coordinates_log
    if coords.shape[0] != tokens * tokens:
        return f"the coordinates of {coords.shape[0]} pairs do not belong to a window of {tokens} tokens"
    return {
        "table_shape": (coords.shape[0], attn.meta_mlp.fc2.weight.shape[0]),
        "table": lambda: attn.meta_mlp(coords),  # a row for each pair, so that nothing is taken for granted of them
        "index": _pairs(tokens, coords.device),
        "sources": (*attn.meta_mlp.parameters(), coords),
    }


def _no_bias(attn: Any, tokens: int) -> dict[str, Any]:
    scale, heads = attn.logit_scale, attn.num_heads
    return {
        "table_shape": (1, heads),
        "table": lambda: scale.new_zeros(1, heads),
        "index": _pairs(tokens, scale.device, 0),
        "sources": (),
    }


def _pairs(tokens: int, device: torch.device, step: int = 1) -> Tensor:
    """Return the row of each pair in a table of all pairs, (N, N); the same tensor at each call. With 0, the first."""
    return (_make_pairs if torch.compiler.is_compiling() else _made_pairs)(tokens, device, step)


def _make_pairs(tokens: int, device: torch.device, step: int) -> Tensor:
    return step * torch.arange(tokens * tokens, device=device).view(tokens, tokens)


@lru_cache(maxsize=32)
def _made_pairs(tokens: int, device: torch.device, step: int) -> Tensor:
    with torch.inference_mode(False):  # it may be saved for a backward later
        return _make_pairs(tokens, device, step)
