"""Forward of shifted-window attention on the image layout.

Both kernels compute, for every window and head,

    softmax(q kᵀ · scale + B + mask) v            (Liu et al. 2021, arXiv:2103.14030, eq. 4)
    softmax(cos(q, k) · τ + B + mask) v           (Liu et al. 2022, arXiv:2111.09883, eq. 2)

and differ in what they keep: a small window's scores fit one tile, so a program handles one window position of
several images with bias and mask loaded once; a large window is walked in tiles of keys with the usual online
softmax (Dao et al. 2022, arXiv:2205.14135), two images at a time.
"""

import triton
import triton.language as tl

from .tiles import (
    BIAS_FACTORS,
    BIAS_TABLE,
    LOG2E,
    MASK_NONE,
    MASK_TENSOR,
    add_mask,
    cosine_scale,
    dropout_factor,
    inverse_norm,
    is_divided,
    load_tokens,
    locate_tokens,
    place_window,
    scaled_query,
    tile_bias,
    token_offsets,
)

STALE_FACTORS = tl.constexpr(3)  # beside the three masks, a kind of window


@triton.jit
def _scores(q, k, start, COSINE: tl.constexpr, PRECISION: tl.constexpr):
    """q kᵀ on top of `start`; cosine scores are divided by the norms of k here, so that k stays in shared memory."""
    if COSINE:
        return tl.dot(q, tl.trans(k), input_precision=PRECISION) * inverse_norm(k)[None, :] + start
    return tl.dot(q, tl.trans(k), start, input_precision=PRECISION)


@triton.jit
def _window_attention_fwd_small_kernel(
    out_ptr,  # (batch, depth, height, width, heads, HEAD_DIM)
    qkv_ptr,  # (batch, depth, height, width, 3, heads, HEAD_DIM); without PACKED q alone, and k and v have its strides
    k_ptr,
    v_ptr,
    padding_ptr,  # (3 * heads * HEAD_DIM,): q, k and v of a padding token
    table_ptr,  # (T, heads)
    index_ptr,  # (N, N), int64
    mask_ptr,  # (windows, N, N)
    logit_scale_ptr,  # (heads,)
    seed_ptr,  # (1,), int64, of attention dropout
    stride_qkv_batch,
    stride_qkv_depth,
    stride_qkv_row,
    stride_qkv_col,
    stride_qkv_head,
    stride_out_batch,
    stride_out_depth,
    stride_out_row,
    stride_out_col,
    stride_out_head,
    stride_table_row,
    stride_table_head,
    batch,
    num_heads,
    depth,
    height,
    width,
    windows_d,
    windows_h,
    windows_w,
    shift_d,
    shift_h,
    shift_w,
    roll_d,
    roll_h,
    roll_w,
    scale,
    mask_value,
    dropout,
    WINDOW: tl.constexpr,
    VOLUME: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PACKED: tl.constexpr,
    COSINE: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    HAS_PAD: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """One program: one window position and head of up to IMAGES images."""
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    size, windows = (depth, height, width), (windows_d, windows_h, windows_w)
    shift, roll = (shift_d, shift_h, shift_w), (roll_d, roll_h, roll_w)
    stride_qkv = (stride_qkv_depth, stride_qkv_row, stride_qkv_col)
    stride_out = (stride_out_depth, stride_out_row, stride_out_col)
    tl.static_assert(N <= BLOCK_N)
    tl.static_assert(HEAD_DIM <= BLOCK_D)
    pid = tl.program_id(0)
    head = pid % num_heads  # fastest: neighbouring heads share cache lines of the image
    window = pid // num_heads
    num_windows = windows_d * windows_h * windows_w
    place = place_window(window, windows, VOLUME)

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    token, real = locate_tokens(offs_n, place, size, windows, roll, WINDOW, ROLL_FIRST)
    padding = (offs_n < N) & (real == 0)
    offs_token = token_offsets(token, stride_qkv) + head * stride_qkv_head * HEAD_DIM
    offs_out = token_offsets(token, stride_out) + head * stride_out_head * HEAD_DIM

    # Bias and mask, the start value of the score product, are the same for all images.
    start = tile_bias(
        offs_n[:, None], offs_n[None, :], table_ptr, index_ptr, table_ptr, stride_table_row, stride_table_head, 0, 0,
        head, N, BIAS,
    )  # fmt: skip
    start = add_mask(
        start, offs_n[:, None], offs_n[None, :], mask_ptr, window, place, windows, shift, mask_value, WINDOW, MASK,
    )  # fmt: skip

    if PACKED:
        k_ptr = qkv_ptr + num_heads * HEAD_DIM
        v_ptr = qkv_ptr + 2 * num_heads * HEAD_DIM
    if COSINE:
        scale = cosine_scale(logit_scale_ptr, head)
    if not HAS_PAD:
        padding_ptr = qkv_ptr  # never read
    pad_q_ptr = padding_ptr + head * HEAD_DIM
    pad_k_ptr = pad_q_ptr + num_heads * HEAD_DIM
    pad_v_ptr = pad_k_ptr + num_heads * HEAD_DIM
    first = tl.program_id(1) * IMAGES
    for image in tl.range(first, tl.minimum(first + IMAGES, batch)):
        offs_image = tl.cast(image, tl.int64) * stride_qkv_batch
        q = load_tokens(qkv_ptr + offs_image, offs_token, real, padding, pad_q_ptr, offs_d, HEAD_DIM, HAS_PAD)
        k = load_tokens(k_ptr + offs_image, offs_token, real, padding, pad_k_ptr, offs_d, HEAD_DIM, HAS_PAD)
        v = load_tokens(v_ptr + offs_image, offs_token, real, padding, pad_v_ptr, offs_d, HEAD_DIM, HAS_PAD)
        scores = _scores(scaled_query(q, scale, COSINE), k, start, COSINE, PRECISION)
        p = tl.exp2((scores - tl.max(scores, axis=1)[:, None]) * LOG2E)
        total = tl.sum(p, axis=1)
        if HAS_DROPOUT:
            part = (tl.cast(image, tl.int64) * num_windows + window) * num_heads + head
            p *= dropout_factor(seed_ptr, dropout, part, offs_n[:, None], offs_n[None, :], N)
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * (1.0 / total)[:, None]
        tl.store(
            out_ptr + tl.cast(image, tl.int64) * stride_out_batch + (offs_out[:, None] + offs_d[None, :]),
            out.to(out_ptr.dtype.element_ty),
            mask=real[:, None] & (offs_d < HEAD_DIM)[None, :],
        )


@triton.jit
def _attend(
    acc,  # (BLOCK_M, BLOCK_D), fp32
    total,  # (BLOCK_M,)
    maximum,  # (BLOCK_M,)
    q,  # (BLOCK_M, BLOCK_D), scaled
    k,  # (BLOCK_N, BLOCK_D)
    v,
    start,  # (BLOCK_M, BLOCK_N), bias and mask
    seed_ptr,
    dropout,
    part,
    offs_m,
    offs_n,
    N: tl.constexpr,
    COSINE: tl.constexpr,
    MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax: attention to one more tile of keys."""
    scores = _scores(q, k, start, COSINE, PRECISION)
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    if MASK == MASK_TENSOR:  # its numbers may be so large that what a multiply-add does not round is more than a score
        p = tl.exp2((scores - new_maximum[:, None]) * LOG2E)
    else:
        p = tl.exp2(scores * LOG2E - (new_maximum * LOG2E)[:, None])
    correction = tl.exp2((maximum - new_maximum) * LOG2E)
    total = total * correction + tl.sum(p, axis=1)
    if HAS_DROPOUT:
        p *= dropout_factor(seed_ptr, dropout, part, offs_m[:, None], offs_n[None, :], N)
    acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
    return acc, total, new_maximum


@triton.jit
def _walk_keys(
    q,  # (BLOCK_M, BLOCK_D), scaled
    next_q,  # of the next image
    k_ptr,  # of this image and head
    v_ptr,
    stride_next,  # to the next image
    pad_k_ptr,
    pad_v_ptr,
    table_ptr,
    index_ptr,
    mask_ptr,
    dense_ptr,
    q_factor_ptr,
    k_factor_ptr,
    seed_ptr,
    stride_qkv,
    stride_table_row,
    stride_table_head,
    stride_dense_head,
    stride_dense_row,
    offs_m,
    head,
    window,
    place,
    part,
    next_part,
    size,
    windows,
    shift,
    roll,
    mask_value,
    dropout,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COSINE: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    HAS_PAD: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """Attention of a tile of queries to all keys of their window, in one or two images.

    Two images share bias, mask and addresses, and give the scheduler two chains that do not wait for each other.

    Returns:
        For each image (BLOCK_M, BLOCK_D) and the scores' log-sum-exp (BLOCK_M,), log2 units; all fp32.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    offs_d = tl.arange(0, BLOCK_D)
    if BIAS == BIAS_FACTORS:
        offs_r = tl.arange(0, RANK)
        offs_factor = (head * N + offs_m[:, None]) * RANK + offs_r[None, :]
        q_factor = tl.load(q_factor_ptr + offs_factor, mask=(offs_m < N)[:, None], other=0.0)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Finite at the start: a caller's mask may rule out a whole tile with -inf, but must not make it NaN.
    maximum = tl.full((BLOCK_M,), -1e38, tl.float32)
    next_acc, next_total, next_maximum = acc, total, maximum
    for first in tl.range(0, N, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        token, real = locate_tokens(offs_n, place, size, windows, roll, WINDOW, ROLL_FIRST)
        padding = (offs_n < N) & (real == 0)
        offs_token = token_offsets(token, stride_qkv)
        start = tile_bias(
            offs_m[:, None], offs_n[None, :], table_ptr, index_ptr, dense_ptr, stride_table_row, stride_table_head,
            stride_dense_head, stride_dense_row, head, N, BIAS,
        )  # fmt: skip
        if BIAS == BIAS_FACTORS:
            offs_factor_n = (head * N + offs_n[:, None]) * RANK + offs_r[None, :]
            k_factor = tl.load(k_factor_ptr + offs_factor_n, mask=(offs_n < N)[:, None], other=0.0)
            start = tl.dot(q_factor, tl.trans(k_factor), start, input_precision=PRECISION)
        start = add_mask(
            start, offs_m[:, None], offs_n[None, :], mask_ptr, window, place, windows, shift, mask_value, WINDOW, MASK,
        )  # fmt: skip

        k = load_tokens(k_ptr, offs_token, real, padding, pad_k_ptr, offs_d, HEAD_DIM, HAS_PAD)
        v = load_tokens(v_ptr, offs_token, real, padding, pad_v_ptr, offs_d, HEAD_DIM, HAS_PAD)
        acc, total, maximum = _attend(
            acc, total, maximum, q, k, v, start, seed_ptr, dropout, part, offs_m, offs_n, N, COSINE, MASK,
            HAS_DROPOUT, PRECISION,
        )  # fmt: skip
        if IMAGES == 2:
            k = load_tokens(k_ptr + stride_next, offs_token, real, padding, pad_k_ptr, offs_d, HEAD_DIM, HAS_PAD)
            v = load_tokens(v_ptr + stride_next, offs_token, real, padding, pad_v_ptr, offs_d, HEAD_DIM, HAS_PAD)
            next_acc, next_total, next_maximum = _attend(
                next_acc, next_total, next_maximum, next_q, k, v, start, seed_ptr, dropout, next_part, offs_m, offs_n,
                N, COSINE, MASK, HAS_DROPOUT, PRECISION,
            )  # fmt: skip
    lse = maximum * LOG2E + tl.log2(total)
    next_lse = next_maximum * LOG2E + tl.log2(next_total)
    return acc * (1.0 / total)[:, None], lse, next_acc * (1.0 / next_total)[:, None], next_lse


@triton.jit
def _store_attention(
    out_ptr, lse_ptr, out, lse, offs_out, offs_m, real, offs_d, N: tl.constexpr, HEAD_DIM: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    if HAS_LSE:
        # Infinite where the query is padding: the backward takes its weights for zero.
        tl.store(lse_ptr + offs_m, tl.where(real, lse, float("inf")), mask=offs_m < N)
    tl.store(
        out_ptr + (offs_out[:, None] + offs_d[None, :]),
        out.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & (offs_d < HEAD_DIM)[None, :],
    )


@triton.jit
def _window_attention_fwd_kernel(
    out_ptr,  # (batch, depth, height, width, heads, HEAD_DIM)
    qkv_ptr,  # (batch, depth, height, width, 3, heads, HEAD_DIM); without PACKED q alone, and k and v have its strides
    k_ptr,
    v_ptr,
    padding_ptr,  # (3 * heads * HEAD_DIM,): q, k and v of a padding token
    table_ptr,  # (T, heads)
    index_ptr,  # (N, N), int64
    mask_ptr,  # (windows, N, N)
    unusual_ptr,  # (windows, CHECKS), nonzero where a window's mask is not the one that its shift implies
    logit_scale_ptr,  # (heads,)
    dense_ptr,  # (heads, rows, cols)
    q_factor_ptr,  # (heads, N, RANK)
    k_factor_ptr,  # (heads, N, RANK)
    stale_ptr,  # (1,), nonzero where the factors no longer belong to the table
    seed_ptr,  # (1,), int64, of attention dropout
    lse_ptr,  # (batch, windows, heads, N), fp32: log-sum-exp of the scores, for the backward
    stride_qkv_batch,
    stride_qkv_depth,
    stride_qkv_row,
    stride_qkv_col,
    stride_qkv_head,
    stride_out_batch,
    stride_out_depth,
    stride_out_row,
    stride_out_col,
    stride_out_head,
    stride_table_row,
    stride_table_head,
    stride_dense_head,
    stride_dense_row,
    batch,
    num_heads,
    depth,
    height,
    width,
    windows_d,
    windows_h,
    windows_w,
    shift_d,
    shift_h,
    shift_w,
    roll_d,
    roll_h,
    roll_w,
    scale,
    mask_value,
    dropout,
    WINDOW: tl.constexpr,
    VOLUME: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PACKED: tl.constexpr,
    COSINE: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    HAS_PAD: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    CHECKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """One program: BLOCK_M queries of one window and head, in one image or two.

    What differs between windows (whether a mask applies, and which; whether factors are fresh) is decided here, once,
    so that the walk over the keys of most windows has nothing to decide.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    size, windows = (depth, height, width), (windows_d, windows_h, windows_w)
    shift, roll = (shift_d, shift_h, shift_w), (roll_d, roll_h, roll_w)
    stride_qkv = (stride_qkv_depth, stride_qkv_row, stride_qkv_col)
    stride_out = (stride_out_depth, stride_out_row, stride_out_col)
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    tl.static_assert(HEAD_DIM <= BLOCK_D)
    pid = tl.program_id(0).to(tl.int64)
    tile = (pid % TILES).to(tl.int32)
    head = ((pid // TILES) % num_heads).to(tl.int32)
    num_windows = windows_d * windows_h * windows_w
    window = ((pid // TILES // num_heads) % num_windows).to(tl.int32)
    image = pid // TILES // num_heads // num_windows * IMAGES
    next_image = tl.minimum(image + IMAGES - 1, batch - 1)  # the same once more where the batch is odd
    place = place_window(window, windows, VOLUME)

    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    token, real = locate_tokens(offs_m, place, size, windows, roll, WINDOW, ROLL_FIRST)
    padding = (offs_m < N) & (real == 0)
    offs_image = image * stride_qkv_batch + head * stride_qkv_head * HEAD_DIM
    offs_token = token_offsets(token, stride_qkv)
    if PACKED:
        k_ptr = qkv_ptr + num_heads * HEAD_DIM
        v_ptr = qkv_ptr + 2 * num_heads * HEAD_DIM
    if not HAS_PAD:
        padding_ptr = qkv_ptr  # never read
    pad_q_ptr = padding_ptr + head * HEAD_DIM
    pad_k_ptr = pad_q_ptr + num_heads * HEAD_DIM
    pad_v_ptr = pad_k_ptr + num_heads * HEAD_DIM
    if COSINE:
        scale = cosine_scale(logit_scale_ptr, head)
    q = load_tokens(qkv_ptr + offs_image, offs_token, real, padding, pad_q_ptr, offs_d, HEAD_DIM, HAS_PAD)
    q = scaled_query(q, scale, COSINE)
    stride_next = (next_image - image) * stride_qkv_batch
    next_q = q
    if IMAGES == 2:
        next_q = load_tokens(
            qkv_ptr + offs_image + stride_next, offs_token, real, padding, pad_q_ptr, offs_d, HEAD_DIM, HAS_PAD
        )
        next_q = scaled_query(next_q, scale, COSINE)

    # The kind of this window: its mask (MASK_NONE, MASK_REGIONS, MASK_TENSOR), or STALE_FACTORS.
    kind = 0
    if MASK != MASK_NONE:
        kind = is_divided(place, windows, shift, WINDOW).to(tl.int32)
    if MASK == MASK_TENSOR:
        unusual = tl.max(tl.load(unusual_ptr + window * CHECKS + tl.arange(0, CHECKS)), axis=0)
        kind = tl.where(unusual != 0, 2, kind)
    if BIAS == BIAS_FACTORS:
        kind = tl.where(tl.load(stale_ptr) != 0, STALE_FACTORS, kind)

    part = (image * num_windows + window) * num_heads + head
    next_part = (next_image * num_windows + window) * num_heads + head
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    lse = tl.zeros((BLOCK_M,), tl.float32)
    next_out, next_lse = out, lse
    for KIND in tl.static_range(4):
        if KIND <= MASK or (KIND == STALE_FACTORS and BIAS == BIAS_FACTORS):
            if kind == KIND:
                out, lse, next_out, next_lse = _walk_keys(
                    q, next_q, k_ptr + offs_image, v_ptr + offs_image, stride_next, pad_k_ptr, pad_v_ptr, table_ptr,
                    index_ptr, mask_ptr, dense_ptr, q_factor_ptr, k_factor_ptr, seed_ptr, stride_qkv,
                    stride_table_row, stride_table_head, stride_dense_head, stride_dense_row, offs_m, head, window,
                    place, part, next_part, size, windows, shift, roll, mask_value, dropout, WINDOW, HEAD_DIM, COSINE,
                    BIAS_TABLE if KIND == STALE_FACTORS else BIAS, MASK if KIND == STALE_FACTORS else KIND,
                    HAS_PAD, ROLL_FIRST, HAS_DROPOUT, PRECISION, RANK, BLOCK_M, BLOCK_N, BLOCK_D, IMAGES,
                )  # fmt: skip

    if not HAS_LSE:
        lse_ptr = out_ptr  # never written
    offs_out = token_offsets(token, stride_out) + head * stride_out_head * HEAD_DIM
    _store_attention(
        out_ptr + image * stride_out_batch, lse_ptr + part * N, out, lse, offs_out, offs_m, real, offs_d, N, HEAD_DIM,
        HAS_LSE,
    )  # fmt: skip
    if IMAGES == 2:
        _store_attention(
            out_ptr + next_image * stride_out_batch, lse_ptr + next_part * N, next_out, next_lse, offs_out, offs_m,
            real, offs_d, N, HEAD_DIM, HAS_LSE,
        )  # fmt: skip
