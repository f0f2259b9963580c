"""The official `WindowAttention` by itself, where the block around it is not known: (windows, N, C) in and out.

It is handed windows that its block has cut and rolled, with the mask that belongs to them.
"""

from __future__ import annotations

import inspect
import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..spec.window import SHIFT_MASK_VALUE, Section, WindowSpec
from .shared.common import positional_names
from .shared.official import attention_projections, attention_section, attention_spec, flash_reason
from .shared.stacked import stacked_geometry, stacked_image


class WindowAttention:
    """Any module with the structure of the official attention and a forward of (windows, mask)."""

    name = "window_attention"
    method = "forward"

    def match(self, module: Any) -> WindowSpec | None:
        if hasattr(module, "shift_size") or _names(type(module)) is None:
            return None
        return attention_spec(self.name, module)

    def attention(self, module: Any) -> nn.Module:
        return module

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        return attention_projections(module)

    def section(self, module: Any, *args: Any, **kwargs: Any) -> Section | str:
        x, mask = _arguments(module, args, kwargs)
        geometry = stacked_geometry(x, mask, tuple(module.window_size))
        if isinstance(geometry, str):
            return geometry
        return flash_reason(module) or attention_section(module, geometry, mask, SHIFT_MASK_VALUE)

    def forward(self, module: Any, attend: Any, *args: Any, **kwargs: Any) -> Tensor:
        x, mask = _arguments(module, args, kwargs)
        out = attend(stacked_image(x, mask, tuple(module.window_size)))
        return out.reshape(*x.shape[:2], out.shape[-1])

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        tokens = math.prod(module.window_size)
        x = torch.Size((6, tokens, module.qkv.in_features))
        return [(x, torch.Size((3, tokens, tokens))), (x, None)]


def _arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return windows and mask, under whatever names the forward gives them; what else it may take must be left out."""
    names = _NAMES.get(type(module))
    if names is None:
        names = _NAMES[type(module)] = _names(type(module)) or ()
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(args) > len(names) or not given.keys() <= {*names} or names[0] not in given:
        raise TypeError(f"its arguments are {' and '.join(names[:2])}")
    for name in names[2:]:
        if given.get(name) is not None:
            raise TypeError(f"it is given {name}, which no family knows")
    return given[names[0]], given.get(names[1])


def _names(cls: type) -> tuple[str, ...] | None:
    """Return the names of a forward's arguments (windows, mask, others that default to None), or None."""
    names = positional_names(cls.forward)  # type: ignore[attr-defined]
    parameters = inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]
    return names if len(names) > 1 and all(parameters[name].default is None for name in names[2:]) else None


_NAMES: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()
