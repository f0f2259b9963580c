"""Backward of large windows; `window_bwd` has the formulas.

A window is walked in tiles three times, once for each of dQ, (dK, dV) and dB, with the forward's softmax as
`softmax.store_log_sum` keeps it, so that scores must be the forward's to the last digit: the first walk writes the
queries down as the forward scaled and rounded them, padding included, for the others.
"""

import triton
import triton.language as tl

from .softmax import (
    LOG2E,
    delta_of,
    is_finite,
    load_log_sum,
    score_tile,
    weights_of,
)
from .tiles import (
    BIAS_DENSE,
    BIAS_NONE,
    MASK_REGIONS,
    MASK_TENSOR,
    SIZES,
    Bias,
    Dropout,
    Geometry,
    Mask,
    add_mask,
    bias_column,
    cosine_scale,
    dropout_factor,
    inverse_norm,
    is_divided,
    load_tokens,
    locate_tokens,
    operand_pointers,
    padding_pointers,
    place_window,
    scale_rows,
    scaled_query,
    store_tokens,
    tile_bias,
    token_offsets,
)
from .window_bwd import (
    gradient_scale,
    logit_scale_gradient,
    sum_padding,
    through_norm,
)


@triton.jit
def _is_masked(window, geometry, WINDOW: tl.constexpr, MASK: tl.constexpr):
    """Return True if a window has a mask: of shifted windows only those with tokens of more than one region do."""
    if MASK == MASK_REGIONS:
        return is_divided(window, geometry, WINDOW)
    return MASK == MASK_TENSOR


@triton.jit
def load_vector(ptr, offs, N: tl.constexpr, other):
    """Load one number of each token of a window."""
    return tl.load(ptr + offs, mask=offs < N, other=other)


@triton.jit
def load_queries(ptr, offs, offs_d, N: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Load queries of a window and head as they were written down; beyond the last, which weigh nothing, that again.

    Zeros in their place would meet an infinite key as NaN, which all queries' keys then shared.
    """
    offs = tl.minimum(offs, N - 1)
    return tl.load(ptr + (offs[:, None] * HEAD_DIM + offs_d[None, :]), mask=(offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _place_program(num_heads, geometry, TILES: tl.constexpr):
    """Return this program's tile and instance (image, window and head), and the latter's image, window and head."""
    tile = tl.program_id(0) % TILES
    instance = (tl.program_id(0) // TILES).to(tl.int64)
    head = (instance % num_heads).to(tl.int32)
    num_windows = geometry.windows[0] * geometry.windows[1] * geometry.windows[2]
    number = ((instance // num_heads) % num_windows).to(tl.int32)
    return tile, instance, instance // num_heads // num_windows, number, head


@triton.jit(do_not_specialize=SIZES)
def _window_attention_bwd_query_kernel(
    grad_qkv_ptr,  # as qkv
    grad_padding_ptr,  # (batch * windows * TILES or more, 3 * heads * HEAD_DIM), fp32, zero at the start
    grad_logit_scale_ptr,  # (batch * windows * TILES, heads), fp32
    delta_ptr,  # (batch, windows, heads, N), fp32: rowsum(dO ∘ O), for the other two kernels
    query_ptr,  # (batch, windows, heads, N, HEAD_DIM), as qkv: the queries as they meet the keys, likewise
    grad_out_ptr, out_ptr,  # (batch, depth, height, width, heads, HEAD_DIM)
    lse_ptr,  # (batch, windows, heads, N), with a mask tensor (.., 2, N), fp32: the softmax
    qkv_ptr,  # (batch, depth, height, width, 3, heads, HEAD_DIM); without PACKED q alone, and k and v have its strides
    k_ptr, v_ptr,
    padding_ptr,  # (3 * heads * HEAD_DIM,)
    mask_ptr,  # (windows, N, N)
    logit_scale_ptr,  # (heads,)
    dense_ptr,  # (BIAS_ROWS * heads, ROWS, COLS)
    seed_ptr,  # (1,), int64
    stride_qkv_batch, stride_qkv_depth, stride_qkv_row, stride_qkv_col, stride_qkv_head,
    stride_out_batch, stride_out_depth, stride_out_row, stride_out_col, stride_out_head,
    num_heads,
    depth, height, width, windows_d, windows_h, windows_w, shift_d, shift_h, shift_w, roll_d, roll_h, roll_w,
    scale, mask_value, dropout,
    WINDOW: tl.constexpr, VOLUME: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr, COSINE: tl.constexpr,
    BIAS: tl.constexpr, BIAS_ROWS: tl.constexpr, MASK: tl.constexpr, HAS_PAD: tl.constexpr, ROLL_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute dQ, and with it logit_scale's gradient. One program: BLOCK_M queries of a window and head.

        P = exp(S − log Σ exp S)        dP = dO Vᵀ        dS = P ∘ (dP − δ)        dQ = scale · Σ dS K

    summed over tiles of keys and values, which pass by. Queries, dO, their softmax and δ stay, and dQ
    (BLOCK_M, BLOCK_D) gathers in registers.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    APART: tl.constexpr = MASK == MASK_TENSOR
    tl.static_assert(HEAD_DIM <= BLOCK_D)
    tl.static_assert(VOLUME or WINDOW[0] == 1)
    tl.static_assert(BIAS == BIAS_NONE or BIAS == BIAS_DENSE)
    tl.static_assert(ROWS >= N and ROWS % BLOCK_M == 0 and COLS >= N and COLS % BLOCK_N == 0)
    geometry = Geometry(
        (depth, height, width), (windows_d, windows_h, windows_w), (shift_d, shift_h, shift_w), (roll_d, roll_h, roll_w)
    )
    bias = Bias(dense_ptr=dense_ptr, stride_dense=(ROWS * COLS, COLS))
    mask = Mask(mask_ptr, mask_value)
    stride_qkv = (stride_qkv_depth, stride_qkv_row, stride_qkv_col)
    tile, instance, image, number, head = _place_program(num_heads, geometry, TILES)
    window = place_window(number, geometry, VOLUME)
    column = bias_column(head, window, geometry, num_heads, BIAS_ROWS, KINDS)

    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    tokens = locate_tokens(offs_m, window, geometry, WINDOW, ROLL_FIRST)
    offs_image = image * stride_qkv_batch + head * stride_qkv_head * HEAD_DIM
    offs_token = token_offsets(tokens, stride_qkv)
    offs_out = token_offsets(tokens, (stride_out_depth, stride_out_row, stride_out_col))
    grad_out_ptr += image * stride_out_batch + head * stride_out_head * HEAD_DIM
    out_ptr += image * stride_out_batch + head * stride_out_head * HEAD_DIM
    q_ptr, k_ptr, v_ptr = operand_pointers(qkv_ptr, k_ptr, v_ptr, num_heads, HEAD_DIM, PACKED)
    pad_q_ptr, pad_k_ptr, pad_v_ptr = padding_pointers(padding_ptr, q_ptr, head, num_heads, HEAD_DIM, HAS_PAD)

    # Of padding queries dO is zero, and so is their gradient, where everything is finite.
    q = load_tokens(q_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_q_ptr, HAS_PAD)
    grad_out = load_tokens(grad_out_ptr, offs_out, tokens, offs_d, HEAD_DIM)
    out = load_tokens(out_ptr, offs_out, tokens, offs_d, HEAD_DIM)
    maximum, log_sum = load_log_sum(lse_ptr, instance, offs_m, N, APART)
    delta = delta_of(out, grad_out)
    if COSINE:
        scale = cosine_scale(logit_scale_ptr, head)
    query = scaled_query(q, scale, COSINE)
    offs_query = offs_m[:, None] * HEAD_DIM + offs_d[None, :]
    inside = (offs_m < N)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(query_ptr + instance * (N * HEAD_DIM) + offs_query, query, mask=inside)
    rescale = gradient_scale(scale, COSINE)
    log_sum -= tl.log2(rescale)

    masked = _is_masked(window, geometry, WINDOW, MASK)
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    mean_key = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    residual = tl.zeros((BLOCK_M,), tl.float32)
    for first in tl.range(0, N, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        tokens_n = locate_tokens(offs_n, window, geometry, WINDOW, ROLL_FIRST)
        offs_key = token_offsets(tokens_n, stride_qkv)
        k = load_tokens(k_ptr + offs_image, offs_key, tokens_n, offs_d, HEAD_DIM, pad_k_ptr, HAS_PAD)
        v = load_tokens(v_ptr + offs_image, offs_key, tokens_n, offs_d, HEAD_DIM, pad_v_ptr, HAS_PAD)
        attn_bias = tile_bias(offs_m[:, None], offs_n[None, :], bias, column, N, BIAS)
        if masked:
            attn_bias = add_mask(attn_bias, offs_m[:, None], offs_n[None, :], mask, window, geometry, WINDOW, MASK)
        key, norms = k, 0.0
        if COSINE:
            norm = inverse_norm(k)
            key, norms = scale_rows(k, norm), norm[None, :]
        scores = score_tile(query, k, attn_bias, norms, COSINE, PRECISION)
        p = weights_of(scores, maximum[:, None], log_sum[:, None], LOG2E, APART)
        grad_p = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        if HAS_DROPOUT:
            grad_p *= dropout_factor(Dropout(seed_ptr, dropout), instance, offs_m[:, None], offs_n[None, :], N)
        grad_scores = p * (grad_p - delta[:, None])
        grad_q = tl.dot(grad_scores.to(q.dtype), key, grad_q, input_precision=PRECISION)
        residual += tl.sum(grad_scores, axis=1)
        mean_key = tl.dot(p.to(q.dtype), key, mean_key, input_precision=PRECISION)

    # A row of dS sums to zero, but for what the rounding of O has left in delta: it is taken out of dQ here, and of
    # delta for the kernels that follow. Where dP is infinite, delta is so rightly. Of padding it is not known but here.
    residual *= 1.0 / rescale
    residual = tl.where(is_finite(residual) | tokens.padding, residual, 0.0)
    tl.store(delta_ptr + instance * N + offs_m, delta + residual, mask=offs_m < N)
    grad_q = (grad_q - residual[:, None] * mean_key) * (scale / rescale)
    if COSINE:
        # Queries are read again: they would take registers all along the walk.
        q = load_tokens(q_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_q_ptr, HAS_PAD)
        grad_q, along = through_norm(q, grad_q)
        grad_scale = logit_scale_gradient(tl.sum(along, axis=0), logit_scale_ptr, head)
        tl.store(grad_logit_scale_ptr + (instance // num_heads * TILES + tile) * num_heads + head, grad_scale)
    if HAS_PAD:
        offs_pad = ((instance // num_heads * TILES + tile) * 3 * num_heads + head) * HEAD_DIM + offs_d
        tl.store(grad_padding_ptr + offs_pad, sum_padding(grad_q, tokens), mask=offs_d < HEAD_DIM)
    store_tokens(grad_qkv_ptr + offs_image, grad_q, offs_token, tokens, offs_d, HEAD_DIM)


@triton.jit(do_not_specialize=SIZES)
def _window_attention_bwd_key_kernel(
    grad_qkv_ptr,  # as qkv, k and v
    grad_k_ptr, grad_v_ptr,
    grad_padding_ptr,  # (batch * windows * TILES or more, 3 * heads * HEAD_DIM), fp32, zero at the start
    key_norm_ptr,  # (batch, windows, heads, N), fp32: inverse norms of the keys, for the bias kernel
    grad_out_ptr,  # (batch, depth, height, width, heads, HEAD_DIM)
    lse_ptr,  # (batch, windows, heads, N), with a mask tensor (.., 2, N), fp32: the softmax
    delta_ptr,  # (batch, windows, heads, N), fp32
    query_ptr,  # (batch, windows, heads, N, HEAD_DIM), as they meet the keys
    qkv_ptr,  # (batch, depth, height, width, 3, heads, HEAD_DIM); without PACKED k and v apart, with q's strides
    k_ptr, v_ptr,
    padding_ptr,  # (3 * heads * HEAD_DIM,)
    mask_ptr,  # (windows, N, N)
    logit_scale_ptr,  # (heads,)
    dense_ptr,  # (BIAS_ROWS * heads, ROWS, COLS)
    seed_ptr,  # (1,), int64
    stride_qkv_batch, stride_qkv_depth, stride_qkv_row, stride_qkv_col, stride_qkv_head,
    stride_out_batch, stride_out_depth, stride_out_row, stride_out_col, stride_out_head,
    num_heads,
    depth, height, width, windows_d, windows_h, windows_w, shift_d, shift_h, shift_w, roll_d, roll_h, roll_w,
    scale, mask_value, dropout,
    WINDOW: tl.constexpr, VOLUME: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr, COSINE: tl.constexpr,
    BIAS: tl.constexpr, BIAS_ROWS: tl.constexpr, MASK: tl.constexpr, HAS_PAD: tl.constexpr, ROLL_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute dK and dV. One program: BLOCK_N keys of one window and head of one image.

        dV = Σ Pᵀ dO        dK = Σ dSᵀ (scale · Q)

    summed over tiles of queries and dO, which pass by with their softmax and δ. Keys and values stay, and dK and dV
    (BLOCK_N, BLOCK_D) gather in registers. Scores are transposed here, (keys, queries), so that both products take
    them from registers as they are.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    APART: tl.constexpr = MASK == MASK_TENSOR
    tl.static_assert(HEAD_DIM <= BLOCK_D)
    tl.static_assert(VOLUME or WINDOW[0] == 1)
    tl.static_assert(BIAS == BIAS_NONE or BIAS == BIAS_DENSE)
    tl.static_assert(ROWS >= N and ROWS % BLOCK_M == 0 and COLS >= N and COLS % BLOCK_N == 0)
    geometry = Geometry(
        (depth, height, width), (windows_d, windows_h, windows_w), (shift_d, shift_h, shift_w), (roll_d, roll_h, roll_w)
    )
    bias = Bias(dense_ptr=dense_ptr, stride_dense=(ROWS * COLS, COLS))
    mask = Mask(mask_ptr, mask_value)
    stride_qkv = (stride_qkv_depth, stride_qkv_row, stride_qkv_col)
    tile, instance, image, number, head = _place_program(num_heads, geometry, TILES)
    window = place_window(number, geometry, VOLUME)
    column = bias_column(head, window, geometry, num_heads, BIAS_ROWS, KINDS)

    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    tokens = locate_tokens(offs_n, window, geometry, WINDOW, ROLL_FIRST)
    offs_image = image * stride_qkv_batch + head * stride_qkv_head * HEAD_DIM
    offs_token = token_offsets(tokens, stride_qkv)
    q_ptr, k_ptr, v_ptr = operand_pointers(qkv_ptr, k_ptr, v_ptr, num_heads, HEAD_DIM, PACKED)
    query_ptr += instance * (N * HEAD_DIM)
    _, grad_k_ptr, grad_v_ptr = operand_pointers(grad_qkv_ptr, grad_k_ptr, grad_v_ptr, num_heads, HEAD_DIM, PACKED)
    pad_k_ptr, pad_v_ptr, _ = padding_pointers(padding_ptr, q_ptr, head + num_heads, num_heads, HEAD_DIM, HAS_PAD)
    k = load_tokens(k_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_k_ptr, HAS_PAD)
    v = load_tokens(v_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_v_ptr, HAS_PAD)
    norms = 0.0
    if COSINE:
        scale = cosine_scale(logit_scale_ptr, head)
        norm = inverse_norm(k)
        tl.store(key_norm_ptr + instance * N + offs_n, norm, mask=offs_n < N)
        norms = norm[:, None]
    rescale = gradient_scale(scale, COSINE)
    log_rescale = tl.log2(rescale)

    grad_out_ptr += image * stride_out_batch + head * stride_out_head * HEAD_DIM
    masked = _is_masked(window, geometry, WINDOW, MASK)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # Vectors are not pipelined by the compiler: each is loaded one turn ahead.
    delta_ptr += instance * N
    offs_m = tl.arange(0, BLOCK_M)
    maximum, log_sum = load_log_sum(lse_ptr, instance, offs_m, N, APART)
    delta = load_vector(delta_ptr, offs_m, N, 0.0)
    for first in tl.range(0, N, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        tokens_m = locate_tokens(offs_m, window, geometry, WINDOW, ROLL_FIRST)
        offs_out = token_offsets(tokens_m, (stride_out_depth, stride_out_row, stride_out_col))
        attn_bias = tile_bias(offs_m[None, :], offs_n[:, None], bias, column, N, BIAS)
        if masked:
            attn_bias = add_mask(attn_bias, offs_m[None, :], offs_n[:, None], mask, window, geometry, WINDOW, MASK)
        query = load_queries(query_ptr, offs_m, offs_d, N, HEAD_DIM)
        grad_out = load_tokens(grad_out_ptr, offs_out, tokens_m, offs_d, HEAD_DIM)
        log_sum -= log_rescale
        # Cosine scores over the norms, so that `attn_bias` is in the product and takes no registers meanwhile; beside
        # large numbers of a mask that would not be exact enough.
        if COSINE and not APART:
            scores = score_tile(k, query, attn_bias * (1.0 / norms), norms, False, PRECISION)
            p = weights_of(scores, maximum[None, :], log_sum[None, :], norms * LOG2E, APART)
        else:
            scores = score_tile(k, query, attn_bias, norms, COSINE, PRECISION)
            p = weights_of(scores, maximum[None, :], log_sum[None, :], LOG2E, APART)
        grad_p = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        kept = p
        if HAS_DROPOUT:
            dropped = dropout_factor(Dropout(seed_ptr, dropout), instance, offs_m[None, :], offs_n[:, None], N)
            kept = p * dropped
            grad_p *= dropped
        grad_v = tl.dot(kept.to(v.dtype), grad_out, grad_v, input_precision=PRECISION)
        grad_scores = p * (grad_p - delta[None, :])
        grad_k = tl.dot(grad_scores.to(k.dtype), query, grad_k, input_precision=PRECISION)
        maximum, log_sum = load_log_sum(lse_ptr, instance, offs_m + BLOCK_M, N, APART)
        delta = load_vector(delta_ptr, offs_m + BLOCK_M, N, 0.0)

    if COSINE:
        grad_v *= 1.0 / rescale
        # Keys are read again: they would take registers all along the walk.
        k = load_tokens(k_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_k_ptr, HAS_PAD)
        grad_k, _ = through_norm(k, grad_k * (1.0 / rescale))
    if HAS_PAD:
        offs_pad = ((instance // num_heads * TILES + tile) * 3 * num_heads + head) * HEAD_DIM + offs_d
        grad_pad_k = sum_padding(grad_k, tokens)
        grad_pad_v = sum_padding(grad_v, tokens)
        tl.store(grad_padding_ptr + offs_pad + num_heads * HEAD_DIM, grad_pad_k, mask=offs_d < HEAD_DIM)
        tl.store(grad_padding_ptr + offs_pad + 2 * num_heads * HEAD_DIM, grad_pad_v, mask=offs_d < HEAD_DIM)
    store_tokens(grad_k_ptr + offs_image, grad_k, offs_token, tokens, offs_d, HEAD_DIM)
    store_tokens(grad_v_ptr + offs_image, grad_v, offs_token, tokens, offs_d, HEAD_DIM)
