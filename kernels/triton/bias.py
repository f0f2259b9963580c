"""Small kernels around the bias, on live tensors: its forms and the mask's check before, its gradient after."""

import triton
import triton.language as tl

from .softmax import at_least, clamp_finite, is_finite
from .tiles import Geometry, place_window, shift_region, table_row, window_of_kind


@triton.jit
def _expand_bias_kernel(
    dense_ptr,  # (KINDS * heads, rows, cols)
    largest_ptr,  # (KINDS * heads, tiles of columns, rows), fp32: of each row of a tile
    table_ptr, index_ptr,  # (T, heads) and (N, N), int64
    stride_dense_head, stride_dense_row, stride_table_row, stride_table_head, table_rows,
    num_tokens, num_rows, num_cols, num_heads, shift_d, shift_h, shift_w, mask_value,
    WINDOW: tl.constexpr, KINDS: tl.constexpr, HAS_LARGEST: tl.constexpr, LIMIT: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Expand a table to the dense form, table[index]: -inf in columns beyond the window, NaN where there is no row.

    One program: a tile of HEADS heads. The index is the larger read by far, and all heads share it, and all KINDS of
    windows that differ in their mask, which is added.
    """
    nothing = (0, 0, 0)
    geometry = Geometry(nothing, (1, 1, 1), (shift_d, shift_h, shift_w), nothing)
    offs_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_n = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (offs_m < num_tokens)[:, None] & (offs_n < num_tokens)[None, :]
    index = tl.load(index_ptr + offs_m[:, None] * num_tokens + offs_n[None, :], mask=inside, other=0)
    row, there = table_row(index, table_rows)
    stored = (offs_m < num_rows)[:, None] & (offs_n < num_cols)[None, :]
    first = tl.program_id(2) * HEADS
    for head in tl.range(first, tl.minimum(first + HEADS, num_heads)):
        ptrs = table_ptr + row * stride_table_row + head * stride_table_head
        bias = tl.load(ptrs, mask=inside & there, other=float("nan"))
        bias = clamp_finite(bias, LIMIT)  # of the dense form, which may be narrower than the table
        bias = tl.where(inside, bias, tl.where((offs_n < num_tokens)[None, :], 0.0, float("-inf")))
        for KIND in tl.static_range(KINDS):
            masked = bias
            if KIND:
                region_q = shift_region(offs_m[:, None], window_of_kind(KIND), geometry, WINDOW)
                region_k = shift_region(offs_n[None, :], window_of_kind(KIND), geometry, WINDOW)
                masked += tl.where(region_q != region_k, tl.cast(mask_value, tl.float32), 0.0)
                masked = tl.where(is_finite(bias), clamp_finite(masked, LIMIT), masked)
            masked = masked.to(dense_ptr.dtype.element_ty)
            column = tl.cast(KIND * num_heads + head, tl.int64)
            offs_dense = column * stride_dense_head + offs_m[:, None] * stride_dense_row + offs_n[None, :]
            tl.store(dense_ptr + offs_dense, masked, mask=stored)
            if HAS_LARGEST:
                offs_largest = (column * tl.num_programs(1) + tl.program_id(1)) * num_rows + offs_m
                tl.store(largest_ptr + offs_largest, tl.max(masked.to(tl.float32), axis=1), mask=offs_m < num_rows)


@triton.jit
def _reduce_bias_kernel(
    grad_table_ptr,  # (T, heads), fp32, zero at the start
    grad_bias_ptr,  # (heads, N, N), fp32
    index_ptr,  # (N, N), int64
    num_rows,
    num_heads,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the pairs of one offset between query and key, and one head, which share a row of the table.

    That they share it is what a relative position bias is, but it is the live index that decides: a pair whose row
    is another one goes there by itself, and one without a row nowhere.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    right = tl.program_id(0) % (2 * WINDOW[2] - 1) - (WINDOW[2] - 1)
    down = tl.program_id(0) // (2 * WINDOW[2] - 1)
    deeper = 0
    if WINDOW[0] > 1:
        deeper = down // (2 * WINDOW[1] - 1) - (WINDOW[0] - 1)
        down = down % (2 * WINDOW[1] - 1)
    down -= WINDOW[1] - 1
    head = tl.program_id(1)
    corner = tl.maximum(down, 0) * WINDOW[2] + tl.maximum(right, 0)  # the first query that has such a key
    distance = down * WINDOW[2] + right
    if WINDOW[0] > 1:
        corner += tl.maximum(deeper, 0) * (WINDOW[1] * WINDOW[2])
        distance += deeper * (WINDOW[1] * WINDOW[2])
    row, there = table_row(tl.load(index_ptr + corner * N + corner - distance), num_rows)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, N, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        in_row, inside = offs // WINDOW[2], offs < N
        if WINDOW[0] > 1:
            key_depth = in_row // WINDOW[1] - deeper
            in_row = in_row % WINDOW[1]
            inside = inside & (key_depth >= 0) & (key_depth < WINDOW[0])
        key_row, key_col = in_row - down, offs % WINDOW[2] - right
        inside = inside & (key_row >= 0) & (key_row < WINDOW[1]) & (key_col >= 0) & (key_col < WINDOW[2])
        pair = offs * N + offs - distance
        grad = tl.load(grad_bias_ptr + tl.cast(head, tl.int64) * (N * N) + pair, mask=inside, other=0.0)
        live, has_row = table_row(tl.load(index_ptr + pair, mask=inside, other=0), num_rows)
        stray = inside & (live != row)
        tl.atomic_add(grad_table_ptr + live * num_heads + head, grad, mask=stray & has_row)
        total += tl.where(stray, 0.0, grad)
    tl.atomic_add(grad_table_ptr + row * num_heads + head, tl.sum(total, axis=0), mask=there)


@triton.jit
def _check_mask_kernel(
    mask_differs_ptr,  # (windows, CHECKS), int32
    mask_ptr,  # (windows, N, N)
    windows_d, windows_h, windows_w, shift_d, shift_h, shift_w, mask_value,
    WINDOW: tl.constexpr, VOLUME: tl.constexpr, CHECKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Note whether a share of one window's mask is anything but the mask that the shift implies."""
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    nothing = (0, 0, 0)
    geometry = Geometry(nothing, (windows_d, windows_h, windows_w), (shift_d, shift_h, shift_w), nothing)
    window = place_window(tl.program_id(0), geometry, VOLUME)
    differs = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(tl.program_id(1) * BLOCK, N * N, CHECKS * BLOCK):
        offs = first + tl.arange(0, BLOCK)
        region_q = shift_region(offs // N, window, geometry, WINDOW)
        region_k = shift_region(offs % N, window, geometry, WINDOW)
        implied = tl.where(region_q != region_k, tl.cast(mask_value, tl.float32), 0.0)
        value = tl.load(mask_ptr + window.number.to(tl.int64) * (N * N) + offs, mask=offs < N * N, other=0.0)
        differs |= ((value.to(tl.float32) != implied) & (offs < N * N)).to(tl.int32)
    tl.store(mask_differs_ptr + window.number * CHECKS + tl.program_id(1), tl.max(differs, axis=0))


@triton.jit
def _position_table_kernel(
    table_ptr,  # (heads, T), fp32
    coords_ptr,  # (T, 2)
    hidden_weight_ptr, hidden_bias_ptr,  # (HIDDEN, 2) and (HIDDEN,)
    weight_ptr,  # (heads, HIDDEN)
    num_rows,
    HIDDEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Compute SwinV2's bias table, 16 · sigmoid(MLP(log-spaced coordinates)) (arXiv:2111.09883, eq. 3, section 3.3).

    One program: BLOCK_T rows of one head. Every head computes the hidden channels anew, since what so small a kernel
    takes is the way through one program, and not the work of all. The heads come first in memory: neighbours in a
    window look up neighbours in the table.
    """
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    mask_t = offs_t < num_rows
    row = tl.load(coords_ptr + 2 * offs_t, mask=mask_t, other=0.0).to(tl.float32)
    col = tl.load(coords_ptr + 2 * offs_t + 1, mask=mask_t, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_T,), tl.float32)
    for first in tl.range(0, HIDDEN, BLOCK_HIDDEN):
        offs = first + tl.arange(0, BLOCK_HIDDEN)
        inside = offs < HIDDEN
        row_weight = tl.load(hidden_weight_ptr + 2 * offs, mask=inside, other=0.0).to(tl.float32)
        col_weight = tl.load(hidden_weight_ptr + 2 * offs + 1, mask=inside, other=0.0).to(tl.float32)
        hidden_bias = tl.load(hidden_bias_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + head * HIDDEN + offs, mask=inside, other=0.0).to(tl.float32)
        hidden = row[:, None] * row_weight[None, :] + col[:, None] * col_weight[None, :] + hidden_bias[None, :]
        hidden = at_least(hidden, 0.0)
        if HIDDEN % BLOCK_HIDDEN:  # there is no channel, but infinite coordinates times zero are NaN
            hidden = tl.where(inside[None, :], hidden, 0.0)
        acc += tl.sum(hidden * weight[None, :], axis=1)
    tl.store(table_ptr + head * num_rows + offs_t, 16.0 / (1.0 + tl.exp(-acc)), mask=mask_t)


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
