"""DAT's spatial attention, RGT's and their copies': q, k and v of an image in, (3, B, H * W, C), and an image out.

Each takes one half of the channels, in windows that stand or lie, with a bias from an MLP over positions (CrossFormer's
dynamic bias). What is around it projects, pads and rolls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..spec.window import Geometry, Section, WindowSpec
from .shared.blocks import strange_mask, undivided
from .shared.common import AttentionItself, argument, drop_rate, is_index, pair


class Rectangles(AttentionItself):
    """An attention with `H_sp`, `W_sp`, and `pos` over `rpe_biases`, without projections."""

    name = "rectangles"

    def match(self, module: Any) -> WindowSpec | None:
        window, heads = pair((module.H_sp, module.W_sp)), module.num_heads
        if window is None or not isinstance(heads, int) or module._parameters:
            return None
        if set(module._modules) != {"pos", "attn_drop"} or not isinstance(module.pos, nn.Module):
            return None
        if any(isinstance(part, _DropoutNd) for part in module.pos.modules()):
            return None  # biases are kept, and would not be drawn anew
        rows, cols = window
        if tuple(module.rpe_biases.shape) != ((2 * rows - 1) * (2 * cols - 1), 2):
            return None
        if not is_index(module.relative_position_index, rows * cols):
            return None
        return WindowSpec(self.name, window, (0, 0), heads, module.dim // heads)

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        return (module.pos,)

    def section(self, module: Any, qkv: Tensor, H: Any, W: Any, mask: Any = None) -> Section | str:
        size, heads = pair((H, W)), module.num_heads
        if size is None:
            return "height and width are not there as numbers"
        if qkv.dim() != 4 or qkv.shape[0] != 3 or qkv.shape[2] != size[0] * size[1] or qkv.shape[3] % heads:
            return f"the input's tokens are not {size[0]}x{size[1]}"
        geometry = Geometry(size, (module.H_sp, module.W_sp))
        reason = undivided(geometry) or strange_mask(mask, qkv)
        if reason is None and not isinstance(module.scale, (int, float)):
            reason = "its scale is no number"
        if reason is not None:
            return reason
        positions, pos, tokens = module.rpe_biases, module.pos, geometry.tokens
        return Section(
            geometry=geometry,
            num_heads=heads,
            head_dim=qkv.shape[3] // heads,
            project=lambda image: image,
            output=lambda image: image,
            padding=None,  # windows are whole
            table=lambda: pos(positions),
            table_shape=(positions.shape[0], heads),
            index=module.relative_position_index.view(tokens, tokens),
            sources=(*pos.parameters(), positions),
            scale=module.scale,
            mask=mask,
            dropout=drop_rate(module.attn_drop),
        )

    def mask_of(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        return argument(3, "mask", args, kwargs)

    def forward(self, module: Any, attend: Any, qkv: Tensor, H: int, W: int, mask: Any = None) -> Tensor:
        return attend(qkv.permute(1, 2, 0, 3).reshape(qkv.shape[1], H, W, -1))

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        rows, cols, channels = module.H_sp, module.W_sp, module.dim
        images, one = torch.Size((3, 2, 6 * rows * cols, channels)), torch.Size((3, 1, rows * cols, channels))
        mask = torch.Size((6, rows * cols, rows * cols))
        return [(images, 2 * rows, 3 * cols, mask), (images, 2 * rows, 3 * cols), (one, rows, cols)]
