"""timm's Swin and SwinV2: the method of the block that goes from (B, H, W, C) to the same.

timm rolls before it pads, keeps its shift mask in a buffer unless `dynamic_mask`, and lets the head dim differ from
C / heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec.block import Tokens
from ..spec.window import Axes, Geometry, Section, WindowSpec
from .shared.blocks import OfficialBlock
from .shared.common import pair
from .shared.official import attention_section, attention_spec


class Timm(OfficialBlock):
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

    def section(self, module: Any, x: Tensor) -> Section | str:
        dynamic = getattr(module, "dynamic_mask", False)
        mask = None if dynamic else module.attn_mask
        return self.attention_section(
            module.attn,
            Geometry((x.shape[1], x.shape[2]), tuple(module.window_size), tuple(module.shift_size), roll_first=True),
            mask,
            dynamic,
        )

    def attention_section(self, attn: Any, geometry: Geometry, mask: Tensor | None, implied: bool) -> Section | str:
        return attention_section(attn, geometry, mask, implied=implied)

    def forward(self, module: Any, attend: Any, x: Tensor) -> Tensor:
        return attend(x)

    def tokens(self, module: Any, x: Tensor) -> Tokens:
        return x, None

    def attend(self, module: Any) -> Any:
        return getattr(module, self.method)

    def example(self, module: Any) -> tuple[Any, ...]:
        return (torch.Size((2, *few_windows(module, "input_resolution"), module.dim)),)


def few_windows(module: Any, resolution: str) -> Axes:
    """Leave a copy the last two windows of either axis, which a shift's mask tells apart; return their size.

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
