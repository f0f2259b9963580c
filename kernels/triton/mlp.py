"""The MLP of a block: its activation alone, and, for few channels, all that follows the attention in one kernel.

GELU is x · Φ(x) (Hendrycks and Gimpel 2016, arXiv:1606.08415), written as (x + |x| − |x| · erfc(|x| / √2)) / 2, which
cancels nothing, and is NaN at −∞ as PyTorch's is. With h = |x| / 2, erfc is p(h) to the power of −16, p of degree 6
fitted so that the result errs by 5e-7 at most, in fp32: far below what 16 bits resolve, in sixteen instructions.
"""

import triton
import triton.language as tl

from .pointwise import load_channels, normalised


@triton.jit
def _erfc(h):
    """Return erfc(h · √2) of h ≥ 0."""
    p = 4.053060256e-04 * h + 1.324298792e-03
    p = p * h + 9.554697899e-04
    p = p * h + 2.599453181e-02
    p = p * h + 8.462919295e-02
    p = p * h + 9.972827137e-02
    p = p * h + 1.0
    p *= p
    p *= p
    p *= p
    p *= p
    return tl.rsqrt(p * p)


@triton.jit
def gelu(x):
    """Return x · Φ(x) of fp32 numbers, for results in 16 bits."""
    half = tl.abs(x) * 0.5
    h = tl.minimum(half, 16.0)
    return x * 0.5 + half - h * _erfc(h)


@triton.jit
def gelu_and_slope(x):
    """Return x · Φ(x), and its derivative Φ(x) + x · φ(x), likewise."""
    half = tl.abs(x) * 0.5
    h = tl.minimum(half, 16.0)
    erfc = _erfc(h)
    out = x * 0.5 + half - h * erfc
    share = tl.where(x > 0, 1.0 - 0.5 * erfc, 0.5 * erfc)
    return out, share + x * tl.exp(-2.0 * h * h) * 0.3989422804014327


@triton.jit
def _gelu_kernel(
    out_ptr,  # (numbers,), which may be x
    x_ptr,  # (numbers,)
    numbers,
    BLOCK: tl.constexpr,
):
    """Compute GELU of each number."""
    first = tl.cast(tl.program_id(0), tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    inside = offs < numbers - first
    x = tl.load(x_ptr + first + offs, mask=inside, other=0.0)
    tl.store(out_ptr + first + offs, gelu(x.to(tl.float32)).to(x.dtype), mask=inside)


@triton.jit
def _mlp_kernel(
    out_ptr,  # (rows, C)
    x_ptr,  # (rows, C)
    branch_ptr,  # (rows, C): the attention's output, or None where x holds it already; with PRE_NORM only
    norm_weight_ptr, norm_bias_ptr,  # (C,) or None
    weight1_ptr, bias1_ptr,  # (HIDDEN, C), and (HIDDEN,) or None
    weight2_ptr, bias2_ptr,  # (C, HIDDEN), and (C,) or None
    rows, eps,
    C: tl.constexpr, HIDDEN: tl.constexpr, PRE_NORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Compute all of a block after its attention. One program: BLOCK_M rows, whose hidden channels pass by in tiles.

    With PRE_NORM total + mlp(norm(total)) of total = x + branch, else x + norm(mlp(x)); mlp(y) is
    GELU(y weight1ᵀ + bias1) weight2ᵀ + bias2. The rows (BLOCK_M, BLOCK_C) stay, before the MLP and behind it.
    """
    tl.static_assert(C <= BLOCK_C)
    tl.static_assert(HIDDEN % BLOCK_H == 0)
    start = tl.cast(tl.program_id(0), tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    offs_h = tl.arange(0, BLOCK_H)
    inside_c = offs_c < C
    inside = (start + offs_m < rows)[:, None] & inside_c[None, :]
    offs = offs_m[:, None] * C + offs_c[None, :]
    x = tl.load(x_ptr + start * C + offs, mask=inside, other=0.0)
    if PRE_NORM:
        acc = x.to(tl.float32)
        if branch_ptr is not None:
            acc += tl.load(branch_ptr + start * C + offs, mask=inside, other=0.0).to(tl.float32)
        y = normalised(acc, norm_weight_ptr, norm_bias_ptr, offs_c, eps, C).to(x.dtype)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        y = x
    if bias2_ptr is not None:
        acc += load_channels(bias2_ptr, offs_c, C)
    for h in tl.range(0, HIDDEN, BLOCK_H):
        weight1 = tl.load(weight1_ptr + (h + offs_h)[:, None] * C + offs_c[None, :], mask=inside_c[None, :], other=0.0)
        hidden = tl.dot(y, tl.trans(weight1))
        if bias1_ptr is not None:
            hidden += tl.load(bias1_ptr + h + offs_h).to(tl.float32)[None, :]
        offs_weight2 = offs_c[:, None] * HIDDEN + (h + offs_h)[None, :]
        weight2 = tl.load(weight2_ptr + offs_weight2, mask=inside_c[:, None], other=0.0)
        acc = tl.dot(gelu(hidden).to(y.dtype), tl.trans(weight2), acc)
    if not PRE_NORM:
        acc = x.to(tl.float32) + normalised(acc, norm_weight_ptr, norm_bias_ptr, offs_c, eps, C)
    tl.store(out_ptr + start * C + offs, acc.to(out_ptr.dtype.element_ty), mask=inside)
