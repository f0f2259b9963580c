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
    tokens, (names, _, mask, others) = math.prod(window), _arguments(type(module))
    calls = []
    for windows, rows in ((6, 3), (6, 6), (6, None), (1, 1), (1, None)):
        given = {**others, mask: None if rows is None else torch.Size((rows, tokens, tokens))}
        calls.append((torch.Size((windows, tokens, channels)), *(given[name] for name in names[1:])))
    return calls if mask else calls[2::2]


def window_arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return windows and mask, under whatever names the forward gives them; all else must be as it is by default."""
    names, needed, mask, others = _arguments(type(module))
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(args) > len(names) or len(given) < len(args) + len(kwargs) or not needed <= given.keys():
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
    names, needed, mask, others = _arguments(cls)
    return bool(names) and needed <= {names[0], mask} and all(map(is_plain, others.values()))


def _arguments(cls: type) -> _Arguments:
    """Return the names of a forward's positional arguments, of those that must be given, and of its mask.

    The mask is the argument that is called so, or else the second; "" where that is by default something else. With
    them come the defaults of all others.
    """
    known = _ARGUMENTS.get(cls)
    if known is None:
        names = positional_names(cls.forward)  # type: ignore[attr-defined]
        _, *parameters = inspect.signature(cls.forward).parameters.values()  # type: ignore[attr-defined]
        stars, empty = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD), inspect.Parameter.empty
        defaults = {one.name: one.default for one in parameters if one.kind not in stars}
        needed = frozenset(name for name, one in defaults.items() if one is empty)
        masks = [name for name in names[1:] if defaults[name] is None or name in needed]
        masks = sorted((name for name in masks if "mask" in name or name == names[1]), key=_likeness, reverse=True)
        others = {name: one for name, one in defaults.items() if name not in (*masks[:1], *names[:1])}
        known = _ARGUMENTS[cls] = names, needed, "".join(masks[:1]), others
    return known


def _likeness(name: str) -> int:
    return 2 * (name == "mask") + ("mask" in name)


def _is_same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and is_plain(value) and value == default)


_Arguments = tuple[tuple[str, ...], frozenset[str], str, dict[str, Any]]
_ARGUMENTS: WeakKeyDictionary[type, _Arguments] = WeakKeyDictionary()
