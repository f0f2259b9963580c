"""The section in plain PyTorch, made for CPUs.

It is faster than the originals there because the image is gathered into windows before the projection (C channels
move, not 3C, and shift, pad and partition are one copy), the windows are sorted by their shift mask, of which there
are only two along each axis, so that each kind runs through one `scaled_dot_product_attention` whose bias and mask are
one small broadcast tensor, and the position bias is transformed as a table, before it is expanded. A mask that is
another one than the shift implies is added to the bias, window by window.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...errors import KernelError
from ...spec import reference
from ...spec.window import Geometry, Section
from .memory import keep_pages
from .products import PLAIN_TENSORS
from .softmax import accurate, attend, clamp_finite


class _Order(NamedTuple):
    """An order of all windows of a batch in which windows with one mask are neighbours.

    Attributes:
        gather: (windows * N,), row of the flattened image (B * H * W) for every window token; B * H * W itself,
            one beyond the last, for padding. None where tokens lie in this order already.
        scatter: (B * H * W,), row of the window tokens for every image token; None likewise.
        groups: (windows, row of the shift mask or None) for each run of windows with one mask.
    """

    gather: Tensor | None
    scatter: Tensor | None
    groups: tuple[tuple[int, int | None], ...]


@lru_cache(maxsize=16)  # the stages of one model; each is as large as its images
@torch.inference_mode(False)  # it may be saved for a backward later
def _order(geometry: Geometry, batch: int, masked: bool, device: torch.device) -> _Order:
    count = batch * math.prod(geometry.size)
    if geometry.size[1:] == geometry.window[1:] and not (geometry.is_padded or geometry.is_shifted):
        return _Order(None, None, ((batch * geometry.num_windows, None),))
    rows = torch.arange(count, device=device).view(batch, *geometry.size, 1)
    # Numbered from one, zero is what padding leaves behind.
    windows = reference.cut(rows + 1, geometry).view(batch, *geometry.grid, geometry.tokens)
    kinds: list[tuple[Tensor, int | None]] = []
    for kind in _kinds(geometry) if masked else ():
        place = slice(None), *kind.place
        part = windows[place]
        if part.numel():
            kinds.append((part, kind.row if kind.is_masked else None))
    kinds = kinds or [(windows, None)]
    tokens = torch.cat([part.reshape(-1) for part, _ in kinds])
    scatter = torch.empty(count + 1, dtype=torch.long, device=device)
    scatter[tokens] = torch.arange(tokens.numel(), device=device)
    gather = torch.where(tokens == 0, count, tokens - 1)
    groups = tuple((part.numel() // geometry.tokens, row) for part, row in kinds)
    dtype = torch.int32 if tokens.numel() < 2**31 else torch.int64  # there are as many tokens in windows, or more
    return _Order(gather.to(dtype), scatter[1:].to(dtype, copy=True), groups)


class _Kind(NamedTuple):
    """Windows with one shift mask: their place in the grid, and the mask's row in `_shift_masks`."""

    place: tuple[slice, ...] = ()
    row: int = 0
    is_masked: bool = False


def _kinds(geometry: Geometry) -> list[_Kind]:
    """Return the kinds of windows: along a shifted axis the last ones are masked, and the others are not."""
    kinds = [_Kind()]
    for count, shift in zip(geometry.grid, geometry.shift, strict=True):
        sides = [(slice(-1), 0, False), (slice(-1, None), min(count, 2) - 1, True)]
        kinds = [
            _Kind((*kind.place, side), kind.row * min(count, 2) + number, kind.is_masked or is_last)
            for kind, (side, number, is_last) in itertools.product(kinds, sides if shift else [(slice(None), 0, False)])
        ]
    return kinds


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _shift_masks(geometry: Geometry, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (kinds, N, N): the masks of an image of two windows along each axis, which are all that there are."""
    sides = [min(count, 2) * side for count, side in zip(geometry.grid, geometry.window, strict=True)]
    few = Geometry(tuple(sides), geometry.window, geometry.shift)
    return reference.shift_mask(few, value, device=device).to(dtype)


def _is_implied(section: Section) -> bool:
    """Return True if the mask of a call is, now, exactly the one that its shift implies (or zeros without one)."""
    mask, geometry = section.mask, section.geometry
    if mask is None:
        return True
    implied = _shift_masks(geometry, section.mask_value if geometry.is_shifted else 0.0, mask.dtype, mask.device)
    windows = mask.view(*geometry.grid, *mask.shape[1:])
    return all(bool((windows[kind.place] == implied[kind.row]).all()) for kind in _kinds(geometry))


def _bias(section: Section, device: torch.device) -> Tensor:
    """Return (heads, N, N), or (rows, heads, N, N), from the live table, gathered head by head, which writes in order.

    Without a table it is zeros, (1, N, N).
    """
    tokens = section.geometry.tokens
    if section.table is None or section.index is None:
        return torch.zeros(1, tokens, tokens, device=device)
    table = section.table()
    columns = table.flatten(1).t().contiguous()
    return columns.index_select(1, section.index.reshape(-1)).view(*table.shape[1:], tokens, tokens)


def _cosine_operands(q: Tensor, k: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k normalised, q times the clamped scale; (windows, heads, N, D)."""

    def inverse_norm(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accurate(x.dtype))
        return norm.clamp_min(1e-12).reciprocal()

    scale = logit_scale.to(accurate(q.dtype)).view(-1, 1, 1).clamp(max=math.log(100.0)).exp()
    return (q * (inverse_norm(q) * scale)).to(q.dtype), (k * inverse_norm(k)).to(k.dtype)


def shifted_window_attention(section: Section, x: Tensor, in_parts: bool = False) -> Tensor:
    """Run the whole section, projections included.

    Args:
        section: the live facts.
        x: (B, H, W, C), what `section.project` takes.
        in_parts: images may be walked a few at a time, which keeps what is between them in cache.
    Returns:
        (B, H, W, C'), what `section.output` gives.
    """
    keep_pages()
    batch = x.shape[0]
    is_implied = _is_implied(section)
    masked = is_implied and section.geometry.is_shifted and bool(section.mask_value)
    bias = _bias(section, x.device)
    if bias.dim() == 4:  # of all windows, with the mask
        bias = reference.bias_of_windows(bias, section.geometry)
        if masked:
            bias = bias + reference.shift_mask(section.geometry, section.mask_value, device=bias.device)[:, None]
            masked = False
    parts = max(1, round(x.numel() / (x.shape[-1] * part_rows))) if in_parts and not torch.is_grad_enabled() else 1
    size = -(-batch // parts) if batch else 1
    starts = _Starts(section, bias, is_implied, {})
    if size >= batch:
        windows, order = _windows(section, x, starts, masked)
        if order.scatter is not None:
            windows = windows.index_select(0, order.scatter)
        return windows.view(*x.shape[:-1], windows.shape[-1])
    out = None
    for first in range(0, batch, size):
        part = x[first : first + size]
        windows, order = _windows(section, part, starts, masked)
        if out is None:
            out = windows.new_empty(*x.shape[:-1], windows.shape[-1])
        place = out[first : first + size].view(-1, windows.shape[-1])
        if order.scatter is None:
            place.copy_(windows)
        else:
            torch.index_select(windows, 0, order.scatter, out=place)
    assert out is not None
    return out


part_rows = 4096  # tokens walked at a time


def is_plain(attention: nn.Module) -> bool:
    """Return True if all projections in a module treat each token by itself; some quantised ones do not."""
    return all(
        type(module) is nn.Linear and type(module.weight) in PLAIN_TENSORS
        for module in attention.modules()
        if hasattr(module, "in_features")
    )


class _Starts(NamedTuple):
    """Biases (heads, N, N), (1, N, N) or of all windows of an image (M, heads, N, N), and masks that scores start from,
    worked out once a call.
    """

    section: Section
    bias: Tensor
    is_implied: bool
    sums: dict[tuple[int, torch.dtype], Tensor]

    def of(self, order: _Order, dtype: torch.dtype) -> Tensor:
        """Return (windows, 1 or heads, N, N) for all windows of an order, with the masks of their groups."""
        key = sum(count for count, _ in order.groups), dtype
        if key not in self.sums:
            bias, section = clamp_finite(self.bias, dtype), self.section
            mask = _shift_masks(section.geometry, section.mask_value, dtype, bias.device)
            sums = (
                (bias if row is None else bias + mask[row]).expand(count, *bias.shape) for count, row in order.groups
            )
            self.sums[key] = torch.cat(tuple(sums))
        return self.sums[key]


def _windows(section: Section, x: Tensor, starts: _Starts, masked: bool) -> tuple[Tensor, _Order]:
    """Return what `section.output` gives for the tokens of all windows, (windows * N, C'), and their order."""
    geometry = section.geometry
    batch = x.shape[0]
    order = _order(geometry, batch, masked, x.device)
    rows = x.reshape(-1, x.shape[-1])
    if geometry.is_padded:
        rows = torch.cat((rows, x.new_zeros(1, x.shape[-1])))
    if order.gather is not None:
        rows = rows.index_select(0, order.gather)
    windows = rows.view(-1, geometry.tokens, x.shape[-1])

    qkv = section.project(windows)
    if isinstance(qkv, Tensor):
        if qkv.shape[-1] != 3 * section.num_heads * section.head_dim:
            raise KernelError(f"its projection does not give q, k and v of {section.num_heads} x {section.head_dim}")
        q, k, v = qkv.unflatten(-1, (3, section.num_heads, section.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = (reference.split_heads(part, section.num_heads) for part in qkv)
    scale = section.scale
    if section.logit_scale is not None:
        q, k = _cosine_operands(q, k, section.logit_scale)
        scale = 1.0

    bias = clamp_finite(starts.bias, accurate(q.dtype))
    if (bias.dim() == 4 or not starts.is_implied) and batch:
        start = bias
        if not starts.is_implied:
            assert section.mask is not None
            start = bias + clamp_finite(section.mask, bias.dtype)[:, None]  # (M, heads, N, N)
        images = zip(*(part.unflatten(0, (batch, -1)) for part in (q, k, v)), strict=True)
        outs = [_attend(q_image, k_image, v_image, start, scale) for q_image, k_image, v_image in images]
        out = torch.cat(outs) if batch > 1 else outs[0]
    elif len(order.groups) == 1 and order.groups[0][1] is None:
        out = _attend(q, k, v, None if section.table is None else bias[None], scale)
    elif len(order.groups) > 1 and len(q) * bias.numel() <= few_scores:
        out = _attend(q, k, v, starts.of(order, bias.dtype), scale)
    else:
        mask = _shift_masks(geometry, section.mask_value, bias.dtype, bias.device)
        parts, first = [], 0
        for count, row in order.groups:
            window = slice(first, first + count)
            start = bias if row is None else bias + mask[row]
            parts.append(_attend(q[window], k[window], v[window], start[None], scale))
            first += count
        out = torch.cat(parts)
    return section.output(out).flatten(0, 1), order


few_scores = 1 << 18  # of a group of windows, up to which masks written out cost less than calls for each group


def _attend(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, scale: float) -> Tensor:
    """Attend (windows, heads, N, D) to (windows, N, heads * D); start is broadcast to (windows, heads, N, N)."""
    return attend(q, k, v, start, scale).transpose(1, 2).flatten(2)
