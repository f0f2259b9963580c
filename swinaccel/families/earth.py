"""Pangu's `EarthAttention3D` and `EarthAttention2D`, as PhysicsNeMo has them: a bias for every row of windows.

Windows come cut already, (images * columns of windows, rows of windows, N, C), where rows are those of each level of
pressure in turn; the mask is (columns, rows, N, N). So the windows are a stack of which a window's row is its number
modulo the rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..spec.window import Section, WindowSpec
from .shared.common import AttentionItself, argument, drop_rate, dropped, fan_in, is_index, sides
from .shared.stacked import stacked_geometry, stacked_image


class Earth(AttentionItself):
    """An attention with `earth_position_bias_table` (T, rows, heads) and `earth_position_index` (N, N)."""

    name = "earth"

    def match(self, module: Any) -> WindowSpec | None:
        window, heads = sides(getattr(module, "window_size", None)), getattr(module, "num_heads", None)
        if window is None or not isinstance(heads, int):
            return None
        if not all(isinstance(getattr(module, name), nn.Module) for name in ("qkv", "proj", "attn_drop", "proj_drop")):
            return None
        table = module.earth_position_bias_table
        if not isinstance(table, Tensor) or table.dim() != 3 or table.shape[1] < 1 or table.shape[2] != heads:
            return None
        if not is_index(module.earth_position_index, math.prod(window)):
            return None
        return WindowSpec(self.name, window, (0,) * len(window), heads, fan_in(module.proj) // heads)

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        return module.qkv, module.proj

    def section(self, module: Any, x: Tensor, mask: Any = None) -> Section | str:
        table, tokens = module.earth_position_bias_table, math.prod(module.window_size)
        rows = table.shape[1]
        if any(isinstance(one, Tensor) and (one.dim() != 4 or one.shape[1] != rows) for one in (x, mask)):
            return f"the input or the mask has not {rows} windows along its second axis, as the bias has rows"
        geometry = stacked_geometry(*_stacked(x, mask), (1, tokens), rows)
        if isinstance(geometry, str):
            return geometry
        if not isinstance(module.scale, (int, float)):
            return "its scale is no number"
        return Section(
            geometry=geometry,
            num_heads=module.num_heads,
            head_dim=fan_in(module.proj) // module.num_heads,
            project=module.qkv,
            output=dropped(module.proj, module.proj_drop),
            padding=None,
            table=lambda: table,
            index=module.earth_position_index.view(tokens, tokens),
            sources=(table,),
            scale=module.scale,
            mask=_stacked(x, mask)[1],
            mask_value=0.0,
            dropout=drop_rate(module.attn_drop),
        )

    def mask_of(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        mask = argument(1, "mask", args, kwargs)
        return mask.flatten(0, 1) if isinstance(mask, Tensor) else None

    def forward(self, module: Any, attend: Any, x: Tensor, mask: Any = None) -> Tensor:
        out = attend(stacked_image(*_stacked(x, mask), (1, x.shape[2]), x.shape[1]))
        return out.reshape(*x.shape[:3], out.shape[-1])

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        """Return calls with windows in three rows, since a globe has many."""
        table, tokens = module.earth_position_bias_table, math.prod(module.window_size)
        few = table[:, :3].detach().clone()
        module.earth_position_bias_table = nn.Parameter(few, table.requires_grad)
        rows = module.type_of_windows = few.shape[1]
        windows = torch.Size((4, rows, tokens, module.qkv.in_features))
        return [(windows, torch.Size((2, rows, tokens, tokens))), (windows, None)]


def _stacked(x: Tensor, mask: Any) -> tuple[Tensor, Any]:
    """Return windows (windows, N, C) and what is a mask (M, N, N), row by row of each column of windows."""
    return x.flatten(0, 1), mask.flatten(0, 1) if isinstance(mask, Tensor) else mask
