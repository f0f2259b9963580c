"""From the shape of a sequence problem to the shape of a launch; see `launch` for what holds for both.

A launch is the first of a short list, best first, that fits the shared memory. The order was measured on an H200 at
head_dim 64 (docs/benchmarks.md).
"""

from collections.abc import Callable
from dataclasses import dataclass

from .launch import power_of_two

# Bytes of keys and values that a group of sequences may span, so that they stay in the cache while tiles of queries
# take turns: about a third of what a large GPU has.
_CACHE = 16 << 20


@dataclass(frozen=True)
class SequenceLaunch:
    """Launch of a sequence kernel: query tile, key tile, padded head_dim and rank, warps, pipeline stages."""

    block_m: int
    block_n: int
    block_d: int
    block_r: int
    num_warps: int
    num_stages: int


# (block_m, block_n, num_warps, num_stages), for 16 bits an element and for 32.
_FORWARD = {
    2: ((128, 64, 4, 3), (128, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1), (16, 16, 2, 1)),
    4: ((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1), (16, 16, 2, 1)),
}
_QUERY = {
    2: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1), (16, 16, 2, 1)),
    4: ((32, 32, 4, 2), (32, 32, 4, 1), (16, 16, 2, 1)),
}
_KEY = {
    2: ((64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2), (32, 32, 4, 1), (16, 16, 2, 1)),
    4: ((32, 32, 4, 2), (32, 32, 4, 1), (16, 16, 2, 1)),
}


def forward(
    *, head_dim: int, rank: int, element_size: int, factor_size: int, has_mask: bool, shared_memory: int
) -> SequenceLaunch:
    """Launch of the forward: q stays, k and v pass through the pipeline."""

    def used(block_m: int, block_n: int, block_d: int, factor: int, num_stages: int) -> int:
        row = block_d * element_size
        mask = 4 * block_n * block_m if has_mask else 0
        return block_m * (row + factor) + num_stages * (block_n * (2 * row + factor) + mask)

    return _first(_FORWARD[element_size], used, head_dim, rank, factor_size, shared_memory)


def grad_query(
    *, head_dim: int, rank: int, element_size: int, factor_size: int, has_mask: bool, shared_memory: int
) -> SequenceLaunch:
    """Launch of the backward's first kernel: q and the output's gradient stay, k and v pass."""

    def used(block_m: int, block_n: int, block_d: int, factor: int, num_stages: int) -> int:
        row = block_d * element_size
        scratch = 4 * block_m * block_n if element_size == 4 or factor else 0
        mask = 4 * block_n * block_m if has_mask else 0
        return block_m * (2 * row + factor) + num_stages * (block_n * (2 * row + factor) + mask) + scratch

    return _first(_QUERY[element_size], used, head_dim, rank, factor_size, shared_memory)


def grad_key(
    *, head_dim: int, rank: int, element_size: int, factor_size: int, has_mask: bool, shared_memory: int
) -> SequenceLaunch:
    """Launch of the backward's second kernel: k and v stay, q and the output's gradient pass."""

    def used(block_m: int, block_n: int, block_d: int, factor: int, num_stages: int) -> int:
        row = block_d * element_size
        scratch = 4 * block_m * block_n if element_size == 4 or factor else 0
        mask = 4 * block_n * block_m if has_mask else 0
        return block_n * (2 * row + factor) + num_stages * (block_m * (2 * row + factor + 8) + mask) + scratch

    return _first(_KEY[element_size], used, head_dim, rank, factor_size, shared_memory)


def _first(
    shapes: tuple[tuple[int, int, int, int], ...],
    used: Callable[[int, int, int, int, int], int],
    head_dim: int,
    rank: int,
    factor_size: int,
    shared_memory: int,
) -> SequenceLaunch:
    block_d, block_r = power_of_two(head_dim), power_of_two(max(rank, 1))
    factor = block_r * factor_size if rank else 0
    for block_m, block_n, num_warps, num_stages in shapes:
        if used(block_m, block_n, block_d, factor, num_stages) <= shared_memory:
            break
    return SequenceLaunch(block_m, block_n, block_d, block_r, num_warps, num_stages)


def sequences_per_group(*, span: int, head_dim: int, element_size: int, num_sequences: int) -> int:
    """How many sequences (batch and head) take turns tile by tile, where a tile sees up to `span` keys."""
    return max(1, min(num_sequences, _CACHE // max(1, 2 * span * head_dim * element_size)))
