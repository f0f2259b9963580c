"""Windows that come cut already, with the mask that belongs to them: (windows, N, C).

Windows stacked on each other are an image one window wide (and high, of volumes), so nothing is moved: M windows of a
mask are one image, and without a mask each window is one, or as many as have biases of their own.
"""

from __future__ import annotations

import inspect
import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...spec.block import Attend
from ...spec.window import Axes, Geometry, Section, is_plain
from .blocks import strange_mask
from .common import AttentionItself, positional_names


def stacked_geometry(x: Tensor, mask: Any, window: Axes, count: int = 1) -> Geometry | str:
    """Return the geometry of stacked windows, or why the original must run.

    Args:
        count: how many are an image without a mask.
    """
    if x.dim() != 3 or x.shape[1] != math.prod(window) or not x.shape[1]:
        return f"the input {tuple(x.shape)} is not of windows of {math.prod(window)} tokens"
    reason = strange_mask(mask, x)
    if reason is None:
        count = count if mask is None else mask.shape[0]
        if count == 0 or x.shape[0] % count:
            reason = f"{x.shape[0]} windows do not divide into images of {count}, as the mask has it"
    first, *rest = window
    return reason or Geometry((count * first, *rest), window)


def stacked_image(x: Tensor, mask: Tensor | None, window: Axes, count: int = 1) -> Tensor:
    """Return stacked windows as the images of their geometry, (B, H, W, C)."""
    first, *rest = window
    count = count if mask is None else mask.shape[0]
    return x.reshape(x.shape[0] // count, count * first, *rest, x.shape[2])


class StackedAttention(AttentionItself):
    """Members that families of attention by itself share: (windows, N, C) in and out, with the mask of its block."""

    def window(self, module: Any) -> Axes:
        return tuple(module.window_size)

    def channels(self, module: Any) -> int:
        return module.qkv.in_features

    def read(self, module: Any, geometry: Geometry, mask: Tensor | None) -> Section | str:
        raise NotImplementedError

    def section(self, module: Any, *args: Any, **kwargs: Any) -> Section | str:
        x, mask = window_arguments(module, args, kwargs)
        geometry = stacked_geometry(x, mask, self.window(module))
        return geometry if isinstance(geometry, str) else self.read(module, geometry, mask)

    def mask_of(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        return window_arguments(module, args, kwargs)[1]

    def forward(self, module: Any, attend: Attend, *args: Any, **kwargs: Any) -> Any:
        x, mask = window_arguments(module, args, kwargs)
        out = attend(stacked_image(x, mask, self.window(module)))
        return out.reshape(*x.shape[:2], out.shape[-1])

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        """Return calls with a mask that images share, with one of all windows, and without; and of one window alone."""
        tokens, channels = math.prod(self.window(module)), self.channels(module)
        names, _, mask, others = _arguments(type(module))
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
        masks = [name for name in masks if "mask" in name or name == names[1]]
        masks.sort(key=lambda name: (name != "mask", "mask" not in name))
        others = {name: one for name, one in defaults.items() if name not in (*masks[:1], *names[:1])}
        known = _ARGUMENTS[cls] = names, needed, "".join(masks[:1]), others
    return known


def _is_same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and is_plain(value) and value == default)


_Arguments = tuple[tuple[str, ...], frozenset[str], str, dict[str, Any]]
_ARGUMENTS: WeakKeyDictionary[type, _Arguments] = WeakKeyDictionary()
