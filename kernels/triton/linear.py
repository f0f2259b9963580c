"""A linear layer in one kernel: the product and its bias, with a sum or GELU behind it."""

import triton
import triton.language as tl

from .dependent import wait_for_inputs
from .mlp import gelu


@triton.jit
def place_tile(tile, tiles_m, TILES_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Return a tile's first row and column.

    Tiles that are worked on at a time share rows and columns: GROUP down, then the next ones across.
    """
    top = tile // (GROUP * TILES_N) * GROUP
    height = tl.minimum(tiles_m - top, GROUP)
    row = (top + tile % (GROUP * TILES_N) % height) * BLOCK_M
    return row, tile % (GROUP * TILES_N) // height * BLOCK_N


@triton.jit
def _linear_kernel(
    out_desc,  # (rows, N), in tiles (BLOCK_M, BLOCK_N / 2)
    x_desc,  # (rows, K), in tiles (BLOCK_M, BLOCK_K)
    weight_desc,  # (N, K), in tiles (BLOCK_N, BLOCK_K)
    bias_ptr,  # (N,) or None
    hidden_desc,  # as out: what GELU is computed of, for the backward, or None
    added_desc,  # as out, which it may be: what is added to the product, or None
    rows,
    N: tl.constexpr, K: tl.constexpr, GELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Compute x weightᵀ + bias, plus what is added, or its GELU. One program takes one tile after the other.

    Both loops are one to the compiler, so that the next tile's operands are on their way while the last one is
    finished, and another program of the multiprocessor multiplies meanwhile. Tiles leave in halves, for the sake of
    the shared memory which that other program needs. Beyond N and K descriptors read zeros, and write nothing.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    wait_for_inputs(DEPENDENT)
    tiles_m, TILES_N = tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * TILES_N, tl.num_programs(0), flatten=True):
        row, col = place_tile(tile, tiles_m, TILES_N, BLOCK_M, BLOCK_N, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            acc = tl.dot(x_desc.load([row, k]), weight_desc.load([col, k]).T, acc)
        left, right = tl.split(acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1))
        _finish(left, row, col, out_desc, bias_ptr, hidden_desc, added_desc, N, GELU, HALF)
        _finish(right, row, col + HALF, out_desc, bias_ptr, hidden_desc, added_desc, N, GELU, HALF)


@triton.jit
def _finish(
    tile,  # (BLOCK_M, HALF) of the product, fp32
    row, col, out_desc, bias_ptr, hidden_desc, added_desc,
    N: tl.constexpr, GELU: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Add bias and sum to half a tile, or compute its GELU, and store it."""
    if bias_ptr is not None:
        offs = col + tl.arange(0, HALF)
        tile += tl.load(bias_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)[None, :]
    if added_desc is not None:
        tile += added_desc.load([row, col]).to(tl.float32)
    if hidden_desc is not None:  # GELU of what the backward finds, which is rounded
        hidden_desc.store([row, col], tile.to(hidden_desc.dtype))
        tile = tile.to(hidden_desc.dtype).to(tl.float32)
    if GELU:
        tile = gelu(tile)
    out_desc.store([row, col], tile.to(out_desc.dtype))
