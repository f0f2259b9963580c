"""From the shape of a sequence problem to the shape of a launch; see `launch` for what holds for both.

A launch is the one measured best for its kind of problem on an H200 (docs/notes.md), or the first of ever smaller
ones that fits the shared memory.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

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


class Sizes(NamedTuple):
    """Sizes that a launch is chosen by; of elements and the shared memory in bytes."""

    head_dim: int
    rank: int
    element_size: int
    factor_size: int
    has_mask: bool
    shared_memory: int


# With descriptors, at head_dim 64 in 16 bits, where they were measured.
DESCRIBED_HEAD_DIM = 64
DESCRIBED_FORWARD = SequenceLaunch(64, 128, 64, 16, 4, 2)
DESCRIBED_QUERY = SequenceLaunch(64, 64, 64, 16, 4, 3)
DESCRIBED_KEY = SequenceLaunch(64, 64, 64, 16, 4, 2, max_registers=168)


def forward(sizes: Sizes) -> SequenceLaunch:
    """Launch of the forward: q stays, k and v pass through the pipeline."""
    if sizes.element_size == 4:
        best = (32, 32, 8, 2) if sizes.rank or sizes.head_dim > 64 else (64, 64, 4, 2)
    elif 32 < sizes.head_dim <= 64:
        best = (128, 64, 4 if sizes.rank and sizes.factor_size == 4 else 8, 2 if sizes.rank else 3)
    else:
        best = (64, 64, 4, 3)
    return _first((best, *_smaller(sizes)), sizes, 1)


def grad_query(sizes: Sizes) -> SequenceLaunch:
    """Launch of the backward's first kernel: q and the output's gradient stay, k and v pass."""
    if sizes.element_size == 4:
        best = (32, 32, 8, 2) if sizes.rank or sizes.head_dim > 64 else (32, 64, 4, 2)
    elif sizes.rank:
        best = (64, 32, 4, 3)
    else:
        best = (64, 64, 4, 3 if sizes.head_dim <= 64 else 2)
    return _first((best, *_smaller(sizes)), sizes, 2)


def grad_key(sizes: Sizes) -> SequenceLaunch:
    """Launch of the backward's second kernel: k and v stay, q and the output's gradient pass."""
    if sizes.element_size == 4:
        best = (32, 32, 8, 2) if sizes.rank or sizes.head_dim > 64 else (64, 32, 4, 2)
    else:
        best = (64, 64, 4, 3 if sizes.head_dim <= 64 and not sizes.rank else 2)
    return _first((best, *_smaller(sizes)), sizes, 2, True)


def _smaller(sizes: Sizes) -> tuple[_Shape, ...]:
    if sizes.element_size == 4:
        return (32, 32, 8, 2), (32, 32, 8, 1), (16, 16, 4, 1)
    return (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1), (16, 16, 2, 1)


def _first(shapes: tuple[_Shape, ...], sizes: Sizes, staying: int, keys_stay: bool = False) -> SequenceLaunch:
    """Return the first of the shapes that fits the shared memory.

    Args:
        staying: tensors of which a tile stays; of two others, and of what belongs to their tokens, tiles pass.
        keys_stay: they are of the keys, and those that pass of the queries, with two vectors.
    """
    block_d, block_r = power_of_two(sizes.head_dim), power_of_two(max(sizes.rank, 1))
    row, factor = block_d * sizes.element_size, block_r * sizes.factor_size if sizes.rank else 0
    # Bytes for each score that changes its layout through memory, for a product of fp32 or from a mask.
    scratch = 8 if max(sizes.element_size, sizes.factor_size) == 4 else 4 * sizes.has_mask

    def used(block_m: int, block_n: int, num_stages: int) -> int:
        own, others = (block_n, block_m) if keys_stay else (block_m, block_n)
        passing = num_stages * others * (2 * row + factor + 8 * keys_stay + 4 * sizes.has_mask * own)
        return own * (staying * row + factor) + passing + scratch * block_m * block_n

    fitting = (shape for shape in shapes if used(*shape[:2], shape[3]) <= sizes.shared_memory)
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
