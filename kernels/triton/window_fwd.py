"""Forward of shifted-window attention on the image layout.

Both kernels, this one and that of `window_fwd_large`, compute, for every window and head,

    softmax(q kᵀ · scale + B + mask) v            (Liu et al. 2021, arXiv:2103.14030, eq. 4)
    softmax(cos(q, k) · τ + B + mask) v           (Liu et al. 2022, arXiv:2111.09883, eq. 2)

and differ in what they keep: a small window's scores fit one tile, so a program handles one window position of
several images with bias and mask loaded once; a large window is walked in tiles of keys.
"""

import triton
import triton.language as tl

from .dependent import wait_for_inputs
from .softmax import LOG2E, score_tile
from .tiles import (
    BIAS_NONE,
    BIAS_TABLE,
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


@triton.jit
def scores_of(q, k, attn_bias, COSINE: tl.constexpr, PRECISION: tl.constexpr):
    norms = 0.0  # not used
    if COSINE:
        norms = inverse_norm(k)[None, :]
    return score_tile(q, k, attn_bias, norms, COSINE, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def _window_attention_fwd_small_kernel(
    out_ptr,  # (batch, depth, height, width, heads, HEAD_DIM)
    qkv_ptr,  # (batch, depth, height, width, 3, heads, HEAD_DIM); without PACKED q alone, and k and v have its strides
    k_ptr, v_ptr,
    padding_ptr,  # (3 * heads * HEAD_DIM,): q, k and v of a padding token
    table_ptr, index_ptr,  # (T, BIAS_ROWS * heads) and (N, N), int64
    mask_ptr,  # (windows, N, N)
    logit_scale_ptr,  # (heads,)
    seed_ptr,  # (1,), int64, of attention dropout
    stride_qkv_batch, stride_qkv_depth, stride_qkv_row, stride_qkv_col, stride_qkv_head,
    stride_out_batch, stride_out_depth, stride_out_row, stride_out_col, stride_out_head,
    stride_table_row, stride_table_head, num_rows,
    batch, num_heads,
    depth, height, width, windows_d, windows_h, windows_w, shift_d, shift_h, shift_w, roll_d, roll_h, roll_w,
    scale, mask_value, dropout,
    WINDOW: tl.constexpr, VOLUME: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr, COSINE: tl.constexpr,
    BIAS: tl.constexpr, BIAS_ROWS: tl.constexpr, MASK: tl.constexpr, HAS_PAD: tl.constexpr, ROLL_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IMAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Attend within one window position and head of up to IMAGES images. For each, on tiles of a whole window,

        S = q kᵀ + (B + mask)        P = exp(S − max S)        O = P v / Σ P

    Bias and mask (BLOCK_N, BLOCK_N), the start value of the score product, stay in registers from image to image.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    tl.static_assert(N <= BLOCK_N)
    tl.static_assert(HEAD_DIM <= BLOCK_D)
    tl.static_assert(VOLUME or WINDOW[0] == 1)
    tl.static_assert(BIAS == BIAS_NONE or BIAS == BIAS_TABLE)
    wait_for_inputs(DEPENDENT)
    geometry = Geometry(
        (depth, height, width), (windows_d, windows_h, windows_w), (shift_d, shift_h, shift_w), (roll_d, roll_h, roll_w)
    )
    bias = Bias(table_ptr, index_ptr, num_rows, (stride_table_row, stride_table_head))
    pid = tl.program_id(0)
    head = pid % num_heads  # fastest: neighbouring heads share cache lines of the image
    number = pid // num_heads
    num_windows = windows_d * windows_h * windows_w
    window = place_window(number, geometry, VOLUME)

    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    tokens = locate_tokens(offs_n, window, geometry, WINDOW, ROLL_FIRST)
    offs_token = token_offsets(tokens, (stride_qkv_depth, stride_qkv_row, stride_qkv_col))
    offs_token += head * stride_qkv_head * HEAD_DIM
    offs_out = token_offsets(tokens, (stride_out_depth, stride_out_row, stride_out_col))
    offs_out += head * stride_out_head * HEAD_DIM
    column = bias_column(head, window, geometry, num_heads, BIAS_ROWS)
    attn_bias = tile_bias(offs_n[:, None], offs_n[None, :], bias, column, N, BIAS)
    mask = Mask(mask_ptr, mask_value)
    attn_bias = add_mask(attn_bias, offs_n[:, None], offs_n[None, :], mask, window, geometry, WINDOW, MASK)
    q_ptr, k_ptr, v_ptr = operand_pointers(qkv_ptr, k_ptr, v_ptr, num_heads, HEAD_DIM, PACKED)
    if COSINE:
        scale = cosine_scale(logit_scale_ptr, head)
    pad_q_ptr, pad_k_ptr, pad_v_ptr = padding_pointers(padding_ptr, q_ptr, head, num_heads, HEAD_DIM, HAS_PAD)

    first = tl.program_id(1) * IMAGES
    for image in tl.range(first, tl.minimum(first + IMAGES, batch)):
        offs_image = tl.cast(image, tl.int64) * stride_qkv_batch
        q = load_tokens(q_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_q_ptr, HAS_PAD)
        k = load_tokens(k_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_k_ptr, HAS_PAD)
        v = load_tokens(v_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_v_ptr, HAS_PAD)
        scores = scores_of(scaled_query(q, scale, COSINE), k, attn_bias, COSINE, PRECISION)
        p = tl.exp2((scores - tl.max(scores, axis=1)[:, None]) * LOG2E)
        total = tl.sum(p, axis=1)
        if HAS_DROPOUT:
            instance = instance_of(image, number, head, num_windows, num_heads)
            p *= dropout_factor(Dropout(seed_ptr, dropout), instance, offs_n[:, None], offs_n[None, :], N)
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * (1.0 / total)[:, None]
        image_ptr = out_ptr + tl.cast(image, tl.int64) * stride_out_batch
        store_tokens(image_ptr, out, offs_out, tokens, offs_d, HEAD_DIM)
