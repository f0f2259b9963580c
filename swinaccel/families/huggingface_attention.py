"""Hugging Face's attention of the old layout by itself, in a layer that is not known: (windows, N, C) in, a tuple out.

MinerU's UniMER-Swin has such layers, with convolutions before the attention and before the MLP.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..spec.block import Attend
from ..spec.window import SHIFT_MASK_VALUE, Axes, Geometry, Section, WindowSpec
from .shared.common import cosine_bias, drop_rate, is_idle, is_table, pair
from .shared.separate import separate_padding, separate_projections
from .shared.stacked import StackedAttention, takes_windows


class HuggingFaceAttention(StackedAttention):
    """`self` with query, key and value, and `output` with a dense layer; of V1, whose mask is added once."""

    name = "hf_attention"

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
        return WindowSpec(self.name, window, (0, 0), heads, attn.attention_head_size)

    def window(self, module: Any) -> Axes:
        return tuple(module.self.window_size)

    def channels(self, module: Any) -> int:
        return module.self.query.in_features

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        attn = module.self
        return attn.query, attn.key, attn.value, module.output.dense

    def read(self, module: Any, geometry: Geometry, mask: Tensor | None) -> Section | str:
        return outer_section(module, geometry, mask)

    def forward(self, module: Any, attend: Attend, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (super().forward(module, attend, *args, **kwargs),)


def outer_section(outer: Any, geometry: Geometry, mask: Tensor | None = None) -> Section | str:
    """Return the live facts of a call of an attention of this layout, or why it must run itself."""
    attn, heads = outer.self, outer.self.num_attention_heads
    if getattr(outer, "pruned_heads", None):
        return "attention heads were pruned, and its projections have sizes that kernels do not take"
    if hasattr(attn, "logit_scale"):
        mlp, coords = attn.continuous_position_bias_mlp, attn.relative_coords_table
        bias = cosine_bias(mlp, coords, attn.logit_scale, heads)
        if isinstance(bias, str):
            return bias
        bias["mask_value"] = 2 * SHIFT_MASK_VALUE  # added once before and once after a reshape
    else:
        table, scale = attn.relative_position_bias_table, attn.attention_head_size**-0.5
        bias = {"table": lambda: attn.relative_position_bias_table, "sources": (table,), "scale": scale}
    is_dense = type(outer.output).__module__.startswith("transformers.") and [*outer.output._modules][:1] == ["dense"]
    return Section(
        geometry=geometry,
        num_heads=heads,
        head_dim=attn.attention_head_size,
        project=separate_projections(attn.query, attn.key, attn.value),
        output=_output(outer.output),
        padding=separate_padding(attn.query, attn.key, attn.value),
        index=attn.relative_position_index,
        mask=mask,
        dropout=drop_rate(attn.dropout),
        layers=(attn.query, attn.key, attn.value, outer.output.dense) if is_dense else (),
        **bias,
    )


def _output(output: Any) -> Any:
    """Return what makes the output of the weighed values: the projection alone, where its dropout does nothing now."""
    if output._modules.keys() == {"dense", "dropout"} and is_idle(output.dropout):
        return output.dense
    return lambda y: output(y, y)
