"""Forward of shifted-window attention for large windows; `window_fwd` has the formulas.

A window's keys are walked in tiles with the usual online softmax (Dao et al. 2022, arXiv:2205.14135), two images at a
time. Cosine scores need no running maximum: they lie below their scale plus the largest bias, and weights below that
bound are as exact, if only they are not so small that they are lost, which is looked at when all of them are summed up.
"""

import triton
import triton.language as tl

from .softmax import LOG2E, are_enough, bound_of, bounded_scale, store_log_sum
from .tiles import (
    BIAS_DENSE,
    BIAS_FACTORS,
    BIAS_TABLE,
    MASK_NONE,
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
    instance_of,
    inverse_norm,
    is_divided,
    load_tokens,
    locate_tokens,
    operand_pointers,
    padding_pointers,
    place_window,
    scaled_query,
    store_tokens,
    tile_bias,
    token_offsets,
)
from .window_fwd import scores_of

STALE_FACTORS = tl.constexpr(3)  # beside the three masks, a variant of the walk


@triton.jit
def _attend(
    state,  # output (BLOCK_M, BLOCK_D), and of each query the sum of weights and the largest score (BLOCK_M,); fp32
    scores,  # (BLOCK_M, BLOCK_N)
    v,  # (BLOCK_N, BLOCK_D)
    dropout, instance, offs_m, offs_n,
    N: tl.constexpr, MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run one step of the online softmax: attention to one more tile of keys.

    m' = max(m, max S)        P = exp(S − m')        Σ' = Σ exp(m − m') + Σ P        O' = O exp(m − m') + P v
    """
    acc, total, maximum = state
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))  # NaN is left to the weights
    if MASK == MASK_TENSOR:  # its numbers may be so large that what a multiply-add does not round is more than a score
        p = tl.exp2((scores - new_maximum[:, None]) * LOG2E)
    else:
        p = tl.exp2(scores * LOG2E - (new_maximum * LOG2E)[:, None])
    correction = tl.exp2((maximum - new_maximum) * LOG2E)
    state = acc * correction[:, None], total * correction, new_maximum
    return _gather(state, p, v, dropout, instance, offs_m, offs_n, N, HAS_DROPOUT, PRECISION)


@triton.jit
def _gather(
    state,
    p,  # (BLOCK_M, BLOCK_N), weights
    v,
    dropout, instance, offs_m, offs_n,
    N: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of weights to the state: Σ' = Σ + Σ P, O' = O + P v."""
    acc, total, maximum = state
    total += tl.sum(p, axis=1)
    if HAS_DROPOUT:
        p *= dropout_factor(dropout, instance, offs_m[:, None], offs_n[None, :], N)
    return tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION), total, maximum


@triton.jit
def _weights_below(products, k, below):
    """Return exp(S − bound) of cosine scores S = products / ‖k‖ + bias, given (bias − bound) in log2 units."""
    return tl.exp2(products * (inverse_norm(k) * LOG2E)[None, :] + below)


@triton.jit
def _load_factor(ptr, offs, head, N: tl.constexpr, RANK: tl.constexpr):
    """Load a tile (tokens, RANK) of one head's factor of the bias (heads, N, RANK)."""
    offs_factor = (head * N + offs[:, None]) * RANK + tl.arange(0, RANK)[None, :]
    return tl.load(ptr + offs_factor, mask=(offs < N)[:, None], other=0.0)


@triton.jit
def _walk_keys(
    q, next_q,  # (BLOCK_M, BLOCK_D), scaled, of this image and the next
    bound,  # (BLOCK_M,), what the scores lie below, if BOUNDED, which takes the place of their maximum
    k_ptr, v_ptr,  # of this image and head
    pad_k_ptr, pad_v_ptr,
    stride_next,  # to the next image
    stride_qkv,  # depth, row, column
    offs_m, column, window, instance, next_instance, geometry, bias, factors, mask, dropout,
    WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, COSINE: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    HAS_PAD: tl.constexpr, ROLL_FIRST: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, IMAGES: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Attend from a tile of queries to all keys of their window, in one or two images.

    Two images share bias, mask and addresses, and give the scheduler two chains that do not wait for each other.

    Returns:
        For each image what `_finished` gives: (BLOCK_M, BLOCK_D), and (BLOCK_M,) twice; all fp32.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    offs_d = tl.arange(0, BLOCK_D)
    if BIAS == BIAS_FACTORS:
        q_factor = _load_factor(factors[0], offs_m, column, N, RANK)

    # The maximum is finite at the start: a mask may rule out a whole tile with -inf, but must not make it NaN.
    maximum = tl.full((BLOCK_M,), -1e38, tl.float32)
    if BOUNDED:
        maximum = bound
    state = tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M,), tl.float32), maximum
    next_state = state
    for first in tl.range(0, N, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        tokens = locate_tokens(offs_n, window, geometry, WINDOW, ROLL_FIRST)
        offs_token = token_offsets(tokens, stride_qkv)
        attn_bias = tile_bias(offs_m[:, None], offs_n[None, :], bias, column, N, BIAS)
        if BIAS == BIAS_FACTORS:
            k_factor = _load_factor(factors[1], offs_n, column, N, RANK)
            attn_bias = tl.dot(q_factor, tl.trans(k_factor), attn_bias, input_precision=PRECISION)
        attn_bias = add_mask(attn_bias, offs_m[:, None], offs_n[None, :], mask, window, geometry, WINDOW, MASK)
        k = load_tokens(k_ptr, offs_token, tokens, offs_d, HEAD_DIM, pad_k_ptr, HAS_PAD)
        v = load_tokens(v_ptr, offs_token, tokens, offs_d, HEAD_DIM, pad_v_ptr, HAS_PAD)
        if IMAGES == 2:
            next_k = load_tokens(k_ptr + stride_next, offs_token, tokens, offs_d, HEAD_DIM, pad_k_ptr, HAS_PAD)
            next_v = load_tokens(v_ptr + stride_next, offs_token, tokens, offs_d, HEAD_DIM, pad_v_ptr, HAS_PAD)
        # Products of both images come before weights of the first, so that the two do not wait for each other.
        if BOUNDED:
            below = attn_bias * LOG2E - (bound * LOG2E)[:, None]
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if IMAGES == 2:
                next_products = tl.dot(next_q, tl.trans(next_k), input_precision=PRECISION)
            p = _weights_below(products, k, below)
            if IMAGES == 2:
                next_p = _weights_below(next_products, next_k, below)
            state = _gather(state, p, v, dropout, instance, offs_m, offs_n, N, HAS_DROPOUT, PRECISION)
            if IMAGES == 2:
                next_state = _gather(
                    next_state, next_p, next_v, dropout, next_instance, offs_m, offs_n, N, HAS_DROPOUT, PRECISION
                )  # fmt: skip
        else:
            scores = scores_of(q, k, attn_bias, COSINE, PRECISION)
            if IMAGES == 2:
                next_scores = scores_of(next_q, next_k, attn_bias, COSINE, PRECISION)
            state = _attend(state, scores, v, dropout, instance, offs_m, offs_n, N, MASK, HAS_DROPOUT, PRECISION)
            if IMAGES == 2:
                next_state = _attend(
                    next_state, next_scores, next_v, dropout, next_instance, offs_m, offs_n, N, MASK, HAS_DROPOUT,
                    PRECISION,
                )  # fmt: skip
    return _finished(state), _finished(next_state)


@triton.jit
def _largest_bias(ptr, column, offs_m, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """Load the largest bias of each query, its mask included."""
    ptr += column * (PARTS * ROWS) + offs_m
    largest = tl.load(ptr)
    for PART in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, tl.load(ptr + PART * ROWS))
    return largest


@triton.jit
def _finished(state):
    """Return the output, and of the softmax the largest scores and log2 of the sum of weights."""
    acc, total, maximum = state
    return acc * (1.0 / total)[:, None], maximum, tl.log2(total)


@triton.jit(do_not_specialize=SIZES)
def _window_attention_fwd_kernel(
    out_ptr,  # (batch, depth, height, width, heads, HEAD_DIM)
    qkv_ptr,  # (batch, depth, height, width, 3, heads, HEAD_DIM); without PACKED q alone, and k and v have its strides
    k_ptr, v_ptr,
    padding_ptr,  # (3 * heads * HEAD_DIM,): q, k and v of a padding token
    table_ptr, index_ptr,  # (T, BIAS_ROWS * heads) and (N, N), int64
    mask_ptr,  # (windows, N, N)
    mask_differs_ptr,  # (windows, CHECKS), nonzero where a window's mask is not the one that its shift implies
    logit_scale_ptr,  # (heads,)
    dense_ptr,  # (BIAS_ROWS * KINDS * heads, ROWS, COLS)
    largest_ptr,  # (BIAS_ROWS * KINDS * heads, PARTS, ROWS), fp32: the largest of each part of a row of it
    q_factor_ptr, k_factor_ptr,  # (heads, N, RANK)
    factors_stale_ptr,  # (1,), nonzero where the factors no longer belong to the table
    seed_ptr,  # (1,), int64, of attention dropout
    lse_ptr,  # (batch, windows, heads, N), with a mask tensor (.., 2, N), fp32: the softmax, for the backward
    stride_qkv_batch, stride_qkv_depth, stride_qkv_row, stride_qkv_col, stride_qkv_head,
    stride_out_batch, stride_out_depth, stride_out_row, stride_out_col, stride_out_head,
    stride_table_row, stride_table_head, num_rows,
    batch, num_heads,
    depth, height, width, windows_d, windows_h, windows_w, shift_d, shift_h, shift_w, roll_d, roll_h, roll_w,
    scale, mask_value, dropout,
    WINDOW: tl.constexpr, VOLUME: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr, COSINE: tl.constexpr,
    BIAS: tl.constexpr, BIAS_ROWS: tl.constexpr, MASK: tl.constexpr, HAS_PAD: tl.constexpr, ROLL_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_LSE: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr,
    CHECKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, KINDS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, IMAGES: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Attend from BLOCK_M queries of one window and head, in one image or two.

    The queries stay, and so does what `_attend` gathers for them; tiles of BLOCK_N keys pass by. What differs between
    windows (whether a mask applies, and which; whether factors are fresh) is decided here, once, so that the walk over
    the keys of most windows has nothing to decide.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    tl.static_assert(HEAD_DIM <= BLOCK_D)
    tl.static_assert(VOLUME or WINDOW[0] == 1)
    tl.static_assert(BIAS != BIAS_TABLE)  # but for stale factors' sake
    tl.static_assert(IMAGES == 1 or IMAGES == 2)
    tl.static_assert(not BOUNDED or (COSINE and MASK == MASK_NONE and not HAS_DROPOUT))
    tl.static_assert(ROWS >= N and ROWS % BLOCK_M == 0 and COLS >= N and COLS % BLOCK_N == 0)  # tiles of it are whole
    geometry = Geometry(
        (depth, height, width), (windows_d, windows_h, windows_w), (shift_d, shift_h, shift_w), (roll_d, roll_h, roll_w)
    )
    stride_qkv = (stride_qkv_depth, stride_qkv_row, stride_qkv_col)
    pid = tl.program_id(0).to(tl.int64)
    tile = (pid % TILES).to(tl.int32)
    head = ((pid // TILES) % num_heads).to(tl.int32)
    num_windows = windows_d * windows_h * windows_w
    number = ((pid // TILES // num_heads) % num_windows).to(tl.int32)
    image = pid // TILES // num_heads // num_windows * IMAGES
    next_image = tl.minimum(image + IMAGES - 1, batch - 1)  # the same once more where the batch is odd
    window = place_window(number, geometry, VOLUME)

    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    tokens = locate_tokens(offs_m, window, geometry, WINDOW, ROLL_FIRST)
    offs_image = image * stride_qkv_batch + head * stride_qkv_head * HEAD_DIM
    offs_token = token_offsets(tokens, stride_qkv)
    q_ptr, k_ptr, v_ptr = operand_pointers(qkv_ptr, k_ptr, v_ptr, num_heads, HEAD_DIM, PACKED)
    pad_q_ptr, pad_k_ptr, pad_v_ptr = padding_pointers(padding_ptr, q_ptr, head, num_heads, HEAD_DIM, HAS_PAD)
    if COSINE:
        scale = cosine_scale(logit_scale_ptr, head)
    q = load_tokens(q_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_q_ptr, HAS_PAD)
    q = scaled_query(q, scale, COSINE)
    stride_next = (next_image - image) * stride_qkv_batch
    next_q = q
    if IMAGES == 2:
        next_q = load_tokens(
            q_ptr + offs_image + stride_next, offs_token, tokens, offs_d, HEAD_DIM, pad_q_ptr, HAS_PAD
        )  # fmt: skip
        next_q = scaled_query(next_q, scale, COSINE)

    # The variant of this window: its mask (MASK_NONE, MASK_REGIONS, MASK_TENSOR), or STALE_FACTORS.
    variant = 0
    if MASK != MASK_NONE:
        variant = is_divided(window, geometry, WINDOW).to(tl.int32)
    if MASK == MASK_TENSOR:
        differs = tl.max(tl.load(mask_differs_ptr + number * CHECKS + tl.arange(0, CHECKS)), axis=0)
        variant = tl.where(differs != 0, 2, variant)
    if BIAS == BIAS_FACTORS:
        variant = tl.where(tl.load(factors_stale_ptr) != 0, STALE_FACTORS, variant)

    bias = Bias(
        table_ptr, index_ptr, num_rows, (stride_table_row, stride_table_head),
        dense_ptr, (ROWS * COLS, COLS),
    )  # fmt: skip
    instance = instance_of(image, number, head, num_windows, num_heads)
    next_instance = instance_of(next_image, number, head, num_windows, num_heads)
    column = bias_column(head, window, geometry, num_heads, BIAS_ROWS, KINDS)
    rows = tl.zeros((BLOCK_M,), tl.float32)
    found = tl.zeros((BLOCK_M, BLOCK_D), tl.float32), rows, rows
    next_found = found
    if BOUNDED:
        bound = rows
        if BIAS == BIAS_DENSE:
            bound = _largest_bias(largest_ptr, column, offs_m, PARTS, ROWS)
        bound = bound_of(scale, bound, q.dtype)
        if scale <= bounded_scale(q.dtype):
            found, next_found = _walk_keys(
                q, next_q, bound, k_ptr + offs_image, v_ptr + offs_image, pad_k_ptr, pad_v_ptr, stride_next, stride_qkv,
                offs_m, column, window, instance, next_instance, geometry, bias, (q_factor_ptr, k_factor_ptr),
                Mask(mask_ptr, mask_value), Dropout(seed_ptr, dropout), WINDOW, HEAD_DIM, COSINE, BIAS, MASK_NONE,
                HAS_PAD, ROLL_FIRST, HAS_DROPOUT, PRECISION, RANK, BLOCK_M, BLOCK_N, BLOCK_D, IMAGES, True,
            )  # fmt: skip
            enough = are_enough(found[0], found[2], offs_m, N, q.dtype)
            if IMAGES == 2:
                enough = enough & are_enough(next_found[0], next_found[2], offs_m, N, q.dtype)
            variant = tl.where(enough, -1, variant)  # else all is done anew, by the running maximum
    for VARIANT in tl.static_range(4):
        if VARIANT <= MASK or (VARIANT == STALE_FACTORS and BIAS == BIAS_FACTORS):
            if variant == VARIANT:
                found, next_found = _walk_keys(
                    q, next_q, rows, k_ptr + offs_image, v_ptr + offs_image, pad_k_ptr, pad_v_ptr, stride_next,
                    stride_qkv, offs_m, column, window, instance, next_instance, geometry, bias,
                    (q_factor_ptr, k_factor_ptr), Mask(mask_ptr, mask_value), Dropout(seed_ptr, dropout), WINDOW,
                    HEAD_DIM, COSINE, BIAS_TABLE if VARIANT == STALE_FACTORS else BIAS,
                    MASK if VARIANT == STALE_FACTORS else VARIANT, HAS_PAD, ROLL_FIRST, HAS_DROPOUT, PRECISION, RANK,
                    BLOCK_M, BLOCK_N, BLOCK_D, IMAGES, False,
                )  # fmt: skip

    offs_out = token_offsets(tokens, (stride_out_depth, stride_out_row, stride_out_col))
    offs_out += head * stride_out_head * HEAD_DIM
    for NUMBER in tl.static_range(IMAGES):
        out, maximum, log_total = found if NUMBER == 0 else next_found
        one, its_instance = (image, instance) if NUMBER == 0 else (next_image, next_instance)
        if HAS_LSE:
            store_log_sum(lse_ptr, its_instance, offs_m, N, maximum, log_total, LOG2E, MASK == MASK_TENSOR)
        store_tokens(out_ptr + one * stride_out_batch, out, offs_out, tokens, offs_d, HEAD_DIM)
