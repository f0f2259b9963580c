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
from torch import Tensor, nn

from ...spec.block import Attend
from ...spec.window import Axes, Geometry, Section
from .blocks import strange_mask
from .common import positional_names


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


def attend_stacked(attend: Any, x: Tensor, mask: Tensor | None, window: Axes) -> Tensor:
    """Return what `attend`, from image to image, makes of stacked windows."""
    out = attend(stacked_image(x, mask, window))
    return out.reshape(*x.shape[:2], out.shape[-1])


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
