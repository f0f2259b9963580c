"""timm's SwinV2-CR: SwinV2 with a bias of its own, an MLP over every pair of tokens, neither normalised nor bounded.

The dropout in that MLP is active in training whatever the model's rates are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..spec.window import Axes, Geometry, Section, WindowSpec
from .shared.common import drop_rate, is_plain_linear, pair, zero_token
from .timm import Timm, few_windows


class TimmCr(Timm):
    """SwinTransformerV2CrBlock."""

    name = "timm_cr"
    method = "_shifted_window_attn"

    def attention_spec(self, attn: Any, shift: Axes) -> WindowSpec | None:
        window, heads = pair(attn.window_size), attn.num_heads
        if window is None or attn.logit_scale.numel() != heads:
            return None
        if tuple(attn.relative_coordinates_log.shape) != ((window[0] * window[1]) ** 2, 2):
            return None
        if attn.meta_mlp.fc1.in_features != 2 or attn.meta_mlp.fc2.out_features != heads:
            return None
        return WindowSpec(self.name, window, shift, heads, attn.proj.in_features // heads, True)

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        return module.attn.qkv, module.attn.proj

    def attention_section(self, attn: Any, geometry: Geometry, mask: Tensor | None, mask_value: float) -> Section | str:
        coords, tokens = attn.relative_coordinates_log, geometry.tokens
        if coords.shape[0] != tokens * tokens:
            return f"the coordinates of {coords.shape[0]} pairs do not belong to a window of {tokens} tokens"
        return Section(
            geometry=geometry,
            num_heads=attn.num_heads,
            head_dim=attn.proj.in_features // attn.num_heads,
            project=attn.qkv,
            output=lambda y: attn.proj_drop(attn.proj(y)),
            padding=(lambda: zero_token(attn.qkv)) if is_plain_linear(attn.qkv) else None,
            table_shape=(coords.shape[0], attn.meta_mlp.fc2.weight.shape[0]),
            table=lambda: attn.meta_mlp(coords),  # a row for each pair, so that nothing is taken for granted of them
            index=_pairs(tokens, coords.device),
            sources=(*attn.meta_mlp.parameters(), coords),
            logit_scale=attn.logit_scale,
            mask=mask,
            mask_value=mask_value,
            dropout=drop_rate(attn.attn_drop),
        )

    def example(self, module: Any) -> tuple[Any, ...]:
        return (torch.Size((2, *few_windows(module, "feat_size"), module.dim)),)


def _pairs(tokens: int, device: torch.device) -> Tensor:
    """Return the row of each pair in a table of all pairs, (N, N); the same tensor at each call."""
    return _made_pairs(tokens, device) if not torch.compiler.is_compiling() else _make_pairs(tokens, device)


def _make_pairs(tokens: int, device: torch.device) -> Tensor:
    return torch.arange(tokens * tokens, device=device).view(tokens, tokens)


@lru_cache(maxsize=32)
def _made_pairs(tokens: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be saved for a backward later
        return _make_pairs(tokens, device)
