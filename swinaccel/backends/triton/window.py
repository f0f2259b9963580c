"""Launch the forward of window attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...spec.window import Geometry
from . import devices
from .bias import as_table, compare, expand
from .checks import check_shapes, lse_shape
from .launches import BoundLaunch, Launch, keep, launches
from .problem import Operands, Problem, as_3d, expected, image_shape, key_of

_CHECKS = 32  # programs that look over one window's mask


def registers_of(large: Any) -> dict[str, Any]:
    """Return the launch option that holds the compiler to so many registers; AMD's has none."""
    return {"maxnreg": large.max_registers} if large.max_registers and torch.version.hip is None else {}


class Forward:
    """The launches of one forward, and what it needs allocated: `run` looks at no shape any more."""

    __slots__ = ("attention", "check", "checks_shape", "dense", "expand", "for_backward", "is_empty",
                 "is_small", "largest_shape", "lse_shape", "out_shape", "swaps_heads")  # fmt: skip

    def __init__(self, problem: Problem) -> None:
        from ...kernels import bias as bias_kernels
        from ...kernels import launch, tiles, window_fwd, window_fwd_large

        check_shapes(problem)
        geometry, tokens = problem.geometry, problem.geometry.tokens
        self.is_small, self.for_backward = problem.is_small, problem.for_backward
        self.out_shape, self.swaps_heads = image_shape(problem.shape, geometry, problem.packed)
        self.is_empty = 0 in map(expected, self.out_shape)
        self.check: Any = None
        self.expand: Any = None
        self.largest_shape: Any = None
        self.checks_shape = (geometry.num_windows, _CHECKS)
        self.lse_shape = (0,)
        table_strides = (*(problem.table_strides or (0, 0)), problem.table_rows)
        sizes: dict[str, int] = {
            "tokens": tokens, "head_dim": problem.head_dim, "batch": expected(problem.batch),
            "positions": geometry.num_windows * problem.num_heads, "element_size": problem.dtype.itemsize,
            "shared_memory": devices.shared_memory(problem.device),
        }  # fmt: skip
        if self.is_small:
            small = launch.small(**sizes)
            self.attention: Any = Launch(
                window_fwd._window_attention_fwd_small_kernel,
                (geometry.num_windows * problem.num_heads, -(-problem.batch // small.images)),
                (
                    *problem.image_strides, *table_strides, problem.batch, problem.num_heads, *problem.runtime_args,
                    *problem.constexprs, problem.precision, small.block_n, small.block_d, small.images,
                ),
                ("", "qkv", "k", "v", "padding", "table", "index", "mask", "logit_scale", "seed"),
                devices.are_dependent(problem.device, problem.batch * math.prod(geometry.size), problem.channels),
                num_warps=small.num_warps,
                num_stages=small.num_stages,
            )  # fmt: skip
            return
        large = launch.large(**sizes)
        self.dense = problem.dense(large.block_m, large.block_n)
        columns, rows, cols = self.dense[0]
        parts = 1
        if problem.bias_mode == tiles.BIAS_DENSE.value:
            self.expand = expand(problem, self.dense, problem.is_bounded)
            parts = self.expand.grid[1]
            if problem.is_bounded:
                self.largest_shape = (columns, parts, rows)
        if problem.has_mask:
            self.check = Launch(
                bias_kernels._check_mask_kernel,
                (geometry.num_windows, _CHECKS),
                (
                    *as_3d(geometry.grid, 1), *as_3d(geometry.shift, 0), problem.mask_value, problem.window,
                    problem.is_volume, _CHECKS, 1024,
                ),
            )  # fmt: skip
        if problem.for_backward:
            shape = lse_shape(problem.batch, geometry, problem.num_heads, problem.has_mask)
            self.lse_shape = shape  # type: ignore[assignment]
        self.attention = Launch(
            window_fwd_large._window_attention_fwd_kernel,
            (rows // large.block_m * problem.num_heads * geometry.num_windows * -(-problem.batch // large.images),),
            (
                *problem.image_strides, *table_strides, problem.batch, problem.num_heads,
                *problem.runtime_args, *problem.constexprs, problem.for_backward, problem.precision, problem.rank or 16,
                _CHECKS, rows, cols, problem.kinds, parts, large.block_m, large.block_n, large.block_d, large.images,
                problem.is_bounded,
            ),
            (
                "", "qkv", "k", "v", "padding", "table", "index", "mask", "", "logit_scale", "", "", "a factor",
                "a factor", "", "seed",
            ),
            num_warps=large.num_warps,
            num_stages=large.num_stages,
            **registers_of(large),
        )  # fmt: skip

    def bound(self, kind: Callable[[Launch], Any] = BoundLaunch) -> Forward:
        """Return a copy for one caller, who gives tensors of the same dtypes and devices at every call."""
        other = copy.copy(self)
        for name in ("attention", "check", "expand"):
            launch = getattr(self, name)
            setattr(other, name, None if launch is None else kind(launch))
        return other

    def run(
        self,
        qkv: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        table: Tensor | None,
        index: Tensor | None,
        padding: Tensor | None,
        mask: Tensor | None,
        logit_scale: Tensor | None,
        seed: Tensor | None = None,
        factors: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Allocate and launch; the tensors are of the problem's shapes and strides."""
        out = qkv.new_empty(self.out_shape)
        if self.swaps_heads:
            out = out.transpose(-3, -2)
        lse = qkv.new_empty(self.lse_shape, dtype=torch.float32) if self.for_backward else None
        if self.is_empty:
            return out, lse
        if self.is_small:
            self.attention(out, qkv, k, v, padding, table, index, mask, logit_scale, seed)
            return out, lse

        differs = dense = largest = q_factor = k_factor = stale = None
        if self.check is not None:
            differs = qkv.new_empty(self.checks_shape, dtype=torch.int32)
            self.check(differs, mask)
        if factors is not None:
            assert table is not None
            assert index is not None
            q_factor, k_factor, known_table, known_index = factors
            stale = qkv.new_zeros(1, dtype=torch.int32)
            compare(stale, table.contiguous(), known_table)
            compare(stale, index, known_index)
        elif self.expand is not None:
            shape, dtype = self.dense
            dense = qkv.new_empty(shape, dtype=dtype)
            if self.largest_shape is not None:
                largest = qkv.new_empty(self.largest_shape, dtype=torch.float32)
            self.expand(dense, largest, table, index)
        self.attention(
            out, qkv, k, v, padding, table, index, mask, differs, logit_scale, dense, largest, q_factor, k_factor,
            stale, seed, lse,
        )  # fmt: skip
        return out, lse


def bind(call: Operands, geometry: Geometry) -> Forward:
    """Return the launches of inference for tensors of such forms: all but the table are contiguous.

    Raises:
        ArgumentError: they do not fit together, or have no place in memory that launches could find.
    """
    table, index, rows = as_table(call.table, call.index)
    if table is not None and call.table is not None and table.data_ptr() != call.table.data_ptr():
        raise ArgumentError(f"table must have biases that are neighbours in memory; got strides {call.table.stride()}")
    return _kept(key_of(call, geometry, table, index, rows, False), geometry).bound()


def _kept(key: tuple[Any, ...], geometry: Geometry) -> Forward:
    return launches.get(key) or keep(key, Forward(Problem(geometry, *key[3:])))


def shifted_window_attention(
    call: Operands,
    geometry: Geometry,
    factors: tuple[Tensor, ...] | None = None,
    for_backward: bool = False,
    bound: Callable[[Launch], Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend as `reference.shifted_window_attention` does, by one kernel.

    Args:
        factors: q's (heads, N, R) and k's (heads, N, R) factors of the bias, and the table and index
            that they were computed from; where those differ from the live ones, the live table is used.
        for_backward: keep what the backward needs.
        bound: what launches are made into; nothing is kept then. With factors, only None.
    Returns:
        (B, H, W, heads * D), with an axis for the heads where q has one, and where `for_backward` what is kept of the
        softmax, of `lse_shape`, which is empty for small windows.
    """
    qkv, k, v, table, index, padding, mask, logit_scale, seed, *_ = call
    table, index, rows = as_table(table, index)
    key = key_of(call, geometry, table, index, rows, for_backward, factors)
    # Where it is bound otherwise, sizes may be symbols, which no key is made of.
    forward = _kept(key, geometry) if bound is None else Forward(Problem(geometry, *key[3:])).bound(bound)
    padding = padding if geometry.is_padded else None
    return forward.run(qkv, k, v, table, index, padding, mask, logit_scale, seed, factors)
