"""GRL's attention of V1 and V2, (B, H * W, C) in and out, which rolls and cuts the image for itself, as no other does.

Its block, which is not known, tells it the size. It keeps the mask of the size that it was made for.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..spec.window import Section, WindowSpec
from .restoration import told_examples, told_section
from .shared.common import AttentionItself, pair, positional_names
from .shared.official import attention_projections, attention_spec


class Rolling(AttentionItself):
    """The official attention with `shift_size`, `attn_mask` and `input_resolution`."""

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
