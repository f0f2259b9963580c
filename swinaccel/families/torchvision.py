"""torchvision's `ShiftedWindowAttention`, its V2, (B, H, W, C) in and out, and its 3D, (B, depth, H, W, C).

Window and shift live on the attention module as lists that all blocks share. At run time the shift is clamped, axis
by axis, and of volumes the window as well, which then reads the first rows and columns of the index as if they were
those of a smaller window. Both projections are read as weights past their modules, and V2 zeroes the k part of the
qkv bias at every call, so the values there mean nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec.block import Product
from ..spec.window import Axes, Geometry, Section, WindowSpec
from .shared.common import AttentionItself, cosine_bias, is_position_mlp, is_table, sides
from .shared.shrinking import example_sizes, prefix, shrinking_geometry


class Torchvision(AttentionItself):
    name = "torchvision"
    axes, form = 2, "(B, H, W, C)"

    def match(self, module: Any) -> WindowSpec | None:
        window, shift = sides(getattr(module, "window_size", None)), sides(getattr(module, "shift_size", None))
        if window is None or shift is None or not len(window) == len(shift) == self.axes:
            return None
        if not callable(getattr(module, "get_relative_position_bias", None)):
            return None
        if not isinstance(module.attention_dropout, float) or not isinstance(module.dropout, float):
            return None
        heads = module.num_heads
        if hasattr(module, "logit_scale"):
            if not is_position_mlp(module.cpb_mlp, heads) or module.logit_scale.numel() != heads:
                return None
        elif not is_table(module.relative_position_bias_table, module.relative_position_index, window, heads):
            return None
        return WindowSpec(self.name, window, shift, heads, module.qkv.in_features // heads)

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        return ()  # their weights are read past them

    def section(self, module: Any, x: Tensor) -> Section | str:
        if x.dim() != self.axes + 2:
            return f"torchvision's window attention takes {self.form}, not {x.dim()} axes"
        heads, geometry = module.num_heads, self.geometry(tuple(x.shape[1:-1]), module.window_size, module.shift_size)
        product, drops = Product(module.proj), module.training and module.dropout
        if hasattr(module, "logit_scale"):
            bias = cosine_bias(module.cpb_mlp, module.relative_coords_table, module.logit_scale, heads)
            if isinstance(bias, str):
                return bias
        else:
            bias = {
                "table": lambda: module.relative_position_bias_table,
                "sources": (module.relative_position_bias_table,),
                "scale": (x.shape[-1] // heads) ** -0.5,
            }
        return Section(
            geometry=geometry,
            num_heads=heads,
            head_dim=x.shape[-1] // heads,
            project=Product(module.qkv, lambda: _qkv_bias(module)),
            output=(lambda y: F.dropout(product(y), p=module.dropout)) if drops else product,
            padding=lambda: _qkv_bias(module),
            index=prefix(module.relative_position_index, module.window_size, geometry),
            dropout=module.attention_dropout if module.training else 0.0,
            **bias,
        )

    def geometry(self, size: Axes, window: list[int], shift: list[int]) -> Geometry:
        shift = [0 if side >= length else step for length, side, step in zip(size, window, shift, strict=True)]
        return Geometry(size, tuple(window), tuple(shift))

    def forward(self, module: Any, attend: Any, x: Tensor) -> Tensor:
        return attend(x)

    def example(self, module: Any) -> Any:
        (height, width), channels = module.window_size, module.qkv.in_features
        sizes = (2 * height - 1, 2 * width - 1), (height, 2 * width)  # padded on both axes; and not at all
        return [(torch.Size((2, *size, channels)),) for size in sizes]


class Torchvision3d(Torchvision):
    """ShiftedWindowAttention3d."""

    name = "torchvision3d"
    axes, form = 3, "(B, depth, H, W, C)"

    def geometry(self, size: Axes, window: list[int], shift: list[int]) -> Geometry:
        return shrinking_geometry(size, window, shift)

    def example(self, module: Any) -> Any:
        sizes = example_sizes(module.window_size)
        return [(torch.Size((1, *size, module.qkv.in_features)),) for size in sizes]


def _qkv_bias(module: Any) -> Tensor | None:
    bias = module.qkv.bias
    if bias is None or not hasattr(module, "logit_scale") or bias.dim() != 1 or bias.numel() % 3:
        return bias  # of another size it is spread over the product, and k's part of it is none
    q_bias, k_bias, v_bias = bias.chunk(3)
    return torch.cat((q_bias, torch.zeros_like(k_bias), v_bias))
