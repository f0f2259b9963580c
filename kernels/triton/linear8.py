"""A linear layer of 8 bits (e4m3) in one kernel: the product, with a sum or with GELU, which is written in 8 bits.

GELU's result has a scale for each row and each 128 channels, since that is what a program has at once: the largest
number that e4m3 has is the largest magnitude of them. A product of such numbers is a sum of products of 128 channels
each, which are multiplied by their row's scale, and added in fp32.
"""

import triton
import triton.language as tl

# Which scales what is multiplied has.
ROWS = tl.constexpr(0)  # (rows,)
GROUPS = tl.constexpr(1)  # (K / CHANNELS, rows)
RUNNING = tl.constexpr(2)  # the same; the sum so far is brought to the next group's scale


@triton.jit
def gelu8(x, TERMS: tl.constexpr):
    """Return x · Φ(x) of fp32 numbers, for results in 8 bits.

    As `mlp.gelu`, but with an erfc that is 2 to the power of a polynomial.
    """
    half = tl.abs(x) * 0.5
    if TERMS == 5:
        p = -1.429525e-02 * half + 1.1065685e-01
        p = p * half - 4.1197592e-01
        p = p * half - 1.84068298e00
        p = p * half - 2.30169106e00
    else:
        p = -1.9153852e-01 * half - 1.99543874e00
        p = p * half - 2.26935044e00
    return x * 0.5 + half - half * tl.exp2(p * half)


@triton.jit
def _linear8_kernel(
    out_desc,  # (rows, N); of 8 bits in tiles (BLOCK_M, CHANNELS), else in tiles (BLOCK_M, BLOCK_N / PARTS)
    out_scale_ptr,  # (N / CHANNELS, rows), fp32: of GELU's results, which are of 8 bits; or None
    x_desc,  # (rows, K), e4m3, in tiles (BLOCK_M, BLOCK_K)
    x_scale_ptr,  # fp32
    weight_desc,  # (N, K), e4m3, in tiles (BLOCK_N, BLOCK_K)
    weight_scale_ptr,  # (N,), fp32
    bias_ptr,  # (N,) or None
    added_desc,  # as out, which it may be: what is added to the product, or None
    rows,
    N: tl.constexpr, K: tl.constexpr, SCALES: tl.constexpr, GIVEN: tl.constexpr, TERMS: tl.constexpr,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute x weightᵀ + bias, plus what is added, or its GELU. One program takes one tile after the other.

    Tiles, their order, and how programs overlap: as in `linear._linear_kernel`.
    """
    tl.static_assert(SCALES == ROWS or (BLOCK_K == CHANNELS and K % CHANNELS == 0))
    HALF: tl.constexpr = BLOCK_N // 2
    offs_m = tl.arange(0, BLOCK_M)
    tiles_m, TILES_N = tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * TILES_N, tl.num_programs(0), flatten=True):
        top = tile // (GROUP * TILES_N) * GROUP
        height = tl.minimum(tiles_m - top, GROUP)
        row = (top + tile % (GROUP * TILES_N) % height) * BLOCK_M
        col = tile % (GROUP * TILES_N) // height * BLOCK_N
        inside = row + offs_m < rows
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        last = tl.full((BLOCK_M,), 1.0, tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            x, weight = x_desc.load([row, k]), weight_desc.load([col, k])
            if SCALES == ROWS:
                acc = tl.dot(x, weight.T, acc)
            else:
                scale = tl.load(x_scale_ptr + k // BLOCK_K * rows + row + offs_m, mask=inside, other=1.0)
                if SCALES == GROUPS:
                    acc += tl.dot(x, weight.T) * scale[:, None]
                else:
                    acc = tl.dot(x, weight.T, acc * (last / scale)[:, None])
                    last = scale
        if SCALES == ROWS:
            acc *= tl.load(x_scale_ptr + row + offs_m, mask=inside, other=0.0)[:, None]
        if SCALES == RUNNING:
            acc *= last[:, None]
        if out_scale_ptr is not None:
            if BLOCK_N == CHANNELS:
                _finish_gelu(acc, row, col, inside, out_desc, out_scale_ptr, weight_scale_ptr, bias_ptr, rows, CHANNELS, GIVEN, TERMS)
            else:
                left, right = tl.split(acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1))
                _finish_gelu(left, row, col, inside, out_desc, out_scale_ptr, weight_scale_ptr, bias_ptr, rows, CHANNELS, GIVEN, TERMS)
                _finish_gelu(right, row, col + HALF, inside, out_desc, out_scale_ptr, weight_scale_ptr, bias_ptr, rows, CHANNELS, GIVEN, TERMS)
        elif PARTS == 1:
            _finish(acc, row, col, out_desc, weight_scale_ptr, bias_ptr, added_desc, N, BLOCK_N)
        else:
            left, right = tl.split(acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1))
            if PARTS == 2:
                _finish(left, row, col, out_desc, weight_scale_ptr, bias_ptr, added_desc, N, HALF)
                _finish(right, row, col + HALF, out_desc, weight_scale_ptr, bias_ptr, added_desc, N, HALF)
            else:
                _finish_halves(left, row, col, out_desc, weight_scale_ptr, bias_ptr, added_desc, N, HALF)
                _finish_halves(right, row, col + HALF, out_desc, weight_scale_ptr, bias_ptr, added_desc, N, HALF)


@triton.jit
def _finish_halves(
    tile, row, col, out_desc, weight_scale_ptr, bias_ptr, added_desc, N: tl.constexpr, COLUMNS: tl.constexpr
):
    HALF: tl.constexpr = COLUMNS // 2
    left, right = tl.split(tile.reshape(tile.shape[0], 2, HALF).permute(0, 2, 1))
    _finish(left, row, col, out_desc, weight_scale_ptr, bias_ptr, added_desc, N, HALF)
    _finish(right, row, col + HALF, out_desc, weight_scale_ptr, bias_ptr, added_desc, N, HALF)


@triton.jit
def _finish(
    tile, row, col, out_desc, weight_scale_ptr, bias_ptr, added_desc, N: tl.constexpr, COLUMNS: tl.constexpr
):
    """Multiply a tile of the product, fp32, by its columns' scales, add bias and sum, and store it."""
    offs = col + tl.arange(0, COLUMNS)
    tile *= tl.load(weight_scale_ptr + offs, mask=offs < N, other=0.0)[None, :]
    if bias_ptr is not None:
        tile += tl.load(bias_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)[None, :]
    if added_desc is not None:
        tile += added_desc.load([row, col]).to(tl.float32)
    out_desc.store([row, col], tile.to(out_desc.dtype))


@triton.jit
def _finish_gelu(tile, row, col, inside, out_desc, out_scale_ptr, weight_scale_ptr, bias_ptr, rows, CHANNELS: tl.constexpr, GIVEN: tl.constexpr, TERMS: tl.constexpr):
    """Store GELU of a tile of the product (BLOCK_M, CHANNELS), fp32, in 8 bits, with a scale for each row."""
    offs = col + tl.arange(0, CHANNELS)
    tile *= tl.load(weight_scale_ptr + offs)[None, :]
    if bias_ptr is not None:
        tile += tl.load(bias_ptr + offs).to(tl.float32)[None, :]
    tile = gelu8(tile, TERMS)
    scale_ptrs = out_scale_ptr + row + tl.arange(0, tile.shape[0])
    if GIVEN:
        factor = 1.0 / tl.load(scale_ptrs, mask=inside, other=1.0)
    else:
        largest = tl.maximum(tl.max(tl.abs(tile), axis=1), 1e-30)  # else rows of zeros would be divided by zero
        tl.store(scale_ptrs + col // CHANNELS * rows, largest / 448.0, mask=inside)
        factor = 448.0 / largest
    out_desc.store([row, col], (tile * factor[:, None]).to(out_desc.dtype))
