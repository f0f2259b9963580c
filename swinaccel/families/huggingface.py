"""Hugging Face Swin of transformers 5: `SwinLayer`, (B, H * W, C) in, (the same, None) out.

H and W come as an argument. The layer shrinks its own window and shift for good when an image is small, unless
`always_partition`, and its attention goes through an interface of which only "sdpa" returns no weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..spec.block import Block, Tokens
from ..spec.window import Geometry, Section, WindowSpec
from .shared.common import is_table, pair
from .shared.separate import separate_padding, separate_projections


def layer_geometry(module: Any, dimensions: Any, always_partition: Any, table_window: Any) -> Geometry | str:
    """Return the windows of a call, after the layer has shrunk them if it does, or why the original must run."""
    if hasattr(module, "set_shift_and_window_size") and not always_partition:
        module.set_shift_and_window_size(dimensions)
    window, shift = module.window_size, module.shift_size
    if not (isinstance(window, int) and isinstance(shift, int) and pair(dimensions)):
        return "window, shift or input_dimensions are tensors, as they are while a model is traced"
    if tuple(table_window) != (window, window):
        return f"the bias table belongs to a window of {table_window[0]}, not {window}"
    return Geometry((dimensions[0], dimensions[1]), (window, window), (shift, shift))


class HuggingFaceLayer:
    """Members that families of Hugging Face layers share."""

    method = "forward"

    def attention(self, module: Any) -> nn.Module:
        return module.attention

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        raise NotImplementedError

    def inner(self, module: Any) -> tuple[Any, nn.Module]:
        return self, module

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        """Return a call that is padded on one axis, and one that is not."""
        channels: Any = self.projections(module)[-1].out_features
        height, *widths = (2 * module.window_size + extra for extra in (0, 1, 0))
        return [(torch.Size((2, height * width, channels)), (height, width)) for width in widths]


class HuggingFaceSwin(HuggingFaceLayer):
    """SwinLayer of transformers 5."""

    name = "hf_swin"

    def match(self, module: Any) -> WindowSpec | None:
        attn, size = getattr(module, "attention", None), getattr(module, "window_size", None)
        bias = getattr(attn, "relative_position_bias", None)
        if attn is None or not isinstance(size, int) or bias is None:
            return None
        window, heads = pair(bias.window_size), attn.num_attention_heads
        if window is None or not is_table(
            bias.relative_position_bias_table, bias.relative_position_index, window, heads
        ):
            return None
        if not hasattr(module, "set_shift_and_window_size") or not hasattr(attn, "o_proj"):
            return None
        return WindowSpec(self.name, (size, size), (module.shift_size,) * 2, heads, attn.head_dim)

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        attn = module.attention
        return attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj

    def section(
        self, module: Any, hidden_states: Tensor, input_dimensions: Any, always_partition: bool = False, **kwargs: Any
    ) -> Section | str:
        attn = module.attention
        if attn.config._attn_implementation != "sdpa":
            name = attn.config._attn_implementation
            return f"attn_implementation={name!r} returns attention weights; set attn_implementation='sdpa'"
        if kwargs.get("output_attentions"):
            return "attention weights are requested, which kernels do not keep; call without output_attentions"
        if not type(module).__module__.startswith("transformers.") and kwargs.keys() - {"output_attentions"}:
            return f"the call has arguments that are not known: {', '.join(sorted(kwargs))}"
        bias = attn.relative_position_bias
        geometry = layer_geometry(module, input_dimensions, always_partition, bias.window_size)
        if isinstance(geometry, str):
            return geometry
        if not isinstance(attn.scaling, (int, float)):
            return "its scale is no number"
        return Section(
            geometry=geometry,
            num_heads=attn.num_attention_heads,
            head_dim=attn.head_dim,
            project=separate_projections(attn.q_proj, attn.k_proj, attn.v_proj),
            output=attn.o_proj,
            padding=separate_padding(attn.q_proj, attn.k_proj, attn.v_proj),
            table=lambda: bias.relative_position_bias_table,
            sources=(bias.relative_position_bias_table,),
            index=bias.relative_position_index.view(geometry.tokens, -1),
            scale=attn.scaling,
            dropout=attn.attention_dropout if attn.training else 0.0,
            layers=(attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj),
        )

    def forward(
        self, module: Any, attend: Any, hidden_states: Tensor, input_dimensions: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        batch, _, channels = hidden_states.shape
        image = module.layernorm_before(hidden_states).view(batch, *input_dimensions, channels)
        hidden_states = hidden_states + module.drop_path(module.dropout(attend(image)).view(hidden_states.shape))
        residual = hidden_states
        hidden_states = module.mlp(module.layernorm_after(hidden_states))
        return module.dropout(hidden_states) + residual, None

    def block(self, module: Any) -> Block:
        mlp = module.mlp
        norms = module.layernorm_before, module.layernorm_after
        parts = mlp.fc1, mlp.activation_fn, mlp.fc2
        return Block(
            module.attention, *norms, (mlp,), *parts, False, module.drop_path, as_output=lambda out: (out, None)
        )

    def tokens(self, module: Any, hidden_states: Tensor, input_dimensions: Any, *args: Any, **kwargs: Any) -> Tokens:
        return hidden_states, tuple(input_dimensions)
