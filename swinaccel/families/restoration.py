"""Image restoration on (B, H * W, C), told the size at each call: SwinIR's and HAT's blocks, and GRL's attention.

None pads. Their shift was settled by the size that the model was made for, and stays at any other. SwinIR and GRL keep
the mask of that size and compute that of others; HAT is given mask and index of the biases, and has a branch of
convolutions beside the attention. GRL's attention rolls and cuts the image for itself, as no other does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..spec.block import Tokens
from ..spec.window import Geometry, Section, WindowSpec
from .shared.blocks import OfficialAttention, OfficialBlock, block_spec, sized_geometry, strange_mask, undivided
from .shared.common import AttentionItself, argument, is_index, pair, positional_names
from .shared.official import attention_projections, attention_section, attention_spec


def told_geometry(module: Any, x: Tensor, size: Any) -> Geometry | str:
    """Return the windows of a block that is told its size and does not pad."""
    geometry = sized_geometry(x, size, module.window_size, module.shift_size)
    return geometry if isinstance(geometry, str) else undivided(geometry) or geometry


def told_section(module: Any, attn: Any, x: Tensor, x_size: Any) -> Section | str:
    """Return the facts of a call of a module that keeps the mask of one size, and computes that of others."""
    geometry = told_geometry(module, x, x_size)
    if isinstance(geometry, str):
        return geometry
    if module.input_resolution != x_size:
        return attention_section(attn, geometry)
    return attention_section(attn, geometry, module.attn_mask, implied=False)


def told_examples(module: Any, window: tuple[int, int]) -> list[tuple[Any, ...]]:
    """Return calls of the size that a module was made for, of another, and of few windows, in one image and in two."""
    rows, cols = window
    sizes = (2, module.input_resolution), (2, (2 * rows, 3 * cols)), (1, (rows, 2 * cols)), (2, (rows, cols))
    return [(torch.Size((batch, size[0] * size[1], module.dim)), size) for batch, size in sizes]


class SwinIR(OfficialBlock):
    """SwinIR's block, and those of its descendants with V2's attention."""

    name = "swinir"

    def match(self, module: Any) -> WindowSpec | None:
        if not callable(getattr(module, "calculate_mask", None)) or "attn_mask" not in module._buffers:
            return None
        return block_spec(self.name, module, 2)

    def section(self, module: Any, x: Tensor, x_size: Any) -> Section | str:
        return told_section(module, module.attn, x, x_size)

    def tokens(self, module: Any, x: Tensor, x_size: Any) -> Tokens:
        return x, tuple(x_size)

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        return told_examples(module, (module.window_size,) * 2)


class Hat(OfficialAttention):
    """HAT's hybrid attention block. Its overlapping cross-attention is no window attention of this kind."""

    name = "hat"

    def match(self, module: Any) -> WindowSpec | None:
        if not isinstance(getattr(module, "conv_block", None), nn.Module) or not hasattr(module, "conv_scale"):
            return None
        return block_spec(self.name, module, 4, has_index=False)

    def section(self, module: Any, x: Tensor, x_size: Any, rpi_sa: Tensor, attn_mask: Any) -> Section | str:
        geometry = told_geometry(module, x, x_size)
        if isinstance(geometry, str):
            return geometry
        if not is_index(rpi_sa, geometry.tokens):
            return f"the bias index does not belong to a window of {geometry.tokens} tokens"
        mask = attn_mask if module.shift_size > 0 else None
        index = rpi_sa.to(x.device)  # it may be no buffer, and lag
        return strange_mask(mask, x) or attention_section(module.attn, geometry, mask, index, implied=False)

    def mask_of(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        return argument(3, "attn_mask", args, kwargs)

    def forward(self, module: Any, attend: Any, x: Tensor, x_size: Any, rpi_sa: Tensor, attn_mask: Any) -> Tensor:
        image = module.norm1(x).view(x.shape[0], *x_size, x.shape[2])
        local = module.conv_block(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(x.shape)
        x = x + module.drop_path(attend(image).view(x.shape)) + local * module.conv_scale
        return x + module.drop_path(module.mlp(module.norm2(x)))

    def example(self, module: Any) -> tuple[Any, ...]:
        rows, cols, tokens = 2, 3, module.window_size**2
        size = rows * module.window_size, cols * module.window_size
        table = module.attn.relative_position_bias_table
        index = torch.arange(tokens * tokens).view(tokens, tokens) % table.shape[0]
        return torch.Size((2, size[0] * size[1], module.dim)), size, index, torch.Size((rows * cols, tokens, tokens))


class Rolling(AttentionItself):
    """GRL's attention of V1 and V2, with `shift_size`, `attn_mask` and `input_resolution`; its block is not known."""

    name = "rolling_attention"

    def match(self, module: Any) -> WindowSpec | None:
        shift = getattr(module, "shift_size", None)
        if not isinstance(shift, int) or "attn_mask" not in module._buffers or pair(module.input_resolution) is None:
            return None
        if len(positional_names(type(module).forward)) != 2:
            return None
        return attention_spec(self.name, module, (shift, shift))

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        return attention_projections(module)

    def section(self, module: Any, x: Tensor, x_size: Any) -> Section | str:
        return told_section(module, module, x, x_size)

    def forward(self, module: Any, attend: Any, x: Tensor, x_size: Any) -> Tensor:
        return attend(x.view(x.shape[0], *x_size, x.shape[2])).view(x.shape)

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        return told_examples(module, tuple(module.window_size))
