"""Kernels that write rows in 8 bits (e4m3), each with a scale of its own, for products of such rows.

A row is x ≈ q · scale, with scale = max |x| / 448, the largest number that e4m3 has. It is in registers as a whole
when it is written, so that its scale costs no further pass. NaN stays NaN; an infinity makes its row NaN, as it makes
what is multiplied with it.

An MLP's hidden rows get their scales before they are computed, from what they cannot exceed: by Cauchy and Schwarz,
|GELU(h)| ≤ |h| ≤ ‖x‖ · max ‖w‖ + max |b|, over the hidden channels' weights w and biases b. In e4m3, whose numbers span
18 binades, a scale that is a hundred times larger than need be costs no precision that matters.
"""

import triton
import triton.language as tl

from .pointwise import normalised, place_rows

# What is written in 8 bits.
PLAIN = tl.constexpr(0)  # x
NORM = tl.constexpr(1)  # norm(x)
ADD_NORM = tl.constexpr(2)  # norm(x + branch); total = x + branch
NORM_ADD = tl.constexpr(3)  # x + norm(branch), which total is, too

SMALLEST = tl.constexpr(1e-30)  # that a row's largest number counts as: rows of zeros would be divided by zero
LARGEST = tl.constexpr(3.4028234663852886e38)  # that fp32 has
SLACK = tl.constexpr(1 + 2**-6)  # for what rounding, in tensor cores above all, adds to a hidden number
UNIT = tl.constexpr(2**10)  # of norms: in it, fp32 has the norm of every row that it has


@triton.jit
def store_rows(out_ptrs, scale_ptr, tile, row, rows, inside):
    """Store a tile of whole rows (ROWS, BLOCK), fp32, zero beyond their ends, in 8 bits, and the rows' scales.

    Returns:
        The Euclidean norms of what is stored, in UNIT, (ROWS,).
    """
    largest = tl.maximum(tl.max(tl.abs(tile), axis=1), SMALLEST)
    eighth = (tile * (448.0 / largest)[:, None]).to(out_ptrs.dtype.element_ty)
    scale = largest / 448.0
    tl.store(out_ptrs, eighth, mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    eighth = eighth.to(tl.float32)
    return tl.sqrt(tl.sum(eighth * eighth, axis=1)) / UNIT * scale


@triton.jit
def _store_limits(limits_ptr, norm_ptr, bias_ptr, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr):
    offs = tl.arange(0, BLOCK_H)
    tl.store(limits_ptr, tl.max(tl.load(norm_ptr + offs, mask=offs < HIDDEN, other=0.0), axis=0))
    largest = 0.0
    if bias_ptr is not None:
        largest = tl.max(tl.abs(tl.load(bias_ptr + offs, mask=offs < HIDDEN, other=0.0).to(tl.float32)), axis=0)
    tl.store(limits_ptr + 1, largest)


@triton.jit
def _quantise_kernel(
    out_ptr,  # (rows, C), e4m3
    scale_ptr,  # (rows,), fp32
    x_ptr,  # (rows, C)
    branch_ptr, total_ptr,  # (rows, C), where the mode has them
    weight_ptr, bias_ptr,  # (C,) or None
    limits_ptr,  # (2,), fp32: largest norm of a hidden channel's weight, in UNIT, and largest bias; or None
    hidden_norm_ptr,  # (HIDDEN,), fp32: what the limits are taken from, by a program of its own; None where they are
    hidden_bias_ptr,  # (HIDDEN,) or None
    hidden_scale_ptr,  # (rows,), fp32: of the MLP's hidden rows, from the limits; or None
    rows, eps,
    C: tl.constexpr, HIDDEN: tl.constexpr, MODE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write rows, their norm, or sum with a norm before or after it, in 8 bits. One program: ROWS rows.

    Where the limits are to be taken, the last program does that, and has no rows.
    """
    tl.static_assert(C <= BLOCK_C and HIDDEN <= BLOCK_H)
    if hidden_norm_ptr is not None:
        if tl.program_id(0) == tl.num_programs(0) - 1:
            _store_limits(limits_ptr, hidden_norm_ptr, hidden_bias_ptr, HIDDEN, BLOCK_H)
    offs_c = tl.arange(0, BLOCK_C)
    row, start, offs, inside = place_rows(tl.program_id(0), rows, offs_c, C, ROWS)
    x = tl.load(x_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    if MODE == NORM:
        x = normalised(x, weight_ptr, bias_ptr, offs_c, eps, C)
    if MODE == ADD_NORM or MODE == NORM_ADD:
        branch = tl.load(branch_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        if MODE == NORM_ADD:
            branch = normalised(branch, weight_ptr, bias_ptr, offs_c, eps, C)
        x += branch
        tl.store(total_ptr + start + offs, x.to(total_ptr.dtype.element_ty), mask=inside)
        if MODE == ADD_NORM:
            x = normalised(x, weight_ptr, bias_ptr, offs_c, eps, C)
    norm = store_rows(out_ptr + start + offs, scale_ptr, x, row, rows, inside)
    if hidden_scale_ptr is not None:
        bound = norm * tl.load(limits_ptr) * (UNIT * UNIT) + tl.load(limits_ptr + 1)
        bound = tl.where(bound > LARGEST, LARGEST, tl.where(bound < SMALLEST, SMALLEST, bound))  # NaN stays NaN
        tl.store(hidden_scale_ptr + row, bound * (SLACK / 448), mask=row < rows)


@triton.jit
def _store_weight(
    out_ptr, scale_ptr, norm_ptr, weight_ptr, place,
    N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    offs_c = tl.arange(0, BLOCK)
    row, start, offs, inside = place_rows(place, N, offs_c, K, ROWS)
    tile = tl.load(weight_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    norm = store_rows(out_ptr + start + offs, scale_ptr, tile, row, N, inside)
    if norm_ptr is not None:
        tl.store(norm_ptr + row, norm, mask=row < N)


@triton.jit
def _quantise_weights_kernel(
    out_ptr,  # all three matrices, one after the other, e4m3
    scale_ptr,  # of all their rows, fp32
    norm_ptr,  # (HIDDEN,), fp32: of the rows of the second, in UNIT
    qkv_ptr,  # (QKV, C)
    fc1_ptr,  # (HIDDEN, C)
    fc2_ptr,  # (C, HIDDEN)
    C: tl.constexpr, QKV: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, ROWS_C: tl.constexpr, ROWS_H: tl.constexpr,
):  # fmt: skip
    """Write the weights of a block in 8 bits, a scale for each output channel. One program: some rows of one of them.

    ROWS_C rows of C numbers, in BLOCK_C, and likewise HIDDEN.
    """
    END_QKV: tl.constexpr = (QKV + ROWS_C - 1) // ROWS_C
    END_FC1: tl.constexpr = END_QKV + (HIDDEN + ROWS_C - 1) // ROWS_C
    pid = tl.program_id(0)
    if pid < END_QKV:
        _store_weight(out_ptr, scale_ptr, None, qkv_ptr, pid, QKV, C, BLOCK_C, ROWS_C)
    elif pid < END_FC1:
        out = out_ptr + QKV * C
        _store_weight(out, scale_ptr + QKV, norm_ptr, fc1_ptr, pid - END_QKV, HIDDEN, C, BLOCK_C, ROWS_C)
    else:
        out = out_ptr + QKV * C + HIDDEN * C
        _store_weight(out, scale_ptr + QKV + HIDDEN, None, fc2_ptr, pid - END_FC1, C, HIDDEN, BLOCK_H, ROWS_H)
