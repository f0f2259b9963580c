"""timm's Swin, SwinV2 and SwinV2-CR: the method of the block that goes from (B, H, W, C) to the same.

timm rolls before it pads, keeps its shift mask in a buffer unless `dynamic_mask`, and lets the head dim differ from
C / heads. CR is SwinV2 with a bias of its own: an MLP over every pair of tokens, neither normalised nor bounded, whose
dropout is active in training whatever the model's rates are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import Block, Tokens
from ..spec import SHIFT_MASK_VALUE, Axes, Geometry, Section, WindowSpec
from ._block import block_facts
from ._common import drop_rate, is_plain_linear, pair, zero_token
from ._official import attention_section, attention_spec


class Timm:
    """SwinTransformerBlock and SwinTransformerV2Block."""

    name = "timm"
    method = "_attn"
    block_method = "forward"

    def match(self, module: Any) -> WindowSpec | None:
        window, shift = pair(getattr(module, "window_size", None)), pair(getattr(module, "shift_size", None))
        if window is None or shift is None or not hasattr(module, "target_shift_size"):
            return None
        if not callable(getattr(module, self.method, None)):
            return None
        spec = self.attention_spec(module.attn, shift)
        return spec if spec is not None and spec.window == window else None

    def attention_spec(self, attn: Any, shift: Axes) -> WindowSpec | None:
        return attention_spec(self.name, attn, shift)

    def attention(self, module: Any) -> nn.Module:
        return module.attn

    def section(self, module: Any, x: Tensor) -> Section | str:
        dynamic = getattr(module, "dynamic_mask", False)
        mask = None if dynamic else module.attn_mask
        return self.attention_section(
            module.attn,
            Geometry((x.shape[1], x.shape[2]), tuple(module.window_size), tuple(module.shift_size), roll_first=True),
            mask,
            SHIFT_MASK_VALUE if dynamic or mask is not None else 0.0,
        )

    def attention_section(self, attn: Any, geometry: Geometry, mask: Tensor | None, mask_value: float) -> Section | str:
        return attention_section(attn, geometry, mask, mask_value)

    def forward(self, module: Any, attend: Any, x: Tensor) -> Tensor:
        return attend(x)

    def block(self, module: Any) -> Block:
        return block_facts(module)

    def tokens(self, module: Any, x: Tensor) -> Tokens:
        return x, None

    def inner(self, module: Any) -> tuple[Any, nn.Module]:
        return self, module

    def attend(self, module: Any) -> Any:
        return getattr(module, self.method)

    def example(self, module: Any) -> tuple[Any, ...]:
        return (torch.Size((2, *_few_windows(module, "input_resolution"), module.dim)),)


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
        return (torch.Size((2, *_few_windows(module, "feat_size"), module.dim)),)


def _few_windows(module: Any, resolution: str) -> Axes:
    """Leaves a copy the last two windows of either axis, which a shift's mask tells apart; returns their size.

    A probe in fp64 of all windows of 24x24 takes half a minute.
    """
    size, window = getattr(module, resolution), module.window_size
    counts = [length // side for length, side in zip(size, window, strict=True)]
    kept = [min(count, 2) for count in counts]
    if kept == counts or any(length % side for length, side in zip(size, window, strict=True)):
        return tuple(size)
    if module.attn_mask is not None:
        masks = module.attn_mask.unflatten(0, counts)[-kept[0] :, -kept[1] :]
        module.attn_mask = masks.flatten(0, 1).clone()
    small = kept[0] * window[0], kept[1] * window[1]
    setattr(module, resolution, small)
    return small


def _pairs(tokens: int, device: torch.device) -> Tensor:
    """(N, N): the row of each pair in a table of all of them; the same tensor at each call, for factors to know it."""
    return _made_pairs(tokens, device) if not torch.compiler.is_compiling() else _make_pairs(tokens, device)


def _make_pairs(tokens: int, device: torch.device) -> Tensor:
    return torch.arange(tokens * tokens, device=device).view(tokens, tokens)


@lru_cache(maxsize=32)
def _made_pairs(tokens: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be saved for a backward later
        return _make_pairs(tokens, device)
