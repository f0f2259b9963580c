"""Softmax attention in plain PyTorch, NaN and infinities as plain softmax has them.

`scaled_dot_product_attention` has not: a query whose scores are all -inf gives zeros in place of NaN, and so do some
gradients. Its results are looked at, therefore, and where they may hide such a thing it is computed anew.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._nn import scaled_dot_product_attention  # PyTorch's own: tools put others into F, without bias

from ...spec.arguments import can_look


def accurate(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of softmax and sums."""
    return torch.promote_types(dtype, torch.float32)


def clamp_finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bias or mask in another dtype, in which its finite numbers stay finite, as stand in for -inf.

    And so do their sums with scores: queries that see nothing else would turn from a mean into NaN, or nothing.
    """
    limit = torch.finfo(dtype).max / 2
    if torch.finfo(x.dtype).max > limit and (x.dtype != dtype or dtype == torch.float16):
        x = torch.where(x.isfinite(), x.clamp(-limit, limit), x)
    return x.to(dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """Return softmax(q kᵀ · scale + start) v, on a CPU.

    Args:
        q, k, v: (windows, heads, N, D).
        start: to be broadcast to (windows, heads, N, N), in the dtype of softmax and sums.
        dropout: probability at which a weight is dropped.
    """
    given = (q, k, v) if start is None else (q, k, v, start)
    if dropout or (torch.is_grad_enabled() and any(one.requires_grad for one in given)):
        return softmax(q, k, v, start, scale, dropout)  # which of few queries takes no more time, with gradients
    out = scaled_dot_product_attention(q, k, v, attn_mask=start, scale=scale)
    if can_look():
        return softmax(q, k, v, start, scale) if has_zeros(out) else out
    if start is None:
        return out
    return out.masked_fill((start == float("-inf")).all(-1, keepdim=True), float("nan"))


def has_zeros(out: Tensor) -> bool:
    """Return True if any token got nothing but zeros, and NaN of v; seldom more than its first channel is looked at."""
    if not out.numel() or bool(torch.linalg.vector_norm(out[..., 0], ord=-math.inf) > 0):  # the smallest size, or NaN
        return False
    zeros = out == 0
    return bool(((zeros | out.isnan()).all(-1) & zeros.any(-1)).any())


def softmax(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """Return the same, step by step."""
    dtype = q.dtype
    q, k, v = (one.to(accurate(dtype)) for one in (q, k, v))
    scores = (q * scale) @ k.transpose(-2, -1)
    weights = (scores if start is None else scores + start).softmax(-1)
    return (F.dropout(weights, dropout) @ v).to(dtype)


def nothing(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> Tensor:
    """Return attention of empty tensors, with gradients for all inputs, zeros.

    PyTorch 2.11's own ends the process without heads.
    """
    rest = sum(one.sum().to(q.dtype) for one in others if one is not None)
    return q + k + v + rest
