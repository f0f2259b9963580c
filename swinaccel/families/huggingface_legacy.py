"""Hugging Face layers with `attention.self` and `attention.output`: Swin of transformers 4 and its siblings, Swinv2.

(B, H * W, C) in, a tuple out; H and W come as an argument. Swin shrinks its own window and shift for good when an
image is small; Swinv2 never looks, normalises after what it normalises, and adds its shift mask twice.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..spec.block import Block, Tokens
from ..spec.window import Section, WindowSpec
from .huggingface import HuggingFaceLayer, layer_geometry
from .huggingface_attention import outer_section
from .shared.common import has_table_rows, is_index, is_position_mlp, pair, positional_names


class HuggingFaceSwinLegacy(HuggingFaceLayer):
    """SwinLayer of transformers 4 and its siblings of that layout, and Swinv2Layer of both."""

    name = "hf_swin_legacy"

    def match(self, module: Any) -> WindowSpec | None:
        outer, size = getattr(module, "attention", None), getattr(module, "window_size", None)
        attn = getattr(outer, "self", None)
        if attn is None or not isinstance(size, int) or not isinstance(module.shift_size, int):
            return None
        if not all(hasattr(module, name) for name in ("layernorm_before", "layernorm_after", "intermediate")):
            return None
        window, heads = pair(tuple(attn.window_size)), attn.num_attention_heads
        if window is None or not is_index(attn.relative_position_index, window[0] * window[1]):
            return None
        if hasattr(attn, "logit_scale"):
            mlp = attn.continuous_position_bias_mlp
            if not is_position_mlp(mlp, heads) or attn.logit_scale.numel() != heads:
                return None
        elif not has_table_rows(attn.relative_position_bias_table, window, heads):
            return None
        return WindowSpec(self.name, (size, size), (module.shift_size,) * 2, heads, attn.attention_head_size)

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        attn = module.attention.self
        return attn.query, attn.key, attn.value, module.attention.output.dense

    def section(self, module: Any, *args: Any, **kwargs: Any) -> Section | str:
        arguments, names = _named(module, args, kwargs), _NAMES[type(module)]
        unknown = arguments.keys() - set(names)
        if unknown or len(args) > len(names):
            return f"the call has arguments that are not known: {', '.join(sorted(unknown)) or len(args)}"
        if arguments.get("output_attentions"):
            return "attention weights are requested, which kernels do not keep; call without output_attentions"
        if arguments.get("head_mask") is not None:
            return "a head_mask is given, which kernels do not take; call without it"
        outer = module.attention
        size, always = arguments["input_dimensions"], arguments.get("always_partition")
        geometry = layer_geometry(module, size, always, outer.self.window_size)
        return geometry if isinstance(geometry, str) else outer_section(outer, geometry)

    def forward(self, module: Any, attend: Any, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        arguments = _named(module, args, kwargs)
        x = arguments["hidden_states"]
        image = (x.shape[0], *arguments["input_dimensions"], x.shape[2])
        if hasattr(module.attention.self, "logit_scale"):  # both norms come after what they normalise
            x = x + module.drop_path(module.layernorm_before(attend(x.view(image)).view(x.shape)))
            mlp = module.output(module.intermediate(x))
            return (x + module.drop_path(module.layernorm_after(mlp)),)
        x = x + module.drop_path(attend(module.layernorm_before(x).view(image)).view(x.shape))
        return (x + module.output(module.intermediate(module.layernorm_after(x))),)

    def block(self, module: Any) -> Block:
        attention, first, last = module.attention, module.intermediate, module.output
        norms = module.layernorm_before, module.layernorm_after
        parts = first.dense, first.intermediate_act_fn, last.dense
        post_norm = hasattr(attention.self, "logit_scale")
        drops = module.drop_path, module.drop_path if post_norm else None
        return Block(attention, *norms, (first, last), *parts, post_norm, *drops, as_output=lambda out: (out,))

    def tokens(self, module: Any, *args: Any, **kwargs: Any) -> Tokens:
        arguments = _named(module, args, kwargs)
        return arguments["hidden_states"], tuple(arguments["input_dimensions"])


# Positional parameters of the layers' forwards: they differ between models and versions of transformers.
_NAMES: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()


def _named(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = _NAMES.get(type(module))
    if names is None:
        names = _NAMES[type(module)] = positional_names(type(module).forward)
    return {**dict(zip(names, args, strict=False)), **kwargs}
