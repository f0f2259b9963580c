"""Backward of shifted-window attention on the image layout: gradients land where the tokens came from.

With P = softmax(S) and dP = dO Vᵀ, all kernels compute (Dao et al. 2022, arXiv:2205.14135, appendix B.2)

    dV = Pᵀ dO      dS = P ∘ (dP − rowsum(dO ∘ O))      dQ = dS K      dK = dSᵀ Q      dB = Σ dS

from recomputed scores. A small window, in this file, needs nothing but its tokens; its bias gradient is summed in
registers over all images that a program walks. `window_bwd_large` has the others. Nothing is added up by atomics, so
results do not depend on timing.

Attention dropout multiplies P where it meets V, and dP (dropped weights pass no gradient). Cosine attention passes
dQ and dK through the normalisation, x / max(‖x‖, ε): dx = (dx̂ − x̂ (x̂ · dx̂)) / ‖x‖, and x̂ · dx̂ of the queries,
summed, is the gradient of logit_scale. Padding tokens hand theirs to the projection's bias: keys and values, and
queries too, whose outputs are cropped, so that theirs is zero, or NaN.
"""

import triton
import triton.language as tl

from .softmax import (
    LOG2E,
)
from .tiles import (
    BIAS_NONE,
    BIAS_TABLE,
    LOG_100,
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
    scale_rows,
    scaled_query,
    store_tokens,
    tile_bias,
    token_offsets,
    window_of_row,
    within,
)


@triton.jit
def normalised(x, COSINE: tl.constexpr):
    """Return x, divided by its norm for cosine attention, in its own dtype."""
    if COSINE:
        return scale_rows(x, inverse_norm(x))
    return x


@triton.jit
def through_norm(x, grad):
    """Return the gradient of x from that of x / max(‖x‖, 1e-12), and the product of the latter two by row; fp32."""
    inverse = inverse_norm(x)
    direction = x.to(tl.float32) * inverse[:, None]
    along = tl.sum(direction * grad, axis=1)
    clamped = inverse > 0.9999e12  # where ε replaces the norm, that is a constant
    return (grad - tl.where(clamped[:, None], 0.0, direction * along[:, None])) * inverse[:, None], along


@triton.jit
def gradient_scale(scale, COSINE: tl.constexpr):
    """Return what P and dS are multiplied by: dS meets its product in 16 bits, and fp16 is coarse near zero.

    Cosine attention's scale is large, and comes after the product in the originals: their dS there is of this size.
    """
    if COSINE:  # the power of two below, so that nothing is rounded
        return (tl.maximum(scale, 1.0).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.full((), 1.0, tl.float32)


@triton.jit
def logit_scale_gradient(grad_scale, logit_scale_ptr, head):
    """Return the gradient of a head's logit_scale from that of its logarithm, Σ dS ∘ S; 0 where clamped, or NaN."""
    return tl.where(tl.load(logit_scale_ptr + head).to(tl.float32) <= LOG_100, grad_scale, 0.0)


@triton.jit
def sum_padding(grad, tokens):
    """Return what the padding tokens of a tile hand to the projection's bias, (BLOCK_D,)."""
    return tl.sum(tl.where(tokens.padding[:, None], grad, 0.0), axis=0)


@triton.jit(do_not_specialize=SIZES)
def _window_attention_bwd_small_kernel(
    grad_qkv_ptr,  # as qkv, k and v
    grad_k_ptr, grad_v_ptr,
    grad_bias_ptr,  # (parts, BIAS_ROWS, heads, N, N), fp32
    grad_padding_ptr,  # (parts, 3 * heads * HEAD_DIM), fp32, zero at the start
    grad_logit_scale_ptr,  # (parts, heads), fp32
    grad_out_ptr,  # (batch, depth, height, width, heads, HEAD_DIM)
    qkv_ptr,  # (batch, depth, height, width, 3, heads, HEAD_DIM); without PACKED q alone, and k and v have its strides
    k_ptr, v_ptr,
    padding_ptr,  # (3 * heads * HEAD_DIM,)
    table_ptr, index_ptr,  # (T, BIAS_ROWS * heads) and (N, N), int64
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
    BIAS: tl.constexpr, BIAS_ROWS: tl.constexpr, MASK: tl.constexpr, HAS_PAD: tl.constexpr, ROLL_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, GRAD_BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, IMAGES: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """Compute all gradients. One program: one head, WINDOWS window positions of one bias, up to IMAGES images of each.

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
    positions = num_windows // BIAS_ROWS  # that share a bias
    partial = tl.program_id(1) * tl.cdiv(positions, WINDOWS) * BIAS_ROWS + group
    bias_row = group % BIAS_ROWS
    start = group // BIAS_ROWS * WINDOWS

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptr, k_ptr, v_ptr = operand_pointers(qkv_ptr, k_ptr, v_ptr, num_heads, HEAD_DIM, PACKED)
    grad_q_ptr, grad_k_ptr, grad_v_ptr = operand_pointers(
        grad_qkv_ptr, grad_k_ptr, grad_v_ptr, num_heads, HEAD_DIM, PACKED
    )
    if COSINE:
        scale = cosine_scale(logit_scale_ptr, head)
    rescale = gradient_scale(scale, COSINE)
    pad_q_ptr, pad_k_ptr, pad_v_ptr = padding_pointers(padding_ptr, q_ptr, head, num_heads, HEAD_DIM, HAS_PAD)

    # Beyond the window queries are its last one again, of no weight: zeros would meet an infinite key as NaN, for all.
    inside = offs_n < N
    grad_bias = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    grad_pad_q = tl.zeros((BLOCK_D,), tl.float32)
    grad_pad_k = tl.zeros((BLOCK_D,), tl.float32)
    grad_pad_v = tl.zeros((BLOCK_D,), tl.float32)
    grad_scale = 0.0
    for position in tl.range(start, tl.minimum(start + WINDOWS, positions)):
        number = window_of_row(position, bias_row, geometry, BIAS_ROWS)
        window = place_window(number, geometry, VOLUME)
        queries = locate_tokens(tl.minimum(offs_n, N - 1), window, geometry, WINDOW, ROLL_FIRST)
        tokens = within(queries, inside)
        offs_token = token_offsets(tokens, (stride_qkv_depth, stride_qkv_row, stride_qkv_col))
        offs_token += head * stride_qkv_head * HEAD_DIM
        offs_out = token_offsets(tokens, (stride_out_depth, stride_out_row, stride_out_col))
        offs_out += head * stride_out_head * HEAD_DIM
        column = bias_column(head, window, geometry, num_heads, BIAS_ROWS)
        attn_bias = tile_bias(offs_n[:, None], offs_n[None, :], bias, column, N, BIAS)
        attn_bias = add_mask(attn_bias, offs_n[:, None], offs_n[None, :], mask, window, geometry, WINDOW, MASK)
        for image in tl.range(first, tl.minimum(first + IMAGES, batch)):
            offs_image = tl.cast(image, tl.int64) * stride_qkv_batch
            q = load_tokens(q_ptr + offs_image, offs_token, queries, offs_d, HEAD_DIM, pad_q_ptr, HAS_PAD)
            k = load_tokens(k_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_k_ptr, HAS_PAD)
            v = load_tokens(v_ptr + offs_image, offs_token, tokens, offs_d, HEAD_DIM, pad_v_ptr, HAS_PAD)
            image_ptr = grad_out_ptr + tl.cast(image, tl.int64) * stride_out_batch
            grad_out = load_tokens(image_ptr, offs_out, tokens, offs_d, HEAD_DIM)

            query, key = scaled_query(q, scale, COSINE), normalised(k, COSINE)
            scores = tl.dot(query, tl.trans(key), attn_bias, input_precision=PRECISION)
            p = tl.exp2((scores - tl.max(scores, axis=1)[:, None]) * LOG2E)
            p *= tl.where(inside, rescale / tl.sum(p, axis=1), 0.0)[:, None]
            grad_p = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            kept = p
            if HAS_DROPOUT:
                instance = instance_of(image, number, head, num_windows, num_heads)
                factor = dropout_factor(Dropout(seed_ptr, dropout), instance, offs_n[:, None], offs_n[None, :], N)
                kept = p * factor
                grad_p *= factor
            grad_v = tl.dot(tl.trans(kept.to(v.dtype)), grad_out, input_precision=PRECISION)
            delta = tl.where(inside, tl.sum(p * grad_p, axis=1) / rescale, 0.0)
            grad_scores = p * (grad_p - delta[:, None])
            if GRAD_BIAS:
                grad_bias += grad_scores
            grad_scores = grad_scores.to(q.dtype)
            grad_q = tl.dot(grad_scores, key, input_precision=PRECISION) * (scale / rescale)
            grad_k = tl.dot(tl.trans(grad_scores), query, input_precision=PRECISION)  # query holds the scale
            if COSINE:
                grad_k *= 1.0 / rescale
                grad_v *= 1.0 / rescale
                grad_q, along = through_norm(q, grad_q)
                grad_k, _ = through_norm(k, grad_k)
                grad_scale += tl.sum(along, axis=0)
            if HAS_PAD:
                grad_pad_q += sum_padding(grad_q, tokens)
                grad_pad_k += sum_padding(grad_k, tokens)
                grad_pad_v += sum_padding(grad_v, tokens)
            store_tokens(grad_q_ptr + offs_image, grad_q, offs_token, tokens, offs_d, HEAD_DIM)
            store_tokens(grad_k_ptr + offs_image, grad_k, offs_token, tokens, offs_d, HEAD_DIM)
            store_tokens(grad_v_ptr + offs_image, grad_v, offs_token, tokens, offs_d, HEAD_DIM)

    if GRAD_BIAS:
        grad_bias *= 1.0 / rescale
        grad_bias_ptr += (tl.cast(partial, tl.int64) * num_heads + head) * (N * N)
        offs_bias = offs_n[:, None] * N + offs_n[None, :]
        tl.store(grad_bias_ptr + offs_bias, grad_bias, mask=(offs_n < N)[:, None] & (offs_n < N)[None, :])
    if COSINE:
        grad_scale = logit_scale_gradient(grad_scale, logit_scale_ptr, head)
        tl.store(grad_logit_scale_ptr + partial * num_heads + head, grad_scale)
    if HAS_PAD:
        offs_pad = (tl.cast(partial, tl.int64) * 3 * num_heads + head) * HEAD_DIM + offs_d
        tl.store(grad_padding_ptr + offs_pad, grad_pad_q, mask=offs_d < HEAD_DIM)
        tl.store(grad_padding_ptr + offs_pad + num_heads * HEAD_DIM, grad_pad_k, mask=offs_d < HEAD_DIM)
        tl.store(grad_padding_ptr + offs_pad + 2 * num_heads * HEAD_DIM, grad_pad_v, mask=offs_d < HEAD_DIM)
