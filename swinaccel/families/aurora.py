"""Aurora's `WindowAttention` by itself: windows of volumes, no position bias, LoRA by the step of a roll-out.

Its block rolls before it pads, pads on both sides, and lets the image's left and right meet: it hands on windows that
are cut already, with the mask that belongs to them. They shrink to volumes that are smaller, so their number of tokens
is that of the input.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..spec.window import Axes, Section, WindowSpec
from .shared.common import AttentionItself, dropped, fan_in, sides
from .shared.stacked import stacked_geometry, stacked_image


class Aurora(AttentionItself):
    """An attention with `lora_qkv` and `lora_proj` beside its projections; they are modules, or give 0."""

    name = "aurora"

    def match(self, module: Any) -> WindowSpec | None:
        window, heads = sides(getattr(module, "window_size", None)), getattr(module, "num_heads", None)
        if window is None or not isinstance(heads, int) or not isinstance(module.attn_drop, float):
            return None
        if not all(isinstance(getattr(module, name), nn.Module) for name in ("qkv", "proj", "proj_drop")):
            return None
        if not callable(module.lora_qkv) or not callable(module.lora_proj):
            return None
        return WindowSpec(self.name, window, (0,) * len(window), heads, fan_in(module.proj) // heads)

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        called = module.qkv, module.proj, module.lora_qkv, module.lora_proj
        return tuple(one for one in called if isinstance(one, nn.Module))

    def section(self, module: Any, x: Tensor, mask: Any = None, rollout_step: int = 0) -> Section | str:
        geometry = stacked_geometry(x, mask, _window(x))
        if isinstance(geometry, str):
            return geometry
        if getattr(module, "use_fp16_safe_attention", False):
            return "its attention is the one that is safe in fp16, which rounds otherwise"
        if mask is not None and _hides_all(mask):
            return "a query of the mask sees no key, and gets zeros from scaled_dot_product_attention"
        if module.attn_drop:  # any such number is looked after at eager calls, and none at compiled ones
            rate, name = "attn_drop", type(module).__name__
            return f"{rate} of its {name} is not zero, and only its own code says if that drops; set it to 0"
        head_dim = fan_in(module.proj) // module.num_heads
        return Section(
            geometry=geometry,
            num_heads=module.num_heads,
            head_dim=head_dim,
            project=functools.partial(_adapted, module.qkv, module.lora_qkv, rollout_step),
            output=dropped(functools.partial(_adapted, module.proj, module.lora_proj, rollout_step), module.proj_drop),
            padding=None,
            scale=head_dim**-0.5,
            mask=mask,
            mask_value=0.0,
        )

    def forward(self, module: Any, attend: Any, x: Tensor, mask: Any = None, rollout_step: int = 0) -> Tensor:
        return attend(stacked_image(x, mask, _window(x))).reshape(x.shape)

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        """Return calls with windows of other sizes than the module's, at the first step and at later ones."""
        tokens, channels = 6, module.qkv.in_features
        windows, mask = torch.Size((6, tokens, channels)), torch.Size((3, tokens, tokens))
        return [*((windows, mask, step) for step in (0, 1, 7)), (windows,), (torch.Size((1, tokens, channels)),)]


def _window(x: Tensor) -> Axes:
    """Return the window (1, N) of N tokens in a row, since only their number counts."""
    return 1, *x.shape[1:2]


def _hides_all(mask: Tensor) -> bool:
    """Return True if a mask is -inf in a whole row. On GPUs it is looked through once, until it is written to."""
    if torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    known = _looked.get(mask)
    if known is None or mask.is_inference() or not mask.is_cuda or known[0] != mask._version:
        version = 0 if mask.is_inference() else mask._version
        known = _looked[mask] = version, bool((mask == float("-inf")).all(-1).any())
    return known[1]


_looked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _adapted(projection: Any, lora: Any, step: int, x: Tensor) -> Tensor:
    """Return a projection plus what its LoRA adds at a step; 0 costs nothing."""
    out, more = projection(x), lora(x, step)
    return out if isinstance(more, int) and more == 0 else out + more
