"""Blocks of detection and segmentation on (B, H * W, C), which pad, and never clamp window or shift.

The copies of the official code are given H and W by their stage, as attributes set before each call, and the shift
mask as an argument that unshifted blocks ignore. OpenMMLab's ShiftWindowMSA is a module around the attention alone,
told its size; mmpretrain's drops the shift where the image is one window, unless `pad_small_map`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..spec.block import Tokens
from ..spec.window import Section, WindowSpec
from .shared.blocks import OfficialBlock, block_spec, sized_geometry, strange_mask
from .shared.common import argument, pair, positional_names
from .shared.official import attention_projections, attention_section, attention_spec


class Detection(OfficialBlock):
    """The block of Swin-Transformer-Object-Detection, Semantic-Segmentation, Mask2Former and others."""

    name = "detection"
    call_settings = ("H", "W")

    def match(self, module: Any) -> WindowSpec | None:
        if "H" not in vars(module) or "W" not in vars(module):
            return None
        return block_spec(self.name, module, 2)

    def section(self, module: Any, x: Tensor, mask_matrix: Any) -> Section | str:
        geometry = sized_geometry(x, (module.H, module.W), module.window_size, module.shift_size)
        if isinstance(geometry, str):
            return geometry
        mask = mask_matrix if module.shift_size > 0 else None
        return strange_mask(mask, x) or attention_section(module.attn, geometry, mask, implied=False)

    def mask_of(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        return argument(1, "mask_matrix", args, kwargs)

    def tokens(self, module: Any, x: Tensor, mask_matrix: Any) -> Tokens:
        return x, (module.H, module.W)

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        window = module.window_size
        module.H, module.W = 2 * window - 1, 3 * window
        x = torch.Size((2, module.H * module.W, module.dim))
        return [(x, torch.Size((6, window**2, window**2))), (x, None)]


class ShiftWindowMSA:
    """OpenMMLab's window attention: mmdet, mmsegmentation, mmpretrain."""

    name = "openmmlab"
    method = "forward"

    def match(self, module: Any) -> WindowSpec | None:
        attn, size, shift = (getattr(module, name, None) for name in ("w_msa", "window_size", "shift_size"))
        if attn is None or not isinstance(size, int) or not isinstance(shift, int):
            return None
        if not isinstance(getattr(module, "drop", None), nn.Module):
            return None
        if len(positional_names(type(module).forward)) != 2:
            return None
        spec = attention_spec(self.name, attn, (shift, shift))
        return spec if spec is not None and spec.window == (size, size) else None

    def attention(self, module: Any) -> nn.Module:
        return module.w_msa

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        return attention_projections(module.w_msa)

    def section(self, module: Any, query: Tensor, hw_shape: Any) -> Section | str:
        shift = module.shift_size
        sides = pair(hw_shape)
        if sides is not None and not getattr(module, "pad_small_map", True):
            if min(sides) < module.window_size:
                return "the image is smaller than the window, which the original refuses"
            if min(sides) == module.window_size:
                shift = 0
        geometry = sized_geometry(query, hw_shape, module.window_size, shift)
        return geometry if isinstance(geometry, str) else attention_section(module.w_msa, geometry)

    def forward(self, module: Any, attend: Any, query: Tensor, hw_shape: Any) -> Tensor:
        batch, _, channels = query.shape
        return module.drop(attend(query.view(batch, *hw_shape, channels)).view(query.shape))

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        window, channels = module.window_size, module.w_msa.proj.in_features
        sizes = (2 * window - 1, 3 * window), (window, 2 * window)
        return [(torch.Size((2, height * width, channels)), (height, width)) for height, width in sizes]
