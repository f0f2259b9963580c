"""Kernels between the products of a Swin block, with its neighbours in memory: normalisation with the residual
sum before or after it, and the gathering of patches that are merged.

All of it is bound by memory: a program holds whole rows of C channels in registers, reads each number once, and keeps
sums, mean and variance in fp32. Rows lie one after the other.
"""

import triton
import triton.language as tl

from .dependent import wait_for_inputs

# What is done with the branch beside the normalised tensor.
NORM = tl.constexpr(0)  # out = norm(x)
ADD_NORM = tl.constexpr(1)  # total = x + branch (+ more_bias), out = norm(x + branch)
NORM_ADD = tl.constexpr(2)  # out = x + norm(branch (+ more_bias))
ADD = tl.constexpr(3)  # total = x + branch


@triton.jit
def place_rows(tile, rows, offs_c, C: tl.constexpr, ROWS: tl.constexpr):
    """Return the rows of a tile (ROWS,), its start in memory, and its numbers' places behind that, and which exist.

    The last two are (ROWS, BLOCK_C).
    """
    first = tl.cast(tile, tl.int64) * ROWS
    offs_r = tl.arange(0, ROWS)
    inside = (first + offs_r < rows)[:, None] & (offs_c < C)[None, :]
    return first + offs_r, first * C, offs_r[:, None] * C + offs_c[None, :], inside


@triton.jit
def load_channels(ptr, offs_c, C: tl.constexpr):
    """Load one number of each channel, for all rows: (1, BLOCK_C), fp32, zero beyond C."""
    return tl.load(ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def standardised(tile, offs_c, eps, C: tl.constexpr):
    """Return (tile - mean) / sqrt(variance + eps) of each row, the means and 1 / sqrt(variance + eps).

    The tile is (rows, BLOCK_C), fp32, zero beyond C, and so is the result.
    """
    mean = tl.sum(tile, axis=1) / C
    centred = tl.where((offs_c < C)[None, :], tile - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / C
    rstd = 1.0 / tl.sqrt_rn(variance + tl.cast(eps, tl.float32))
    return centred * rstd[:, None], mean, rstd


@triton.jit
def weighted(tile, weight_ptr, bias_ptr, offs_c, C: tl.constexpr):
    """Return tile * weight + bias, where there are those of each channel."""
    if weight_ptr is not None:
        tile *= load_channels(weight_ptr, offs_c, C)
    if bias_ptr is not None:
        tile += load_channels(bias_ptr, offs_c, C)
    return tile


@triton.jit
def normalised(
    tile,  # (rows, BLOCK_C), fp32, zero beyond C
    weight_ptr, bias_ptr,  # (C,) or None
    offs_c, eps, C: tl.constexpr,
):  # fmt: skip
    """Return each row as `torch.nn.functional.layer_norm` makes it; fp32."""
    return weighted(standardised(tile, offs_c, eps, C)[0], weight_ptr, bias_ptr, offs_c, C)


@triton.jit
def load_factors(scale_ptr, row, rows, sample_rows):
    """Load the factors of each row's sample, by which its branch is multiplied: (rows, 1), fp32."""
    return tl.load(scale_ptr + row // sample_rows, mask=row < rows, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _norm_kernel(
    x_ptr,  # (rows, C)
    out_ptr,  # (rows, C); not with ADD
    total_ptr,  # (rows, C): with ADD_NORM and ADD; with NORM_ADD the result once more, in another dtype, or None
    stats_ptr,  # (2, rows): mean and 1 / sqrt(variance + eps), fp32, or None
    branch_ptr,  # (rows, C), or (PARTS, rows, C), whose sum it is; not with NORM
    scale_ptr,  # (samples,): what the branch, or its norm, of each sample is multiplied by; or None
    weight_ptr, bias_ptr,  # (C,) or None
    more_bias_ptr,  # (C,), what is added to the total, with NORM_ADD to the branch; or None
    rows, sample_rows, eps,
    C: tl.constexpr, MODE: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Compute the norm of rows, or of their sum, or the sum with a norm, or the sum. One program: ROWS rows."""
    tl.static_assert(C <= BLOCK_C)
    wait_for_inputs(DEPENDENT)
    offs_c = tl.arange(0, BLOCK_C)
    row, start, offs, inside = place_rows(tl.program_id(0), rows, offs_c, C, ROWS)
    source = tl.load(x_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    x = source
    if MODE != NORM:
        source = tl.load(branch_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        for _ in tl.static_range(1, PARTS):
            branch_ptr += tl.cast(rows, tl.int64) * C
            source += tl.load(branch_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    if MODE == NORM_ADD and more_bias_ptr is not None:
        source += load_channels(more_bias_ptr, offs_c, C)
    if MODE == ADD_NORM or MODE == ADD:
        if scale_ptr is not None:
            source *= load_factors(scale_ptr, row, rows, sample_rows)
        source += x
        total = source
        if more_bias_ptr is not None:
            total += load_channels(more_bias_ptr, offs_c, C)
        total = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + start + offs, total, mask=inside)
        if stats_ptr is not None:
            source = total.to(tl.float32)  # the backward finds it rounded
    if MODE != ADD:
        out, mean, rstd = standardised(source, offs_c, eps, C)
        if stats_ptr is not None:
            tl.store(stats_ptr + row, mean, mask=row < rows)
            tl.store(stats_ptr + rows + row, rstd, mask=row < rows)
        out = weighted(out, weight_ptr, bias_ptr, offs_c, C)
        if MODE == NORM_ADD:
            if scale_ptr is not None:
                out *= load_factors(scale_ptr, row, rows, sample_rows)
            out += x
            if total_ptr is not None:
                tl.store(total_ptr + start + offs, out.to(total_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptr + start + offs, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def place_patches(token, rows, height, width, offs_c, C: tl.constexpr):
    """Return where the four patches of tokens that are merged lie, and which exist; (tokens, BLOCK_C) each.

    Left column first, top to bottom. Tokens are counted in 32 bits.

    Returns:
        Offsets; True where a token's patch lies in the image; True where the token has such a channel.
    """
    patch, channel = offs_c // C, offs_c % C
    down, right = patch % 2, patch // 2
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    row, col = token // out_width % out_height * 2, token % out_width * 2
    image = tl.cast(token // (out_width * out_height), tl.int64)
    # In 64 bits only where a token's first patch lies: all else is within an image, or the same for all tokens.
    offs = (((image * height + row) * width + col) * C)[:, None] + ((down * width + right) * C + channel)[None, :]
    inside = (token < rows)[:, None] & (offs_c < 4 * C)[None, :]
    real = inside & (row[:, None] + down[None, :] < height) & (col[:, None] + right[None, :] < width)
    return offs, real, inside


@triton.jit
def merged_offsets(token, offs_c, C: tl.constexpr):
    """Return where the merged channels of tokens lie, (tokens, BLOCK_C)."""
    return (tl.cast(token, tl.int64) * (4 * C))[:, None] + offs_c[None, :]


@triton.jit
def _merge_kernel(
    out_ptr,  # (batch, ceil(height / 2), ceil(width / 2), 4 * C)
    x_ptr,  # (batch, height, width, C)
    patches_ptr,  # as out: what is normalised, in the dtype of x, for a backward; or None
    stats_ptr,  # (2, rows): mean and 1 / sqrt(variance + eps), fp32, or None
    weight_ptr, bias_ptr,  # (4 * C,) or None
    rows,  # of the output: batch * ceil(height / 2) * ceil(width / 2)
    height, width, eps,
    C: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gather four patches for each of ROWS tokens: left column first, top to bottom; or compute their norm.

    Patches beyond an odd height or width are zeros, which count in the statistics.
    """
    tl.static_assert(4 * C <= BLOCK_C)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_c = tl.arange(0, BLOCK_C)
    offs, real, inside = place_patches(token, rows, height, width, offs_c, C)
    out = tl.load(x_ptr + offs, mask=real, other=0.0)
    out_offs = merged_offsets(token, offs_c, C)
    if patches_ptr is not None:
        tl.store(patches_ptr + out_offs, out, mask=inside)
    if HAS_NORM:
        out, mean, rstd = standardised(out.to(tl.float32), offs_c, eps, 4 * C)
        if stats_ptr is not None:
            tl.store(stats_ptr + token, mean, mask=token < rows)
            tl.store(stats_ptr + rows + token, rstd, mask=token < rows)
        out = weighted(out, weight_ptr, bias_ptr, offs_c, 4 * C)
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=inside)
