"""The official attention under other names, by itself: Uformer's (`win_size`, `to_q` and `to_kv`), VRT's (`qkv_self`).

Dropouts may be missing. What VRT adds between frames is in `mutual`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..spec.window import Axes, Geometry, Section, WindowSpec
from .shared.common import drop_rate, fan_in, is_table, sides
from .shared.stacked import StackedAttention, takes_windows


class Renamed(StackedAttention):
    """Any module with a table of biases, projections of one of these kinds, and a forward of (windows, mask)."""

    name = "renamed_attention"

    def match(self, module: Any) -> WindowSpec | None:
        return None if hasattr(module, "qkv_mut") else self.named(module)

    def named(self, module: Any) -> WindowSpec | None:
        """Return what such an attention is, whatever it has beside that; None for anything else."""
        window, heads, proj = sides(_window(module)), getattr(module, "num_heads", None), getattr(module, "proj", None)
        if window is None or not isinstance(heads, int) or not isinstance(proj, nn.Module):
            return None
        if hasattr(module, "shift_size") or not takes_windows(type(module)):
            return None
        if not all(isinstance(one, nn.Module) for one in _queries(module)):
            return None
        if not is_table(module.relative_position_bias_table, module.relative_position_index, window, heads):
            return None
        return WindowSpec(self.name, window, (0,) * len(window), heads, fan_in(module.proj) // heads)

    def window(self, module: Any) -> Axes:
        return tuple(_window(module))

    def channels(self, module: Any) -> int:
        return _queries(module)[0].in_features

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        return *_queries(module), module.proj

    def read(self, module: Any, geometry: Geometry, mask: Tensor | None) -> Section | str:
        if not isinstance(module.scale, (int, float)):
            return "its scale is no number"
        table, queries, tokens = module.relative_position_bias_table, _queries(module), geometry.tokens
        drops: Any = [getattr(module, name, None) for name in ("attn_drop", "proj_drop")]
        return Section(
            geometry=geometry,
            num_heads=module.num_heads,
            head_dim=fan_in(module.proj) // module.num_heads,
            project=queries[0] if len(queries) == 1 else lambda x: torch.cat([one(x) for one in queries], -1),
            output=module.proj if drops[1] is None else lambda y: drops[1](module.proj(y)),
            padding=None,  # windows come whole
            table=lambda: table,
            index=module.relative_position_index.view(tokens, tokens),
            sources=(table,),
            scale=module.scale,
            mask=mask,
            dropout=0.0 if drops[0] is None else drop_rate(drops[0]),
        )


def _window(module: Any) -> Any:
    return getattr(module, "window_size", getattr(module, "win_size", None))


def _queries(module: Any) -> tuple[Any, ...]:
    """Return what gives q, k and v, one after the other."""
    whole: Any = getattr(module, "qkv", getattr(module, "qkv_self", None))
    return (whole.to_q, whole.to_kv) if hasattr(whole, "to_kv") else (whole,)
