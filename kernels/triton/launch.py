"""From the shape of a problem to the shape of a launch. Plain arithmetic: no device is asked.

The numbers were chosen by measurement on an H200 at head_dim 32 (docs/notes.md); what must hold elsewhere is
that a launch fits `shared_memory`, which the caller reads from the device.
"""

from dataclasses import dataclass
from typing import NamedTuple

SMALL_WINDOW = 64  # the most tokens whose scores fit one tile

# Images are chained in one program, which loads bias and mask once and pipelines the rest, down to about this many
# programs: four for each multiprocessor of a large GPU.
_PROGRAMS_WANTED = 512

# A program of the bias gradient writes a whole tile of it, to be added up later: as few as keep a large GPU busy.
_BACKWARD_PROGRAMS = 512

_DENSE_NUMBERS = 1 << 24  # in dense biases with their masks: 32 MiB in 16 bits


@dataclass(frozen=True)
class SmallLaunch:
    """Launch of the small-window kernel: tile sizes, images per program, warps, pipeline stages."""

    block_n: int
    block_d: int
    images: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class LargeLaunch:
    """Launch of a large-window kernel: query tile, key tile, warps, pipeline stages, registers of a thread at most.

    Fewer registers let more programs share a multiprocessor, which hides the latency of their short loops.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    images: int = 1


@dataclass(frozen=True)
class SmallBackwardLaunch(SmallLaunch):
    """Launch of the small-window backward: also window positions per program."""

    windows: int


class LargeBackwardLaunch(NamedTuple):
    """Launches of the large-window backward: of dQ, of dK and dV, of dB."""

    query: LargeLaunch
    key: LargeLaunch
    bias: LargeLaunch


def power_of_two(value: int) -> int:
    """Return the smallest power of two that is at least `value`, and 16, the shortest side of a product."""
    return max(16, 1 << (value - 1).bit_length())


def small(
    *, tokens: int, head_dim: int, batch: int, positions: int, element_size: int, shared_memory: int
) -> SmallLaunch:
    """Launch for windows of at most SMALL_WINDOW tokens; `positions` is windows per image times heads."""
    block_n = power_of_two(tokens)
    block_d = power_of_two(head_dim)
    images = max(1, min(32, batch, round(positions * batch / _PROGRAMS_WANTED)))
    stage = 3 * block_n * block_d * element_size
    scratch = block_n * max(block_n, block_d) * 4
    num_stages = max(1, min(3 if images > 1 else 1, (shared_memory - scratch) // stage))
    num_warps = 4 if block_n * max(block_n, block_d) >= 4096 else 2
    return SmallLaunch(block_n, block_d, images, num_warps, num_stages)


def mask_kinds(*, tokens: int, axes: int, num_heads: int, windows: int, cosine: bool) -> int:
    """Return how many dense biases a head has: one, or one with its mask for each kind of shifted windows.

    Those are written at every call, which pays where many windows read them; with cosine scores sooner, see
    `softmax.bound_of`.

    Args:
        axes: that windows have.
        windows: of all images.
    """
    kinds = 2**axes
    is_worth = windows >= (16 if cosine else 128) * kinds
    return kinds if is_worth and kinds * num_heads * tokens * tokens <= _DENSE_NUMBERS else 1


def large(
    *, tokens: int, head_dim: int, batch: int, positions: int, element_size: int, shared_memory: int
) -> LargeLaunch:
    """Launch for windows of more than SMALL_WINDOW tokens; `positions` is windows per image times heads."""
    block_d = power_of_two(head_dim)
    block_m, block_n, num_stages = 64, 32, 3
    programs = -(-tokens // block_m) * positions * batch
    pairs = element_size == 2 and block_d <= 32 and batch > 1 and programs >= 2 * _PROGRAMS_WANTED
    images = 2 if pairs else 1

    def needed() -> int:
        """Return the bytes for q, in fp32 the output too, and in each stage k, v and, at worst, bias and a mask."""
        own = block_m * block_d * (8 if element_size == 4 else element_size)
        stage = images * 2 * block_n * block_d * element_size + block_m * block_n * (4 + element_size)
        return images * own + num_stages * stage

    while num_stages > 1 and needed() > shared_memory:
        num_stages -= 1
    while block_m > 16 and needed() > shared_memory:
        block_m, block_n = block_m // 2, max(16, block_n // 2)
    return LargeLaunch(block_m, block_n, block_d, 4, num_stages, 128 if pairs else None, images)


def is_small_backward(*, tokens: int, head_dim: int, element_size: int, shared_memory: int) -> bool:
    """Return True if a problem is one for the small-window backward, which holds all of a window at once."""
    if tokens > SMALL_WINDOW:
        return False
    return _small_backward_stage(power_of_two(tokens), power_of_two(head_dim), element_size) <= shared_memory


def _small_backward_stage(block_n: int, block_d: int, element_size: int) -> int:
    """Return bytes of shared memory of the small-window backward, unpipelined: q, k, v, dO, two tiles of scores."""
    return (4 * block_n * block_d + 2 * block_n * block_n) * element_size


def small_backward(
    *, tokens: int, head_dim: int, batch: int, windows: int, num_heads: int, element_size: int, shared_memory: int
) -> SmallBackwardLaunch:
    """Launch of the backward for windows of at most SMALL_WINDOW tokens.

    Every program writes one bias gradient (N, N), so programs are few, and each takes many images.
    """
    block_n, block_d = power_of_two(tokens), power_of_two(head_dim)
    chunk, images = bias_chunk(tiles=num_heads, windows=windows, batch=batch)
    stage = _small_backward_stage(block_n, block_d, element_size)
    num_stages = max(1, min(3, shared_memory // stage))
    return SmallBackwardLaunch(block_n, block_d, images, 4, num_stages, chunk)


def bias_chunk(*, tiles: int, windows: int, batch: int) -> tuple[int, int]:
    """Return window positions of a program of the bias gradient, and images of each: for `_BACKWARD_PROGRAMS` or so."""
    parts = max(1, _BACKWARD_PROGRAMS // tiles)
    if parts <= windows:
        return -(-windows // parts), max(1, batch)
    return 1, max(1, -(-batch // (parts // windows)))


def large_backward(*, tokens: int, head_dim: int, element_size: int, shared_memory: int) -> LargeBackwardLaunch:
    """Return launches of the three backward kernels for windows of more than SMALL_WINDOW tokens."""
    block_d = power_of_two(head_dim)

    def fit(block_m: int, block_n: int, num_stages: int, max_registers: int | None = None) -> LargeLaunch:
        def needed(tiles: int) -> int:
            return tiles * (block_m + block_n) * block_d * element_size + block_m * block_n * (4 + element_size)

        while needed(2) > shared_memory and block_m * block_n > 256:
            block_m, block_n = max(16, block_m // 2), max(16, block_n // 2)
        while num_stages > 1 and needed(2 * num_stages) > shared_memory:
            num_stages -= 1
        return LargeLaunch(block_m, block_n, block_d, 4, num_stages, max_registers)

    if element_size == 4 or block_d > 64:
        return LargeBackwardLaunch(fit(32, 32, 1), fit(32, 32, 1), fit(32, 32, 1))
    if block_d > 32:
        return LargeBackwardLaunch(fit(64, 32, 2), fit(32, 64, 2), fit(64, 32, 2))
    if tokens % 64 == 0:
        return LargeBackwardLaunch(fit(64, 64, 3, 168), fit(64, 64, 3, 168), fit(64, 32, 3, 168))
    return LargeBackwardLaunch(fit(64, 32, 3, 128), fit(32, 64, 3, 128), fit(64, 32, 3, 128))
