"""The official `WindowAttention` by itself, where the block around it is not known: (windows, N, C) in and out.

It is handed windows that its block has cut and rolled, with the mask that belongs to them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..spec.window import Geometry, Section, WindowSpec
from .shared.official import attention_projections, attention_section, attention_spec, flash_reason
from .shared.stacked import StackedAttention, takes_windows


class WindowAttention(StackedAttention):
    """Any module with the structure of the official attention and a forward of windows, and of a mask."""

    name = "window_attention"

    def match(self, module: Any) -> WindowSpec | None:
        if hasattr(module, "shift_size") or not takes_windows(type(module)):
            return None
        return attention_spec(self.name, module)

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        return attention_projections(module)

    def read(self, module: Any, geometry: Geometry, mask: Tensor | None) -> Section | str:
        return flash_reason(module) or attention_section(module, geometry, mask)
