"""The operators as functions, for people who write their own model.

Every function runs on the Triton kernels where they can serve a call (CUDA; fp16, bf16, fp32), and in plain PyTorch
elsewhere, forward and backward, eagerly and under torch.compile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import sequence_ops
from .backends import torch_sequence
from .backends.triton_sequence import Problem
from .config import env_interpret
from .factors import BiasFactors, alibi_factors, factorize_bias, squared_distance_factors

__all__ = [
    "BiasFactors",
    "alibi_factors",
    "block_sliding_window_attention",
    "factored_bias_attention",
    "factorize_bias",
    "squared_distance_factors",
]


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
    """Attention with the bias q_factor k_factorᵀ, which is never materialised.

    Args:
        q, k, v: (batch, heads, N, D), one dtype.
        q_factor, k_factor: (heads, N, R), or (batch, heads, N, R) for a bias of each batch, 1 in place of heads where
            all share it; natural units, any floating dtype: fp32 factors keep their precision beside half-precision
            q. See `factorize_bias`, `alibi_factors`, `squared_distance_factors`.
        mask: (M, N, N), added to the scores of all heads; batch i uses row i mod M. It takes no gradient.
        scale: multiplies q kᵀ; D^-0.5 without.
        causal: whether a query sees no later key.
    Returns:
        (batch, heads, N, D), dtype of q. A query that the mask leaves without keys gets zeros.
    Source: FlashBias, Wu et al. 2025, arXiv:2505.12044.
    """
    _check_qkv(q, k, v)
    q_factor, k_factor = _check_factors(q, q_factor, k_factor)
    rank = q_factor.shape[-1]
    if mask is not None:
        _check_mask(q, mask)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False; got {causal!r}")
    q, k, v = _autocast(q, k, v)
    q, factor = _positive_scale(q, scale)
    reason = _unsupported(q, rank, torch.promote_types(q_factor.dtype, k_factor.dtype))
    if reason is not None or rank == 0:
        return torch_sequence.factored_bias_attention(q, k, v, q_factor, k_factor, mask, factor, causal)
    if q_factor.dtype != k_factor.dtype:
        dtype = torch.promote_types(q_factor.dtype, k_factor.dtype)
        q_factor, k_factor = q_factor.to(dtype), k_factor.to(dtype)
    return sequence_ops.sequence_attention(q, k, v, q_factor, k_factor, mask, Problem(causal, 0, 0, factor))


def block_sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, window_blocks: int, scale: float | None = None
) -> Tensor:
    """Attention of every token to its own block of tokens, all of it, and to the blocks just before.

    For videos, block_size is the tokens of a frame, and window_blocks the frames that a frame knows, itself included.
    Time and memory grow linearly with the number of tokens.

    Args:
        q, k, v: (batch, heads, N, D), one dtype; any N, the last block may be shorter than the others.
        block_size: tokens in a block, 1 or more.
        window_blocks: blocks that a token sees, 1 or more.
        scale: multiplies q kᵀ; D^-0.5 without.
    Returns:
        (batch, heads, N, D), dtype of q.
    """
    _check_qkv(q, k, v)
    for name, value in (("block_size", block_size), ("window_blocks", window_blocks)):
        _check_positive(name, value)
    q, k, v = _autocast(q, k, v)
    q, factor = _positive_scale(q, scale)
    if _unsupported(q, 0, q.dtype) is not None:
        return torch_sequence.block_sliding_window_attention(q, k, v, block_size, window_blocks, factor)
    return sequence_ops.sequence_attention(
        q, k, v, None, None, None, Problem(False, block_size, window_blocks, factor)
    )  # fmt: skip


# Shared by the functions: what they accept, and where it runs.


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point; got {value.dtype}")


def _check_device(name: str, value: Tensor, q: Tensor) -> None:
    if value.device != q.device:
        raise ValueError(f"{name} must be on q's device, {q.device}; got {value.device}")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more; got {value}")


def _check_qkv(q: Any, k: Any, v: Any) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, value)
        if value.dim() != 4:
            raise ValueError(f"{name} must have shape (batch, heads, tokens, head_dim); got {tuple(value.shape)}")
        if value.shape != q.shape:
            raise ValueError(f"{name} must have q's shape, {tuple(q.shape)}; got {tuple(value.shape)}")
        if value.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype, {q.dtype}; got {value.dtype}")
        _check_device(name, value, q)
    if q.shape[-1] < 1:
        raise ValueError(f"q must have a head_dim of 1 or more; got {tuple(q.shape)}")


def _check_factors(q: Tensor, q_factor: Any, k_factor: Any) -> list[Tensor]:
    """The two, with the heads of q."""
    batch, heads, tokens, _ = q.shape
    found = []
    for name, value in (("q_factor", q_factor), ("k_factor", k_factor)):
        _check_tensor(name, value)
        sizes = value.shape[:-1]
        fits = value.dim() in (3, 4) and sizes[-1] == tokens and sizes[-2] in (1, heads)
        if not fits or sizes[:-2] not in ((), (batch,)):
            raise ValueError(
                f"{name} must have shape (heads, tokens, rank) or (batch, heads, tokens, rank) with the sizes of q, "
                f"{tuple(q.shape)}; got {tuple(value.shape)}"
            )
        _check_device(name, value, q)
        found.append(value.expand(*sizes[:-2], heads, -1, -1))
    if q_factor.shape[-1] != k_factor.shape[-1]:
        raise ValueError(f"k_factor must have q_factor's rank, {q_factor.shape[-1]}; got {k_factor.shape[-1]}")
    return found


def _check_mask(q: Tensor, mask: Any) -> None:
    _check_tensor("mask", mask)
    tokens = q.shape[2]
    if mask.dim() != 3 or mask.shape[0] < 1 or mask.shape[1:] != (tokens, tokens):
        raise ValueError(f"mask must have shape (masks, {tokens}, {tokens}), 1 mask or more; got {tuple(mask.shape)}")
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("mask takes no gradient: detach it, or give what is to be learned as factors")
    _check_device("mask", mask, q)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As `scaled_dot_product_attention` does: under autocast, in its dtype."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _positive_scale(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """q and a scale above 0, which the kernels rely on, with the product that was asked for."""
    if scale is None:
        return q, q.shape[-1] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"scale must be None or a number; got {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite; got {scale!r}")
    if scale > 0:
        return q, float(scale)
    return (-q, -float(scale)) if scale < 0 else (q * 0, 1.0)


def _unsupported(q: Tensor, rank: int, factor_dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    if q.numel() == 0:
        return "there is nothing to compute"
    interpret = q.device.type == "cpu" and env_interpret()
    return sequence_ops.unsupported_reason(q.device, q.dtype, q.shape[-1], rank, factor_dtype, interpret)
