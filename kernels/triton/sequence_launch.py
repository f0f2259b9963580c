"""From the shape of a sequence problem to the shape of a launch; see `launch` for what holds for both.

A launch is the one measured best for its kind of problem on an H200 (docs/notes.md), or the first of ever smaller
ones that fits the shared memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import power_of_two

# Bytes of keys and values that a group of sequences may span, so that they stay in the cache while tiles of queries
# take turns: about a third of what a large GPU has.
_CACHE = 16 << 20

# (block_m, block_n, num_warps, num_stages)
_Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class SequenceLaunch:
    """Launch of a sequence kernel: query tile, key tile, padded head_dim and rank, warps, pipeline stages.

    With `max_registers` the compiler is held to so many, which lets one more program onto a multiprocessor.
    """

    block_m: int
    block_n: int
    block_d: int
    block_r: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# With descriptors, at head_dim 64 in 16 bits, where they were measured.
DESCRIBED_HEAD_DIM = 64
DESCRIBED_FORWARD = SequenceLaunch(64, 128, 64, 16, 4, 2)
DESCRIBED_QUERY = SequenceLaunch(64, 64, 64, 16, 4, 3)
DESCRIBED_KEY = SequenceLaunch(64, 64, 64, 16, 4, 2, max_registers=168)


def _smaller(element_size: int) -> tuple[_Shape, ...]:
    if element_size == 4:
        return (32, 32, 8, 2), (32, 32, 8, 1), (16, 16, 4, 1)
    return (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1), (16, 16, 2, 1)


def _scratch(element_size: int, factor_size: int, has_mask: bool) -> int:
    """Return the bytes for each score that changes its layout through memory, for a product of fp32 or from a mask."""
    return 8 if max(element_size, factor_size) == 4 else 4 * has_mask


def forward(
    *, head_dim: int, rank: int, element_size: int, factor_size: int, has_mask: bool, shared_memory: int
) -> SequenceLaunch:
    """Launch of the forward: q stays, k and v pass through the pipeline."""
    scratch = _scratch(element_size, factor_size, has_mask)

    def used(block_m: int, block_n: int, block_d: int, factor: int, num_stages: int) -> int:
        row = block_d * element_size
        passing = num_stages * block_n * (2 * row + factor + 4 * has_mask * block_m)
        return block_m * (row + factor) + passing + scratch * block_m * block_n

    if element_size == 4:
        best = (32, 32, 8, 2) if rank or head_dim > 64 else (64, 64, 4, 2)
    elif 32 < head_dim <= 64:
        best = (128, 64, 4 if rank and factor_size == 4 else 8, 2 if rank else 3)
    else:
        best = (64, 64, 4, 3)
    return _first((best, *_smaller(element_size)), used, head_dim, rank, factor_size, shared_memory)


def grad_query(
    *, head_dim: int, rank: int, element_size: int, factor_size: int, has_mask: bool, shared_memory: int
) -> SequenceLaunch:
    """Launch of the backward's first kernel: q and the output's gradient stay, k and v pass."""
    scratch = _scratch(element_size, factor_size, has_mask)

    def used(block_m: int, block_n: int, block_d: int, factor: int, num_stages: int) -> int:
        row = block_d * element_size
        passing = num_stages * block_n * (2 * row + factor + 4 * has_mask * block_m)
        return block_m * (2 * row + factor) + passing + scratch * block_m * block_n

    if element_size == 4:
        best = (32, 32, 8, 2) if rank or head_dim > 64 else (32, 64, 4, 2)
    elif rank:
        best = (64, 32, 4, 3)
    else:
        best = (64, 64, 4, 3 if head_dim <= 64 else 2)
    return _first((best, *_smaller(element_size)), used, head_dim, rank, factor_size, shared_memory)


def grad_key(
    *, head_dim: int, rank: int, element_size: int, factor_size: int, has_mask: bool, shared_memory: int
) -> SequenceLaunch:
    """Launch of the backward's second kernel: k and v stay, q and the output's gradient pass."""
    scratch = _scratch(element_size, factor_size, has_mask)

    def used(block_m: int, block_n: int, block_d: int, factor: int, num_stages: int) -> int:
        row = block_d * element_size
        passing = num_stages * block_m * (2 * row + factor + 8 + 4 * has_mask * block_n)
        return block_n * (2 * row + factor) + passing + scratch * block_m * block_n

    if element_size == 4:
        best = (32, 32, 8, 2) if rank or head_dim > 64 else (64, 32, 4, 2)
    else:
        best = (64, 64, 4, 3 if head_dim <= 64 and not rank else 2)
    return _first((best, *_smaller(element_size)), used, head_dim, rank, factor_size, shared_memory)


def _first(
    shapes: tuple[_Shape, ...],
    used: Callable[[int, int, int, int, int], int],
    head_dim: int,
    rank: int,
    factor_size: int,
    shared_memory: int,
) -> SequenceLaunch:
    block_d, block_r = power_of_two(head_dim), power_of_two(max(rank, 1))
    factor = block_r * factor_size if rank else 0
    fitting = (shape for shape in shapes if used(*shape[:2], block_d, factor, shape[3]) <= shared_memory)
    block_m, block_n, num_warps, num_stages = next(fitting, shapes[-1])
    return SequenceLaunch(block_m, block_n, block_d, block_r, num_warps, num_stages)


def sequences_per_group(*, span: int, head_dim: int, element_size: int, num_sequences: int) -> int:
    """Return how many sequences (batch and head) take turns tile by tile, where a tile sees up to `span` keys."""
    return max(1, min(num_sequences, _CACHE // max(1, 2 * span * head_dim * element_size)))


def describe(tensor: Any, rows: int) -> TensorDescriptor:
    """Return the descriptor of a tensor (batch, heads, tokens, D) for tiles of `rows` tokens.

    It has rows as long as the step from token to token: they hold a token's one head where heads come first in memory,
    all of its heads where tokens do, and q and v too of a packed projection.
    """
    (batch, head, token, _), (batches, heads, tokens, width) = tensor.stride(), tensor.shape
    length = ((batches - 1) * batch + (heads - 1) * head) // token + tokens
    return TensorDescriptor(tensor, [length, token], [token, 1], [rows, width])
