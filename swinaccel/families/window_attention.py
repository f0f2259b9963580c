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

from ..spec.window import SHIFT_MASK_VALUE, Section, WindowSpec, is_plain
from .shared.common import positional_names
from .shared.official import attention_projections, attention_section, attention_spec, flash_reason
from .shared.stacked import attend_stacked, stacked_geometry


class WindowAttention:
    """Any module with the structure of the official attention and a forward of windows, and of a mask."""

    name = "window_attention"
    method = "forward"

    def match(self, module: Any) -> WindowSpec | None:
        if hasattr(module, "shift_size") or not takes_windows(type(module)):
            return None
        return attention_spec(self.name, module)

    def attention(self, module: Any) -> nn.Module:
        return module

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        return attention_projections(module)

    def section(self, module: Any, *args: Any, **kwargs: Any) -> Section | str:
        x, mask = window_arguments(module, args, kwargs)
        geometry = flash_reason(module) or stacked_geometry(x, mask, tuple(module.window_size))
        return geometry if isinstance(geometry, str) else attention_section(module, geometry, mask, SHIFT_MASK_VALUE)

    def forward(self, module: Any, attend: Any, *args: Any, **kwargs: Any) -> Tensor:
        return attend_stacked(attend, *window_arguments(module, args, kwargs), tuple(module.window_size))

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        return window_examples(module, module.window_size, module.qkv.in_features)


def window_examples(module: Any, window: Any, channels: int) -> list[tuple[Any, ...]]:
    """Return calls with a mask that images share, with one of all windows, and without; and of one window alone."""
    tokens, (names, mask, others) = math.prod(window), _arguments(type(module))
    calls = []
    for windows, rows in ((6, 3), (6, 6), (6, None), (1, 1), (1, None)):
        given = {**others, mask: None if rows is None else torch.Size((rows, tokens, tokens))}
        calls.append((torch.Size((windows, tokens, channels)), *(given[name] for name in names[1:])))
    return calls if mask else calls[2::2]


def window_arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return windows and mask, under whatever names the forward gives them; all else must be as it is by default."""
    names, mask, others = _arguments(type(module))
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(args) > len(names) or names[0] not in given:
        raise TypeError(f"its arguments are {', '.join(names)}")
    if len(given) > 1 + (mask in given):
        for name, value in given.items():
            if name in others and not _is_same(value, others[name]):
                raise TypeError(f"it is given {name}, and was proven without")
            if name not in others and name not in (names[0], mask):
                raise TypeError(f"it is given {name}, which its family does not know")
    return given[names[0]], given.get(mask)


def takes_windows(cls: type) -> bool:
    """Return True if a forward takes windows, perhaps a mask, and else what need not be given."""
    names, mask, others = _arguments(cls)
    defaults = [others[name] for name in names[1:] if name != mask]
    return bool(names) and all(is_plain(one) and one is not inspect.Parameter.empty for one in defaults)


def _arguments(cls: type) -> tuple[tuple[str, ...], str, dict[str, Any]]:
    """Return the names of a forward's positional arguments, that of its mask, and the defaults of what is neither.

    The mask is the argument that is called so, or else the second; "" where that is by default something else.
    """
    known = _ARGUMENTS.get(cls)
    if known is None:
        names = positional_names(cls.forward)  # type: ignore[attr-defined]
        _, *parameters = inspect.signature(cls.forward).parameters.values()  # type: ignore[attr-defined]
        defaults = {
            one.name: one.default for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        }
        called = sorted((name for name in names[1:] if "mask" in name), key=lambda name: name != "mask")
        mask = [*called, *(name for name in names[1:2] if defaults[name] in (None, inspect.Parameter.empty)), ""][0]
        others = {name: one for name, one in defaults.items() if name not in (mask, *names[:1])}
        known = _ARGUMENTS[cls] = names, mask, others
    return known


def _is_same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and is_plain(value) and value == default)


_ARGUMENTS: WeakKeyDictionary[type, tuple[tuple[str, ...], str, dict[str, Any]]] = WeakKeyDictionary()
