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

from ..spec.block import Attend
from ..spec.window import SHIFT_MASK_VALUE, Axes, Geometry, Section, WindowSpec
from .shared.common import positional_names
from .shared.official import attention_projections, attention_section, attention_spec, flash_reason
from .shared.stacked import attend_stacked, stacked_geometry


class StackedAttention:
    """Members that families of attention by itself share: (windows, N, C) in and out, with the mask of its block."""

    method = "forward"

    def window(self, module: Any) -> Axes:
        return tuple(module.window_size)

    def channels(self, module: Any) -> int:
        return module.qkv.in_features

    def read(self, module: Any, geometry: Geometry, mask: Tensor | None) -> Section | str:
        raise NotImplementedError

    def attention(self, module: Any) -> nn.Module:
        return module

    def section(self, module: Any, *args: Any, **kwargs: Any) -> Section | str:
        x, mask = window_arguments(module, args, kwargs)
        geometry = stacked_geometry(x, mask, self.window(module))
        return geometry if isinstance(geometry, str) else self.read(module, geometry, mask)

    def forward(self, module: Any, attend: Attend, *args: Any, **kwargs: Any) -> Any:
        return attend_stacked(attend, *window_arguments(module, args, kwargs), self.window(module))

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        """Return calls with a mask that images share, with one of all windows, and without; and of one window alone."""
        tokens, names = math.prod(self.window(module)), argument_names(type(module)) or ()
        between = (None,) * (names.index(_mask_name(names)) - 1)
        counts = (6, 3), (6, 6), (6, None), (1, 1), (1, None)
        masks = [(windows, None if rows is None else torch.Size((rows, tokens, tokens))) for windows, rows in counts]
        channels = self.channels(module)
        return [(torch.Size((windows, tokens, channels)), *between, mask) for windows, mask in masks]


class WindowAttention(StackedAttention):
    """Any module with the structure of the official attention and a forward of (windows, mask)."""

    name = "window_attention"

    def match(self, module: Any) -> WindowSpec | None:
        if hasattr(module, "shift_size") or argument_names(type(module)) is None:
            return None
        return attention_spec(self.name, module)

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        return attention_projections(module)

    def read(self, module: Any, geometry: Geometry, mask: Tensor | None) -> Section | str:
        return flash_reason(module) or attention_section(module, geometry, mask, SHIFT_MASK_VALUE)


def window_arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return windows and mask, under whatever names the forward gives them; what else it may take must be left out."""
    names = _NAMES.get(type(module))
    if names is None:
        names = _NAMES[type(module)] = argument_names(type(module)) or ()
    given, mask = {**dict(zip(names, args, strict=False)), **kwargs}, _mask_name(names)
    if len(args) > len(names) or not given.keys() <= {*names} or names[0] not in given:
        raise TypeError(f"its arguments are {names[0]} and {mask}")
    for name in names[1:]:
        if name != mask and given.get(name) is not None and given[name] is not False:
            raise TypeError(f"it is given {name}, which no family knows")
    return given[names[0]], given.get(mask)


def argument_names(cls: type) -> tuple[str, ...] | None:
    """Return the names of a forward's arguments (windows, mask, others that default to None or False), or None."""
    names = positional_names(cls.forward)  # type: ignore[attr-defined]
    if len(names) < 2:
        return None
    parameters, mask = inspect.signature(cls.forward).parameters, _mask_name(names)  # type: ignore[attr-defined]
    others = (parameters[name].default for name in names[1:] if name != mask)
    return names if all(default is None or default is False for default in others) else None


def _mask_name(names: tuple[str, ...]) -> str:
    """Return which argument is the mask: the one of that name, or else the second."""
    return "mask" if "mask" in names else names[1]


_NAMES: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()
