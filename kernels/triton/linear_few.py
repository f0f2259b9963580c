"""A linear layer of few rows, such as those of one image, in one short kernel that follows another without a gap."""

import triton
import triton.language as tl

from .dependent import wait_for_inputs


@triton.jit
def _linear_few_kernel(
    out_ptr,  # (rows, N); with PARTS > 1 (PARTS, rows, N), fp32: what each part of K gives
    x_ptr,  # (rows, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,) or None
    hidden_ptr, added_ptr,  # None: nothing is kept or added, as by `linear._linear_kernel`
    rows,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Compute x weightᵀ + bias. One program: a tile, of one part of K.

    What bounds it is how fast operands come from the second-level cache.
    """
    LENGTH: tl.constexpr = K // PARTS
    tl.static_assert(N % BLOCK_N == 0)
    tl.static_assert(K % (PARTS * BLOCK_K) == 0)
    tl.static_assert(PARTS == 1 or bias_ptr is None)
    tl.static_assert(hidden_ptr is None and added_ptr is None)
    wait_for_inputs(DEPENDENT)
    tile, part = tl.program_id(0), tl.program_id(1)
    offs_m = tile // (N // BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile % (N // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = part * LENGTH + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(offs_m, rows - 1)[:, None] * K + offs_k[None, :]  # beyond the last row that once more
    weight_ptrs = weight_ptr + offs_n[:, None] * K + offs_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, LENGTH, BLOCK_K):
        acc = tl.dot(tl.load(x_ptrs + k), tl.trans(tl.load(weight_ptrs + k)), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n).to(tl.float32)[None, :]
    offs = part * rows * N + offs_m[:, None] * N + offs_n[None, :]
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < rows)[:, None])
