"""Launches of what stands around the attention. Chosen by measurement on an H200 (docs/notes.md)."""

from functools import partial
from typing import Any, NamedTuple

from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import power_of_two

_NUMBERS = 2048  # that a program holds of each tensor
GELU_BLOCK = 2048
NORM_WARPS, MERGE_WARPS, GELU_WARPS = 4, 2, 4
COLUMNS, COLUMN_ROWS, BACKWARD_WARPS = 128, 16, 4  # of a program that sums over rows
PARTS_COLUMNS, PARTS_ROWS, PARTS_WARPS = 16, 256, 8  # of one that adds up what those have summed
_BACKWARD_PROGRAMS = 8  # on a multiprocessor

MLP_CHANNELS = 128  # at most; beyond, products of their own are faster

EMBED_CHANNELS, EMBED_NUMBERS = 512, 256  # of a token, and of a patch, at most: what keeps a program in registers


class RowsLaunch(NamedTuple):
    """Rows of a program, and the channels that it has room for."""

    rows: int
    block_c: int


class MlpLaunch(NamedTuple):
    """Launch of the kernel for all that follows the attention."""

    block_m: int
    block_c: int
    block_h: int
    num_warps: int
    num_stages: int


class LinearLaunch(NamedTuple):
    """Launch of a product with descriptors: tiles, tiles of rows that go together, programs on a multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    programs: int
    num_warps: int
    num_stages: int


# Best or next to it of thirteen for the sizes of Swin's stages, from 1,568 rows of 512 channels to 50,176 of 256.
LINEAR_GELU = LinearLaunch(128, 128, 64, 8, 2, 8, 3)
# Without GELU, of six. With more channels, or where tiles are far from full, PyTorch's products are faster.
LINEAR = LinearLaunch(128, 128, 64, 8, 2, 4, 3)
_CHANNELS, _SQUARE_CHANNELS, _WASTE = 384, 256, 1.15
# The same of eight for few rows, such as those of one image: a tile for each program, and few steps to its end.
LINEAR_GELU_FEW = LinearLaunch(64, 64, 128, 8, 2, 4, 3)
_FEW_CHANNELS = 512  # at most; beyond, PyTorch's products, which share a long sum among programs, are faster


# Few rows: of them, and rows times channels squared, at most. One image of swin_base and swinv2_base, two of swin_tiny.
# With twice as many swin_base is slower by them: programs of PyTorch's products share what they load.
_FEW, _FEW_WORK = 8192, 2**26
# Rows and columns of tiles, widest first, and how many are enough; of parts of a long sum there are to be more.
_FEW_ROWS, _FEW_COLUMNS, _FEW_TILES, _FEW_PARTS = 64, (128, 64, 32), 40, 96

# Products of 8 bits, and how many registers a thread may have: best or within 4 % of the best of eleven with GELU, of
# four with a sum and of three with neither, from 3,136 rows of 1,024 channels to 50,176 of 256.
LINEAR8, LINEAR8_REGISTERS = LinearLaunch(128, 128, 128, 8, 2, 8, 3), 128


class FewLaunch(NamedTuple):
    """Launch of a product of few rows: tiles, and the parts of its sums that have programs of their own."""

    block_m: int
    block_n: int
    block_k: int
    parts: int
    num_warps: int
    num_stages: int


class EmbedLaunch(NamedTuple):
    """Launch of the patch embedding."""

    block_m: int
    block_c: int
    block_k: int
    num_warps: int
    num_stages: int


def rows(channels: int) -> RowsLaunch:
    block_c = power_of_two(channels)
    return RowsLaunch(max(1, _NUMBERS // block_c), block_c)


def merged_rows(tokens: int, channels: int) -> RowsLaunch:
    """Return the rows of a program that merges patches of so many channels; tokens are counted in 32 bits."""
    if tokens >= 2**31 - _NUMBERS:
        raise ValueError(f"{tokens} tokens are more than the kernel counts")
    return rows(4 * channels)


def quantise_warps(block_c: int) -> int:
    """Return how many warps hold rows with room for so many channels, each of which has to be there as a whole."""
    return 4 if block_c <= 2 * _NUMBERS else 8


def backward_programs(tiles: int, multiprocessors: int) -> int:
    """Return how many programs share that many tiles of rows."""
    return max(1, min(tiles, _BACKWARD_PROGRAMS * multiprocessors))


def mlp(*, channels: int, hidden: int, element_size: int, shared_memory: int) -> MlpLaunch | None:
    """Launch for C channels and as many hidden ones, or None where products of their own are to be preferred."""
    block_m, block_c, block_h = 64, power_of_two(channels), 32 if channels > 96 else 64
    if channels > MLP_CHANNELS or channels % 16 or hidden % block_h:
        return None
    own, stage = (block_m * block_c + block_m * block_h) * element_size, 2 * block_h * block_c * element_size
    num_stages = min(3, (shared_memory - own) // stage)
    return MlpLaunch(block_m, block_c, block_h, 4, num_stages) if num_stages >= 1 and element_size == 2 else None


def linear_gelu(
    *, rows: int, channels: int, outputs: int, multiprocessors: int, keeps: bool = False
) -> tuple[LinearLaunch, int] | None:
    """Launch and programs of the first product and GELU; None where PyTorch's and a kernel for GELU are faster.

    Args:
        keeps: what GELU is computed of is kept for a backward, whose rows are many.
    """

    def tiles(launch: LinearLaunch) -> int:
        if channels % launch.block_k or outputs % launch.block_n:
            return 0
        return -(-rows // launch.block_m) * (outputs // launch.block_n)

    many = LINEAR_GELU._replace(block_k=32) if keeps and channels % LINEAR_GELU.block_k else LINEAR_GELU
    programs = many.programs * multiprocessors
    if tiles(many) >= programs:
        return many, programs
    if keeps:
        return None
    few, most = tiles(LINEAR_GELU_FEW), LINEAR_GELU_FEW.programs * multiprocessors
    if most // 3 < few <= most and channels <= _FEW_CHANNELS:
        return LINEAR_GELU_FEW, few
    return None


def are_few(rows: int, channels: int) -> bool:
    """Return True if tokens are so few that what counts is how soon one kernel follows another."""
    return rows <= _FEW and rows * channels**2 <= _FEW_WORK


def few(*, rows: int, channels: int, outputs: int, may_part: bool = False) -> tuple[FewLaunch, int] | None:
    """Launch and tiles of a product of few rows; None where tiles do not divide its sizes.

    Args:
        may_part: sums may be left in parts, where tiles alone are not enough.
    """
    down, block_k = -(-rows // _FEW_ROWS), next((one for one in (128, 64, 32) if channels % one == 0), None)
    widest = 128 if channels > 128 and not may_part else 64
    columns = [one for one in _FEW_COLUMNS if outputs % one == 0 and one <= widest]
    if block_k is None or not columns:
        return None
    enough = [one for one in columns if may_part or down * (outputs // one) >= _FEW_TILES]
    block_n = enough[0] if enough else columns[-1]
    if block_n > 64:
        block_k = min(block_k, 64)
    tiles, parts = down * (outputs // block_n), 1
    while may_part and tiles * parts < _FEW_PARTS and channels % (2 * parts * block_k) == 0:
        parts *= 2
    return FewLaunch(_FEW_ROWS, block_n, block_k, parts, 4, 3 if (block_n, block_k) == (64, 128) else 4), tiles


def linear(*, rows: int, channels: int, outputs: int, multiprocessors: int) -> tuple[LinearLaunch, int] | None:
    """Launch and programs of a product of many rows, with a sum or without; None where PyTorch's is faster."""
    columns, programs = -(-outputs // LINEAR.block_n), LINEAR.programs * multiprocessors
    if channels % 8 or outputs % 8 or -(-rows // LINEAR.block_m) * columns < programs:
        return None  # rows do not begin where descriptors can, or are few
    is_full = columns == 1 or columns * LINEAR.block_n <= _WASTE * outputs
    most = _SQUARE_CHANNELS if channels == outputs else _CHANNELS
    return (LINEAR, programs) if is_full and channels <= most else None


def describe(matrix: Any, block: tuple[int, int]) -> TensorDescriptor:
    """Return the descriptor of a contiguous tensor (..., columns) for tiles of so many rows and columns."""
    columns = matrix.shape[-1]
    return TensorDescriptor(matrix, [matrix.numel() // columns, columns], [columns, 1], list(block))


def describers(tiles: dict[int, tuple[int, int]]) -> dict[int, Any]:
    """Return what describes tensors, by their places in a launch, for tiles of these sizes."""
    return {place: partial(describe, block=tile) for place, tile in tiles.items()}


def embed(*, channels: int, numbers: int) -> EmbedLaunch | None:
    """Launch for patches of so many numbers that become C channels, or None where the convolution is to be preferred.

    A program reads all of the weight anew, so that it takes as many patches as its registers hold.
    """
    block_c = power_of_two(channels)
    if channels > EMBED_CHANNELS or numbers > EMBED_NUMBERS:
        return None
    return EmbedLaunch(64 if block_c <= 256 else 32, block_c, 16, 4 if block_c <= 128 else 8, 3)
