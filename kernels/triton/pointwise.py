"""What stands between the products of a Swin block, with its neighbours in memory: normalisation with the residual
sum before or after it, and the gathering of patches that are merged.

All of it is bound by memory: a program holds whole rows of C channels in registers, reads each number once, and keeps
sums, mean and variance in fp32. Rows lie one after the other.
"""

import triton
import triton.language as tl

# What is done with the branch beside the normalised tensor.
NORM = tl.constexpr(0)  # out = norm(x)
ADD_NORM = tl.constexpr(1)  # total = x + branch (+ total_bias), out = norm(x + branch)
NORM_ADD = tl.constexpr(2)  # out = x + norm(branch)


@triton.jit
def load_channels(ptr, offs_c, C: tl.constexpr):
    """One number of each channel, for all rows: (1, BLOCK_C), fp32, zero beyond C."""
    return tl.load(ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def normalised(
    tile,  # (rows, BLOCK_C), fp32, zero beyond C
    weight_ptr, bias_ptr,  # (C,) or None
    offs_c, eps, C: tl.constexpr,
):  # fmt: skip
    """(tile - mean) / sqrt(variance + eps) * weight + bias of each row, as `torch.nn.functional.layer_norm`; fp32."""
    inside = offs_c < C
    mean = tl.sum(tile, axis=1) / C
    centred = tl.where(inside[None, :], tile - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / C
    out = centred * (1.0 / tl.sqrt(variance + eps))[:, None]
    if weight_ptr is not None:
        out *= load_channels(weight_ptr, offs_c, C)
    if bias_ptr is not None:
        out += load_channels(bias_ptr, offs_c, C)
    return out


@triton.jit
def _norm_kernel(
    out_ptr,  # (rows, C)
    total_ptr,  # (rows, C); ADD_NORM only
    x_ptr,  # (rows, C)
    branch_ptr,  # (rows, C); not with NORM
    weight_ptr, bias_ptr, total_bias_ptr,  # (C,) or None
    rows, eps,
    C: tl.constexpr, MODE: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The norm of rows, or of their sum, or the sum with a norm. One program: ROWS rows."""
    tl.static_assert(C <= BLOCK_C)
    first = tl.cast(tl.program_id(0), tl.int64) * ROWS
    offs_r = tl.arange(0, ROWS)
    offs_c = tl.arange(0, BLOCK_C)
    inside = (first + offs_r < rows)[:, None] & (offs_c < C)[None, :]
    offs = offs_r[:, None] * C + offs_c[None, :]
    x = tl.load(x_ptr + first * C + offs, mask=inside, other=0.0).to(tl.float32)
    if MODE == NORM_ADD:
        branch = tl.load(branch_ptr + first * C + offs, mask=inside, other=0.0).to(tl.float32)
        out = x + normalised(branch, weight_ptr, bias_ptr, offs_c, eps, C)
    else:
        if MODE == ADD_NORM:
            x += tl.load(branch_ptr + first * C + offs, mask=inside, other=0.0).to(tl.float32)
            total = x
            if total_bias_ptr is not None:
                total += load_channels(total_bias_ptr, offs_c, C)
            tl.store(total_ptr + first * C + offs, total.to(total_ptr.dtype.element_ty), mask=inside)
        out = normalised(x, weight_ptr, bias_ptr, offs_c, eps, C)
    tl.store(out_ptr + first * C + offs, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _merge_norm_kernel(
    out_ptr,  # (batch, ceil(height / 2), ceil(width / 2), 4 * C)
    x_ptr,  # (batch, height, width, C)
    weight_ptr, bias_ptr,  # (4 * C,) or None
    rows,  # of the output: batch * ceil(height / 2) * ceil(width / 2)
    height, width, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of the output, each the norm of its four patches: left column first, top to bottom.

    Patches beyond an odd height or width are zeros, which count in the statistics.
    """
    tl.static_assert(4 * C <= BLOCK_C)
    first = tl.cast(tl.program_id(0), tl.int64) * ROWS
    token = first + tl.arange(0, ROWS)
    offs_c = tl.arange(0, BLOCK_C)
    part, channel = offs_c // C, offs_c % C
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    row = (token // out_width % out_height * 2)[:, None] + (part % 2)[None, :]
    col = (token % out_width * 2)[:, None] + (part // 2)[None, :]
    image = (token // (out_width * out_height))[:, None]
    real = (token < rows)[:, None] & (offs_c < 4 * C)[None, :] & (row < height) & (col < width)
    offs = ((image * height + row) * width + col) * C + channel[None, :]
    x = tl.load(x_ptr + offs, mask=real, other=0.0).to(tl.float32)
    out = normalised(x, weight_ptr, bias_ptr, offs_c, eps, 4 * C)
    inside = (token < rows)[:, None] & (offs_c < 4 * C)[None, :]
    tl.store(out_ptr + token[:, None] * (4 * C) + offs_c[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
