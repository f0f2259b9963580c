"""Hugging Face's attention of the old layout by itself, in a layer that is not known: (windows, N, C) in, a tuple out.

MinerU's UniMER-Swin has such layers, with convolutions before the attention and before the MLP.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..spec.window import SHIFT_MASK_VALUE, Geometry, Section, WindowSpec
from .shared.common import drop_rate, is_table, logit_scale_reason, pair, position_bias
from .shared.separate import separate_padding, separate_projections
from .shared.stacked import attend_stacked, stacked_geometry
from .window_attention import takes_windows, window_arguments, window_examples


class HuggingFaceAttention:
    """`self` with query, key and value, and `output` with a dense layer; of V1, whose mask is added once."""

    name = "hf_attention"
    method = "forward"

    def match(self, module: Any) -> WindowSpec | None:
        parts = getattr(module, "self", None), getattr(getattr(module, "output", None), "dense", None)
        if not all(isinstance(part, nn.Module) for part in parts):
            return None
        attn = module.self
        window, heads = pair(tuple(attn.window_size)), attn.num_attention_heads
        if window is None or hasattr(attn, "logit_scale") or not takes_windows(type(module)):
            return None
        if not is_table(attn.relative_position_bias_table, attn.relative_position_index, window, heads):
            return None
        return WindowSpec(self.name, window, (0, 0), heads, attn.attention_head_size, False)

    def attention(self, module: Any) -> nn.Module:
        return module

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        attn = module.self
        return attn.query, attn.key, attn.value, module.output.dense

    def section(self, module: Any, *args: Any, **kwargs: Any) -> Section | str:
        x, mask = window_arguments(module, args, kwargs)
        geometry = stacked_geometry(x, mask, tuple(module.self.window_size))
        return geometry if isinstance(geometry, str) else outer_section(module, geometry, mask)

    def forward(self, module: Any, attend: Any, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (attend_stacked(attend, *window_arguments(module, args, kwargs), tuple(module.self.window_size)),)

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        return window_examples(module, module.self.window_size, module.self.query.in_features)


def outer_section(outer: Any, geometry: Geometry, mask: Tensor | None = None) -> Section | str:
    """Return the live facts of a call of an attention of this layout, or why it must run itself."""
    attn, heads = outer.self, outer.self.num_attention_heads
    if getattr(outer, "pruned_heads", None):
        return "attention heads were pruned, and its projections have sizes that kernels do not take"
    if hasattr(attn, "logit_scale"):
        reason = logit_scale_reason(attn.logit_scale, heads)
        if reason is not None:
            return reason
        bias = {
            **position_bias(attn.continuous_position_bias_mlp, attn.relative_coords_table, heads),
            "logit_scale": attn.logit_scale,
            "mask_value": 2 * SHIFT_MASK_VALUE,  # added once before and once after a reshape
        }
    else:
        table, scale = attn.relative_position_bias_table, attn.attention_head_size**-0.5
        bias = {"table": lambda: attn.relative_position_bias_table, "sources": (table,), "scale": scale}
    is_dense = type(outer.output).__module__.startswith("transformers.") and [*outer.output._modules][:1] == ["dense"]
    return Section(
        geometry=geometry,
        num_heads=heads,
        head_dim=attn.attention_head_size,
        project=separate_projections(attn.query, attn.key, attn.value),
        output=lambda y: outer.output(y, y),
        padding=separate_padding(attn.query, attn.key, attn.value),
        index=attn.relative_position_index,
        mask=mask,
        dropout=drop_rate(attn.dropout),
        layers=(attn.query, attn.key, attn.value, outer.output.dense) if is_dense else (),
        **bias,
    )
