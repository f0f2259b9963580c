"""What every window kernel shares: where a window's tokens lie in the image, and how a tile of them is read.

Axis words: images are (depth, rows, columns), and so is whatever comes in threes: the image's ``size``, the grid of
``windows``, ``shift``, ``roll``, a window's ``place`` in the grid, and ``WINDOW``, its tokens, numbered row-major by
``n``. Flat images are one token deep, and where VOLUME is not set nothing is computed of a depth. The image is never
shifted, padded or partitioned in memory: these functions turn (window, n) into an address instead. Offsets within
one image, and within one head's bias, are 32 bits wide; where an image begins is a 64-bit offset.

Heads of a token need not be neighbours: they lie ``stride_head * HEAD_DIM`` apart.
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
def place_window(window, windows, VOLUME: tl.constexpr):
    """Depth, row and column of a window in the grid of windows, which are numbered row-major."""
    depth = window * 0
    row = window // windows[2]
    if VOLUME:
        depth = row // windows[1]
        row = row % windows[1]
    return depth, row, window % windows[2]


@triton.jit
def _locate(n, place, length, windows, roll, WINDOW: tl.constexpr, ROLL_FIRST: tl.constexpr):
    """Along one axis, where in the image the n-th of a window lies, and whether it exists (is no padding).

    The shifted window is cut from the rolled image. Most libraries pad and then roll, so the roll wraps around
    the padded size; timm rolls and then pads (ROLL_FIRST), so it wraps around the image's own size.
    """
    at = place * WINDOW + n
    if ROLL_FIRST:
        real = at < length
        at += roll
        at = tl.where(at >= length, at - length, at)
    else:
        at += roll
        at = tl.where(at >= windows * WINDOW, at - windows * WINDOW, at)
        real = at < length
    return at, real


@triton.jit
def locate_tokens(n, place, size, windows, roll, WINDOW: tl.constexpr, ROLL_FIRST: tl.constexpr):
    """Image (depth, row, column) of the tokens ``n`` of one window, and whether they exist (are no padding).

    Args:
        place: of the window in the grid, by `place_window`.
        size, windows, roll: of the image, along its three axes.
    """
    in_row = n // WINDOW[2]
    depth = place[0]  # of windows one token deep, which have no depth to roll or to pad
    inside = n < WINDOW[0] * WINDOW[1] * WINDOW[2]
    if WINDOW[0] > 1:
        in_row = in_row % WINDOW[1]
        in_depth = n // (WINDOW[1] * WINDOW[2])
        depth, real = _locate(in_depth, place[0], size[0], windows[0], roll[0], WINDOW[0], ROLL_FIRST)
        inside = inside & real
    row, real_row = _locate(in_row, place[1], size[1], windows[1], roll[1], WINDOW[1], ROLL_FIRST)
    col, real_col = _locate(n % WINDOW[2], place[2], size[2], windows[2], roll[2], WINDOW[2], ROLL_FIRST)
    return (depth, row, col), inside & real_row & real_col


@triton.jit
def token_offsets(token, stride):
    """Where tokens lie within an image of these strides."""
    return token[0] * stride[0] + token[1] * stride[1] + token[2] * stride[2]


@triton.jit
def shift_region(n, place, windows, shift, WINDOW: tl.constexpr):
    """Region number of the tokens ``n``; tokens of different regions were brought together by the roll only.

    Along each axis, a window holds up to two of the shift mask's regions, and more than one only where it is the
    last, whose last ``shift`` tokens come from the image's other side.
    """
    in_row = n // WINDOW[2]
    if WINDOW[0] > 1:
        in_row = in_row % WINDOW[1]
    wrapped_row = (place[1] == windows[1] - 1) & (in_row >= WINDOW[1] - shift[1])
    wrapped_col = (place[2] == windows[2] - 1) & (n % WINDOW[2] >= WINDOW[2] - shift[2])
    region = wrapped_row.to(tl.int32) * 2 + wrapped_col.to(tl.int32)
    if WINDOW[0] > 1:
        wrapped = (place[0] == windows[0] - 1) & (n // (WINDOW[1] * WINDOW[2]) >= WINDOW[0] - shift[0])
        region += wrapped.to(tl.int32) * 4
    return region


@triton.jit
def is_divided(place, windows, shift, WINDOW: tl.constexpr):
    """Whether a window holds tokens of more than one region."""
    divided = ((place[1] == windows[1] - 1) & (shift[1] > 0)) | ((place[2] == windows[2] - 1) & (shift[2] > 0))
    if WINDOW[0] > 1:
        divided = divided | ((place[0] == windows[0] - 1) & (shift[0] > 0))
    return divided


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
    """q (normalised for cosine attention) times scale, in q's own dtype."""
    if COSINE:
        return (q.to(tl.float32) * (inverse_norm(q) * scale)[:, None]).to(q.dtype)
    return (q.to(tl.float32) * scale).to(q.dtype)


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
    """Relative position bias of a tile of scores, and -inf for keys beyond the window; fp32.

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
            bias = bias.to(tl.float32)
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
    place,
    windows,
    shift,
    mask_value,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
):
    """Scores plus their window's mask; `offs_m` and `offs_n` as for `tile_bias`."""
    if MASK == MASK_REGIONS:
        region_m = shift_region(offs_m, place, windows, shift, WINDOW)
        region_n = shift_region(offs_n, place, windows, shift, WINDOW)
        scores += tl.where(region_m != region_n, tl.cast(mask_value, tl.float32), 0.0)
    elif MASK == MASK_TENSOR:
        N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
        inside = (offs_m < N) & (offs_n < N)
        mask_ptr += tl.cast(window, tl.int64) * (N * N)
        mask = tl.load(mask_ptr + (offs_m * N + offs_n), mask=inside, other=0.0).to(tl.float32)
        # Large finite values, as stand in for -inf elsewhere, are drawn in to where scaling keeps them finite.
        scores += tl.where(mask > float("-inf"), tl.maximum(mask, -1.0e30), mask)
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
    return tl.where(tl.uint_to_uniform_float(random) >= dropout, 1.0 / tl.maximum(1.0 - dropout, 1e-6), 0.0)
