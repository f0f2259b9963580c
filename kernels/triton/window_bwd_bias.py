"""Gradient of the bias of large windows, after the other two of `window_bwd_large`, whose vectors it reads."""

import triton
import triton.language as tl

from .softmax import (
    LOG2E,
    load_log_sum,
    score_tile,
    weights_of,
)
from .tiles import (
    BIAS_DENSE,
    MASK_TENSOR,
    SIZES,
    Bias,
    Dropout,
    Geometry,
    Mask,
    add_mask,
    bias_column,
    dropout_factor,
    instance_of,
    load_tokens,
    locate_tokens,
    operand_pointers,
    padding_pointers,
    place_window,
    tile_bias,
    token_offsets,
    window_of_row,
)
from .window_bwd_large import (
    load_queries,
    load_vector,
)


@triton.jit
def _load_vectors(ptrs, instance, offs_m, offs_n, N: tl.constexpr, COSINE: tl.constexpr, APART: tl.constexpr):
    """Load softmax and delta of a tile's queries, and for cosine attention inverse norms of its keys."""
    lse_ptr, delta_ptr, key_norm_ptr = ptrs
    maximum, log_sum = load_log_sum(lse_ptr, instance, offs_m, N, APART)
    delta = load_vector(delta_ptr + instance * N, offs_m, N, 0.0)
    norm = tl.zeros(offs_n.shape, tl.float32)
    if COSINE:
        norm = load_vector(key_norm_ptr + instance * N, offs_n, N, 0.0)
    return maximum, log_sum, delta, norm


@triton.jit(do_not_specialize=SIZES)
def _window_attention_bwd_bias_kernel(
    grad_bias_ptr,  # (parts, BIAS_ROWS, heads, N, N), fp32
    grad_out_ptr,  # (batch, depth, height, width, heads, HEAD_DIM)
    lse_ptr,  # (batch, windows, heads, N), with a mask tensor (.., 2, N), fp32: the softmax
    delta_ptr, key_norm_ptr,  # (batch, windows, heads, N), fp32
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
    batch, num_heads,
    depth, height, width, windows_d, windows_h, windows_w, shift_d, shift_h, shift_w, roll_d, roll_h, roll_w,
    scale, mask_value, dropout,
    WINDOW: tl.constexpr, VOLUME: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr, COSINE: tl.constexpr,
    BIAS: tl.constexpr, BIAS_ROWS: tl.constexpr, MASK: tl.constexpr, HAS_PAD: tl.constexpr, ROLL_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, IMAGES: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """Compute dB = Σ dS. One program: a tile of scores and a head, WINDOWS window positions of one bias, up to IMAGES
    images.

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
    positions = num_windows // BIAS_ROWS  # that share a bias
    partial = tl.program_id(2) * tl.cdiv(positions, WINDOWS) * BIAS_ROWS + tl.program_id(1)
    bias_row = tl.program_id(1) % BIAS_ROWS
    start = tl.program_id(1) // BIAS_ROWS * WINDOWS
    first = tl.program_id(2) * IMAGES

    offs_m = tile // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_head = head * stride_qkv_head * HEAD_DIM
    q_ptr, k_ptr, v_ptr = operand_pointers(qkv_ptr, k_ptr, v_ptr, num_heads, HEAD_DIM, PACKED)
    pad_k_ptr, pad_v_ptr, _ = padding_pointers(padding_ptr, q_ptr, head + num_heads, num_heads, HEAD_DIM, HAS_PAD)
    bias = Bias(dense_ptr=dense_ptr, stride_dense=(ROWS * COLS, COLS))
    if KINDS == 1:
        any_window = place_window(window_of_row(start, bias_row, geometry, BIAS_ROWS), geometry, VOLUME)
        column = bias_column(head, any_window, geometry, num_heads, BIAS_ROWS)
        bias_tile = tile_bias(offs_m[:, None], offs_n[None, :], bias, column, N, BIAS)

    grad_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for position in tl.range(start, tl.minimum(start + WINDOWS, positions)):
        number = window_of_row(position, bias_row, geometry, BIAS_ROWS)
        window = place_window(number, geometry, VOLUME)
        tokens_m = locate_tokens(offs_m, window, geometry, WINDOW, ROLL_FIRST)
        tokens_n = locate_tokens(offs_n, window, geometry, WINDOW, ROLL_FIRST)
        offs_out = token_offsets(tokens_m, (stride_out_depth, stride_out_row, stride_out_col))
        offs_out += head * stride_out_head * HEAD_DIM
        offs_key = token_offsets(tokens_n, stride_qkv) + offs_head
        if KINDS == 1:
            attn_bias = bias_tile
        else:
            column = bias_column(head, window, geometry, num_heads, BIAS_ROWS, KINDS)
            attn_bias = tile_bias(offs_m[:, None], offs_n[None, :], bias, column, N, BIAS)
        attn_bias = add_mask(attn_bias, offs_m[:, None], offs_n[None, :], mask, window, geometry, WINDOW, MASK)
        # Vectors are not pipelined by the compiler: each is loaded one image ahead.
        last = tl.minimum(first + IMAGES, batch) - 1
        instance = instance_of(first, number, head, num_windows, num_heads)
        vectors = _load_vectors(vector_ptrs, instance, offs_m, offs_n, N, COSINE, APART)
        for image in tl.range(first, last + 1):
            offs_image = tl.cast(image, tl.int64) * stride_qkv_batch
            instance = instance_of(image, number, head, num_windows, num_heads)
            next_instance = instance_of(tl.minimum(image + 1, last), number, head, num_windows, num_heads)
            maximum, log_sum, delta, norm = vectors
            vectors = _load_vectors(vector_ptrs, next_instance, offs_m, offs_n, N, COSINE, APART)
            query = load_queries(query_ptr + instance * (N * HEAD_DIM), offs_m, offs_d, N, HEAD_DIM)
            k = load_tokens(k_ptr + offs_image, offs_key, tokens_n, offs_d, HEAD_DIM, pad_k_ptr, HAS_PAD)
            v = load_tokens(v_ptr + offs_image, offs_key, tokens_n, offs_d, HEAD_DIM, pad_v_ptr, HAS_PAD)
            image_ptr = grad_out_ptr + tl.cast(image, tl.int64) * stride_out_batch
            grad_out = load_tokens(image_ptr, offs_out, tokens_m, offs_d, HEAD_DIM)
            scores = score_tile(query, k, attn_bias, norm[None, :], COSINE, PRECISION)
            p = weights_of(scores, maximum[:, None], log_sum[:, None], LOG2E, APART)
            grad_p = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            if HAS_DROPOUT:
                grad_p *= dropout_factor(Dropout(seed_ptr, dropout), instance, offs_m[:, None], offs_n[None, :], N)
            grad_bias += p * (grad_p - delta[:, None])

    offs_bias = (tl.cast(partial, tl.int64) * num_heads + head) * (N * N) + offs_m[:, None] * N + offs_n[None, :]
    tl.store(grad_bias_ptr + offs_bias, grad_bias, mask=(offs_m < N)[:, None] & (offs_n < N)[None, :])
