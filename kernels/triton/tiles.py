"""What every window kernel shares: where a window's tokens lie in the image, and how a tile of them is read.

Axis words: a *window* holds ``WINDOW_H * WINDOW_W`` tokens, numbered row-major by ``n``. The image is never
shifted, padded or partitioned in memory: these functions turn (window, n) into an address instead. Offsets within
one image, and within one head's bias, are 32 bits wide; where an image begins is a 64-bit offset.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOG_100 = tl.constexpr(4.605170185988092)  # SwinV2 clamps logit_scale at ln(100), from above only

# How a shift mask reaches a kernel.
MASK_NONE = tl.constexpr(0)
MASK_REGIONS = tl.constexpr(1)  # computed from coordinates
MASK_TENSOR = tl.constexpr(2)  # read from (windows, N, N), by large windows only where it is not the implied one

# How the relative position bias does.
BIAS_NONE = tl.constexpr(0)
BIAS_TABLE = tl.constexpr(1)  # gathered from the live table (T, heads) through the index (N, N)
BIAS_DENSE = tl.constexpr(2)  # (heads, rows, cols), by `bias._expand_bias_kernel`, -inf beyond N
BIAS_FACTORS = tl.constexpr(3)  # (heads, N, R) each; the live table where the factors are stale


@triton.jit
def locate_tokens(
    n,
    window_row,
    window_col,
    height,
    width,
    padded_height,
    padded_width,
    roll_h,
    roll_w,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
):
    """Image row and column of the tokens ``n`` of one window, and whether they exist (are no padding).

    The shifted window is cut from the rolled image. Most libraries pad and then roll, so the roll wraps around
    the padded size; timm rolls and then pads (ROLL_FIRST), so it wraps around the image's own size.
    """
    row = window_row * WINDOW_H + n // WINDOW_W
    col = window_col * WINDOW_W + n % WINDOW_W
    inside = n < WINDOW_H * WINDOW_W
    if ROLL_FIRST:
        real = inside & (row < height) & (col < width)
        row += roll_h
        col += roll_w
        row = tl.where(row >= height, row - height, row)
        col = tl.where(col >= width, col - width, col)
    else:
        row += roll_h
        col += roll_w
        row = tl.where(row >= padded_height, row - padded_height, row)
        col = tl.where(col >= padded_width, col - padded_width, col)
        real = inside & (row < height) & (col < width)
    return row, col, real


@triton.jit
def shift_region(
    n,
    last_row,
    last_col,
    shift_h,
    shift_w,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
):
    """Region number of the tokens ``n``; tokens of different regions were brought together by the roll only.

    Of the nine regions of the shift mask, a window holds up to four, and more than one only in the last row or
    column of windows, where the last ``shift`` rows (columns) come from the image's other side.
    """
    wrapped_row = last_row & (n // WINDOW_W >= WINDOW_H - shift_h)
    wrapped_col = last_col & (n % WINDOW_W >= WINDOW_W - shift_w)
    return wrapped_row.to(tl.int32) * 2 + wrapped_col.to(tl.int32)


@triton.jit
def load_tokens(
    image_ptr,
    offs_token,
    real,
    padding,
    pad_ptr,
    offs_d,
    HEAD_DIM: tl.constexpr,
    HAS_PAD: tl.constexpr,
):
    """A tile (tokens, BLOCK_D) of one head: image tokens from memory, padding tokens from the projection's bias."""
    mask_d = offs_d < HEAD_DIM
    tile = tl.load(image_ptr + (offs_token[:, None] + offs_d[None, :]), mask=real[:, None] & mask_d[None, :], other=0.0)
    if HAS_PAD:
        pad = tl.load(pad_ptr + offs_d, mask=mask_d, other=0.0).to(tile.dtype)
        tile = tl.where(padding[:, None], pad[None, :], tile)
    return tile


@triton.jit
def inverse_norm(x):
    """1 / max(Euclidean norm, 1e-12) of each row, the factor of `torch.nn.functional.normalize`; fp32."""
    x = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)


@triton.jit
def cosine_scale(logit_scale_ptr, head):
    """What multiplies a head's cosines, natural units: exp of the clamped logit_scale."""
    return tl.exp(tl.minimum(tl.load(logit_scale_ptr + head).to(tl.float32), LOG_100))


@triton.jit
def scaled_query(q, scale, COSINE: tl.constexpr):
    """q (normalised for cosine attention) times scale and log2(e), in q's own dtype."""
    if COSINE:
        return (q.to(tl.float32) * (inverse_norm(q) * (scale * LOG2E))[:, None]).to(q.dtype)
    return (q.to(tl.float32) * (scale * LOG2E)).to(q.dtype)


@triton.jit
def tile_bias(
    offs_m,
    offs_n,
    table_ptr,
    index_ptr,
    dense_ptr,
    stride_table_row,
    stride_table_head,
    stride_dense_head,
    stride_dense_row,
    head,
    N: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Relative position bias of a tile of scores, log2 units, and -inf for keys beyond the window; fp32.

    Args:
        offs_m, offs_n: queries and keys, as a column and a row, or as a row and a column for transposed scores.
    """
    if BIAS == BIAS_DENSE:
        bias = tl.load(dense_ptr + head * stride_dense_head + (offs_m * stride_dense_row + offs_n)).to(tl.float32)
    else:
        inside = (offs_m < N) & (offs_n < N)
        if BIAS == BIAS_TABLE:
            row = tl.load(index_ptr + offs_m * N + offs_n, mask=inside, other=0)
            bias = tl.load(table_ptr + row * stride_table_row + head * stride_table_head, mask=inside, other=0.0)
            bias = bias.to(tl.float32) * LOG2E
        else:
            bias = tl.zeros(inside.shape, tl.float32)
        bias = tl.where(offs_n < N, bias, float("-inf"))
    return bias


@triton.jit
def add_mask(
    scores,
    offs_m,
    offs_n,
    mask_ptr,
    window,
    windows_h,
    windows_w,
    shift_h,
    shift_w,
    mask_value,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    MASK: tl.constexpr,
):
    """Scores in log2 units plus their window's mask; `offs_m` and `offs_n` as for `tile_bias`."""
    if MASK == MASK_REGIONS:
        last_row, last_col = window // windows_w == windows_h - 1, window % windows_w == windows_w - 1
        region_m = shift_region(offs_m, last_row, last_col, shift_h, shift_w, WINDOW_H, WINDOW_W)
        region_n = shift_region(offs_n, last_row, last_col, shift_h, shift_w, WINDOW_H, WINDOW_W)
        scores += tl.where(region_m != region_n, mask_value * LOG2E, 0.0)
    elif MASK == MASK_TENSOR:
        N: tl.constexpr = WINDOW_H * WINDOW_W
        inside = (offs_m < N) & (offs_n < N)
        mask_ptr += tl.cast(window, tl.int64) * (N * N)
        scores += tl.load(mask_ptr + (offs_m * N + offs_n), mask=inside, other=0.0).to(tl.float32) * LOG2E
    return scores


@triton.jit
def dropout_factor(seed_ptr, dropout, part, offs_m, offs_n, N: tl.constexpr):
    """What attention dropout multiplies the weights of a tile by: 0, or 1 / (1 - dropout).

    Each weight has a random number of its own (Philox, keyed by the call's seed), by its place in the attention
    alone, so that forward and backward agree however they tile it.

    Args:
        part: number of the (image, window, head), counted over the whole call.
        offs_m, offs_n: as for `tile_bias`.
    """
    counter = offs_m * N + offs_n
    part = tl.cast(part, tl.int64)
    low, high = (part & 0xFFFFFFFF).to(tl.int32), (part >> 32).to(tl.int32)
    zero = counter * 0
    random, _, _, _ = tl.philox(tl.load(seed_ptr), counter, zero + low, zero + high, zero)
    return tl.where(tl.uint_to_uniform_float(random) >= dropout, 1.0 / (1.0 - dropout), 0.0)
