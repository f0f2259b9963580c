"""The operators as functions, for people who write their own model.

Every function runs on the Triton kernels where they can serve a call (CUDA; fp16, bf16, fp32), and in plain PyTorch
elsewhere, forward and backward, eagerly and under torch.compile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .backends.torch import sequence as torch_sequence
from .backends.torch import windows as torch_windows
from .backends.triton.sequence import Problem
from .bias.exact import alibi_factors, squared_distance_factors
from .bias.factors import BiasFactors, factorize_bias
from .ops import sequence as sequence_ops
from .ops.serving import autocast, serves_sequences, serves_windows, try_window_kernels
from .spec import reference
from .spec.arguments import (
    check_axes,
    check_bias,
    check_device,
    check_dropout,
    check_factors,
    check_logit_scale,
    check_mask,
    check_number,
    check_positive,
    check_qkv,
    check_table,
    check_tensor,
)
from .spec.window import SHIFT_MASK_VALUE, Geometry

__all__ = [
    "BiasFactors",
    "alibi_factors",
    "block_sliding_window_attention",
    "cosine_window_attention",
    "factored_bias_attention",
    "factorize_bias",
    "shifted_window_attention",
    "squared_distance_factors",
    "window_attention",
]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute softmax(q kᵀ · scale + bias + mask) v within windows: Swin's attention, on windows that are cut already.

    Differentiable in q, k, v and bias. The kernels take windows of up to 1024 tokens and a head_dim of up to 128;
    larger ones run in PyTorch. Where windows are still to be cut from an image, see `shifted_window_attention`.

    Args:
        q, k, v: (windows, heads, N, D), one dtype, any strides; the output projection's view of q, k and v is as good
            as contiguous ones.
        bias: (heads, N, N), added to the scores, natural units, any floating dtype. Or (rows, heads, N, N), where it
            differs by window row, as in weather models: window i uses row i mod rows.
        mask: (M, N, N), 0 or a large negative (Swin's is -100), added to the scores of all heads; window i uses row
            i mod M. It takes no gradient. A query whose whole row is -inf has no defined output.
        scale: multiplies q kᵀ; D^-0.5 without.
        dropout: probability at which an attention weight is dropped, from PyTorch's generator. It is dropped whenever
            it is given: pass 0.0 in evaluation.
    Returns:
        (windows, heads, N, D), dtype of q (autocast's under autocast). Softmax and sums in fp32, or fp64.
    Raises:
        TypeError, ValueError: for arguments of another kind or shape; the message names the argument.
    Source: Liu et al. 2021, arXiv:2103.14030, eq. 4; Flash Window Attention, arXiv:2501.06480.
    """
    return _attend_windows(q, k, v, None, bias, mask, scale, dropout)


def cosine_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_scale: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute softmax(cos(q, k) · exp(min(logit_scale, ln 100)) + bias + mask) v within windows: SwinV2's attention.

    Vectors are divided by max(‖x‖, 1e-12), as `torch.nn.functional.normalize` does. Differentiable in q, k, v,
    logit_scale and bias; above its clamp logit_scale has no gradient.

    Args:
        q, k, v, bias, mask, dropout: as for `window_attention`.
        logit_scale: (heads,) or (heads, 1, 1), before its clamp and exp, any floating dtype.
    Returns:
        (windows, heads, N, D), dtype of q (autocast's under autocast).
    Raises:
        TypeError, ValueError: for arguments of another kind or shape; the message names the argument.
    Source: Liu et al. 2022, arXiv:2111.09883, eq. 2.
    """
    if logit_scale is None:
        raise TypeError("logit_scale must be a tensor; got None")
    return _attend_windows(q, k, v, logit_scale, bias, mask, None, dropout)


def shifted_window_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    window_size: int | tuple[int, ...],
    num_heads: int,
    shift_size: int | tuple[int, ...] = 0,
    *,
    table: Tensor | None = None,
    index: Tensor | None = None,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
    mask_value: float = SHIFT_MASK_VALUE,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    dropout: float = 0.0,
    roll_first: bool = False,
) -> Tensor:
    """Compute attention within the shifted windows of an image, from image to image.

    Stands in for pad, roll, partition, attention, reverse, roll back and crop, and on a GPU does none of those in
    memory. Differentiable in qkv, table, bias, padding and logit_scale.

    Args:
        qkv: (B, H, W, 3 * heads * D), as one projection gives q, k and v, or the three (B, H, W, heads * D) apart.
            Volumes and videos have their depth before H, and three axes in all that follows.
        window_size: tokens of a window, (rows, columns) or one number for every axis. Images that it does not divide
            are padded at the end of the axis.
        num_heads: heads, which lie side by side in the last axis of q, of k and of v.
        shift_size: how far windows are shifted, likewise, 0 or more and less than window_size.
        table, index: the relative position bias as parameters hold it: (rows, heads), natural units, and (N, N) int64,
            the row for (query, key) of a window, numbered row by row. Entries are 0 or more and less than the table's
            rows; they are looked through at the first call with an index, and again when that was written to. Or
        bias: (heads, N, N), the same as one tensor; with neither there is none. Or (rows, heads, N, N), one for each
            row of windows from the top; of volumes the rows of each depth of windows in turn.
        padding: (3 * heads * D,), what a padding token has for q, k and v; where a projection makes them of zeros, its
            bias. Zeros without.
        mask: (M, N, N) for the M windows of an image, row by row, added to the scores in place of what the shift
            implies. It takes no gradient.
        mask_value: what the shift's own mask adds between tokens that only the shift made neighbours; 0 for no mask.
        scale: multiplies q kᵀ; D^-0.5 without. Not to be given with logit_scale.
        logit_scale: (heads,) or (heads, 1, 1): cosine attention, as in `cosine_window_attention`.
        dropout: as for `window_attention`.
        roll_first: shift the image and then pad it, as timm does; else pad and then shift, as everyone else.
    Returns:
        (B, H, W, heads * D), dtype of qkv (autocast's under autocast).
    Raises:
        TypeError, ValueError: for arguments of another kind or shape; the message names the argument.
    Source: Liu et al. 2021, arXiv:2103.14030, section 3.2; Liu et al. 2022, arXiv:2111.09883, eq. 2.
    """
    check_positive("num_heads", num_heads)
    parts = _check_images(qkv)
    first, packed = parts[0], len(parts) == 1
    channels, axes = first.shape[-1] // 3 if packed else first.shape[-1], first.dim() - 2
    if channels < 1 or channels % num_heads or (packed and first.shape[-1] % 3):
        wanted = "(B, H, W, 3 * num_heads * head_dim)" if packed else "(B, H, W, num_heads * head_dim)"
        raise ValueError(f"qkv must have shape {wanted}, num_heads {num_heads}; got {tuple(first.shape)}")
    window = check_axes("window_size", window_size, 1, axes)
    shift = check_axes("shift_size", shift_size, 0, axes)
    if not all(step < side for step, side in zip(shift, window, strict=True)):
        raise ValueError(f"shift_size must be less than window_size, {window}; got {shift_size!r}")
    geometry = Geometry(tuple(first.shape[1:-1]), window, shift, roll_first)
    tokens, head_dim = geometry.tokens, channels // num_heads

    if bias is not None:
        if table is not None or index is not None:
            raise ValueError("bias must not be given together with table and index; got both")
        check_bias(first, bias, num_heads, tokens, "qkv", math.prod(geometry.grid[:-1]))
    elif table is not None or index is not None:
        index = check_table(first, table, index, num_heads, tokens)
    if padding is not None:
        check_tensor("padding", padding)
        if padding.shape != (3 * channels,):
            raise ValueError(f"padding must have shape ({3 * channels},), q, k and v; got {tuple(padding.shape)}")
        check_device("padding", padding, first, "qkv")
    if mask is not None:
        check_mask(first, mask, tokens, "bias", geometry.num_windows, "qkv")
    check_number("mask_value", mask_value)
    if not isinstance(roll_first, bool):
        raise TypeError(f"roll_first must be True or False; got {roll_first!r}")
    dropout = check_dropout(dropout)
    if logit_scale is not None:
        logit_scale = check_logit_scale(first, logit_scale, num_heads, "qkv")
        if scale is not None:
            raise ValueError(f"scale must be None where logit_scale is given; got {scale!r}")
    if scale is not None:
        check_number("scale", scale, "None or a number")
    number = head_dim**-0.5 if scale is None else float(scale)

    parts = autocast(*parts)
    options: dict[str, Any] = {
        "num_heads": num_heads, "padding": padding, "mask": mask, "mask_value": float(mask_value), "scale": number,
        "logit_scale": logit_scale, "dropout": dropout,
    }  # fmt: skip
    if serves_windows(parts[0], geometry, num_heads, head_dim, logit_scale is not None):
        given = parts[0] if packed else parts
        out = try_window_kernels(given, geometry, table=table if bias is None else bias, index=index, **options)
        if out is not None:
            return out
    if table is not None and index is not None:
        bias = reference.bias_from_table(table, index)
    q, k, v = parts[0].chunk(3, dim=-1) if packed else parts
    return torch_windows.shifted_window_attention(q, k, v, geometry, bias=bias, **options)


def _attend_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_scale: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    check_qkv(q, k, v, "windows, heads, tokens, head_dim")
    windows, heads, tokens, head_dim = q.shape
    if bias is not None:
        check_bias(q, bias, heads, tokens)
    if mask is not None:
        check_mask(q, mask, tokens, "bias")
    if logit_scale is not None:
        logit_scale = check_logit_scale(q, logit_scale, heads)
    if scale is not None:
        check_number("scale", scale, "None or a number")
    dropout, number = check_dropout(dropout), head_dim**-0.5 if scale is None else float(scale)
    if mask is not None and windows % mask.shape[0]:
        mask = mask[torch.arange(windows, device=mask.device) % mask.shape[0]]
    if bias is not None and bias.dim() == 4 and windows % bias.shape[0]:
        bias = bias[torch.arange(windows, device=bias.device) % bias.shape[0]]
    period, rows = 1 if mask is None else mask.shape[0], 1 if bias is None or bias.dim() == 3 else bias.shape[0]
    if period % rows:
        period = windows if rows % period else rows
        mask = None if mask is None else mask[torch.arange(period, device=mask.device) % mask.shape[0]]

    q, k, v = autocast(q, k, v)
    geometry = Geometry((period, tokens), (1, max(1, tokens)))  # as an image with one window a row
    if serves_windows(q, geometry, heads, head_dim, logit_scale is not None):
        images = tuple(t.transpose(1, 2).unflatten(0, (-1, period)) for t in (q, k, v))
        # Heads that are neighbours, as in a view of the projection, may stay so: the output then is such a view too.
        are_neighbours = q.stride(1) == head_dim and q.stride(3) == 1
        if are_neighbours:
            images = tuple(image.flatten(-2) for image in images)
        out = try_window_kernels(
            images, geometry, num_heads=heads, table=bias, mask=mask, mask_value=0.0, scale=number,
            logit_scale=logit_scale, dropout=dropout,
        )  # fmt: skip
        if out is not None:
            if are_neighbours:
                out = out.unflatten(-1, (heads, head_dim))
            return out.flatten(0, 1).transpose(1, 2)
    return torch_windows.attention(
        q, k, v, bias=bias, mask=mask, scale=number, logit_scale=logit_scale, dropout=dropout
    )  # fmt: skip


def _check_images(qkv: Any) -> tuple[Tensor, ...]:
    """Return qkv, checked, as one packed tensor or three."""
    parts = tuple(qkv) if isinstance(qkv, (tuple, list)) else (qkv,)
    if len(parts) not in (1, 3) or (len(parts) == 1 and not isinstance(qkv, Tensor)):
        count = f" of {len(qkv)}" if isinstance(qkv, (tuple, list)) else ""
        raise TypeError(f"qkv must be a tensor or three of them; got {type(qkv).__name__}{count}")
    for part in parts:
        check_tensor("qkv", part)
        if part.dim() not in (4, 5):
            raise ValueError(
                f"qkv must have shape (B, H, W, channels), or (B, depth, H, W, channels); got {tuple(part.shape)}"
            )
        if part.shape != parts[0].shape:
            raise ValueError(
                f"qkv must be three tensors of one shape; got {', '.join(str(tuple(p.shape)) for p in parts)}"
            )
        if part.dtype != parts[0].dtype:
            raise TypeError(f"qkv must be three tensors of one dtype; got {', '.join(str(p.dtype) for p in parts)}")
        check_device("qkv's three", part, parts[0], "the first one")
    return parts


def factored_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_factor: Tensor,
    k_factor: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Compute attention with the bias q_factor k_factorᵀ, which is never materialised.

    Differentiable in q, k, v and the factors; twice where the kernels run or under torch.func, by plain PyTorch, which
    holds all scores then.

    Args:
        q, k, v: (batch, heads, N, D), one dtype.
        q_factor, k_factor: (heads, N, R), or (batch, heads, N, R) for a bias of each batch, 1 in place of heads where
            all share it; natural units, any floating dtype: fp32 factors keep their precision beside half-precision
            q. See `factorize_bias`, `alibi_factors`, `squared_distance_factors`.
        mask: (M, N, N), added to the scores of all heads; batch i uses row i mod M. It takes no gradient.
        scale: multiplies q kᵀ; D^-0.5 without.
        causal: whether a query sees no later key.
    Returns:
        (batch, heads, N, D), dtype of q (autocast's under autocast). A query that the mask leaves without keys gets
        zeros.
    Raises:
        TypeError, ValueError: for arguments of another kind or shape; the message names the argument.
    Source: FlashBias, Wu et al. 2025, arXiv:2505.12044.
    """
    check_qkv(q, k, v)
    q_factor, k_factor = check_factors(q, q_factor, k_factor)
    rank = q_factor.shape[-1]
    if mask is not None:
        check_mask(q, mask, q.shape[2], "factors")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False; got {causal!r}")
    q, k, v = autocast(q, k, v)
    q, factor = _positive_scale(q, scale)
    dtype = torch.promote_types(q_factor.dtype, k_factor.dtype)
    if rank == 0 or not serves_sequences(q, rank, dtype):
        return torch_sequence.factored_bias_attention(q, k, v, q_factor, k_factor, mask, factor, causal)
    problem = Problem(causal, 0, 0, factor)
    return sequence_ops.sequence_attention(q, k, v, q_factor.to(dtype), k_factor.to(dtype), mask, problem)


def block_sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, window_blocks: int, scale: float | None = None
) -> Tensor:
    """Compute attention of every token to its own block of tokens, all of it, and to the blocks just before.

    For videos, block_size is the tokens of a frame, and window_blocks the frames that a frame knows, itself included.
    Time and memory grow linearly with the number of tokens. Differentiable in q, k and v; twice where the kernels run
    or under torch.func, by plain PyTorch.

    Args:
        q, k, v: (batch, heads, N, D), one dtype; any N, the last block may be shorter than the others.
        block_size: tokens in a block, 1 or more.
        window_blocks: blocks that a token sees, 1 or more.
        scale: multiplies q kᵀ; D^-0.5 without.
    Returns:
        (batch, heads, N, D), dtype of q (autocast's under autocast).
    Raises:
        TypeError, ValueError: for arguments of another kind or shape; the message names the argument.
    """
    check_qkv(q, k, v)
    for name, value in (("block_size", block_size), ("window_blocks", window_blocks)):
        check_positive(name, value)
    q, k, v = autocast(q, k, v)
    q, factor = _positive_scale(q, scale)
    if not serves_sequences(q, 0, q.dtype):
        return torch_sequence.block_sliding_window_attention(q, k, v, block_size, window_blocks, factor)
    return sequence_ops.sequence_attention(
        q, k, v, None, None, None, Problem(False, block_size, window_blocks, factor)
    )  # fmt: skip


def _positive_scale(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """Return q and a scale above 0, which the kernels rely on, with the product that was asked for."""
    if scale is None:
        return q, q.shape[-1] ** -0.5
    check_number("scale", scale, "None or a number")
    if scale > 0:
        return q, float(scale)
    return (-q, -float(scale)) if scale < 0 else (q * 0, 1.0)
