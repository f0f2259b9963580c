"""Describe a problem of window attention: all that its launches depend on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...spec.window import Geometry
from . import devices

MAX_TOKENS, MAX_HEAD_DIM = 1024, 128


def unsupported_reason(
    device: torch.device, dtype: torch.dtype, geometry: Geometry, num_heads: int, head_dim: int, interpret: bool
) -> str | None:
    """Return why the kernels cannot serve a problem, as one sentence, or None."""
    reason = devices.unsupported_reason(device, (dtype,), interpret)
    if reason is not None:
        return reason
    if geometry.tokens > MAX_TOKENS:
        return f"a window of {'x'.join(map(str, geometry.window))} holds more than {MAX_TOKENS} tokens"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is larger than {MAX_HEAD_DIM}"
    if math.prod(geometry.size) * 3 * num_heads * head_dim >= 2**31:
        return "q, k and v of one image are 2^31 numbers or more"
    return None


def is_small(device: torch.device, dtype: torch.dtype, tokens: int, head_dim: int) -> bool:
    """Return True if forward and backward of a problem run the small-window kernels, which keep no log-sum-exp."""
    from ...kernels import launch

    return launch.is_small_backward(
        tokens=tokens, head_dim=head_dim, element_size=dtype.itemsize, shared_memory=devices.shared_memory(device)
    )


def as_3d(numbers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Return one number for each of (depth, rows, columns); flat images have that one for their depth."""
    return numbers if len(numbers) == 3 else (depth, *numbers)


def are_heads_apart(tokens: Tensor, geometry: Geometry) -> bool:
    """Return True if tokens are (B, H, W, heads, D), with an axis for the heads, rather than (B, H, W, C)."""
    return tokens.dim() == len(geometry.size) + 3


def empty_image(tokens: Tensor, geometry: Geometry, packed: bool) -> Tensor:
    """Return an empty output: (B, H, W, heads * D), or (B, H, W, heads, D) with the heads before W in memory."""
    shape, swaps_heads = image_shape(tokens.shape, geometry, packed)
    out = tokens.new_empty(shape)
    return out.transpose(-3, -2) if swaps_heads else out


def expected(number: Any) -> Any:
    """Return a size, or of a symbol the size that it was traced with, which tiles are chosen for."""
    return number.node.hint if isinstance(number, torch.SymInt) else number


def image_shape(shape: torch.Size, geometry: Geometry, packed: bool) -> tuple[tuple[int, ...], bool]:
    """Return the shape of an output in memory, and whether its axes -3 and -2 are then swapped."""
    if len(shape) == len(geometry.size) + 3:
        return (*shape[:-3], shape[-2], shape[-3], shape[-1]), True
    return (*shape[:-1], shape[-1] // 3 if packed else shape[-1]), False


def shapes_of(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple([None if one is None else one.shape for one in tensors])


class Operands(NamedTuple):
    """Tensors and numbers of one attention, in the order of the operator's schema.

    Attributes:
        qkv, k, v: q, k and v packed, or q alone where k and v are given, all with equal strides, the last one 1. Those
            may have an axis of their own for the heads, (B, H, W, heads, D), whose stride is a multiple of D.
        table: (T, heads), or (T, rows, heads) with biases that rows of windows take in turn; without index the bias
            itself, (heads, N, N) or (rows, heads, N, N).
        index, padding, mask, logit_scale: contiguous.
        seed: (1,), int64, from which the random numbers of dropout follow.
    """

    qkv: Tensor
    k: Tensor | None
    v: Tensor | None
    table: Tensor | None
    index: Tensor | None  # type: ignore[assignment]
    padding: Tensor | None
    mask: Tensor | None
    logit_scale: Tensor | None
    seed: Tensor | None
    num_heads: int
    window: Sequence[int]
    shift: Sequence[int]
    roll_first: bool
    mask_value: float
    scale: float
    dropout: float


def key_of(
    call: Operands,
    geometry: Geometry,
    table: Tensor | None,
    index: Tensor | None,
    rows: int,
    for_backward: bool,
    factors: tuple[Tensor, ...] | None = None,
    kept: tuple[torch.Size | None, ...] | None = None,
) -> tuple[Any, ...]:
    """Return what launches are kept under: three numbers of the geometry, and the fields of a `Problem` behind it.

    Tuples are compared in a fraction of a dataclass's time.

    Args:
        table, index, rows: of the call, as `bias.as_table` gives them.
        factors, kept: as the launches of forward and backward take them.
    """
    qkv, k, v, _, given, padding, mask, logit_scale, seed, num_heads, _, _, _, mask_value, scale, dropout = call
    dtype = qkv.dtype
    return (
        geometry.window, geometry.shift, geometry.roll_first, qkv.device, dtype, qkv.shape, qkv.stride(), num_heads,
        None if k is None else shapes_of(k, v), None if table is None else table.shape,
        None if table is None else table.stride(), None if index is None else index.shape,
        given is None and table is not None, rows,
        None if padding is None or not geometry.is_padded else padding.shape, None if mask is None else mask.shape,
        None if logit_scale is None else logit_scale.shape, mask_value, scale,
        None if factors is None else shapes_of(*factors[:2]), None if seed is None else seed.shape, dropout,
        for_backward, "ieee" if dtype is not torch.float32 else devices.precision(dtype),
        kept,
    )  # fmt: skip


class Problem(NamedTuple):
    """All that the launches of one attention problem depend on, and the key that they are kept under.

    Attributes:
        shape, strides: of qkv, which is packed, or of q, and then k and v have shapes; and so on, None for what is not.
        is_dense: whether table and index were made of a bias that has no index.
        bias_rows: how many biases rows of windows take in turn; a table has bias_rows * heads columns.
        kept: shapes of the output's gradient, the output and what is kept of the softmax, where this is a backward.
    """

    geometry: Geometry
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    num_heads: int
    parts: tuple[torch.Size, ...] | None
    table_shape: torch.Size | None
    table_strides: tuple[int, ...] | None
    index_shape: torch.Size | None
    is_dense: bool
    bias_rows: int
    padding_shape: torch.Size | None
    mask_shape: torch.Size | None
    logit_scale_shape: torch.Size | None
    mask_value: float
    scale: float
    factors: tuple[torch.Size, ...] | None
    seed_shape: torch.Size | None
    dropout: float
    for_backward: bool
    precision: str
    kept: tuple[torch.Size | None, ...] | None = None

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def packed(self) -> bool:
        return self.parts is None

    @property
    def channels(self) -> int:
        if self.packed:
            return self.shape[-1] // 3
        return self.shape[-1] * (self.shape[-2] if self.heads_apart else 1)

    @property
    def has_mask(self) -> bool:
        return self.mask_shape is not None

    @property
    def rank(self) -> int:
        return 0 if self.factors is None else self.factors[0][-1]

    @property
    def table_rows(self) -> int:
        return 0 if self.table_shape is None else self.table_shape[0]

    @property
    def head_dim(self) -> int:
        return self.channels // self.num_heads

    @property
    def is_small(self) -> bool:
        if not self.for_backward:
            from ...kernels import launch

            return self.geometry.tokens <= launch.SMALL_WINDOW
        return is_small(self.device, self.dtype, self.geometry.tokens, self.head_dim)

    @property
    def mask_mode(self) -> int:
        from ...kernels import tiles

        if self.has_mask:
            return tiles.MASK_TENSOR.value
        is_computed = self.geometry.is_shifted and self.mask_value and self.kinds == 1
        return (tiles.MASK_REGIONS if is_computed else tiles.MASK_NONE).value

    @property
    def kinds(self) -> int:
        """Return how many dense biases each head has, for windows that differ in the mask that they hold.

        In 16 bits bias and mask are rounded together, which must not matter: those weights are next to nothing.
        """
        from ...kernels import launch, tiles

        is_masked = self.geometry.is_shifted and self.mask_value < 0 and not self.has_mask
        if not is_masked or self.bias_mode != tiles.BIAS_DENSE.value or self.bias_rows > 1:
            return 1
        return launch.mask_kinds(
            tokens=self.geometry.tokens, axes=len(self.geometry.size), num_heads=self.num_heads,
            windows=self.geometry.num_windows * expected(self.batch), cosine=self.logit_scale_shape is not None,
        )  # fmt: skip

    @property
    def bias_mode(self) -> int:
        from ...kernels import tiles

        if self.table_strides is None:
            return tiles.BIAS_NONE.value
        if self.is_small:
            return tiles.BIAS_TABLE.value
        return (tiles.BIAS_FACTORS if self.rank else tiles.BIAS_DENSE).value

    @property
    def is_bounded(self) -> bool:
        """Return True if large windows take weights below a bound of their scores, which saves the running maximum.

        Attention dropout would need room above that bound.
        """
        from ...kernels import tiles

        is_cosine = self.logit_scale_shape is not None and self.dtype.itemsize == 2 and self.dropout == 0.0
        modes = self.mask_mode == tiles.MASK_NONE.value, self.bias_mode != tiles.BIAS_FACTORS.value
        return is_cosine and all(modes)

    @property
    def image_strides(self) -> tuple[int, ...]:
        """Return strides of the token images, (batch, depth, row, column, head), those of q, k, v first.

        From head to head the kernels count in heads, so that neighbours, which are one apart, are nothing to compute.
        """
        height, width = self.geometry.size[-2:]
        axes, rows = len(self.geometry.size), width * self.channels
        col, head = (self.head_dim, width) if self.heads_apart else (self.channels, 1)
        out = (math.prod(self.geometry.size) * self.channels, height * rows, rows, col, head)
        token_head = self.strides[axes + 1] // self.head_dim if self.heads_apart else 1
        return (self.strides[0], *as_3d(self.strides[1 : axes + 1], 0), token_head, *out)

    @property
    def heads_apart(self) -> bool:
        return len(self.strides) == len(self.geometry.size) + 3

    @property
    def window(self) -> tuple[int, ...]:
        return as_3d(self.geometry.window, 1)

    @property
    def is_volume(self) -> bool:
        return len(self.geometry.size) == 3

    @property
    def runtime_args(self) -> tuple[Any, ...]:
        geometry = self.geometry
        numbers = (self.scale, self.mask_value, self.dropout)
        sizes = (*as_3d(geometry.size, 1), *as_3d(geometry.grid, 1))
        return (*sizes, *as_3d(geometry.shift, 0), *as_3d(geometry.roll, 0), *numbers)

    @property
    def constexprs(self) -> tuple[Any, ...]:
        flags = (self.padding_shape is not None, self.geometry.roll_first, self.dropout > 0)
        is_cosine = self.logit_scale_shape is not None
        shape = (self.window, self.is_volume, self.head_dim, self.packed, is_cosine)
        return (*shape, self.bias_mode, self.bias_rows, self.mask_mode, *flags)

    def dense(self, block_m: int, block_n: int) -> tuple[tuple[int, int, int], torch.dtype]:
        """Return shape and dtype of the dense bias: rows and columns of whole tiles; for 16-bit compute fp16, since
        bf16 would round it eight times coarser.
        """
        tokens = self.geometry.tokens
        rows, cols = -(-tokens // block_m) * block_m, -(-tokens // block_n) * block_n
        shape = self.bias_rows * self.kinds * self.num_heads, rows, cols
        return shape, torch.float32 if self.dtype == torch.float32 else torch.float16
