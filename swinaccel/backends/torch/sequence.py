"""Attention over sequences in plain PyTorch, by `scaled_dot_product_attention`, which never holds all scores.

Gradients are autograd's. Where they are to have gradients in turn, or in a torch.func transform, scores are held.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._nn import scaled_dot_product_attention

from ...spec import reference
from ...spec.arguments import can_look
from .softmax import accurate, clamp_finite, has_zeros, nothing

_ROWS = 64  # queries that one call should have at least
_SCORES = 1 << 27  # at most, of calls whose scores may be held


def factored_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_factor: Tensor | None,
    k_factor: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    twice: bool = False,
) -> Tensor:
    """Attend as `reference.sequence_attention` does: the factors are further columns of q and k (FlashBias).

    v gets as many columns of zeros, since the kernels that hold no scores want heads of one width. With `twice` the
    gradients have gradients.
    """
    if q.numel() == 0:
        return nothing(q, k, v, q_factor, k_factor)
    query, key, value, given, factor = q, k, v, mask, scale
    if q_factor is not None and k_factor is not None and q_factor.shape[-1]:
        wide = torch.promote_types(torch.promote_types(q.dtype, q_factor.dtype), k_factor.dtype)
        batch, factor = q.shape[0], 1.0
        query = torch.cat((q.to(wide) * scale, q_factor.to(wide).expand(batch, -1, -1, -1)), -1)
        key = torch.cat((k.to(wide), k_factor.to(wide).expand(batch, -1, -1, -1)), -1)
        value = F.pad(v.to(wide), (0, q_factor.shape[-1]))
    if mask is not None:
        given = _batch_mask(mask, query, causal)
        is_recorded = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
        # Numbers so large leave no digits for the scores in a log-sum-exp, of which gradients are made.
        twice = twice or (is_recorded and can_look() and bool(((given.abs() > 1e3) & given.isfinite()).any()))
    out = _attend(query, key, value, given, causal and mask is None, factor, twice)
    out = out[..., : v.shape[-1]].to(q.dtype)
    return _exactly(out, q, k, v, q_factor=q_factor, k_factor=k_factor, mask=mask, scale=scale, causal=causal)


def _batch_mask(mask: Tensor, q: Tensor, causal: bool) -> Tensor:
    """Return (batch or 1, 1, N, N), in a dtype that goes with q's, from (M, N, N); batch i has row i mod M."""
    if causal:
        seen = reference.visible_keys(q.shape[2], causal=True, device=q.device)
        mask = mask.masked_fill(~seen, float("-inf"))
    if mask.shape[0] > 1:
        mask = mask[torch.arange(q.shape[0], device=mask.device) % mask.shape[0]]
    return clamp_finite(mask, accurate(q.dtype) if q.device.type == "cpu" else q.dtype).unsqueeze(1)


def block_sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, window_blocks: int, scale: float, twice: bool = False
) -> Tensor:
    """Attend as `reference.sequence_attention` does, a chunk of whole blocks at a time; linear in the tokens.

    Keys and values are split once and put together again for every chunk: autograd then adds up pieces, where slices
    would each give it a gradient of full length. With `twice` the gradients have gradients.
    """
    if q.numel() == 0:
        return nothing(q, k, v)
    tokens = q.shape[2]
    blocks = max(1, -(-_ROWS // block_size))  # of a chunk; more than one share a call with a mask
    chunk = min(blocks * block_size, tokens)
    reach = min(-(-(window_blocks - 1) // blocks), -(-tokens // chunk))  # chunks before a query's own that it may see
    keys, values, outs = k.split(chunk, 2), v.split(chunk, 2), []
    for index, query in enumerate(q.split(chunk, 2)):
        first = max(0, index - reach)
        mask = None
        if blocks > 1:
            offs_m = torch.arange(index * chunk, index * chunk + query.shape[2], device=q.device) // block_size
            offs_n = torch.arange(first * chunk, index * chunk + query.shape[2], device=q.device) // block_size
            ago = offs_m[:, None] - offs_n[None, :]
            mask = (ago >= 0) & (ago < window_blocks)
        window = slice(first, index + 1)
        key, value = torch.cat(keys[window], 2), torch.cat(values[window], 2)
        outs.append(_attend(query, key, value, mask, False, scale, twice))
    return _exactly(
        torch.cat(outs, 2), q, k, v, scale=scale, block_size=block_size, window_blocks=window_blocks
    )  # fmt: skip


def _exactly(out: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Return the output, or that of plain softmax where NaN may be hidden, or lie where it does not belong.

    A key's NaN would get to queries that do not see it, or leave zeros, and gradients would lack some. Not where scores
    are too many to be held.
    """
    batch, heads, tokens, _ = q.shape
    if out.device.type != "cpu" or not can_look() or is_transformed() or batch * heads * tokens**2 > _SCORES:
        return out
    if bool(out.sum(dtype=accurate(out.dtype)).isfinite()) and not has_zeros(out):
        return out
    wide = accurate(q.dtype)
    for name in ("q_factor", "k_factor", "mask"):
        if options.get(name) is not None:
            wide = torch.promote_types(wide, options[name].dtype)
    q, k, v = (one.to(wide) for one in (q, k, v))
    options = {name: one.to(wide) if isinstance(one, Tensor) else one for name, one in options.items()}
    return reference.sequence_attention(q, k, v, **options).to(out.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, twice: bool) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):  # which would round the factors
        if twice or is_transformed():  # derivatives that only the operators have which it is made of
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
            return torch._scaled_dot_product_attention_math(q, k, v, mask, is_causal=causal, scale=scale)[0]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


def is_transformed() -> bool:
    """Return True if derivatives may be wanted that only elementary operators have: torch.func, forward mode."""
    return is_in_transform() or torch.autograd.forward_ad._current_level >= 0


def is_in_transform() -> bool:
    """Return True if the call is inside a torch.func transform."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# Compilers call it while they trace, in the transforms that they meet there. What torch.compiler.assume_constant_result
# does, which would import the compiler.
is_in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
