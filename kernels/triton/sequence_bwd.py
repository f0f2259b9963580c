"""Backward of attention over sequences, in two passes and without atomics, so the same numbers at every run.

With p the attention weights, recomputed from the saved log-sum-exp, and δ = Σ_d out · grad of a query:

    dv = pᵀ grad        ds = p ∘ (grad vᵀ - δ)        dq = ds k · scale        dk = dsᵀ q · scale
    dq_factor = ds k_factor        dk_factor = dsᵀ q_factor

The first kernel walks keys for a tile of queries (dq, and δ for the second); the second walks queries for a tile of
keys (dk, dv), with its tiles of scores transposed: the weights then are left operands, which stay in registers.

A row of ds sums to zero, but δ comes from an output that was rounded to its dtype, and misses by a little. Keys, whose
mean is small, do not show that. Factors may: positions have any mean. So where factors have gradients the first
kernel measures the miss and takes it out again.
"""

import triton
import triton.language as tl

from .sequence_fwd import (
    FACTOR_PRECISION,
    assert_whole_tiles,
    load_mask,
    load_rows,
    load_stream,
    only_visible,
    place,
    plan_walk,
    scores_of,
    sequence_offset,
    store_rows,
    stream,
    visible_keys,
    visible_queries,
)
from .softmax import LOG2E, delta_of, is_finite, load_log_sum, weights_of


@triton.jit
def _walk_keys(
    state,  # dq (BLOCK_M, BLOCK_D), dq_factor and p k_factor (BLOCK_M, BLOCK_R), the sum of ds (BLOCK_M,); fp32
    q, q_factor, grad,  # (BLOCK_M, BLOCK_D or BLOCK_R)
    softmax, delta,  # (BLOCK_M,), the first of two vectors
    keys, values,
    k_factor_ptr, stride_kf_token, mask_ptr,  # of this sequence
    start, end, offs_m,
    visible,  # (BLOCK_M,) each: the interval of keys that each query sees
    num_tokens, scale,
    HEAD_DIM: tl.constexpr, RANK: tl.constexpr, HAS_MASK: tl.constexpr, FACTOR_GRAD: tl.constexpr,
    AT_EDGE: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Add to the sums what the keys from `start` to `end` give; see `sequence_fwd._walk_keys`."""
    dq, dq_factor, mean_factor, miss = state
    for first in tl.range(start, end, BLOCK_N):
        k = load_stream(keys, first, num_tokens, HEAD_DIM, BLOCK_N, BLOCK_D, AT_EDGE, DESCRIBED)
        v = load_stream(values, first, num_tokens, HEAD_DIM, BLOCK_N, BLOCK_D, AT_EDGE, DESCRIBED)
        k_factor = k
        if RANK > 0:
            k_factor = load_rows(k_factor_ptr, first, stride_kf_token, num_tokens, RANK, BLOCK_N, BLOCK_R, AT_EDGE)
        scores = scores_of(q, k, q_factor, k_factor, 1.0 / scale, RANK, PRECISION)
        offs_n = first + tl.arange(0, BLOCK_N)
        if HAS_MASK:
            scores += load_mask(mask_ptr, offs_m, offs_n, num_tokens) * (1.0 / scale)
        if AT_EDGE:
            scores = only_visible(scores, offs_n, visible, float("-inf"))
        p = weights_of(scores, softmax[0][:, None], softmax[1][:, None], scale * LOG2E, HAS_MASK)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        if FACTOR_GRAD:
            dq_factor = tl.dot(ds.to(k_factor.dtype), k_factor, dq_factor, input_precision=FACTOR_PRECISION)
            mean_factor = tl.dot(p.to(k_factor.dtype), k_factor, mean_factor, input_precision=FACTOR_PRECISION)
            miss += tl.sum(ds, axis=1)
    return dq, dq_factor, mean_factor, miss


@triton.jit
def _sequence_attention_bwd_query_kernel(
    dq_ptr,  # (batch, heads, tokens, HEAD_DIM)
    dq_factor_ptr,  # (batch, heads, tokens, RANK), contiguous, where FACTOR_GRAD
    delta_ptr,  # (batch * heads, tokens), fp32, written for the second kernel
    grad_ptr, out_ptr, q_ptr, k_ptr, v_ptr,  # (batch, heads, tokens, HEAD_DIM)
    lse_ptr,  # (batch * heads, tokens), with a mask (.., 2, tokens), fp32: the softmax
    q_factor_ptr, k_factor_ptr,  # (batch, heads, tokens, RANK)
    mask_ptr,  # (masks, tokens, tokens)
    stride_dq_batch, stride_dq_head, stride_dq_token,
    stride_grad_batch, stride_grad_head, stride_grad_token,
    stride_out_batch, stride_out_head, stride_out_token,
    stride_q_batch, stride_q_head, stride_q_token,
    stride_k_batch, stride_k_head, stride_k_token,
    stride_v_batch, stride_v_head, stride_v_token,
    stride_qf_batch, stride_qf_head, stride_qf_token,
    stride_kf_batch, stride_kf_head, stride_kf_token,
    num_sequences, num_heads, num_tokens, num_masks, block_size, window_blocks, group, scale,
    HEAD_DIM: tl.constexpr, RANK: tl.constexpr, PATTERN: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_EDGES: tl.constexpr,
    DESCRIBED: tl.constexpr,  # k_ptr and v_ptr are descriptors
    FACTOR_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute dq, dq_factor and δ. One program: BLOCK_M queries of one sequence, which stay; keys pass."""
    assert_whole_tiles(num_tokens, HEAD_DIM, RANK, HAS_EDGES, DESCRIBED, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_R)
    scale = tl.cast(scale, tl.float32)  # as in the forward, whose sums it goes with
    tl.static_assert(RANK > 0 or not FACTOR_GRAD)
    num_tiles = tl.cdiv(num_tokens, BLOCK_M)
    tile, sequence = place(num_tiles, num_sequences, group)
    first_query = (num_tiles - 1 - tile) * BLOCK_M
    last_query = tl.minimum(first_query + BLOCK_M, num_tokens) - 1
    offs_m = first_query + tl.arange(0, BLOCK_M)

    q_ptr += sequence_offset(sequence, num_heads, stride_q_batch, stride_q_head)
    k_offset = sequence_offset(sequence, num_heads, stride_k_batch, stride_k_head)
    v_offset = sequence_offset(sequence, num_heads, stride_v_batch, stride_v_head)
    keys = stream(k_ptr, k_offset, stride_k_token, DESCRIBED)
    values = stream(v_ptr, v_offset, stride_v_token, DESCRIBED)
    grad_ptr += sequence_offset(sequence, num_heads, stride_grad_batch, stride_grad_head)
    out_ptr += sequence_offset(sequence, num_heads, stride_out_batch, stride_out_head)
    q = load_rows(q_ptr, first_query, stride_q_token, num_tokens, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    grad = load_rows(grad_ptr, first_query, stride_grad_token, num_tokens, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    out = load_rows(out_ptr, first_query, stride_out_token, num_tokens, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    delta = delta_of(out, grad)
    softmax = load_log_sum(lse_ptr, sequence.to(tl.int64), offs_m, num_tokens, HAS_MASK)
    q_factor = q
    if RANK > 0:
        q_factor_ptr += sequence_offset(sequence, num_heads, stride_qf_batch, stride_qf_head)
        k_factor_ptr += sequence_offset(sequence, num_heads, stride_kf_batch, stride_kf_head)
        q_factor = load_rows(q_factor_ptr, first_query, stride_qf_token, num_tokens, RANK, BLOCK_M, BLOCK_R, True)
    if HAS_MASK:
        mask_ptr += (sequence // num_heads % num_masks).to(tl.int64) * num_tokens * num_tokens

    bounds, visible = plan_walk(
        visible_keys, first_query, last_query, offs_m, num_tokens, block_size, window_blocks, PATTERN, BLOCK_N
    )  # fmt: skip
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq_factor = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    mean_factor = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    miss = tl.zeros((BLOCK_M,), tl.float32)
    for SEGMENT in tl.static_range(3):
        if SEGMENT == 1 or HAS_EDGES:
            dq, dq_factor, mean_factor, miss = _walk_keys(
                (dq, dq_factor, mean_factor, miss), q, q_factor, grad, softmax, delta, keys, values, k_factor_ptr,
                stride_kf_token, mask_ptr, bounds[SEGMENT], bounds[SEGMENT + 1], offs_m, visible, num_tokens, scale,
                HEAD_DIM, RANK, HAS_MASK, FACTOR_GRAD, SEGMENT != 1, DESCRIBED, PRECISION, BLOCK_N, BLOCK_D, BLOCK_R,
            )  # fmt: skip

    dq_ptr += sequence_offset(sequence, num_heads, stride_dq_batch, stride_dq_head)
    store_rows(dq_ptr, dq * scale, first_query, stride_dq_token, num_tokens, HEAD_DIM, BLOCK_M, BLOCK_D)
    miss = tl.where(is_finite(miss), miss, 0.0)  # where dp is infinite, so is δ, rightly
    tl.store(delta_ptr + sequence.to(tl.int64) * num_tokens + offs_m, delta + miss, mask=offs_m < num_tokens)
    if FACTOR_GRAD:
        dq_factor -= miss[:, None] * mean_factor
        dq_factor_ptr += sequence.to(tl.int64) * num_tokens * RANK
        store_rows(dq_factor_ptr, dq_factor, first_query, RANK, num_tokens, RANK, BLOCK_M, BLOCK_R)


@triton.jit
def _walk_queries(
    state,  # dk and dv (BLOCK_N, BLOCK_D), dk_factor (BLOCK_N, BLOCK_R); fp32
    k, v, k_factor,  # (BLOCK_N, BLOCK_D or BLOCK_R)
    queries, grads,
    lse_ptr, sequence,
    delta_ptr, q_factor_ptr, stride_qf_token, mask_ptr,  # of this sequence
    start, end, offs_n,
    visible,  # (BLOCK_N,) each: the interval of queries that see each key
    num_tokens, scale,
    HEAD_DIM: tl.constexpr, RANK: tl.constexpr, HAS_MASK: tl.constexpr, FACTOR_GRAD: tl.constexpr,
    AT_EDGE: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Add to the sums what the queries from `start` to `end` give."""
    dk, dv, dk_factor = state
    for first in tl.range(start, end, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        q = load_stream(queries, first, num_tokens, HEAD_DIM, BLOCK_M, BLOCK_D, AT_EDGE, DESCRIBED)
        grad = load_stream(grads, first, num_tokens, HEAD_DIM, BLOCK_M, BLOCK_D, AT_EDGE, DESCRIBED)
        maximum, log_sum = load_log_sum(lse_ptr, sequence, offs_m, num_tokens, HAS_MASK, AT_EDGE)
        if AT_EDGE:
            delta = tl.load(delta_ptr + offs_m, mask=offs_m < num_tokens, other=0.0)
        else:
            delta = tl.load(delta_ptr + offs_m)
        q_factor = q
        if RANK > 0:
            q_factor = load_rows(q_factor_ptr, first, stride_qf_token, num_tokens, RANK, BLOCK_M, BLOCK_R, AT_EDGE)
        scores = scores_of(k, q, k_factor, q_factor, 1.0 / scale, RANK, PRECISION)
        if HAS_MASK:
            scores += tl.trans(load_mask(mask_ptr, offs_m, offs_n, num_tokens)) * (1.0 / scale)
        if AT_EDGE:
            scores = only_visible(scores, offs_m, visible, float("-inf"))
        p = weights_of(scores, maximum[None, :], log_sum[None, :], scale * LOG2E, HAS_MASK)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if AT_EDGE:  # a query whose δ is not finite hands that to the keys that it sees
            ds = only_visible(ds, offs_m, visible, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        if FACTOR_GRAD:
            dk_factor = tl.dot(ds.to(q_factor.dtype), q_factor, dk_factor, input_precision=FACTOR_PRECISION)
    return dk, dv, dk_factor


@triton.jit
def _sequence_attention_bwd_key_kernel(
    dk_ptr, dv_ptr,  # (batch, heads, tokens, HEAD_DIM)
    dk_factor_ptr,  # (batch, heads, tokens, RANK), contiguous, where FACTOR_GRAD
    delta_ptr,  # (batch * heads, tokens), fp32, by the first kernel
    grad_ptr, q_ptr, k_ptr, v_ptr,  # (batch, heads, tokens, HEAD_DIM)
    lse_ptr,  # (batch * heads, tokens), with a mask (.., 2, tokens), fp32: the softmax
    q_factor_ptr, k_factor_ptr,  # (batch, heads, tokens, RANK)
    mask_ptr,  # (masks, tokens, tokens)
    stride_dk_batch, stride_dk_head, stride_dk_token,
    stride_dv_batch, stride_dv_head, stride_dv_token,
    stride_grad_batch, stride_grad_head, stride_grad_token,
    stride_q_batch, stride_q_head, stride_q_token,
    stride_k_batch, stride_k_head, stride_k_token,
    stride_v_batch, stride_v_head, stride_v_token,
    stride_qf_batch, stride_qf_head, stride_qf_token,
    stride_kf_batch, stride_kf_head, stride_kf_token,
    num_sequences, num_heads, num_tokens, num_masks, block_size, window_blocks, group, scale,
    HEAD_DIM: tl.constexpr, RANK: tl.constexpr, PATTERN: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_EDGES: tl.constexpr,
    DESCRIBED: tl.constexpr,  # q_ptr and grad_ptr are descriptors
    FACTOR_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute dk, dk_factor and dv. One program: BLOCK_N keys of one sequence, which stay; queries pass.

    The first keys have the most queries, so they come first.
    """
    assert_whole_tiles(num_tokens, HEAD_DIM, RANK, HAS_EDGES, DESCRIBED, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_R)
    scale = tl.cast(scale, tl.float32)  # as in the forward, whose sums it goes with
    tl.static_assert(RANK > 0 or not FACTOR_GRAD)
    tile, sequence = place(tl.cdiv(num_tokens, BLOCK_N), num_sequences, group)
    first_key = tile * BLOCK_N
    last_key = tl.minimum(first_key + BLOCK_N, num_tokens) - 1
    offs_n = first_key + tl.arange(0, BLOCK_N)

    k_ptr += sequence_offset(sequence, num_heads, stride_k_batch, stride_k_head)
    v_ptr += sequence_offset(sequence, num_heads, stride_v_batch, stride_v_head)
    q_offset = sequence_offset(sequence, num_heads, stride_q_batch, stride_q_head)
    grad_offset = sequence_offset(sequence, num_heads, stride_grad_batch, stride_grad_head)
    queries = stream(q_ptr, q_offset, stride_q_token, DESCRIBED)
    grads = stream(grad_ptr, grad_offset, stride_grad_token, DESCRIBED)
    delta_ptr += sequence.to(tl.int64) * num_tokens
    k = load_rows(k_ptr, first_key, stride_k_token, num_tokens, HEAD_DIM, BLOCK_N, BLOCK_D, not DESCRIBED)
    v = load_rows(v_ptr, first_key, stride_v_token, num_tokens, HEAD_DIM, BLOCK_N, BLOCK_D, not DESCRIBED)
    k_factor = k
    if RANK > 0:
        q_factor_ptr += sequence_offset(sequence, num_heads, stride_qf_batch, stride_qf_head)
        k_factor_ptr += sequence_offset(sequence, num_heads, stride_kf_batch, stride_kf_head)
        k_factor = load_rows(k_factor_ptr, first_key, stride_kf_token, num_tokens, RANK, BLOCK_N, BLOCK_R, True)
    if HAS_MASK:
        mask_ptr += (sequence // num_heads % num_masks).to(tl.int64) * num_tokens * num_tokens

    bounds, visible = plan_walk(
        visible_queries, first_key, last_key, offs_n, num_tokens, block_size, window_blocks, PATTERN, BLOCK_M
    )  # fmt: skip
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dk_factor = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for SEGMENT in tl.static_range(3):
        if SEGMENT == 1 or HAS_EDGES:
            dk, dv, dk_factor = _walk_queries(
                (dk, dv, dk_factor), k, v, k_factor, queries, grads, lse_ptr, sequence.to(tl.int64), delta_ptr,
                q_factor_ptr, stride_qf_token, mask_ptr, bounds[SEGMENT], bounds[SEGMENT + 1], offs_n, visible,
                num_tokens, scale, HEAD_DIM, RANK, HAS_MASK, FACTOR_GRAD, SEGMENT != 1, DESCRIBED, PRECISION, BLOCK_M,
                BLOCK_D, BLOCK_R,
            )  # fmt: skip

    dk_ptr += sequence_offset(sequence, num_heads, stride_dk_batch, stride_dk_head)
    dv_ptr += sequence_offset(sequence, num_heads, stride_dv_batch, stride_dv_head)
    store_rows(dk_ptr, dk * scale, first_key, stride_dk_token, num_tokens, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_rows(dv_ptr, dv, first_key, stride_dv_token, num_tokens, HEAD_DIM, BLOCK_N, BLOCK_D)
    if FACTOR_GRAD:
        dk_factor_ptr += sequence.to(tl.int64) * num_tokens * RANK
        store_rows(dk_factor_ptr, dk_factor, first_key, RANK, num_tokens, RANK, BLOCK_N, BLOCK_R)
