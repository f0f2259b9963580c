"""Windows that come cut already, with the mask that belongs to them: (windows, N, C).

Windows stacked on each other are an image one window wide (and high, of volumes), so nothing is moved: M windows of a
mask are one image, and without a mask each window is one, or as many as have biases of their own.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ...spec.window import Axes, Geometry
from .blocks import strange_mask


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
