"""What every window kernel shares: where a window's tokens lie in the image, and how a tile of them is read.

Axis words: a *window* holds ``WINDOW_H * WINDOW_W`` tokens, numbered row-major by ``n``. The image is never
shifted, padded or partitioned in memory: these functions turn (window, n) into an address instead.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG_100 = tl.constexpr(4.605170185988092)  # SwinV2 clamps logit_scale at ln(100), from above only


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
    tile = tl.load(image_ptr + offs_token[:, None] + offs_d[None, :], mask=real[:, None] & mask_d[None, :], other=0.0)
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
