"""Softmax attention in plain PyTorch, NaN and infinities as plain softmax has them.

`scaled_dot_product_attention` has not: a query whose scores are all -inf gives zeros in place of NaN, and so do some
gradients. Its results are looked at, therefore, and where they may hide such a thing it is computed anew.

On AMD's processors its products, by MKL one after the other, take longer than batched ones with a softmax between,
which on Intel's lose to it (docs/notes.md).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._nn import scaled_dot_product_attention  # PyTorch's own: tools put others into F, without bias

from ...spec.arguments import can_look
from .products import PLAIN_TENSORS


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
    looks = can_look()
    if looks and _suits_products(given):
        return _by_products(q, k, v, start, scale)
    out = scaled_dot_product_attention(q, k, v, attn_mask=start, scale=scale)
    if looks:
        return softmax(q, k, v, start, scale) if has_zeros(out) else out
    if start is None:
        return out
    return out.masked_fill((start == float("-inf")).all(-1, keepdim=True), float("nan"))


IS_AMD = str(torch.cpu.get_capabilities().get("cpu_name", "")).startswith("AMD")

most_tokens = 144  # of a window, up to which batched products win
most_scores = 1 << 18  # at a time: with their weights 2 MiB, what second-level caches hold


def _suits_products(given: tuple[Tensor, ...]) -> bool:
    """Return True if batched products are faster than `scaled_dot_product_attention`."""
    if not IS_AMD or not all(type(one) in PLAIN_TENSORS and one.dtype is torch.float32 for one in given):
        return False
    if not given[0].is_cpu or torch.is_autocast_enabled("cpu"):  # which knows nothing of products into a given tensor
        return False
    return max(given[0].shape[2], given[1].shape[2]) <= most_tokens and given[0].numel() > 0 < given[1].numel()


def _by_products(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, scale: float) -> Tensor:
    """Return the same as `softmax`, a few windows at a time over the same pieces of memory."""
    (windows, heads, tokens, _), keys = q.shape, k.shape[2]
    size = -(-windows // -(-windows * heads * tokens * keys // most_scores))
    out = q.new_empty(windows, tokens, heads, v.shape[-1])
    scores = q.new_empty(size * heads, tokens, keys)
    weights = torch.empty_like(scores)
    for first in range(0, windows, size):
        part = slice(first, first + size)
        query, key, value = (one[part].reshape(-1, *one.shape[2:]) for one in (q, k, v))
        products = torch.bmm(query, key.transpose(1, 2), out=scores[: len(key)])
        if start is None:
            products *= scale
        else:
            sums = products.view(-1, heads, tokens, keys)
            torch.add(start if start.shape[0] == 1 else start[part], sums, alpha=scale, out=sums)
        attended = torch.bmm(torch.softmax(products, -1, out=weights[: len(key)]), value)
        out[part] = attended.unflatten(0, (-1, heads)).transpose(1, 2)
    return out.transpose(1, 2)


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
