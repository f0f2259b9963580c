"""Kernels that write rows in 8 bits (e4m3), each with a scale of its own, for products of such rows.

A row is x ≈ q · scale, with scale = max |x| / 448, the largest number that e4m3 has. It is in registers as a whole
when it is written, so that its scale costs no further pass. NaN stays NaN; an infinity makes its row NaN, as it makes
what is multiplied with it.
"""

import triton
import triton.language as tl

from .mlp import gelu
from .pointwise import normalised, place_rows

# What is written in 8 bits.
PLAIN = tl.constexpr(0)  # x
GELU = tl.constexpr(1)  # GELU(x)
NORM = tl.constexpr(2)  # norm(x)
ADD_NORM = tl.constexpr(3)  # norm(x + branch); total = x + branch
NORM_ADD = tl.constexpr(4)  # x + norm(branch), which total is, too


@triton.jit
def store_rows(out_ptrs, scale_ptr, tile, row, rows, inside):
    """Store a tile of whole rows (ROWS, BLOCK), fp32, zero beyond their ends, in 8 bits, and the rows' scales."""
    largest = tl.maximum(tl.max(tl.abs(tile), axis=1), 1e-30)  # else rows of zeros would be divided by zero
    eighth = (tile * (448.0 / largest)[:, None]).to(out_ptrs.dtype.element_ty)
    tl.store(out_ptrs, eighth, mask=inside)
    tl.store(scale_ptr + row, largest / 448.0, mask=row < rows)


@triton.jit
def _quantise_kernel(
    out_ptr,  # (rows, C), e4m3
    scale_ptr,  # (rows,), fp32
    x_ptr,  # (rows, C)
    branch_ptr, total_ptr,  # (rows, C), where the mode has them
    weight_ptr, bias_ptr,  # (C,) or None
    rows, eps,
    C: tl.constexpr, MODE: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write rows, their GELU, norm, or sum with a norm before or after it, in 8 bits. One program: ROWS rows."""
    tl.static_assert(C <= BLOCK_C)
    offs_c = tl.arange(0, BLOCK_C)
    row, start, offs, inside = place_rows(tl.program_id(0), rows, offs_c, C, ROWS)
    x = tl.load(x_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    if MODE == GELU:
        x = gelu(x)
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
    store_rows(out_ptr + start + offs, scale_ptr, x, row, rows, inside)


@triton.jit
def _store_weight(
    out_ptr, scale_ptr, weight_ptr, place, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    offs_c = tl.arange(0, BLOCK)
    row, start, offs, inside = place_rows(place, N, offs_c, K, ROWS)
    tile = tl.load(weight_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
    store_rows(out_ptr + start + offs, scale_ptr, tile, row, N, inside)


@triton.jit
def _quantise_weights_kernel(
    out_ptr,  # all four matrices, one after the other, e4m3
    scale_ptr,  # of all their rows, fp32
    qkv_ptr,  # (QKV, C)
    proj_ptr,  # (C, WIDTH), or None
    fc1_ptr,  # (HIDDEN, C)
    fc2_ptr,  # (C, HIDDEN)
    C: tl.constexpr, QKV: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_H: tl.constexpr,
    ROWS_C: tl.constexpr, ROWS_W: tl.constexpr, ROWS_H: tl.constexpr,
):  # fmt: skip
    """Write the weights of a block in 8 bits, a scale for each output channel. One program: some rows of one of them.

    ROWS_C rows of C numbers, in BLOCK_C, and likewise WIDTH and HIDDEN.
    """
    END_QKV: tl.constexpr = (QKV + ROWS_C - 1) // ROWS_C
    PROJ: tl.constexpr = 0 if proj_ptr is None else C
    END_PROJ: tl.constexpr = END_QKV + (PROJ + ROWS_W - 1) // ROWS_W
    END_FC1: tl.constexpr = END_PROJ + (HIDDEN + ROWS_C - 1) // ROWS_C
    pid = tl.program_id(0)
    if pid < END_QKV:
        _store_weight(out_ptr, scale_ptr, qkv_ptr, pid, QKV, C, BLOCK_C, ROWS_C)
    elif pid < END_PROJ:
        if proj_ptr is not None:
            out = out_ptr + QKV * C
            _store_weight(out, scale_ptr + QKV, proj_ptr, pid - END_QKV, C, WIDTH, BLOCK_W, ROWS_W)
    elif pid < END_FC1:
        out = out_ptr + QKV * C + PROJ * WIDTH
        _store_weight(out, scale_ptr + QKV + PROJ, fc1_ptr, pid - END_PROJ, HIDDEN, C, BLOCK_C, ROWS_C)
    else:
        out = out_ptr + QKV * C + PROJ * WIDTH + HIDDEN * C
        scale = scale_ptr + QKV + PROJ + HIDDEN
        _store_weight(out, scale, fc2_ptr, pid - END_FC1, C, HIDDEN, BLOCK_H, ROWS_H)
