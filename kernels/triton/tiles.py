"""Shared by every window kernel: where a window's tokens lie in the image, and how a tile of them is read.

The image is never shifted, padded or partitioned in memory. From the n-th token of a window to its address:

    number of a window      → its place in the grid of windows               `place_window`
    place, n                → depth, row, column in the image; is it there?  `locate_tokens`
    depth, row, column      → offset within one image, 32 bits wide          `token_offsets`
    image, head             → 64-bit offset of the image, heads that lie `stride_head * HEAD_DIM` apart

Axis words: images are (depth, rows, columns), and so is whatever comes in threes. A window's tokens are numbered
row-major by ``n``. Flat images are one token deep, and where VOLUME is not set nothing is computed of a depth.

Numbers such as the scale come in fp32 from Triton's launcher, in fp64 from that of AOTInductor: they are cast.

A tile of scores is (queries, keys), or transposed. What works on both kinds takes the queries ``m`` and the keys ``n``
as a column and a row, or as a row and a column.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .softmax import LARGEST, at_least, at_most, clamp_finite

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


# Numbers of a launch that kernels are not compiled anew for: what they are multiples of says nothing of an address.
SIZES = (
    "batch", "num_heads", "height", "width", "windows_h", "windows_w", "shift_h", "shift_w", "roll_h", "roll_w",
    "stride_table_row",
)  # fmt: skip


# What goes together through device functions. Only run-time values: a compile-time one that is assigned, on its own or
# within a tuple, becomes a run-time one.


class Geometry(NamedTuple):
    """Places of the windows of a call, as `swinaccel.spec.Geometry`, along the three axes."""

    size: tl.tuple  # of the image
    windows: tl.tuple  # in the grid
    shift: tl.tuple
    roll: tl.tuple  # the shift as a roll of the axis that is rolled


class Window(NamedTuple):
    number: tl.tensor
    place: tl.tuple  # in the grid


class Tokens(NamedTuple):
    """A tile of a window's tokens, (tokens,) each."""

    n: tl.tensor
    at: tl.tuple  # in the image
    real: tl.tensor  # whether it exists in the image
    padding: tl.tensor  # whether it exists in the window only


class Bias(NamedTuple):
    """Source of the relative position bias."""

    table_ptr: tl.tensor = None  # (rows, columns), a column for every head, or for every row of windows and head
    index_ptr: tl.tensor = None  # (N, N), int64
    rows: tl.tensor = None
    stride_table: tl.tuple = None  # (row, head)
    dense_ptr: tl.tensor = None  # (columns, rows, cols)
    stride_dense: tl.tuple = None  # (head, row)


class Mask(NamedTuple):
    """The shift mask."""

    ptr: tl.tensor  # (windows, N, N)
    value: tl.tensor  # between regions


class Dropout(NamedTuple):
    """Dropout of the attention weights."""

    seed_ptr: tl.tensor  # (1,), int64
    probability: tl.tensor


@triton.jit
def place_window(number, geometry, VOLUME: tl.constexpr):
    """Return a window by its number; the grid's windows are numbered row-major."""
    windows = geometry.windows
    depth = number * 0
    row = number // windows[2]
    if VOLUME:
        depth = row // windows[1]
        row = row % windows[1]
    return Window(number, (depth, row, number % windows[2]))


@triton.jit
def _locate(n, place, length, windows, roll, WINDOW: tl.constexpr, ROLL_FIRST: tl.constexpr):
    """Return, along one axis, where in the image the n-th of a window lies, and whether it exists (is no padding).

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
def locate_tokens(n, window, geometry, WINDOW: tl.constexpr, ROLL_FIRST: tl.constexpr):
    """Return the tokens ``n`` of a window."""
    place, size, windows, roll = window.place, geometry.size, geometry.windows, geometry.roll
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
    real = inside & real_row & real_col
    padding = (n < WINDOW[0] * WINDOW[1] * WINDOW[2]) & (real == 0)
    return Tokens(n, (depth, row, col), real, padding)


@triton.jit
def token_offsets(tokens, stride):
    """Return where tokens lie within an image of these strides."""
    return tokens.at[0] * stride[0] + tokens.at[1] * stride[1] + tokens.at[2] * stride[2]


@triton.jit
def shift_region(n, window, geometry, WINDOW: tl.constexpr):
    """Return the region of the tokens ``n``; tokens of different regions were brought together by the roll only.

    Along each axis, a window holds up to two of the shift mask's regions, and more than one only where it is the
    last, whose last ``shift`` tokens come from the image's other side.
    """
    place, windows, shift = window.place, geometry.windows, geometry.shift
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
def is_divided(window, geometry, WINDOW: tl.constexpr):
    """Return True if a window holds tokens of more than one region."""
    place, windows, shift = window.place, geometry.windows, geometry.shift
    divided = ((place[1] == windows[1] - 1) & (shift[1] > 0)) | ((place[2] == windows[2] - 1) & (shift[2] > 0))
    if WINDOW[0] > 1:
        divided = divided | ((place[0] == windows[0] - 1) & (shift[0] > 0))
    return divided


@triton.jit
def mask_kind(window, geometry):
    """Return the kind of a window by its mask: bit by bit, whether it is the last along depth, rows and columns."""
    place, windows = window.place, geometry.windows
    kind = (place[1] == windows[1] - 1).to(tl.int32) * 2 + (place[2] == windows[2] - 1).to(tl.int32)
    return kind + (place[0] == windows[0] - 1).to(tl.int32) * 4


@triton.jit
def window_of_kind(kind):
    """Return a window of such a kind in a grid of one window."""
    return Window(0, ((kind >> 2) - 1, ((kind >> 1) & 1) - 1, (kind & 1) - 1))


@triton.jit
def instance_of(image, number, head, num_windows, num_heads):
    """Return the number of an (image, window, head), counted over the whole call; 64 bits wide."""
    return (tl.cast(image, tl.int64) * num_windows + number) * num_heads + head


@triton.jit
def operand_pointers(q_ptr, k_ptr, v_ptr, num_heads, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr):
    """Return pointers to q, k and v of a token; PACKED, all are in the first tensor, one after the other."""
    if PACKED:
        k_ptr = q_ptr + num_heads * HEAD_DIM
        v_ptr = q_ptr + 2 * num_heads * HEAD_DIM
    return q_ptr, k_ptr, v_ptr


@triton.jit
def padding_pointers(padding_ptr, q_ptr, head, num_heads, HEAD_DIM: tl.constexpr, HAS_PAD: tl.constexpr):
    """Return pointers to a head's q, k and v of a padding token, in (3 * heads * HEAD_DIM,)."""
    if not HAS_PAD:
        padding_ptr = q_ptr  # never read
    pad_q_ptr = padding_ptr + head * HEAD_DIM
    pad_k_ptr = pad_q_ptr + num_heads * HEAD_DIM
    return pad_q_ptr, pad_k_ptr, pad_k_ptr + num_heads * HEAD_DIM


@triton.jit
def load_tokens(
    ptr, offs_token, tokens, offs_d, HEAD_DIM: tl.constexpr, pad_ptr=None, HAS_PAD: tl.constexpr = False
):  # fmt: skip
    """Load a tile (tokens, BLOCK_D) of one head: image tokens from memory, padding tokens from `pad_ptr`, or zeros."""
    mask_d = offs_d < HEAD_DIM
    mask = tokens.real[:, None] & mask_d[None, :]
    tile = tl.load(ptr + (offs_token[:, None] + offs_d[None, :]), mask=mask, other=0.0)
    if HAS_PAD:
        pad = tl.load(pad_ptr + offs_d, mask=mask_d, other=0.0).to(tile.dtype)
        tile = tl.where(tokens.padding[:, None], pad[None, :], tile)
    return tile


@triton.jit
def store_tokens(ptr, tile, offs_token, tokens, offs_d, HEAD_DIM: tl.constexpr):
    """Write a tile (tokens, BLOCK_D) of one head, less its padding."""
    ptrs = ptr + (offs_token[:, None] + offs_d[None, :])
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=tokens.real[:, None] & (offs_d < HEAD_DIM)[None, :])


@triton.jit
def within(tokens, inside):
    """Return the tokens that are `inside`; the others neither exist nor are padding."""
    return Tokens(tokens.n, tokens.at, tokens.real & inside, tokens.padding & inside)


@triton.jit
def inverse_norm(x):
    """Return 1 / max(Euclidean norm, 1e-12) of each row, as `torch.nn.functional.normalize` has it; fp32."""
    x = x.to(tl.float32)
    return tl.rsqrt(at_least(tl.sum(x * x, axis=1), 1e-24))


@triton.jit
def cosine_scale(logit_scale_ptr, head):
    """Return the factor of a head's cosines, natural units: exp of the clamped logit_scale."""
    return tl.exp(at_most(tl.load(logit_scale_ptr + head).to(tl.float32), LOG_100))


@triton.jit
def scale_rows(x, factor):
    """Return each row of x times a factor of its own, in x's dtype."""
    return (x.to(tl.float32) * factor[:, None]).to(x.dtype)


@triton.jit
def scaled_query(q, scale, COSINE: tl.constexpr):
    """Return q (normalised for cosine attention) times scale, in q's own dtype."""
    if COSINE:
        return scale_rows(q, inverse_norm(q) * scale)
    return (q.to(tl.float32) * tl.cast(scale, tl.float32)).to(q.dtype)


@triton.jit
def table_row(index, rows):
    """Return the row of the table that an entry of the index names, and whether there is one: no other is read."""
    row = index.to(tl.int32)
    return row, row.to(tl.uint32, bitcast=True) < tl.cast(rows, tl.uint32)


@triton.jit
def bias_column(head, window, geometry, num_heads, BIAS_ROWS: tl.constexpr, KINDS: tl.constexpr = 1):
    """Return which of the bias's columns, or dense heads, is that of a window's head.

    Each row of windows may have a bias of its own, of BIAS_ROWS in turn, or each of KINDS of windows one that holds its
    mask: (BIAS_ROWS * heads,) or (KINDS * heads,) columns.
    """
    column = head
    if KINDS > 1:
        column += mask_kind(window, geometry) % KINDS * num_heads
    if BIAS_ROWS > 1:
        column = tl.cast(window.number // geometry.windows[2] % BIAS_ROWS * num_heads + head, tl.int64)
    return column


@triton.jit
def window_of_row(position, row, geometry, BIAS_ROWS: tl.constexpr):
    """Return the number of a window by its position among those that share a row's bias; see `bias_column`."""
    number = position
    if BIAS_ROWS > 1:
        columns = geometry.windows[2]
        number = (position // columns * BIAS_ROWS + row) * columns + position % columns
    return number


@triton.jit
def tile_bias(m, n, bias, head, N: tl.constexpr, BIAS: tl.constexpr):
    """Return the relative position bias of a tile of scores, fp32: -inf for keys beyond the window, NaN without a row.

    The head is a `bias_column`.

    Queries beyond the window have the last one's.
    """
    if BIAS == BIAS_DENSE:
        ptr = bias.dense_ptr + head * bias.stride_dense[0]
        tile = tl.load(ptr + (m * bias.stride_dense[1] + n)).to(tl.float32)
    else:
        offs = tl.minimum(m, N - 1) * N + n
        if BIAS == BIAS_TABLE:
            index = tl.load(bias.index_ptr + offs, mask=n < N, other=0)
            row, there = table_row(index, bias.rows)
            ptrs = bias.table_ptr + row * bias.stride_table[0] + head * bias.stride_table[1]
            tile = tl.load(ptrs, mask=there, other=float("nan"))
            if bias.table_ptr.dtype.element_ty == tl.float64:
                tile = clamp_finite(tile, LARGEST)
            tile = tile.to(tl.float32)
        else:
            tile = tl.zeros(offs.shape, tl.float32)
        tile = tl.where(n < N, tile, float("-inf"))
    return tile


@triton.jit
def add_mask(scores, m, n, mask, window, geometry, WINDOW: tl.constexpr, MASK: tl.constexpr):
    """Return a tile of scores plus its window's mask."""
    if MASK == MASK_REGIONS:
        divided = shift_region(m, window, geometry, WINDOW) != shift_region(n, window, geometry, WINDOW)
        scores += tl.where(divided, tl.cast(mask.value, tl.float32), 0.0)
    elif MASK == MASK_TENSOR:
        N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
        ptr = mask.ptr + tl.cast(window.number, tl.int64) * (N * N)
        scores += clamp_finite(tl.load(ptr + (m * N + n), mask=(m < N) & (n < N), other=0.0), LARGEST)
    return scores


@triton.jit
def dropout_factor(dropout, instance, m, n, N: tl.constexpr):
    """Return what attention dropout multiplies the weights of a tile by: 0, or 1 / (1 - probability).

    Each weight has a random number of its own (Philox, keyed by the call's seed), by its place in the attention
    alone, so that forward and backward agree however they tile it.

    Args:
        instance: by `instance_of`.
    """
    counter = m * N + n
    instance = tl.cast(instance, tl.int64)
    low, high = (instance & 0xFFFFFFFF).to(tl.int32), (instance >> 32).to(tl.int32)
    zero = counter * 0
    random, _, _, _ = tl.philox(tl.load(dropout.seed_ptr), counter, zero + low, zero + high, zero)
    probability = tl.cast(dropout.probability, tl.float32)
    kept = tl.uint_to_uniform_float(random) >= probability
    return tl.where(kept, 1.0 / tl.maximum(1.0 - probability, 1e-6), 0.0)
