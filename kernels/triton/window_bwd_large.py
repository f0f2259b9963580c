"""Backward of shifted-window attention on the image layout: gradients land where the tokens came from.

With P = softmax(S) and dP = dO Vᵀ, both kernels compute (Dao et al. 2022, arXiv:2205.14135, appendix B.2)

    dV = Pᵀ dO      dS = P ∘ (dP − rowsum(dO ∘ O))      dQ = dS K      dK = dSᵀ Q      dB = Σ dS

from recomputed scores. A small window needs nothing but its tokens; its bias gradient is summed in registers over
all images that a program walks. A large window is walked in tiles three times, once for each of dQ, (dK, dV) and dB,
with the forward's softmax as `softmax.store_log_sum` keeps it, so that scores must be the forward's to the last digit:
the first walk writes the queries down as the forward scaled and rounded them, padding included, for the others. Nothing
is added up by atomics, so results do not depend on timing.

Attention dropout multiplies P where it meets V, and dP (dropped weights pass no gradient). Cosine attention passes
dQ and dK through the normalisation, x / max(‖x‖, ε): dx = (dx̂ − x̂ (x̂ · dx̂)) / ‖x‖, and x̂ · dx̂ of the queries,
summed, is the gradient of logit_scale. Padding tokens hand theirs to the projection's bias: keys and values, and
queries too, whose outputs are cropped, so that theirs is zero, or NaN.
"""

import triton
import triton.language as tl

from .softmax import LOG2E, delta_of, is_finite, load_log_sum, score_tile, weights_of
from .tiles import (
    BIAS_DENSE,
    BIAS_NONE,
    BIAS_TABLE,
    LOG_100,
    MASK_REGIONS,
    MASK_TENSOR,
    Bias,
    Dropout,
    Geometry,
    Mask,
    add_mask,
    cosine_scale,
    dropout_factor,
    inverse_norm,
    is_divided,
    load_tokens,
    locate_tokens,
    operand_pointers,
    padding_pointers,
    part_of,
    place_window,
    scale_rows,
    scaled_query,
    store_tokens,
    tile_bias,
    token_offsets,
    within,
)


@triton.jit
def _normalised(x, COSINE: tl.constexpr):
    """x, divided by its norm for cosine attention, in its own dtype."""
    if COSINE:
        return scale_rows(x, inverse_norm(x))
    return x


@triton.jit
def _through_norm(x, grad):
    """Gradient of x from that of x / max(‖x‖, 1e-12), and the product of the latter two by row; fp32."""
    inverse = inverse_norm(x)
    unit = x.to(tl.float32) * inverse[:, None]
    along = tl.sum(unit * grad, axis=1)
    clamped = inverse > 0.9999e12  # where ε replaces the norm, that is a constant
    return (grad - tl.where(clamped[:, None], 0.0, unit * along[:, None])) * inverse[:, None], along


@triton.jit
def _gradient_unit(scale, COSINE: tl.constexpr):
    """What P and dS are multiplied by: dS meets its product in 16 bits, and in fp16 small numbers are coarse.

    Cosine attention's scale is large, and comes after the product in the originals: their dS there is of this size.
    """
    if COSINE:  # the power of two below, so that nothing is rounded
        return (tl.maximum(scale, 1.0).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.full((), 1.0, tl.float32)


@triton.jit
def _logit_scale_gradient(grad_scale, logit_scale_ptr, head):
    """Gradient of a head's logit_scale from Σ dS ∘ S, that of its logarithm; none where it is clamped, or NaN."""
    return tl.where(tl.load(logit_scale_ptr + head).to(tl.float32) <= LOG_100, grad_scale, 0.0)


@triton.jit
def _sum_padding(grad, tokens):
    """What the padding tokens of a tile hand to the projection's bias, (BLOCK_D,)."""
    return tl.sum(tl.where(tokens.padding[:, None], grad, 0.0), axis=0)


@triton.jit
def _window_attention_bwd_small_kernel(
    grad_qkv_ptr,  # as qkv, k and v
    grad_k_ptr, grad_v_ptr,
    grad_bias_ptr,  # (parts, heads, N, N), fp32
    grad_padding_ptr,  # (parts, 3 * heads * HEAD_DIM), fp32, zero at the start
    grad_logit_scale_ptr,  # (parts, heads), fp32
    grad_out_ptr,  # (batch, depth, height, width, heads, HEAD_DIM)
    qkv_ptr,  # (batch, depth, height, width, 3, heads, HEAD_DIM); without PACKED q alone, and k and v have its strides
    k_ptr, v_ptr,
    padding_ptr,  # (3 * heads * HEAD_DIM,)
    table_ptr, index_ptr,  # (T, heads) and (N, N), int64
    mask_ptr,  # (windows, N, N)
    logit_scale_ptr,  # (heads,)
    seed_ptr,  # (1,), int64
    stride_qkv_batch, stride_qkv_depth, stride_qkv_row, stride_qkv_col, stride_qkv_head,
    stride_out_batch, stride_out_depth, stride_out_row, stride_out_col, stride_out_head,
    stride_table_row, stride_table_head, num_rows,
    batch, num_heads,
    depth, height, width, windows_d, windows_h, windows_w, shift_d, shift_h, shift_w, roll_d, roll_h, roll_w,
    scale, mask_value, dropout,
    WINDOW: tl.constexpr, VOLUME: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr, COSINE: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, HAS_PAD: tl.constexpr, ROLL_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, GRAD_BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, IMAGES: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """All gradients. One program: one head, WINDOWS window positions, up to IMAGES images of each.

    Tiles are of a whole window, so P is normalised by its own sum, and rowsum(dO ∘ O) is rowsum(P ∘ dP). In registers
    from image to image: bias and mask (BLOCK_N, BLOCK_N), and what dB, padding and logit_scale gather.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    tl.static_assert(N <= BLOCK_N)
    tl.static_assert(HEAD_DIM <= BLOCK_D)
    tl.static_assert(VOLUME or WINDOW[0] == 1)
    tl.static_assert(BIAS == BIAS_NONE or BIAS == BIAS_TABLE)
    geometry = Geometry(
        (depth, height, width), (windows_d, windows_h, windows_w), (shift_d, shift_h, shift_w), (roll_d, roll_h, roll_w)
    )
    bias = Bias(table_ptr, index_ptr, num_rows, (stride_table_row, stride_table_head))
    mask = Mask(mask_ptr, mask_value)
    num_windows = windows_d * windows_h * windows_w
    head = tl.program_id(0) % num_heads
    group = tl.program_id(0) // num_heads
    first = tl.program_id(1) * IMAGES
    partial = tl.program_id(1) * tl.cdiv(num_windows, WINDOWS) + group

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptr, k_ptr, v_ptr = operand_pointers(qkv_ptr, k_ptr, v_ptr, num_heads, HEAD_DIM, PACKED)
    grad_q_ptr, grad_k_ptr, grad_v_ptr = operand_pointers(
        grad_qkv_ptr, grad_k_ptr, grad_v_ptr, num_heads, HEAD_DIM, PACKED
    )
    if COSINE:
        scale = cosine_scale(logit_scale_ptr, head)
    unit = _gradient_unit(scale, COSINE)
    pad_q_ptr, pad_k_ptr, pad_v_ptr = padding_pointers(padding_ptr, q_ptr, head, num_heads, HEAD_DIM, HAS_PAD)

    # Beyond the window queries are its last one again, of no weight: zeros would meet an infinite key as NaN, for all.
    inside = offs_n < N
    grad_bias = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    grad_pad_q = tl.zeros((BLOCK_D,), tl.float32)
    grad_pad_k = tl.zeros((BLOCK_D,), tl.float32)
    grad_pad_v = tl.zeros((BLOCK_D,), tl.float32)
    grad_scale = 0.0
    for number in tl.range(group * WINDOWS, tl.minimum((group + 1) * WINDOWS, num_windows)):
        window = place_window(number, geometry, VOLUME)
        queries = locate_tokens(tl.minimum(offs_n, N - 1), window, geometry, WINDOW, ROLL_FIRST)
        tokens = within(queries, inside)
        offs_token = token_offsets(tokens, (stride_qkv_depth, stride_qkv_row, stride_qkv_col))
        offs_token += head * stride_qkv_head * HEAD_DIM
        offs_out = token_offsets(tokens, (stride_out_depth, stride_out_row, stride_out_col))
        offs_out += head * stride_out_head * HEAD_DIM
        start = tile_bias(offs_n[:, None], offs_n[None, :], bias, head, N, BIAS)
        start = add_mask(start, offs_n[:, None], offs_n[None, :], mask, window, geometry, WINDOW, MASK)
        for image in tl.range(first, tl.minimum(first + IMAGES, batch)):
            offs_image = tl.cast(image, tl.int64) * stride_qkv_batch
            q = load_tokens(q_ptr + offs_image, offs_token, queries, offs_d, HEAD_DIM, pad_q_ptr, HAS_PAD)
            k = load_tokens(k_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_k_ptr, HAS_PAD)
            v = load_tokens(v_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_v_ptr, HAS_PAD)
            image_ptr = grad_out_ptr + tl.cast(image, tl.int64) * stride_out_batch
            grad_out = load_tokens(image_ptr, offs_out, tokens, offs_d, HEAD_DIM)

            query, key = scaled_query(q, scale, COSINE), _normalised(k, COSINE)
            scores = tl.dot(query, tl.trans(key), start, input_precision=PRECISION)
            p = tl.exp2((scores - tl.max(scores, axis=1)[:, None]) * LOG2E)
            p *= tl.where(inside, unit / tl.sum(p, axis=1), 0.0)[:, None]
            grad_p = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            kept = p
            if HAS_DROPOUT:
                part = part_of(image, number, head, num_windows, num_heads)
                factor = dropout_factor(Dropout(seed_ptr, dropout), part, offs_n[:, None], offs_n[None, :], N)
                kept = p * factor
                grad_p *= factor
            grad_v = tl.dot(tl.trans(kept.to(v.dtype)), grad_out, input_precision=PRECISION)
            delta = tl.where(inside, tl.sum(p * grad_p, axis=1) / unit, 0.0)
            grad_scores = p * (grad_p - delta[:, None])
            if GRAD_BIAS:
                grad_bias += grad_scores
            grad_scores = grad_scores.to(q.dtype)
            grad_q = tl.dot(grad_scores, key, input_precision=PRECISION) * (scale / unit)
            grad_k = tl.dot(tl.trans(grad_scores), query, input_precision=PRECISION)  # query holds the scale
            if COSINE:
                grad_k *= 1.0 / unit
                grad_v *= 1.0 / unit
                grad_q, along = _through_norm(q, grad_q)
                grad_k, _ = _through_norm(k, grad_k)
                grad_scale += tl.sum(along, axis=0)
            if HAS_PAD:
                grad_pad_q += _sum_padding(grad_q, tokens)
                grad_pad_k += _sum_padding(grad_k, tokens)
                grad_pad_v += _sum_padding(grad_v, tokens)
            store_tokens(grad_q_ptr + offs_image, grad_q, offs_token, tokens, offs_d, HEAD_DIM)
            store_tokens(grad_k_ptr + offs_image, grad_k, offs_token, tokens, offs_d, HEAD_DIM)
            store_tokens(grad_v_ptr + offs_image, grad_v, offs_token, tokens, offs_d, HEAD_DIM)

    if GRAD_BIAS:
        grad_bias *= 1.0 / unit
        grad_bias_ptr += (tl.cast(partial, tl.int64) * num_heads + head) * (N * N)
        offs_bias = offs_n[:, None] * N + offs_n[None, :]
        tl.store(grad_bias_ptr + offs_bias, grad_bias, mask=(offs_n < N)[:, None] & (offs_n < N)[None, :])
    if COSINE:
        grad_scale = _logit_scale_gradient(grad_scale, logit_scale_ptr, head)
        tl.store(grad_logit_scale_ptr + partial * num_heads + head, grad_scale)
    if HAS_PAD:
        offs_pad = (tl.cast(partial, tl.int64) * 3 * num_heads + head) * HEAD_DIM + offs_d
        tl.store(grad_padding_ptr + offs_pad, grad_pad_q, mask=offs_d < HEAD_DIM)
        tl.store(grad_padding_ptr + offs_pad + num_heads * HEAD_DIM, grad_pad_k, mask=offs_d < HEAD_DIM)
        tl.store(grad_padding_ptr + offs_pad + 2 * num_heads * HEAD_DIM, grad_pad_v, mask=offs_d < HEAD_DIM)


@triton.jit
def _is_masked(window, geometry, WINDOW: tl.constexpr, MASK: tl.constexpr):
    """Whether a window has a mask: of shifted windows only those with tokens of more than one region do."""
    if MASK == MASK_REGIONS:
        return is_divided(window, geometry, WINDOW)
    return MASK == MASK_TENSOR


@triton.jit
def _load_vector(ptr, offs, N: tl.constexpr, other):
    """One number of each token of a window."""
    return tl.load(ptr + offs, mask=offs < N, other=other)


@triton.jit
def _load_queries(ptr, offs, offs_d, N: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Queries of one window and head as they were written down; beyond the last one, which weigh nothing, that again.

    Zeros in their place would meet an infinite key as NaN, which all queries' keys then shared.
    """
    offs = tl.minimum(offs, N - 1)
    return tl.load(ptr + (offs[:, None] * HEAD_DIM + offs_d[None, :]), mask=(offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _place_program(num_heads, geometry, TILES: tl.constexpr):
    """This program's tile and part, and of which image, window and head that part is."""
    tile = tl.program_id(0) % TILES
    part = (tl.program_id(0) // TILES).to(tl.int64)
    head = (part % num_heads).to(tl.int32)
    num_windows = geometry.windows[0] * geometry.windows[1] * geometry.windows[2]
    number = ((part // num_heads) % num_windows).to(tl.int32)
    return tile, part, part // num_heads // num_windows, number, head


@triton.jit
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
    dense_ptr,  # (heads, ROWS, COLS)
    seed_ptr,  # (1,), int64
    stride_qkv_batch, stride_qkv_depth, stride_qkv_row, stride_qkv_col, stride_qkv_head,
    stride_out_batch, stride_out_depth, stride_out_row, stride_out_col, stride_out_head,
    num_heads,
    depth, height, width, windows_d, windows_h, windows_w, shift_d, shift_h, shift_w, roll_d, roll_h, roll_w,
    scale, mask_value, dropout,
    WINDOW: tl.constexpr, VOLUME: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr, COSINE: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, HAS_PAD: tl.constexpr, ROLL_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dQ, and with it logit_scale's gradient. One program: BLOCK_M queries of one window and head of one image.

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
    tile, part, image, number, head = _place_program(num_heads, geometry, TILES)
    window = place_window(number, geometry, VOLUME)

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
    maximum, log_sum = load_log_sum(lse_ptr, part, offs_m, N, APART)
    delta = delta_of(out, grad_out)
    if COSINE:
        scale = cosine_scale(logit_scale_ptr, head)
    query = scaled_query(q, scale, COSINE)
    offs_query = offs_m[:, None] * HEAD_DIM + offs_d[None, :]
    inside = (offs_m < N)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(query_ptr + part * (N * HEAD_DIM) + offs_query, query, mask=inside)
    unit = _gradient_unit(scale, COSINE)
    log_sum -= tl.log2(unit)

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
        start = tile_bias(offs_m[:, None], offs_n[None, :], bias, head, N, BIAS)
        if masked:
            start = add_mask(start, offs_m[:, None], offs_n[None, :], mask, window, geometry, WINDOW, MASK)
        key, norms = k, 0.0
        if COSINE:
            norm = inverse_norm(k)
            key, norms = scale_rows(k, norm), norm[None, :]
        scores = score_tile(query, k, start, norms, COSINE, PRECISION)
        p = weights_of(scores, maximum[:, None], log_sum[:, None], LOG2E, APART)
        grad_p = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        if HAS_DROPOUT:
            grad_p *= dropout_factor(Dropout(seed_ptr, dropout), part, offs_m[:, None], offs_n[None, :], N)
        grad_scores = p * (grad_p - delta[:, None])
        grad_q = tl.dot(grad_scores.to(q.dtype), key, grad_q, input_precision=PRECISION)
        residual += tl.sum(grad_scores, axis=1)
        mean_key = tl.dot(p.to(q.dtype), key, mean_key, input_precision=PRECISION)

    # A row of dS sums to zero, but for what the rounding of O has left in delta: it is taken out of dQ here, and of
    # delta for the kernels that follow. Where dP is infinite, delta is so rightly. Of padding it is not known but here.
    residual *= 1.0 / unit
    residual = tl.where(is_finite(residual) | tokens.padding, residual, 0.0)
    tl.store(delta_ptr + part * N + offs_m, delta + residual, mask=offs_m < N)
    grad_q = (grad_q - residual[:, None] * mean_key) * (scale / unit)
    if COSINE:
        # Queries are read again: they would take registers all along the walk.
        q = load_tokens(q_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_q_ptr, HAS_PAD)
        grad_q, along = _through_norm(q, grad_q)
        grad_scale = _logit_scale_gradient(tl.sum(along, axis=0), logit_scale_ptr, head)
        tl.store(grad_logit_scale_ptr + (part // num_heads * TILES + tile) * num_heads + head, grad_scale)
    if HAS_PAD:
        offs_pad = ((part // num_heads * TILES + tile) * 3 * num_heads + head) * HEAD_DIM + offs_d
        tl.store(grad_padding_ptr + offs_pad, _sum_padding(grad_q, tokens), mask=offs_d < HEAD_DIM)
    store_tokens(grad_qkv_ptr + offs_image, grad_q, offs_token, tokens, offs_d, HEAD_DIM)


@triton.jit
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
    dense_ptr,  # (heads, ROWS, COLS)
    seed_ptr,  # (1,), int64
    stride_qkv_batch, stride_qkv_depth, stride_qkv_row, stride_qkv_col, stride_qkv_head,
    stride_out_batch, stride_out_depth, stride_out_row, stride_out_col, stride_out_head,
    num_heads,
    depth, height, width, windows_d, windows_h, windows_w, shift_d, shift_h, shift_w, roll_d, roll_h, roll_w,
    scale, mask_value, dropout,
    WINDOW: tl.constexpr, VOLUME: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr, COSINE: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, HAS_PAD: tl.constexpr, ROLL_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dK and dV. One program: BLOCK_N keys of one window and head of one image.

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
    tile, part, image, number, head = _place_program(num_heads, geometry, TILES)
    window = place_window(number, geometry, VOLUME)

    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    tokens = locate_tokens(offs_n, window, geometry, WINDOW, ROLL_FIRST)
    offs_image = image * stride_qkv_batch + head * stride_qkv_head * HEAD_DIM
    offs_token = token_offsets(tokens, stride_qkv)
    q_ptr, k_ptr, v_ptr = operand_pointers(qkv_ptr, k_ptr, v_ptr, num_heads, HEAD_DIM, PACKED)
    query_ptr += part * (N * HEAD_DIM)
    _, grad_k_ptr, grad_v_ptr = operand_pointers(grad_qkv_ptr, grad_k_ptr, grad_v_ptr, num_heads, HEAD_DIM, PACKED)
    pad_k_ptr, pad_v_ptr, _ = padding_pointers(padding_ptr, q_ptr, head + num_heads, num_heads, HEAD_DIM, HAS_PAD)
    k = load_tokens(k_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_k_ptr, HAS_PAD)
    v = load_tokens(v_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_v_ptr, HAS_PAD)
    norms = 0.0
    if COSINE:
        scale = cosine_scale(logit_scale_ptr, head)
        norm = inverse_norm(k)
        tl.store(key_norm_ptr + part * N + offs_n, norm, mask=offs_n < N)
        norms = norm[:, None]
    unit = _gradient_unit(scale, COSINE)
    log_unit = tl.log2(unit)

    grad_out_ptr += image * stride_out_batch + head * stride_out_head * HEAD_DIM
    masked = _is_masked(window, geometry, WINDOW, MASK)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # Vectors are not pipelined by the compiler: each is loaded one turn ahead.
    delta_ptr += part * N
    offs_m = tl.arange(0, BLOCK_M)
    maximum, log_sum = load_log_sum(lse_ptr, part, offs_m, N, APART)
    delta = _load_vector(delta_ptr, offs_m, N, 0.0)
    for first in tl.range(0, N, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        tokens_m = locate_tokens(offs_m, window, geometry, WINDOW, ROLL_FIRST)
        offs_out = token_offsets(tokens_m, (stride_out_depth, stride_out_row, stride_out_col))
        start = tile_bias(offs_m[None, :], offs_n[:, None], bias, head, N, BIAS)
        if masked:
            start = add_mask(start, offs_m[None, :], offs_n[:, None], mask, window, geometry, WINDOW, MASK)
        query = _load_queries(query_ptr, offs_m, offs_d, N, HEAD_DIM)
        grad_out = load_tokens(grad_out_ptr, offs_out, tokens_m, offs_d, HEAD_DIM)
        log_sum -= log_unit
        # Cosine scores over the norms, so that `start` is in the product and takes no registers meanwhile; beside large
        # numbers of a mask that would not be exact enough.
        if COSINE and not APART:
            scores = score_tile(k, query, start * (1.0 / norms), norms, False, PRECISION)
            p = weights_of(scores, maximum[None, :], log_sum[None, :], norms * LOG2E, APART)
        else:
            scores = score_tile(k, query, start, norms, COSINE, PRECISION)
            p = weights_of(scores, maximum[None, :], log_sum[None, :], LOG2E, APART)
        grad_p = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        kept = p
        if HAS_DROPOUT:
            dropped = dropout_factor(Dropout(seed_ptr, dropout), part, offs_m[None, :], offs_n[:, None], N)
            kept = p * dropped
            grad_p *= dropped
        grad_v = tl.dot(kept.to(v.dtype), grad_out, grad_v, input_precision=PRECISION)
        grad_scores = p * (grad_p - delta[None, :])
        grad_k = tl.dot(grad_scores.to(k.dtype), query, grad_k, input_precision=PRECISION)
        maximum, log_sum = load_log_sum(lse_ptr, part, offs_m + BLOCK_M, N, APART)
        delta = _load_vector(delta_ptr, offs_m + BLOCK_M, N, 0.0)

    if COSINE:
        grad_v *= 1.0 / unit
        # Keys are read again: they would take registers all along the walk.
        k = load_tokens(k_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_k_ptr, HAS_PAD)
        grad_k, _ = _through_norm(k, grad_k * (1.0 / unit))
    if HAS_PAD:
        offs_pad = ((part // num_heads * TILES + tile) * 3 * num_heads + head) * HEAD_DIM + offs_d
        grad_pad_k = _sum_padding(grad_k, tokens)
        grad_pad_v = _sum_padding(grad_v, tokens)
        tl.store(grad_padding_ptr + offs_pad + num_heads * HEAD_DIM, grad_pad_k, mask=offs_d < HEAD_DIM)
        tl.store(grad_padding_ptr + offs_pad + 2 * num_heads * HEAD_DIM, grad_pad_v, mask=offs_d < HEAD_DIM)
    store_tokens(grad_k_ptr + offs_image, grad_k, offs_token, tokens, offs_d, HEAD_DIM)
    store_tokens(grad_v_ptr + offs_image, grad_v, offs_token, tokens, offs_d, HEAD_DIM)


@triton.jit
def _load_vectors(ptrs, part, offs_m, offs_n, N: tl.constexpr, COSINE: tl.constexpr, APART: tl.constexpr):
    """Softmax and delta of a tile's queries, and for cosine attention inverse norms of its keys."""
    lse_ptr, delta_ptr, key_norm_ptr = ptrs
    maximum, log_sum = load_log_sum(lse_ptr, part, offs_m, N, APART)
    delta = _load_vector(delta_ptr + part * N, offs_m, N, 0.0)
    norm = tl.zeros(offs_n.shape, tl.float32)
    if COSINE:
        norm = _load_vector(key_norm_ptr + part * N, offs_n, N, 0.0)
    return maximum, log_sum, delta, norm


@triton.jit
def _window_attention_bwd_bias_kernel(
    grad_bias_ptr,  # (parts, heads, N, N), fp32
    grad_out_ptr,  # (batch, depth, height, width, heads, HEAD_DIM)
    lse_ptr,  # (batch, windows, heads, N), with a mask tensor (.., 2, N), fp32: the softmax
    delta_ptr, key_norm_ptr,  # (batch, windows, heads, N), fp32
    query_ptr,  # (batch, windows, heads, N, HEAD_DIM), as they meet the keys
    qkv_ptr,  # (batch, depth, height, width, 3, heads, HEAD_DIM); without PACKED k and v apart, with q's strides
    k_ptr, v_ptr,
    padding_ptr,  # (3 * heads * HEAD_DIM,)
    mask_ptr,  # (windows, N, N)
    logit_scale_ptr,  # (heads,)
    dense_ptr,  # (heads, ROWS, COLS)
    seed_ptr,  # (1,), int64
    stride_qkv_batch, stride_qkv_depth, stride_qkv_row, stride_qkv_col, stride_qkv_head,
    stride_out_batch, stride_out_depth, stride_out_row, stride_out_col, stride_out_head,
    batch, num_heads,
    depth, height, width, windows_d, windows_h, windows_w, shift_d, shift_h, shift_w, roll_d, roll_h, roll_w,
    scale, mask_value, dropout,
    WINDOW: tl.constexpr, VOLUME: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr, COSINE: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, HAS_PAD: tl.constexpr, ROLL_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, IMAGES: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """dB = Σ dS. One program: one tile of scores and one head, in WINDOWS window positions of up to IMAGES images.

    dB (BLOCK_M, BLOCK_N) gathers in registers, where the bias stays too.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = TILES_N * ((N + BLOCK_M - 1) // BLOCK_M)
    APART: tl.constexpr = MASK == MASK_TENSOR
    tl.static_assert(HEAD_DIM <= BLOCK_D)
    tl.static_assert(VOLUME or WINDOW[0] == 1)
    tl.static_assert(BIAS == BIAS_DENSE)
    tl.static_assert(ROWS >= N and ROWS % BLOCK_M == 0 and COLS >= N and COLS % BLOCK_N == 0)
    geometry = Geometry(
        (depth, height, width), (windows_d, windows_h, windows_w), (shift_d, shift_h, shift_w), (roll_d, roll_h, roll_w)
    )
    mask = Mask(mask_ptr, mask_value)
    stride_qkv = (stride_qkv_depth, stride_qkv_row, stride_qkv_col)
    vector_ptrs = (lse_ptr, delta_ptr, key_norm_ptr)
    tile = tl.program_id(0) % TILES
    head = tl.program_id(0) // TILES
    num_windows = windows_d * windows_h * windows_w
    partial = tl.program_id(2) * tl.cdiv(num_windows, WINDOWS) + tl.program_id(1)
    first = tl.program_id(2) * IMAGES

    offs_m = tile // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_head = head * stride_qkv_head * HEAD_DIM
    q_ptr, k_ptr, v_ptr = operand_pointers(qkv_ptr, k_ptr, v_ptr, num_heads, HEAD_DIM, PACKED)
    pad_k_ptr, pad_v_ptr, _ = padding_pointers(padding_ptr, q_ptr, head + num_heads, num_heads, HEAD_DIM, HAS_PAD)
    bias = Bias(dense_ptr=dense_ptr, stride_dense=(ROWS * COLS, COLS))
    bias_tile = tile_bias(offs_m[:, None], offs_n[None, :], bias, head, N, BIAS)

    grad_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for number in tl.range(tl.program_id(1) * WINDOWS, tl.minimum((tl.program_id(1) + 1) * WINDOWS, num_windows)):
        window = place_window(number, geometry, VOLUME)
        tokens_m = locate_tokens(offs_m, window, geometry, WINDOW, ROLL_FIRST)
        tokens_n = locate_tokens(offs_n, window, geometry, WINDOW, ROLL_FIRST)
        offs_out = token_offsets(tokens_m, (stride_out_depth, stride_out_row, stride_out_col))
        offs_out += head * stride_out_head * HEAD_DIM
        offs_key = token_offsets(tokens_n, stride_qkv) + offs_head
        start = add_mask(bias_tile, offs_m[:, None], offs_n[None, :], mask, window, geometry, WINDOW, MASK)
        # Vectors are not pipelined by the compiler: each is loaded one image ahead.
        last = tl.minimum(first + IMAGES, batch) - 1
        part = part_of(first, number, head, num_windows, num_heads)
        vectors = _load_vectors(vector_ptrs, part, offs_m, offs_n, N, COSINE, APART)
        for image in tl.range(first, last + 1):
            offs_image = tl.cast(image, tl.int64) * stride_qkv_batch
            part = part_of(image, number, head, num_windows, num_heads)
            next_part = part_of(tl.minimum(image + 1, last), number, head, num_windows, num_heads)
            maximum, log_sum, delta, norm = vectors
            vectors = _load_vectors(vector_ptrs, next_part, offs_m, offs_n, N, COSINE, APART)
            query = _load_queries(query_ptr + part * (N * HEAD_DIM), offs_m, offs_d, N, HEAD_DIM)
            k = load_tokens(k_ptr + offs_image, offs_key, tokens_n, offs_d, HEAD_DIM, pad_k_ptr, HAS_PAD)
            v = load_tokens(v_ptr + offs_image, offs_key, tokens_n, offs_d, HEAD_DIM, pad_v_ptr, HAS_PAD)
            image_ptr = grad_out_ptr + tl.cast(image, tl.int64) * stride_out_batch
            grad_out = load_tokens(image_ptr, offs_out, tokens_m, offs_d, HEAD_DIM)
            scores = score_tile(query, k, start, norm[None, :], COSINE, PRECISION)
            p = weights_of(scores, maximum[:, None], log_sum[:, None], LOG2E, APART)
            grad_p = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            if HAS_DROPOUT:
                grad_p *= dropout_factor(Dropout(seed_ptr, dropout), part, offs_m[:, None], offs_n[None, :], N)
            grad_bias += p * (grad_p - delta[:, None])

    offs_bias = (tl.cast(partial, tl.int64) * num_heads + head) * (N * N) + offs_m[:, None] * N + offs_n[None, :]
    tl.store(grad_bias_ptr + offs_bias, grad_bias, mask=(offs_m < N)[:, None] & (offs_n < N)[None, :])
