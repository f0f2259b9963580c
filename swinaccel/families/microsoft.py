"""The official `SwinTransformerBlock` of V1, V2 and Swin-MoE, and its many copies: (B, H * W, C) in and out.

It takes H and W from `input_resolution`, never pads, keeps its shift mask in a persistent buffer, and writes the
whole block in one forward, so the rest of the block is repeated here with the original's own modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec.block import Tokens
from ..spec.reference import shift_mask
from ..spec.window import SHIFT_MASK_VALUE, Geometry, Section, WindowSpec
from .shared.blocks import OfficialBlock, block_spec, undivided
from .shared.common import pair
from .shared.official import attention_section


class Microsoft(OfficialBlock):
    """The official block."""

    name = "microsoft"

    def match(self, module: Any) -> WindowSpec | None:
        if pair(getattr(module, "input_resolution", None)) is None or "attn_mask" not in module._buffers:
            return None
        return block_spec(self.name, module, 1)

    def section(self, module: Any, x: Tensor) -> Section | str:
        size, window, shift = module.input_resolution, (module.window_size,) * 2, (module.shift_size,) * 2
        if x.dim() != 3 or x.shape[1] != size[0] * size[1]:
            return f"the input's tokens are not the block's input_resolution {size[0]}x{size[1]}"
        geometry = Geometry((size[0], size[1]), window, shift)
        return undivided(geometry) or attention_section(module.attn, geometry, module.attn_mask, implied=False)

    def tokens(self, module: Any, x: Tensor) -> Tokens:
        return x, tuple(module.input_resolution)

    def shrink_image(self, module: Any) -> bool:
        """Leave a copy an image of two by two windows, with another mask; return False where it has no more."""
        window, shift = (module.window_size,) * 2, (module.shift_size,) * 2
        size = (2 * window[0], 2 * window[1])
        if min(module.input_resolution) < size[0] or tuple(module.input_resolution) == size:
            return False
        module.input_resolution = type(module.input_resolution)(size)
        if module.attn_mask is not None:
            mask = shift_mask(Geometry(size, window, shift), SHIFT_MASK_VALUE).to(module.attn_mask.dtype)
            module.attn_mask = mask + torch.rand_like(mask)
        return True

    def example(self, module: Any) -> tuple[Any, ...]:
        height, width = module.input_resolution
        return (torch.Size((2, height * width, module.dim)),)
