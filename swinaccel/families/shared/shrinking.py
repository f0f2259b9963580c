"""Windows that shrink to the image at run time, axis by axis, as those of volumes and videos do."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ...spec.window import Axes, Geometry


def shrinking_geometry(size: Axes, window: Sequence[int], shift: Sequence[int]) -> Geometry:
    """Return the geometry whose window is as long as the image, and unshifted, along an axis that one window covers."""
    covered = [length <= side for length, side in zip(size, window, strict=True)]
    return Geometry(
        size,
        tuple([length if fits else side for length, side, fits in zip(size, window, covered, strict=True)]),
        tuple([0 if fits else step for step, fits in zip(shift, covered, strict=True)]),
    )


def prefix(index: Tensor, window: Sequence[int], geometry: Geometry) -> Tensor:
    """Return (N, N): of the whole window's index the first rows and columns, whatever pairs those stand for.

    Where the window has shrunk along any axis but the first, they are not the pairs that the smaller window has. It is
    what the originals read, and so what models were trained with.
    """
    tokens = math.prod(window)
    index = index if index.dim() == 2 else index.view(tokens, -1)
    return index if geometry.tokens == tokens else index[: geometry.tokens, : geometry.tokens]


def example_sizes(window: Sequence[int]) -> list[Axes]:
    """Return sizes of images for a probe: one whole, others padded on every axis or with a window that has shrunk."""
    first, *rest = window
    along_last = (*rest[:-1], rest[-1] + 1)
    return [
        (first + 1, *(side + 1 for side in rest[:-1]), rest[-1]),
        (max(1, first - 1), *along_last),
        (first, *(max(1, side - 1) for side in along_last[:-1]), along_last[-1]),
        (first, *rest[:-1], 2 * rest[-1]),
    ]
