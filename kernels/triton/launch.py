"""From the shape of a problem to the shape of a launch. Plain arithmetic: no device is asked, nothing is tuned.

The numbers were chosen by measurement on an H200 at head_dim 32 (docs/benchmarks.md); what must hold elsewhere is
that a launch fits `shared_memory`, which the caller reads from the device.
"""

from dataclasses import dataclass

SMALL_WINDOW = 64  # the most tokens whose scores fit one tile

# Images are chained in one program, which loads bias and mask once and pipelines the rest, down to about this many
# programs: four for each multiprocessor of a large GPU.
_PROGRAMS_WANTED = 512


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
    """Launch of the large-window kernel: query tile, key tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


def power_of_two(value: int, least: int = 16) -> int:
    """The smallest power of two that is at least `value` and `least`."""
    return max(least, 1 << (value - 1).bit_length())


def small(
    *, tokens: int, head_dim: int, batch: int, positions: int, element_size: int, shared_memory: int
) -> SmallLaunch:
    """Launch for windows of at most SMALL_WINDOW tokens; `positions` is windows per image times heads."""
    block_n = power_of_two(tokens)
    block_d = power_of_two(head_dim)
    images = max(1, min(32, batch, positions * batch // _PROGRAMS_WANTED))
    stage = 3 * block_n * block_d * element_size
    scratch = block_n * max(block_n, block_d) * 4
    num_stages = max(1, min(3 if images > 1 else 1, (shared_memory - scratch) // stage))
    num_warps = 4 if block_n * max(block_n, block_d) >= 4096 else 2
    return SmallLaunch(block_n, block_d, images, num_warps, num_stages)


def large(*, tokens: int, head_dim: int, element_size: int, shared_memory: int) -> LargeLaunch:
    """Launch for windows of more than SMALL_WINDOW tokens."""
    block_d = power_of_two(head_dim)
    fits = tokens % 128 == 0 and element_size == 2 and block_d <= 64
    block_m, block_n = 128 if fits else 64, 32
    stage = 2 * block_n * block_d * element_size
    scratch = block_m * block_d * element_size + block_m * block_n * 4
    num_stages = max(1, min(3, (shared_memory - scratch) // stage))
    return LargeLaunch(block_m, block_n, block_d, 4, num_stages)
