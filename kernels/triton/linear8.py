"""A linear layer of 8 bits (e4m3) in one kernel: the product, with a sum or with GELU, which is written in 8 bits."""

import triton
import triton.language as tl

from .linear import place_tile


@triton.jit
def gelu8(x):
    """Return x · Φ(x) of fp32 numbers, for results in 8 bits: off by 2e-4 at most, and where x is small by 1e-4 of it.

    As `mlp.gelu`, but with an erfc that is 2 to the power of a polynomial. Infinities become NaN, which e4m3 has.
    """
    half = tl.abs(x) * 0.5
    p = -1.9153852e-01 * half - 1.99543874e00
    p = p * half - 2.26935044e00
    return x * 0.5 + half - half * tl.exp2(p * half)


@triton.jit
def _linear8_kernel(
    out_desc,  # (rows, N): in 8 bits in tiles (BLOCK_M, BLOCK_N), else in tiles (BLOCK_M, BLOCK_N / 4)
    out_scale_ptr,  # (rows,), fp32: of GELU's results, which no number of a row may exceed 448 times; or None
    x_desc,  # (rows, K), e4m3, in tiles (BLOCK_M, BLOCK_K)
    x_scale_ptr,  # (rows,), fp32
    weight_desc,  # (N, K), e4m3, in tiles (BLOCK_N, BLOCK_K)
    weight_scale_ptr,  # (N,), fp32
    bias_ptr,  # (N,) or None
    added_desc,  # as out, which it may be: what is added to the product, or None
    rows,
    N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute x weightᵀ + bias, plus what is added; or its GELU in 8 bits, where there are scales for that.

    Tiles, their order, and how programs overlap: as in `linear._linear_kernel`. Numbers of more than 8 bits leave in
    quarters, for the sake of the shared memory.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    offs_m = tl.arange(0, BLOCK_M)
    tiles_m, TILES_N = tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * TILES_N, tl.num_programs(0), flatten=True):
        row, col = place_tile(tile, tiles_m, TILES_N, BLOCK_M, BLOCK_N, GROUP)
        inside = row + offs_m < rows
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            acc = tl.dot(x_desc.load([row, k]), weight_desc.load([col, k]).T, acc)
        acc *= tl.load(x_scale_ptr + row + offs_m, mask=inside, other=0.0)[:, None]
        if out_scale_ptr is not None:
            acc = gelu8(_scaled(acc, col, weight_scale_ptr, bias_ptr, N, BLOCK_N))
            factor = 1.0 / tl.load(out_scale_ptr + row + offs_m, mask=inside, other=1.0)
            out_desc.store([row, col], (acc * factor[:, None]).to(out_desc.dtype))
        else:
            left, right = tl.split(acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1))
            _finish_half(left, row, col, out_desc, weight_scale_ptr, bias_ptr, added_desc, N, BLOCK_M, HALF)
            _finish_half(right, row, col + HALF, out_desc, weight_scale_ptr, bias_ptr, added_desc, N, BLOCK_M, HALF)


@triton.jit
def _scaled(tile, col, weight_scale_ptr, bias_ptr, N: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a tile of the product, fp32, times its columns' scales, plus bias."""
    offs = col + tl.arange(0, COLUMNS)
    if N % COLUMNS:  # columns beyond N are written nowhere; masks would cost registers for all
        offs = tl.minimum(offs, N - 1)
    tile *= tl.load(weight_scale_ptr + offs)[None, :]
    if bias_ptr is not None:
        tile += tl.load(bias_ptr + offs).to(tl.float32)[None, :]
    return tile


@triton.jit
def _finish_half(
    tile, row, col, out_desc, weight_scale_ptr, bias_ptr, added_desc,
    N: tl.constexpr, BLOCK_M: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Store half a tile of the product, fp32, in two parts, each times its scales, plus bias and sum."""
    QUARTER: tl.constexpr = HALF // 2
    left, right = tl.split(tile.reshape(BLOCK_M, 2, QUARTER).permute(0, 2, 1))
    _finish(left, row, col, out_desc, weight_scale_ptr, bias_ptr, added_desc, N, QUARTER)
    _finish(right, row, col + QUARTER, out_desc, weight_scale_ptr, bias_ptr, added_desc, N, QUARTER)


@triton.jit
def _finish(tile, row, col, out_desc, weight_scale_ptr, bias_ptr, added_desc, N: tl.constexpr, QUARTER: tl.constexpr):
    tile = _scaled(tile, col, weight_scale_ptr, bias_ptr, N, QUARTER)
    if added_desc is not None:
        tile += added_desc.load([row, col]).to(tl.float32)
    out_desc.store([row, col], tile.to(out_desc.dtype))
