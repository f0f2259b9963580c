"""Small kernels that prepare bias and mask for the large-window kernel, once per call, on live tensors."""

import triton
import triton.language as tl

from .tiles import LOG2E


@triton.jit
def _expand_bias_kernel(
    dense_ptr,  # (heads, rows, cols)
    table_ptr,  # (T, heads)
    index_ptr,  # (N, N), int64
    stride_dense_head,
    stride_dense_row,
    stride_table_row,
    stride_table_head,
    num_tokens,
    num_rows,
    num_cols,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program: a tile of one head; table[index] · log2(e), -inf in columns beyond the window."""
    head = tl.program_id(0)
    offs_m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    offs_n = tl.program_id(2) * COLS + tl.arange(0, COLS)
    inside = (offs_m < num_tokens)[:, None] & (offs_n < num_tokens)[None, :]
    index = tl.load(index_ptr + offs_m[:, None] * num_tokens + offs_n[None, :], mask=inside, other=0)
    bias = tl.load(table_ptr + index * stride_table_row + head * stride_table_head, mask=inside, other=0.0)
    # The dense form may be narrower than the table: keep its range, an fp16 infinity would make NaN of it.
    bias = tl.minimum(tl.maximum(bias.to(tl.float32) * LOG2E, -LIMIT), LIMIT)
    bias = tl.where((offs_n < num_tokens)[None, :], bias, float("-inf"))
    offs_dense = head.to(tl.int64) * stride_dense_head + offs_m[:, None] * stride_dense_row + offs_n[None, :]
    tl.store(
        dense_ptr + offs_dense,
        bias.to(dense_ptr.dtype.element_ty),
        mask=(offs_m < num_rows)[:, None] & (offs_n < num_cols)[None, :],
    )


@triton.jit
def _flag_masked_windows_kernel(
    masked_ptr,  # (windows,), int32
    mask_ptr,  # (windows, N, N)
    num_entries,  # N * N
    BLOCK: tl.constexpr,
):
    """One program: whether one window's mask holds anything but zeros."""
    window = tl.program_id(0).to(tl.int64)
    found = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(0, num_entries, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        value = tl.load(mask_ptr + window * num_entries + offs, mask=offs < num_entries, other=0.0)
        found |= (value != 0).to(tl.int32)
    tl.store(masked_ptr + window, tl.max(found, axis=0))


@triton.jit
def _compare_kernel(
    differs_ptr,  # (1,), int32, zero at the start
    left_ptr,
    right_ptr,
    num_entries,
    BLOCK: tl.constexpr,
):
    """Raise the flag where two tensors of one shape differ in any entry."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < num_entries
    left = tl.load(left_ptr + offs, mask=inside, other=0)
    right = tl.load(right_ptr + offs, mask=inside, other=0)
    if tl.max((left != right).to(tl.int32), axis=0) != 0:
        tl.store(differs_ptr, 1)
