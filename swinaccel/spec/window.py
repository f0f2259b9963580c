"""The facts of window attention: what a module is (WindowSpec), where its windows lie (Geometry), what one call
of it does (Section).

Axis letters, used everywhere: B images, H and W image rows and columns, C channels, N tokens per window, D head
dim, T rows of the relative position bias table, R rank of bias factors, M windows per image. Images of volumes and
videos are (B, depth, H, W, C), and have three numbers wherever flat ones have two.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Axes = tuple[int, ...]  # one number for each axis of an image: (rows, columns) or (depth, rows, columns)
SHIFT_MASK_VALUE = -100.0  # every Swin adds -100, and never -inf, between regions of a shifted window


@dataclass(frozen=True)
class WindowSpec:
    """Static facts of a module with window attention, as the report shows them.

    Attributes:
        family: the family that recognised the module.
        window, shift: along each axis, at the time of the look; both are read again at every call.
        num_heads, head_dim: of the attention.
    """

    family: str
    window: Axes
    shift: Axes
    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class Geometry:
    """Places of the windows of one call.

    Attributes:
        size: of the image, (H, W) or (depth, H, W); so many axes has everything else here.
        window: of a window.
        shift: how far the image is rolled towards its beginning, after every clamping of the original.
        roll_first: timm rolls and then pads; everyone else pads and then rolls.
        grid: windows per axis, the last ones padded at the end.
        padded: what the windows cover.
        roll: the shift as a roll of the axis that is rolled, in [0, length).
        tokens: N, tokens per window.
        num_windows: M, windows per image.
    """

    size: Axes
    window: Axes
    shift: Axes = ()
    roll_first: bool = False

    # What follows from them, worked out once: these are read many times a call.
    grid: Axes = field(init=False, compare=False, repr=False)
    padded: Axes = field(init=False, compare=False, repr=False)
    roll: Axes = field(init=False, compare=False, repr=False)
    tokens: int = field(init=False, compare=False, repr=False)
    num_windows: int = field(init=False, compare=False, repr=False)
    is_padded: bool = field(init=False, compare=False, repr=False)
    is_shifted: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        size, window, shift = self.size, self.window, self.shift or (0,) * len(self.size)
        grid = tuple([-(-length // side) for length, side in zip(size, window, strict=True)])
        padded = tuple([count * side for count, side in zip(grid, window, strict=True)])
        is_shifted = any(shift)
        roll = shift
        if is_shifted:
            lengths = size if self.roll_first else padded
            roll = tuple([step % max(1, length) for step, length in zip(shift, lengths, strict=True)])
        assign = object.__setattr__
        assign(self, "shift", shift)
        assign(self, "grid", grid)
        assign(self, "padded", padded)
        assign(self, "roll", roll)
        assign(self, "tokens", _product(window))
        assign(self, "num_windows", _product(grid))
        assign(self, "is_padded", padded != size)
        assign(self, "is_shifted", is_shifted)


def _product(numbers: Axes) -> int:
    product = numbers[-1] * numbers[-2]
    return product if len(numbers) == 2 else product * numbers[0]


@dataclass(slots=True)
class Section:
    """The live facts of one call: everything between the qkv projection's input and the output projection's output.

    Attributes:
        geometry: where the windows lie.
        num_heads, head_dim: of the attention.
        project: (..., C) to (..., 3 * heads * D) packed as q, k, v, or to the three apart.
        output: (..., heads * D) to (..., C), projection and its dropout.
        padding: gives what `project` makes of a zero token, as a vector (3 * heads * D,) or None for zeros;
            None itself where that cannot be read off the projection.
        table: gives the relative position bias table (T, heads), with every transform applied; None for no bias. Or
            (T, rows, heads), of biases that rows of windows take in turn: see `reference.bias_of_windows`.
        table_shape: the shape that this table will have, where it has to be computed.
        index: (N, N), int64; row of the table for (query, key). None for no bias.
        sources: the tensors that `table` is computed from.
        position: coordinates, hidden weight and bias, and weight, where `table` is SwinV2's 16 · sigmoid of a plain
            two-layer MLP, so that one kernel may compute it.
        scale: factor of the scores, natural units; unused where `logit_scale` is given.
        logit_scale: one value a head, before its clamp and exp (cosine attention), or None.
        mask_value: added between regions of a shifted window; 0 where nothing is.
        mask: (M, N, N) to add in place of the regions, or None.
        dropout: probability at which attention weights are dropped in this call.
        layers: the linear layers that `project`, one or three, and `output`, the last, are made of, where these are
            functions around them that add nothing as long as nothing drops.
        beside: what else the call attends to, of images that the family makes; see `Family`.
    """

    geometry: Geometry
    num_heads: int
    head_dim: int
    project: Callable[[Tensor], Tensor | tuple[Tensor, Tensor, Tensor]]
    output: Callable[[Tensor], Tensor]
    padding: Callable[[], Tensor | None] | None
    table: Callable[[], Tensor] | None = None
    index: Tensor | None = None
    sources: tuple[Tensor, ...] = ()
    table_shape: tuple[int, ...] = ()
    position: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    scale: float = 1.0
    logit_scale: Tensor | None = None
    mask_value: float = SHIFT_MASK_VALUE
    mask: Tensor | None = None
    dropout: float = 0.0
    layers: tuple[Any, ...] = ()
    beside: Section | None = None


def with_mask(section: Section, mask: Tensor | None) -> Section:
    """Return a section with the mask of another call of its kind, which is None where it has none or its own."""
    return section if mask is None else replace(section, mask=mask)


_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type, types.FunctionType, types.BuiltinFunctionType, torch.dtype,
    torch.device,
)  # fmt: skip


def is_plain(value: Any) -> bool:
    """Return True if nothing can write to a value: a number, a word, a function and the like, or a tuple of them."""
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(is_plain, value)))
