"""Forward of attention over sequences: keys by pattern, bias from factors.

For q, k, v of shape (batch, heads, tokens, head_dim) the kernel computes

    softmax(q kᵀ · scale + q_factor k_factorᵀ + mask) v

over the keys that a query sees, with the online softmax of Dao et al. 2022 (arXiv:2205.14135). Two facts carry both
this file and `sequence_bwd`:

* In every pattern a query sees one interval of keys, whose ends never fall as the query moves on. So a tile of queries
  sees an interval too, and inside it lies one that all of its queries see in full, where nothing needs a mask.
* The factors' product is the start value of the score product (FlashBias, arXiv:2505.12044): a bias costs a longer dot
  product, and no tile of it is ever read.

Scores are kept as they leave the dot product; the scale, with log2(e) in it, is applied in the exponent's own
multiply-add, so q is never rounded a second time. The scale is positive.

Operands that pass through the pipeline (k and v here) may be descriptors in place of pointers, where tiles are whole:
Hopper's copy engine then brings them, and the registers that held their addresses are free for one more program on
the multiprocessor.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .softmax import LARGEST, LOG2E, clamp_finite, store_log_sum

# How a product of factors is computed. Positions are factors too, and TF32 would round them like half precision; three
# TF32 products in place of one of fp32 ("tf32x3") give wrong numbers on Hopper, others at each run, in Triton 3.6.
FACTOR_PRECISION = tl.constexpr("ieee")

# Which keys a query sees.
PATTERN_ALL = tl.constexpr(0)
PATTERN_CAUSAL = tl.constexpr(1)  # those up to itself
PATTERN_BLOCKS = tl.constexpr(2)  # its own block of `block_size` tokens and the `window_blocks - 1` before it

LOWEST = tl.constexpr(-3.0e38)  # finite, so that its difference to a score of -inf is not NaN; log2 units


class Stream(NamedTuple):
    """Rows of one sequence that pass through the pipeline."""

    source: tl.tensor  # pointer to the first, or the descriptor of a whole tensor
    row: tl.tensor  # of the first in the descriptor
    col: tl.tensor
    stride_token: tl.tensor


@triton.jit
def visible_keys(query, num_tokens, block_size, window_blocks, PATTERN: tl.constexpr):
    """Return the first key that a query sees, and the one after the last."""
    first = query * 0
    end = first + num_tokens
    if PATTERN == PATTERN_CAUSAL:
        end = tl.minimum(query + 1, num_tokens)
    elif PATTERN == PATTERN_BLOCKS:
        block = query // block_size
        first = tl.maximum(block + 1 - window_blocks, 0) * block_size
        end = tl.minimum((block + 1) * block_size, num_tokens)
    return first, end


@triton.jit
def visible_queries(key, num_tokens, block_size, window_blocks, PATTERN: tl.constexpr):
    """Return the first query that sees a key, and the one after the last: `visible_keys` the other way round."""
    first = key * 0
    end = first + num_tokens
    if PATTERN == PATTERN_CAUSAL:
        first = key
    elif PATTERN == PATTERN_BLOCKS:
        block = key // block_size
        first = block * block_size
        end = tl.minimum((block + window_blocks) * block_size, num_tokens)
    return first, end


@triton.jit
def plan_walk(
    visible: tl.constexpr, first, last, offs, num_tokens, block_size, window_blocks, PATTERN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Plan a walk in steps of BLOCK over all that a tile of tokens sees, in three segments; the second needs no mask.

    Args:
        visible: `visible_keys` or `visible_queries`.
        first, last, offs: the tile's tokens.
    Returns:
        Where the parts begin, and the end: four numbers. And the interval that each token sees.
    """
    start, full_end = visible(first, num_tokens, block_size, window_blocks, PATTERN)
    full_start, end = visible(last, num_tokens, block_size, window_blocks, PATTERN)
    interval = visible(offs, num_tokens, block_size, window_blocks, PATTERN)
    inner_start = start + (full_start - start + BLOCK - 1) // BLOCK * BLOCK
    inner_start = tl.minimum(inner_start, start + (end - start + BLOCK - 1) // BLOCK * BLOCK)
    inner_end = inner_start + tl.maximum(full_end - inner_start, 0) // BLOCK * BLOCK
    return (start, inner_start, inner_end, end), interval


@triton.jit
def assert_whole_tiles(
    num_tokens, HEAD_DIM: tl.constexpr, RANK: tl.constexpr, HAS_EDGES: tl.constexpr, DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Assert that tiles hold what they must, and without HAS_EDGES nothing else; the latter where Triton debugs."""
    tl.static_assert(HEAD_DIM <= BLOCK_D)
    tl.static_assert(RANK <= BLOCK_R)
    tl.static_assert(not (DESCRIBED and (HAS_EDGES or HEAD_DIM < BLOCK_D)))
    if not HAS_EDGES:
        tl.device_assert((num_tokens % BLOCK_M == 0) & (num_tokens % BLOCK_N == 0), "tokens beyond the last")


@triton.jit
def place(num_tiles, num_sequences, group):
    """Return this program's tile, counted from the end of the walk with the most to do, and its sequence.

    Tiles go by turns over a `group` of sequences, as many as have their keys in the cache together.
    """
    pid = tl.program_id(0)
    start = pid // (group * num_tiles) * group
    size = tl.minimum(group, num_sequences - start)
    rest = pid - start * num_tiles
    return rest // size, start + rest % size


@triton.jit
def sequence_offset(sequence, num_heads, stride_batch, stride_head):
    """Return the elements from the start of a tensor to one sequence (batch and head) of it."""
    return (sequence // num_heads).to(tl.int64) * stride_batch + (sequence % num_heads).to(tl.int64) * stride_head


@triton.jit
def _row_pointers(ptr, first, stride_token, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    return ptr + tl.cast(first, tl.int64) * stride_token + rows[:, None] * stride_token + cols[None, :]


@triton.jit
def load_rows(
    ptr,  # (tokens, WIDTH) of one sequence
    first, stride_token, num_tokens,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Load rows first .. first + ROWS - 1, zeros beyond WIDTH and, where BOUNDED, beyond the last token."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    ptrs = _row_pointers(ptr, first, stride_token, ROWS, COLS)
    if BOUNDED:
        return tl.load(ptrs, mask=(first + rows < num_tokens)[:, None] & (cols < WIDTH)[None, :], other=0.0)
    if WIDTH < COLS:
        return tl.load(ptrs, mask=(cols < WIDTH)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def store_rows(
    ptr, tile, first, stride_token, num_tokens, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Store what `load_rows` reads."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    ptrs = _row_pointers(ptr, first, stride_token, ROWS, COLS)
    mask = (first + rows < num_tokens)[:, None] & (cols < WIDTH)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def stream(source, offset, stride_token, DESCRIBED: tl.constexpr):
    """Return one sequence of a tensor, `offset` elements from its start; its descriptor has rows of `stride_token`."""
    row, col = 0, 0
    if DESCRIBED:
        row, col = (offset // stride_token).to(tl.int32), (offset % stride_token).to(tl.int32)
    else:
        source += offset
    return Stream(source, row, col, stride_token)


@triton.jit
def load_stream(
    rows, first, num_tokens, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BOUNDED: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Load rows as `load_rows` does."""
    if DESCRIBED:
        tile = rows.source.load([rows.row + first, rows.col])
    else:
        tile = load_rows(rows.source, first, rows.stride_token, num_tokens, WIDTH, ROWS, COLS, BOUNDED)
    return tile


@triton.jit
def load_mask(mask_ptr, offs_m, offs_n, num_tokens):
    """Load a tile (M, N) of one mask (tokens, tokens), fp32."""
    inside = (offs_m < num_tokens)[:, None] & (offs_n < num_tokens)[None, :]
    ptrs = mask_ptr + offs_m[:, None].to(tl.int64) * num_tokens + offs_n[None, :]
    return clamp_finite(tl.load(ptrs, mask=inside, other=0.0), LARGEST)


@triton.jit
def only_visible(tile, offs, visible, other):
    """Return a tile (rows, columns) where columns `offs` lie in the interval that each row sees, else `other`."""
    inside = (offs[None, :] >= visible[0][:, None]) & (offs[None, :] < visible[1][:, None])
    return tl.where(inside, tile, other)


@triton.jit
def scores_of(rows, cols, row_factor, col_factor, inverse_scale, RANK: tl.constexpr, PRECISION: tl.constexpr):
    """Return rows · colsᵀ plus the bias of their factors over the scale; fp32."""
    if RANK > 0:
        bias = tl.dot(row_factor, tl.trans(col_factor), input_precision=FACTOR_PRECISION)
        return tl.dot(rows, tl.trans(cols), bias * inverse_scale, input_precision=PRECISION)
    return tl.dot(rows, tl.trans(cols), input_precision=PRECISION)


@triton.jit
def _walk_keys(
    state,  # output (BLOCK_M, BLOCK_D), and of each query the sum of weights and the largest score (BLOCK_M,); fp32
    q, q_factor,  # (BLOCK_M, BLOCK_D) and (BLOCK_M, BLOCK_R)
    keys, values,
    k_factor_ptr, stride_kf_token, mask_ptr,  # of this sequence
    start, end, offs_m,
    visible,  # (BLOCK_M,) each: the interval of keys that each query sees
    num_tokens, scale,
    HEAD_DIM: tl.constexpr, RANK: tl.constexpr, HAS_MASK: tl.constexpr, AT_EDGE: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Run the online softmax over the keys from `start` to `end`; AT_EDGE, some are not every query's to see. By tile,

    S = q kᵀ + (q_factor k_factorᵀ + mask) / scale        m' = max(m, max S)        P = exp((S − m') · scale)
    Σ' = Σ exp((m − m') · scale) + Σ P                    O' = O exp((m − m') · scale) + P v
    """
    acc, total, maximum = state
    exponent = scale * LOG2E
    for first in tl.range(start, end, BLOCK_N):
        k = load_stream(keys, first, num_tokens, HEAD_DIM, BLOCK_N, BLOCK_D, AT_EDGE, DESCRIBED)
        k_factor = k
        if RANK > 0:
            k_factor = load_rows(k_factor_ptr, first, stride_kf_token, num_tokens, RANK, BLOCK_N, BLOCK_R, AT_EDGE)
        scores = scores_of(q, k, q_factor, k_factor, 1.0 / scale, RANK, PRECISION)
        offs_n = first + tl.arange(0, BLOCK_N)
        if HAS_MASK:
            scores += load_mask(mask_ptr, offs_m, offs_n, num_tokens) * (1.0 / scale)
        if AT_EDGE:
            scores = only_visible(scores, offs_n, visible, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))  # NaN is left to the weights
        if HAS_MASK:  # its numbers may be so large that what a fused multiply-add does not round is more than a score
            p = tl.exp2((scores - new_maximum[:, None]) * exponent)
        else:
            p = tl.exp2(scores * exponent - (new_maximum * exponent)[:, None])
        correction = tl.exp2((maximum - new_maximum) * exponent)
        total = total * correction + tl.sum(p, axis=1)
        v = load_stream(values, first, num_tokens, HEAD_DIM, BLOCK_N, BLOCK_D, AT_EDGE, DESCRIBED)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
        maximum = new_maximum
    return acc, total, maximum


@triton.jit
def _sequence_attention_fwd_kernel(
    out_ptr,  # (batch, heads, tokens, HEAD_DIM)
    lse_ptr,  # (batch * heads, tokens), with a mask (.., 2, tokens), fp32: the softmax, +inf where no key is seen
    q_ptr, k_ptr, v_ptr,  # (batch, heads, tokens, HEAD_DIM)
    q_factor_ptr, k_factor_ptr,  # (batch, heads, tokens, RANK)
    mask_ptr,  # (masks, tokens, tokens)
    stride_out_batch, stride_out_head, stride_out_token,
    stride_q_batch, stride_q_head, stride_q_token,
    stride_k_batch, stride_k_head, stride_k_token,
    stride_v_batch, stride_v_head, stride_v_token,
    stride_qf_batch, stride_qf_head, stride_qf_token,
    stride_kf_batch, stride_kf_head, stride_kf_token,
    num_sequences, num_heads, num_tokens, num_masks, block_size, window_blocks, group, scale,
    HEAD_DIM: tl.constexpr, RANK: tl.constexpr, PATTERN: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_EDGES: tl.constexpr,
    DESCRIBED: tl.constexpr,  # k_ptr and v_ptr are descriptors
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Attend from BLOCK_M queries of one sequence, which stay, with the sums of `_walk_keys`; keys pass by.

    Without HAS_EDGES every tile of keys is seen in full.
    """
    assert_whole_tiles(num_tokens, HEAD_DIM, RANK, HAS_EDGES, DESCRIBED, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_R)
    scale = tl.cast(scale, tl.float32)  # AOTInductor's launcher has it in fp64
    num_tiles = tl.cdiv(num_tokens, BLOCK_M)
    tile, sequence = place(num_tiles, num_sequences, group)
    first_query = (num_tiles - 1 - tile) * BLOCK_M
    last_query = tl.minimum(first_query + BLOCK_M, num_tokens) - 1
    offs_m = first_query + tl.arange(0, BLOCK_M)

    q_ptr += sequence_offset(sequence, num_heads, stride_q_batch, stride_q_head)
    k_offset = sequence_offset(sequence, num_heads, stride_k_batch, stride_k_head)
    v_offset = sequence_offset(sequence, num_heads, stride_v_batch, stride_v_head)
    keys = stream(k_ptr, k_offset, stride_k_token, DESCRIBED)
    values = stream(v_ptr, v_offset, stride_v_token, DESCRIBED)
    q = load_rows(q_ptr, first_query, stride_q_token, num_tokens, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    q_factor = q
    if RANK > 0:
        q_factor_ptr += sequence_offset(sequence, num_heads, stride_qf_batch, stride_qf_head)
        k_factor_ptr += sequence_offset(sequence, num_heads, stride_kf_batch, stride_kf_head)
        q_factor = load_rows(q_factor_ptr, first_query, stride_qf_token, num_tokens, RANK, BLOCK_M, BLOCK_R, True)
    if HAS_MASK:
        mask_ptr += (sequence // num_heads % num_masks).to(tl.int64) * num_tokens * num_tokens

    bounds, visible = plan_walk(
        visible_keys, first_query, last_query, offs_m, num_tokens, block_size, window_blocks, PATTERN, BLOCK_N
    )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    maximum = tl.zeros((BLOCK_M,), tl.float32) + LOWEST / tl.maximum(scale * LOG2E, 1.0)
    for SEGMENT in tl.static_range(3):
        if SEGMENT == 1 or HAS_EDGES:
            acc, total, maximum = _walk_keys(
                (acc, total, maximum), q, q_factor, keys, values, k_factor_ptr, stride_kf_token, mask_ptr,
                bounds[SEGMENT], bounds[SEGMENT + 1], offs_m, visible, num_tokens, scale, HEAD_DIM, RANK, HAS_MASK,
                SEGMENT != 1, DESCRIBED, PRECISION, BLOCK_N, BLOCK_D, BLOCK_R,
            )  # fmt: skip

    seen = total != 0  # a query that a mask leaves without keys attends to nothing: zeros, and no gradient
    out = acc * tl.where(seen, 1.0 / total, 0.0)[:, None]
    out_ptr += sequence_offset(sequence, num_heads, stride_out_batch, stride_out_head)
    store_rows(out_ptr, out, first_query, stride_out_token, num_tokens, HEAD_DIM, BLOCK_M, BLOCK_D)
    log_total = tl.where(seen, tl.log2(total), float("inf"))
    instance = sequence.to(tl.int64)
    store_log_sum(lse_ptr, instance, offs_m, num_tokens, maximum, log_total, scale * LOG2E, HAS_MASK)
