"""Backward of what stands between the products of a Swin block.

Gradients of all rows' common parameters (a norm's weight and bias, a product's bias) are summed in fp32: a program
walks over many rows, keeps its sums in registers, and stores them in a place of its own, so that results do not
depend on who comes first. What is left to add are these few sums.
"""

import triton
import triton.language as tl

from .mlp import gelu_and_slope
from .pointwise import NORM, NORM_ADD, load_channels, load_factors, merged_offsets, place_patches, place_rows


@triton.jit
def through_norm(grad, hat, rstd, C: tl.constexpr):
    """Return the gradient of rows from that of `hat`, which is (rows - mean) * rstd; (rows, BLOCK_C)."""
    along = tl.sum(grad * hat, axis=1)[:, None] / C
    return (grad - tl.sum(grad, axis=1)[:, None] / C - hat * along) * rstd


@triton.jit
def _norm_bwd_kernel(
    sums_ptr,  # (programs, 2 or 3, C), fp32: of the gradients of the norm's weight and bias, and of the branch's
    grad_x_ptr,  # (rows, C), or None where it is grad_out itself
    grad_branch_ptr,  # (rows, C), or None
    grad_out_ptr,  # (rows, C)
    grad_total_ptr,  # (rows, C), of the second output, or None
    source_ptr,  # (rows, C): what was normalised
    stats_ptr,  # (2, rows), fp32
    scale_ptr,  # (samples,), or None
    weight_ptr,  # (C,), or None
    rows, sample_rows,
    C: tl.constexpr, MODE: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of `_norm_kernel`, whose MODE and operands these are.

    Where there is a branch, the columns of its gradient are summed too: most often it comes from a product, and the
    sums are the gradient of that product's bias.

    One program: every programs-th tile of ROWS rows.
    """
    tl.static_assert(C <= BLOCK_C)
    offs_c = tl.arange(0, BLOCK_C)
    if weight_ptr is not None:
        weight = load_channels(weight_ptr, offs_c, C)
    weight_sums = tl.zeros((ROWS, BLOCK_C), tl.float32)
    bias_sums = tl.zeros((ROWS, BLOCK_C), tl.float32)
    branch_sums = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, start, offs, inside = place_rows(tile, rows, offs_c, C, ROWS)
        offs += start
        grad = tl.load(grad_out_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        source = tl.load(source_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + row, mask=row < rows, other=0.0)[:, None]
        rstd = tl.load(stats_ptr + rows + row, mask=row < rows, other=0.0)[:, None]
        total = tl.zeros((ROWS, BLOCK_C), tl.float32)
        if grad_total_ptr is not None:
            total = tl.load(grad_total_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        if MODE == NORM_ADD:
            grad += total
            if grad_x_ptr is not None:
                tl.store(grad_x_ptr + offs, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
            if scale_ptr is not None:
                grad *= load_factors(scale_ptr, row, rows, sample_rows)
        hat = tl.where(inside, (source - mean) * rstd, 0.0)
        weight_sums += grad * hat
        bias_sums += grad
        if weight_ptr is not None:
            grad *= weight
        grad = through_norm(grad, hat, rstd, C)
        if MODE != NORM_ADD:
            grad += total
            tl.store(grad_x_ptr + offs, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
            if scale_ptr is not None:
                grad *= load_factors(scale_ptr, row, rows, sample_rows)
        if grad_branch_ptr is not None:
            tl.store(grad_branch_ptr + offs, grad.to(grad_branch_ptr.dtype.element_ty), mask=inside)
        if MODE != NORM:
            branch_sums += grad
    SUMS: tl.constexpr = 2 if MODE == NORM else 3
    sums_ptr += tl.cast(tl.program_id(0), tl.int64) * (SUMS * C) + offs_c
    tl.store(sums_ptr, tl.sum(weight_sums, axis=0), mask=offs_c < C)
    tl.store(sums_ptr + C, tl.sum(bias_sums, axis=0), mask=offs_c < C)
    if MODE != NORM:
        tl.store(sums_ptr + 2 * C, tl.sum(branch_sums, axis=0), mask=offs_c < C)


@triton.jit
def _merge_bwd_kernel(
    grad_x_ptr,  # (batch, height, width, C)
    sums_ptr,  # (programs, 2, 4 * C), fp32: of the gradients of the norm's weight and bias; with HAS_NORM only
    grad_out_ptr,  # (batch, ceil(height / 2), ceil(width / 2), 4 * C)
    patches_ptr,  # as grad_out: what was normalised; with HAS_NORM only
    stats_ptr,  # (2, rows), fp32; with HAS_NORM only
    weight_ptr,  # (4 * C,), or None
    rows,  # of grad_out
    height, width,
    C: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of `_merge_kernel`. Programs as those of `_norm_bwd_kernel`."""
    tl.static_assert(4 * C <= BLOCK_C)
    offs_c = tl.arange(0, BLOCK_C)
    if weight_ptr is not None:
        weight = load_channels(weight_ptr, offs_c, 4 * C)
    weight_sums = tl.zeros((ROWS, BLOCK_C), tl.float32)
    bias_sums = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        token = tile * ROWS + tl.arange(0, ROWS)
        offs, real, inside = place_patches(token, rows, height, width, offs_c, C)
        out_offs = merged_offsets(token, offs_c, C)
        grad = tl.load(grad_out_ptr + out_offs, mask=inside, other=0.0)
        if HAS_NORM:
            grad = grad.to(tl.float32)
            x = tl.load(patches_ptr + out_offs, mask=inside, other=0.0).to(tl.float32)
            mean = tl.load(stats_ptr + token, mask=token < rows, other=0.0)[:, None]
            rstd = tl.load(stats_ptr + rows + token, mask=token < rows, other=0.0)[:, None]
            hat = tl.where(inside, (x - mean) * rstd, 0.0)
            weight_sums += grad * hat
            bias_sums += grad
            if weight_ptr is not None:
                grad *= weight
            grad = through_norm(grad, hat, rstd, 4 * C)
        tl.store(grad_x_ptr + offs, grad.to(grad_x_ptr.dtype.element_ty), mask=real)
    if HAS_NORM:
        sums_ptr += tl.cast(tl.program_id(0), tl.int64) * (8 * C) + offs_c
        tl.store(sums_ptr, tl.sum(weight_sums, axis=0), mask=offs_c < 4 * C)
        tl.store(sums_ptr + 4 * C, tl.sum(bias_sums, axis=0), mask=offs_c < 4 * C)


@triton.jit
def _gelu_bwd_kernel(
    sums_ptr,  # (programs, C), fp32: of the columns of grad_x
    grad_x_ptr,  # (rows, C)
    out_ptr,  # (rows, C): GELU(x), which the forward does not keep
    grad_out_ptr,  # (rows, C)
    x_ptr,  # (rows, C)
    rows,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of GELU. One program: BLOCK_C columns of every programs-th tile of ROWS rows."""
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        _, start, offs, inside = place_rows(tile, rows, offs_c, C, ROWS)
        offs += start
        x = tl.load(x_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_out_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        out, slope = gelu_and_slope(x)
        grad *= slope
        sums += grad
        tl.store(grad_x_ptr + offs, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + tl.cast(tl.program_id(0), tl.int64) * C + offs_c, tl.sum(sums, axis=0), mask=offs_c < C)


@triton.jit
def _column_sums_kernel(
    sums_ptr,  # (programs, C), fp32
    scaled_ptr,  # (rows, C): the tensor, multiplied and in another dtype, or None
    x_ptr,  # (rows, C)
    scale_ptr,  # (samples,), or None
    rows, sample_rows,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum columns, each row multiplied by its sample's factor. Programs as those of `_gelu_bwd_kernel`."""
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, start, offs, inside = place_rows(tile, rows, offs_c, C, ROWS)
        offs += start
        x = tl.load(x_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            x *= load_factors(scale_ptr, row, rows, sample_rows)
        sums += x
        if scaled_ptr is not None:
            tl.store(scaled_ptr + offs, x.to(scaled_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + tl.cast(tl.program_id(0), tl.int64) * C + offs_c, tl.sum(sums, axis=0), mask=offs_c < C)


@triton.jit
def _add_parts_kernel(
    sums_ptr,  # (columns,)
    parts_ptr,  # (parts, columns)
    parts, columns,
    BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add up the sums that programs have left, fp32. One program: BLOCK_C columns."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for first in tl.range(0, parts, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < parts)[:, None] & (offs_c < columns)[None, :]
        sums += tl.load(parts_ptr + row[:, None] * columns + offs_c[None, :], mask=inside, other=0.0)
    tl.store(sums_ptr + offs_c, tl.sum(sums, axis=0), mask=offs_c < columns)
