"""The block of Video Swin and of MONAI's SwinUNETR: images (B, H, W, C) or volumes (B, depth, H, W, C).

Window and shift shrink to the image at run time, and the mask of the stage is an argument that unshifted blocks
ignore. Replaced is `forward_part1`, norm and attention, so that checkpointing goes on around it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..spec.window import Geometry, Section, WindowSpec
from .shared.blocks import OfficialAttention, strange_mask
from .shared.common import argument, positional_names, sides
from .shared.official import attention_section, attention_spec, flash_reason
from .shared.shrinking import example_sizes, prefix, shrinking_geometry


class Video(OfficialAttention):
    name = "video"
    method = "forward_part1"

    def match(self, module: Any) -> WindowSpec | None:
        parts = getattr(module, "forward_part1", None), getattr(module, "forward_part2", None)
        if not all(callable(part) for part in parts) or not isinstance(getattr(module, "norm1", None), nn.Module):
            return None
        if len(positional_names(type(module).forward_part1)) != 2:
            return None
        if not isinstance(module.window_size, (tuple, list)) or not isinstance(module.shift_size, (tuple, list)):
            return None
        window, shift = sides(module.window_size), sides(module.shift_size)
        if window is None or shift is None or len(window) != len(shift):
            return None
        spec = attention_spec(self.name, module.attn, shift)
        return spec if spec is not None and spec.window == window else None

    def section(self, module: Any, x: Tensor, mask_matrix: Any) -> Section | str:
        axes, attn = len(module.window_size), module.attn
        if x.dim() != axes + 2:
            return f"its windows have {axes} axes, and the input has {x.dim()} where {axes + 2} are needed"
        if tuple(attn.window_size) != tuple(module.window_size):
            return f"the bias table belongs to a window of {attn.window_size}, not {module.window_size}"
        geometry: Geometry = shrinking_geometry(tuple(x.shape[1:-1]), module.window_size, module.shift_size)
        mask = mask_matrix if geometry.is_shifted else None
        index = prefix(attn.relative_position_index, attn.window_size, geometry)
        reason = strange_mask(mask, x) or flash_reason(attn)
        return reason or attention_section(attn, geometry, mask, index, implied=False)

    def mask_of(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        return argument(1, "mask_matrix", args, kwargs)

    def forward(self, module: Any, attend: Any, x: Tensor, mask_matrix: Any) -> Tensor:
        return attend(module.norm1(x))

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []
        for size in example_sizes(module.window_size):
            geometry = shrinking_geometry(size, module.window_size, module.shift_size)
            mask = torch.Size((geometry.num_windows, geometry.tokens, geometry.tokens))
            calls.append((torch.Size((1, *size, module.attn.qkv.in_features)), mask))
        return [*calls, (calls[0][0], None)]
