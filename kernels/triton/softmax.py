"""Scores and their softmax in all attention kernels: NaN and infinities, and what is kept for the backward.

NaN and infinities come out as PyTorch's operators have them. Triton's own minimum and maximum drop NaN, and so does its
reduction by `tl.max`; a row that holds NaN is NaN by the sum of its weights. Scores times `exponent` are in log2 units.

For the backward a row's softmax is kept as the log-sum-exp of its scores in log2 units, (parts, N). Beside a mask
tensor's large numbers that sum has no digits left for the scores: the largest score then stays APART, (parts, 2, N),
and the sum is of what the scores are below it.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(1.0e30)  # of the finite numbers in biases and masks, so that sums and products stay finite


@triton.jit
def at_most(x, limit):
    """Return the smaller one of two numbers, or NaN."""
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_least(x, limit):
    """Return the larger one of two numbers, or NaN."""
    return tl.maximum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def clamp_finite(x, LIMIT: tl.constexpr):
    """Return a bias or mask in fp32: finite numbers within ±LIMIT, as stand in for -inf; NaN and infinities stay."""
    own = x
    if x.dtype != tl.float64:
        own = x.to(tl.float32)
    narrow = own.to(tl.float32)
    return tl.where(is_finite(own), tl.minimum(tl.maximum(narrow, -LIMIT), LIMIT), narrow)


@triton.jit
def score_tile(rows, cols, attn_bias, key_norms, COSINE: tl.constexpr, PRECISION: tl.constexpr):
    """Return rows · colsᵀ + attn_bias, natural units, of queries that were scaled, and rounded, before.

    Args:
        key_norms: of cosine scores, inverse, along the keys' axis: scores are divided here, so that keys stay in
            shared memory as they are.
    """
    if COSINE:
        return tl.dot(rows, tl.trans(cols), input_precision=PRECISION) * key_norms + attn_bias
    return tl.dot(rows, tl.trans(cols), attn_bias, input_precision=PRECISION)


# Cosine scores lie below their scale plus the bias. Weights may be taken below that bound, in place of below the
# largest score, where the following say so; bf16 has the exponents of fp32.


@triton.jit
def bound_of(scale, largest_bias, DTYPE: tl.constexpr):
    """Return an upper bound of scores, natural units.

    In half precision it is log(2^15) lower: weights go up to its largest power of two, since it loses small ones.
    """
    bound = largest_bias + scale
    if DTYPE == tl.float16:
        bound -= 15 * 0.6931471805599453
    return bound


@triton.jit
def bounded_scale(DTYPE: tl.constexpr):
    """Return the largest scale of cosines at which the largest score is expected to come near enough to its bound."""
    return 16.0 if DTYPE == tl.float16 else 50.0


@triton.jit
def are_enough(out, log_totals, offs, N: tl.constexpr, DTYPE: tl.constexpr):
    """Return True if all sums of weights below a bound, as log2, are large enough to be exact, and outputs are finite.

    In half precision a weight below its normal numbers is wrong by up to 2^-25, and so are N of them by an eighth of
    the sum's rounding at most where that is N / 2^12. An infinite value is NaN by a weight that is lost.
    """
    smallest = -100.0
    if DTYPE == tl.float16:
        smallest = tl.log2(N * 1.0) - 12.0
    enough = (log_totals >= smallest) & is_finite(log_totals) & (tl.sum(out * 0.0, axis=1) == 0.0)
    return tl.min((enough | (offs >= N)).to(tl.int32), axis=0) != 0


@triton.jit
def store_log_sum(ptr, instance, offs, N, maximum, log_total, exponent, APART: tl.constexpr):
    """Keep a softmax for the backward: the largest scores, and log2 of the sums of exp2((S - max S) * exponent)."""
    if APART:
        ptr += instance * (2 * N)
        tl.store(ptr + N + offs, maximum, mask=offs < N)
    else:
        ptr += instance * N
        log_total += maximum * exponent
    tl.store(ptr + offs, log_total, mask=offs < N)


@triton.jit
def load_log_sum(ptr, instance, offs, N, APART: tl.constexpr, BOUNDED: tl.constexpr = True):
    """Load what `store_log_sum` kept: the largest scores, if APART, and the sums. Queries beyond N give no weight."""
    if APART:
        ptr += instance * (2 * N)
    else:
        ptr += instance * N
    if BOUNDED:
        log_sum = tl.load(ptr + offs, mask=offs < N, other=float("inf"))
    else:
        log_sum = tl.load(ptr + offs)
    maximum = log_sum  # not used
    if APART:
        maximum = tl.load(ptr + N + offs, mask=offs < N, other=0.0)
    return maximum, log_sum


@triton.jit
def weights_of(scores, maximum, log_sum, exponent, APART: tl.constexpr):
    """Return the weights of the softmax that was kept."""
    if APART:
        return tl.exp2((scores - maximum) * exponent - log_sum)
    return tl.exp2(scores * exponent - log_sum)


@triton.jit
def delta_of(out, grad_out):
    """Return rowsum(dO ∘ O), which is rowsum(P ∘ dP); NaN, as that one is, where dO is not finite. fp32."""
    grad_out = grad_out.to(tl.float32)
    return tl.sum(out.to(tl.float32) * grad_out + grad_out * 0.0, axis=1)
