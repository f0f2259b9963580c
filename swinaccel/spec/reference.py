"""The oracle: shifted-window attention written out step by step in plain PyTorch, in any dtype, fp64 included.

It materialises everything that the kernels avoid and is meant to be read. Every backend is tested against it, and
every class that `accelerate` meets is probed with it before it is trusted.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import normalize  # as it was at import: a probe shows what was put in its place

from .window import Geometry, Section


def shift_mask(geometry: Geometry, value: float, *, device: torch.device | str = "cpu") -> Tensor:
    """Return the mask of shifted windows: `value` between tokens of different regions, else 0.

    Returns:
        (M, N, N), fp32.
    Source: Liu et al. 2021, arXiv:2103.14030, section 3.2; slices as in the official code, on the padded grid.
    """
    regions = torch.zeros((), device=device)
    for length, window, shift in zip(geometry.padded, geometry.window, geometry.shift, strict=True):
        along = torch.zeros(length, device=device)
        for number, part in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
            along[part] = number
        regions = 3 * regions[..., None] + along  # one axis more; nine regions in the end, or 27 of volumes
    windows = partition(regions[None, ..., None], geometry).squeeze(-1)  # (M, N)
    return (windows[:, :, None] != windows[:, None, :]).float() * value


def partition(image: Tensor, geometry: Geometry) -> Tensor:
    """Turn (B, H, W, C) of padded size into (B * M, N, C), windows row-major in an image; (B, depth, H, W, C) too."""
    batch, *_, channels = image.shape
    axes = len(geometry.grid)
    sides = [side for pair in zip(geometry.grid, geometry.window, strict=True) for side in pair]
    tiles = image.reshape(batch, *sides, channels)  # (B, windows, rows of one, windows, columns of one, C)
    windows_first = (*range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2))
    return tiles.permute(0, *windows_first, 2 * axes + 1).reshape(-1, geometry.tokens, channels)


def reverse(windows: Tensor, geometry: Geometry) -> Tensor:
    """Turn (B * M, N, C) into (B, H, W, C) of padded size; undoes `partition`."""
    axes = len(geometry.grid)
    tiles = windows.reshape(-1, *geometry.grid, *geometry.window, windows.shape[-1])
    interleaved = [axis for number in range(1, axes + 1) for axis in (number, axes + number)]
    return tiles.permute(0, *interleaved, 2 * axes + 1).reshape(-1, *geometry.padded, windows.shape[-1])


def cut(image: Tensor, geometry: Geometry, padding: Tensor | None = None) -> Tensor:
    """Roll, pad and partition an image (B, H, W, C), in the geometry's order, to (B * M, N, C).

    Padding tokens hold `padding` (C,), or zeros.
    """
    missing = [0, 0]  # of the last axis first: before it, after it
    for length, padded in zip(reversed(geometry.size), reversed(geometry.padded), strict=True):
        missing += [0, padded - length]

    def pad(image: Tensor) -> Tensor:
        real = F.pad(image.new_ones(1, *geometry.size, 1), missing)
        image = F.pad(image, missing)
        return image if padding is None else torch.where(real.bool(), image, padding.to(image.dtype))

    shifts, axes = [-shift for shift in geometry.shift], _axes(geometry)
    image = pad(torch.roll(image, shifts, axes)) if geometry.roll_first else torch.roll(pad(image), shifts, axes)
    return partition(image, geometry)


def join(windows: Tensor, geometry: Geometry) -> Tensor:
    """Undo `cut`: (B * M, N, C) to (B, H, W, C), padding dropped."""
    image = reverse(windows, geometry)
    real = (slice(None), *(slice(length) for length in geometry.size))
    if geometry.roll_first:
        return torch.roll(image[real], geometry.shift, _axes(geometry))
    return torch.roll(image, geometry.shift, _axes(geometry))[real]


def _axes(geometry: Geometry) -> tuple[int, ...]:
    return tuple(range(1, len(geometry.size) + 1))


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
    """Compute window attention with additive bias and mask.

    Args:
        q, k, v: (windows, heads, N, D).
        bias: (heads, N, N), natural units; or (rows, heads, N, N), of which window i uses row i mod rows.
        mask: (M, N, N); window i uses row i mod M.
        scale: multiplies q kᵀ; unused with `logit_scale`.
        logit_scale: (heads,) before clamp and exp: scores are cos(q, k) · exp(min(logit_scale, ln 100)).
        dropout: probability at which an attention weight is dropped.
    Returns:
        (windows, heads, N, D).
    """
    weights = attention_scores(q, k, bias=bias, mask=mask, scale=scale, logit_scale=logit_scale).softmax(-1)
    return F.dropout(weights, dropout).to(v.dtype) @ v


def attention_scores(
    q: Tensor, k: Tensor, *, bias: Tensor | None, mask: Tensor | None, scale: float, logit_scale: Tensor | None
) -> Tensor:
    """Compute the scores of `attention`, (windows, heads, N, N), of which softmax makes the weights.

    Source: arXiv:2103.14030, eq. 4; arXiv:2111.09883, eq. 2.
    """
    if logit_scale is None:
        scores = (q * scale) @ k.transpose(-2, -1)
    else:
        cosine = normalize(q, dim=-1) @ normalize(k, dim=-1).transpose(-2, -1)
        scores = cosine * logit_scale.view(-1, 1, 1).clamp(max=math.log(100.0)).exp()
    if bias is not None:
        scores = scores + bias if bias.dim() == 3 else (scores.unflatten(0, (-1, bias.shape[0])) + bias).flatten(0, 1)
    if mask is not None:
        windows, heads, tokens, _ = scores.shape
        scores = scores.view(-1, mask.shape[0], heads, tokens, tokens) + mask[:, None]
        scores = scores.view(windows, heads, tokens, tokens)
    return scores


def split_heads(windows: Tensor, num_heads: int) -> Tensor:
    """Turn (windows, N, heads * D) into (windows, heads, N, D)."""
    return windows.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def windows_of(images: tuple[Tensor, ...], geometry: Geometry, num_heads: int, padding: Tensor | None) -> list[Tensor]:
    """Cut q, k and v into (windows, heads, N, D) each; `padding` as in `shifted_window_attention`."""
    pads = (None,) * 3 if padding is None else padding.chunk(3)
    return [split_heads(cut(image, geometry, pad), num_heads) for image, pad in zip(images, pads, strict=True)]


def bias_from_table(table: Tensor, index: Tensor) -> Tensor:
    """Return the relative position bias (heads, N, N) from its table (T, heads) and index (N, N).

    With biases of rows of windows it is (rows, heads, N, N), from a table (T, rows, heads).
    """
    return table[index.reshape(-1)].view(*index.shape, *table.shape[1:]).movedim((0, 1), (-2, -1))


def bias_of_windows(bias: Tensor, geometry: Geometry) -> Tensor:
    """Return what windows have of the biases (rows, heads, N, N) that their rows take in turn: (M, heads, N, N).

    Rows of windows are numbered as windows are: those of an image from the top, those of a volume depth by depth.
    """
    return bias.repeat_interleave(geometry.grid[-1], 0).repeat(math.prod(geometry.grid[:-1]) // bias.shape[0], 1, 1, 1)


def shifted_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    *,
    num_heads: int,
    table: Tensor | None = None,
    index: Tensor | None = None,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
    mask_value: float = -100.0,
    scale: float = 1.0,
    logit_scale: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute shifted-window attention from image to image.

    Args:
        q, k, v: (B, H, W, heads * D), or (B, depth, H, W, heads * D).
        geometry: window, shift and their order.
        num_heads: heads.
        table, index: (T, heads) and (N, N), the relative position bias; or (heads, N, N), the same, without index. With
            biases that rows of windows take in turn, (T, rows, heads) or (rows, heads, N, N): see `bias_of_windows`.
        padding: (3 * heads * D,), q, k and v of a padding token; zeros without.
        mask: (M, N, N), in place of the mask that the shift implies.
        mask_value: what the implied mask adds between regions.
        scale, logit_scale, dropout: as in `attention`.
    Returns:
        (B, H, W, heads * D), as q.
    """
    q, k, v = windows_of((q, k, v), geometry, num_heads, padding)
    if mask is None and geometry.is_shifted and mask_value:
        mask = shift_mask(geometry, mask_value, device=q.device)
    bias = _bias(table, index, geometry)
    out = attention(q, k, v, bias=bias, mask=mask, scale=scale, logit_scale=logit_scale, dropout=dropout)
    return join(out.transpose(1, 2).flatten(2), geometry)


def _bias(table: Tensor | None, index: Tensor | None, geometry: Geometry) -> Tensor | None:
    """Return the bias of all windows of an image, from its table or as it comes without an index; None without one."""
    bias = table if table is None or index is None else bias_from_table(table, index)
    return bias_of_windows(bias, geometry) if bias is not None and bias.dim() == 4 else bias


def section_attention(section: Section, image: Tensor) -> Tensor:
    """Return what a section gives of an image: (B, H, W, C) to (B, H, W, C'). A dropout counts if it drops all."""
    (q, k, v), bias, mask = _operands(section, image)
    scale, logit_scale, dropout = section.scale, section.logit_scale, float(section.dropout == 1.0)
    out = attention(q, k, v, bias=bias, mask=mask, scale=scale, logit_scale=logit_scale, dropout=dropout)
    return section.output(join(out.transpose(1, 2).flatten(2), section.geometry))


def section_weights(section: Section, image: Tensor) -> Tensor:
    """Return the weights that a section gives the keys of an image (B, H, W, C), (B * M, heads, N, N)."""
    return section_scores(section, image).softmax(-1)


def section_scores(section: Section, image: Tensor) -> Tensor:
    """Return the scores that a section gives the keys of an image (B, H, W, C), (B * M, heads, N, N)."""
    (q, k, _), bias, mask = _operands(section, image)
    return attention_scores(q, k, bias=bias, mask=mask, scale=section.scale, logit_scale=section.logit_scale)


def _operands(section: Section, image: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Return q, k and v of all windows of an image, and their bias and mask."""
    qkv, geometry, mask = section.project(image), section.geometry, section.mask
    parts = qkv.chunk(3, dim=-1) if isinstance(qkv, Tensor) else qkv
    padding = section.padding() if section.padding is not None else None
    windows = windows_of(parts, geometry, section.num_heads, padding)
    if mask is None and geometry.is_shifted and section.mask_value:
        mask = shift_mask(geometry, section.mask_value, device=image.device)
    return windows, _bias(None if section.table is None else section.table(), section.index, geometry), mask


def visible_keys(
    tokens: int,
    *,
    causal: bool = False,
    block_size: int = 0,
    window_blocks: int = 1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return which keys (columns) each query (row) of a sequence sees, (N, N), bool.

    With `causal` those up to itself; with `block_size` those of its own block of so many tokens and of the
    `window_blocks - 1` blocks before; else all.
    """
    place = torch.arange(tokens, device=device)
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    if causal:
        seen &= place[:, None] >= place[None, :]
    if block_size:
        ago = (place // block_size)[:, None] - (place // block_size)[None, :]
        seen &= (ago >= 0) & (ago < window_blocks)
    return seen


def sequence_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_factor: Tensor | None = None,
    k_factor: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    causal: bool = False,
    block_size: int = 0,
    window_blocks: int = 1,
) -> Tensor:
    """Compute attention over sequences with a bias from factors and a pattern of visible keys.

    Args:
        q, k, v: (batch, heads, N, D).
        q_factor, k_factor: (heads, N, R) or (batch, heads, N, R); the bias is q_factor k_factorᵀ, natural units.
        mask: (M, N, N); batch i uses row i mod M.
        scale: multiplies q kᵀ.
        causal, block_size, window_blocks: see `visible_keys`.
    Returns:
        (batch, heads, N, D); zeros for a query that sees no key.
    Source: FlashBias, arXiv:2505.12044, eq. 3.
    """
    scores = (q * scale) @ k.transpose(-2, -1)
    if q_factor is not None and k_factor is not None:
        scores = scores + q_factor @ k_factor.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask[torch.arange(q.shape[0], device=mask.device) % mask.shape[0]].unsqueeze(1)
    seen = visible_keys(q.shape[2], causal=causal, block_size=block_size, window_blocks=window_blocks, device=q.device)
    scores = scores.masked_fill(~seen, float("-inf"))
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return weights.to(v.dtype) @ v
