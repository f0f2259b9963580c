"""Attention of windows in plain PyTorch, for any device and dtype, fp64 included. Gradients are autograd's."""

from __future__ import annotations

import torch
from torch import Tensor

from ...spec import reference
from ...spec.window import Geometry
from .sequence import is_transformed
from .softmax import accurate, attend, clamp_finite, nothing
from .window import _cosine_operands


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    logit_scale: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend as `reference.attention` does; on CPUs by `softmax.attend`, whose start is bias and mask together.

    Where windows take both in turn, the rows of one divide those of the other.
    """
    if q.numel() == 0:
        return nothing(q, k, v, bias, logit_scale)
    with torch.autocast(q.device.type, enabled=False):  # which would round the bias
        if q.device.type != "cpu" or is_transformed():  # `scaled_dot_product_attention` lacks their derivatives
            return reference.attention(
                q, k, v, bias=bias, mask=mask, scale=scale, logit_scale=logit_scale, dropout=dropout
            )  # fmt: skip
        if logit_scale is not None:
            q, k = _cosine_operands(q, k, logit_scale)
            scale = 1.0
        dtype = accurate(q.dtype)
        start = None if bias is None else clamp_finite(bias, dtype)
        if start is not None and start.dim() == 3:
            start = start.unsqueeze(0)
        if mask is not None:
            masks = clamp_finite(mask, dtype).unsqueeze(1)
            start = masks if start is None else _sum_in_turn(start, masks)
        if start is None or start.shape[0] == 1:
            return attend(q, k, v, start, scale, dropout)
        # (windows, heads) become (images, period * heads), so that one start serves all images.
        period, heads = start.shape[0], q.shape[1]
        count = period * heads
        start = start.expand(-1, heads, -1, -1).reshape(1, count, *start.shape[2:])
        q, k, v = (t.reshape(t.shape[0] // period, count, *t.shape[2:]) for t in (q, k, v))
        out = attend(q, k, v, start, scale, dropout)
        return out.reshape(-1, heads, *out.shape[2:])


def _sum_in_turn(bias: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of terms (period, ...) that windows take in turn, where one period divides the other."""
    period = max(bias.shape[0], mask.shape[0])
    one, other = (term.repeat(period // term.shape[0], 1, 1, 1) if term.shape[0] > 1 else term for term in (bias, mask))
    return one + other


def shifted_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    *,
    num_heads: int,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
    mask_value: float = -100.0,
    scale: float = 1.0,
    logit_scale: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend as `reference.shifted_window_attention` does, with the bias (heads, N, N) or (rows, heads, N, N).

    Of the mask that a shift implies there are few different rows: the last windows along each shifted axis have
    their own, and each kind of window goes through `attention` with its one. Where rows of windows have biases of their
    own, the bias and the mask of every window are written out.
    """
    if q.numel() == 0:
        return nothing(q, k, v, bias, padding, logit_scale)
    windows = reference.windows_of((q, k, v), geometry, num_heads, padding)
    if bias is not None and bias.dim() == 4:
        bias = reference.bias_of_windows(bias, geometry)
        if mask is None and geometry.is_shifted and mask_value:
            mask = reference.shift_mask(geometry, mask_value, device=q.device)
    options = {"bias": bias, "scale": scale, "logit_scale": logit_scale, "dropout": dropout}
    if mask is None and geometry.is_shifted and mask_value:
        out = _attend_by_kind(
            [part.unflatten(0, (-1, *geometry.grid)) for part in windows], geometry, mask_value, options
        )
    else:
        out = attention(*windows, mask=mask, **options)  # type: ignore[arg-type]
    return reference.join(out.transpose(1, 2).flatten(2), geometry)


def _attend_by_kind(windows: list[Tensor], geometry: Geometry, mask_value: float, options: dict) -> Tensor:
    """Attend (B, *grid, heads, N, D) each to (B * M, heads, N, D)."""
    few = tuple(min(2, count) for count in geometry.grid)  # two windows along an axis are one of each kind
    size = tuple(count * side for count, side in zip(few, geometry.window, strict=True))
    corner = Geometry(size, geometry.window, geometry.shift)
    masks = reference.shift_mask(corner, mask_value, device=windows[0].device)
    masks = masks.unflatten(0, few)

    def attend(windows: list[Tensor], place: tuple[int, ...]) -> Tensor:
        axis = len(place)
        if axis == len(few):
            shape = windows[0].shape
            parts = (part.flatten(0, axis) for part in windows)
            return attention(*parts, mask=masks[place].unsqueeze(0), **options).reshape(shape)
        if few[axis] == 1 or not geometry.shift[axis]:
            return attend(windows, (*place, 0))
        count = geometry.grid[axis]
        split = zip(*(part.split((count - 1, 1), axis + 1) for part in windows), strict=True)
        return torch.cat([attend(list(parts), (*place, kind)) for kind, parts in enumerate(split)], axis + 1)

    return attend(windows, ()).flatten(0, len(few))
