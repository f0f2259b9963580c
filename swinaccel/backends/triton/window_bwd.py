"""Launch the backward of window attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...spec.window import Geometry
from . import devices
from .bias import as_table, expand, reduce_bias
from .checks import check_shapes
from .launches import Launch, keep, launches
from .problem import Operands, Problem, key_of, shapes_of
from .window import registers_of


class Backward:
    """The launches of one backward, and what it needs allocated."""

    __slots__ = (
        "bias", "bias_shape", "dense", "expand", "is_small", "key", "padding_shape", "query", "query_shape", "reduce",
        "row_shape", "scale_shape", "small",
    )  # fmt: skip

    def __init__(self, problem: Problem, grad_bias: bool) -> None:
        from ...kernels import bias as bias_kernels
        from ...kernels import launch, window_bwd, window_bwd_bias, window_bwd_large

        check_shapes(problem)
        geometry, heads, batch = problem.geometry, problem.num_heads, problem.batch
        tokens, windows, biases = geometry.tokens, geometry.num_windows, problem.bias_rows
        positions = windows // biases  # that share a bias
        self.is_small = problem.is_small
        self.expand: Any = None
        self.bias: Any = None
        self.reduce = Launch(
            bias_kernels._reduce_bias_kernel,
            (math.prod(2 * side - 1 for side in geometry.window), biases * heads),
            (problem.table_rows, biases * heads, problem.window, 64 if self.is_small else 256),
            ("", "", "index"),
            num_warps=2,
        )
        options: dict[str, int] = {
            "head_dim": problem.head_dim,
            "element_size": problem.dtype.itemsize,
            "shared_memory": devices.shared_memory(problem.device),
        }
        if self.is_small:
            small = launch.small_backward(
                tokens=tokens, batch=batch, windows=positions, num_heads=biases * heads, **options
            )  # fmt: skip
            groups = -(-positions // small.windows) * biases, -(-batch // small.images)
            parts = groups[0] * groups[1]
            self.small: Any = Launch(
                window_bwd._window_attention_bwd_small_kernel,
                (groups[0] * heads, groups[1]),
                (
                    *problem.image_strides, *(problem.table_strides or (0, 0)), problem.table_rows, batch, heads,
                    *problem.runtime_args, *problem.constexprs, grad_bias, problem.precision, small.block_n,
                    small.block_d, small.images, small.windows,
                ),
                (*[""] * 6, "grad", "qkv", "k", "v", "padding", "table", "index", "mask", "logit_scale", "seed"),
                num_warps=small.num_warps,
                num_stages=small.num_stages,
            )  # fmt: skip
            self.bias_shape = (parts // biases, biases * heads, tokens, tokens)
            self.scale_shape: tuple[int, ...] = (parts, heads)
            self.padding_shape = (parts, 3 * problem.channels)
            return
        large = launch.large_backward(tokens=tokens, **options)
        blocks = [(one.block_m, one.block_n) for one in large]
        self.dense = problem.dense(max(m for m, _ in blocks), max(n for _, n in blocks))
        _, rows, cols = self.dense[0]
        if problem.table_strides is not None:
            self.expand = expand(problem, self.dense)

        def plan(
            kernel: Any,
            one: launch.LargeLaunch,
            grid: tuple[int, ...],
            names: tuple[str, ...],
            *sizes: int,
            images: Any = (),
        ) -> Launch:
            names = (*names, "qkv", "k", "v", "padding", "mask", "logit_scale", "", "seed")
            numbers = (*problem.image_strides, *sizes, heads, *problem.runtime_args, *problem.constexprs)
            shape = (problem.precision, rows, cols, problem.kinds, one.block_m, one.block_n, one.block_d, *images)
            options = {"num_warps": one.num_warps, "num_stages": one.num_stages, **registers_of(one)}
            return Launch(kernel, grid, (*numbers, *shape), names, **options)

        parts = heads * windows * batch
        self.row_shape = (batch, windows, heads, tokens)
        self.query_shape = (*self.row_shape, problem.head_dim)
        tiles = -(-tokens // large.query.block_m)
        self.query = plan(
            window_bwd_large._window_attention_bwd_query_kernel, large.query, (tiles * parts,),
            (*[""] * 5, "grad", "out", "lse"),
        )  # fmt: skip
        self.scale_shape = (batch, windows, tiles, heads)
        key_tiles = -(-tokens // large.key.block_n)
        self.key = plan(
            window_bwd_large._window_attention_bwd_key_kernel, large.key, (key_tiles * parts,),
            (*[""] * 5, "grad", "lse", "", ""),
        )  # fmt: skip
        self.padding_shape = (batch * windows * max(tiles, key_tiles), 3 * problem.channels)
        if grad_bias:
            tiles = -(-tokens // large.bias.block_m) * -(-tokens // large.bias.block_n) * heads
            chunk, images = launch.bias_chunk(tiles=tiles * biases, windows=positions, batch=batch)
            groups = -(-positions // chunk) * biases, -(-batch // images)
            self.bias = plan(
                window_bwd_bias._window_attention_bwd_bias_kernel, large.bias, (tiles, *groups),
                ("", "grad", "lse", "", "", ""), batch, images=(images, chunk),
            )  # fmt: skip
            self.bias_shape = (groups[0] * groups[1] // biases, biases * heads, tokens, tokens)


def shifted_window_attention_backward(
    grad_out: Tensor, out: Tensor | None, lse: Tensor, call: Operands, geometry: Geometry, grad_table: bool
) -> tuple[Tensor | None, ...]:
    """Return gradients of `shifted_window_attention` with `for_backward`: of qkv, k, v, table, padding, logit_scale.

    Those that were not asked for are None.

    Args:
        grad_out: in memory as `empty_image` makes it, and so are tokens with an axis for the heads.
        out, lse: what the forward gave; small windows need no out.
        call: whose tokens are else contiguous, as everything.
        grad_table: whether the table's gradient is wanted, the only one that costs much.
    """
    qkv, k, v, padding, logit_scale, device = call.qkv, call.k, call.v, call.padding, call.logit_scale, call.qkv.device
    pad = padding if geometry.is_padded else None
    table, index, rows = as_table(call.table, call.index)
    grad_table = grad_table and table is not None
    found = key_of(call, geometry, table, index, rows, True, kept=shapes_of(grad_out, out, lse))
    key = ("backward", grad_table, *found)
    backward = launches.get(key) or keep(key, Backward(Problem(geometry, *found[3:]), grad_table))

    def fp32(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    grad_qkv, grad_k, grad_v = (None if t is None else torch.empty_like(t) for t in (qkv, k, v))
    grad_bias = fp32(backward.bias_shape) if grad_table else None
    grad_scale = None if logit_scale is None else fp32(backward.scale_shape)
    grad_pad = None if pad is None else torch.zeros(backward.padding_shape, dtype=torch.float32, device=device)
    if grad_out.numel() == 0:
        grad_bias = None if grad_bias is None else grad_bias.zero_()
    elif backward.is_small:
        backward.small(
            grad_qkv, grad_k, grad_v, grad_bias, grad_pad, grad_scale, grad_out, qkv, k, v, pad, table, index,
            call.mask, logit_scale, call.seed,
        )  # fmt: skip
    else:
        dense = None
        if backward.expand is not None:
            dense = torch.empty(backward.dense[0], dtype=backward.dense[1], device=device)
            backward.expand(dense, None, table, index)
        delta = fp32(backward.row_shape)
        norms = None if logit_scale is None else fp32(backward.row_shape)
        queries = torch.empty(backward.query_shape, dtype=qkv.dtype, device=device)
        operands = (qkv, k, v, pad, call.mask, logit_scale, dense, call.seed)
        backward.query(grad_qkv, grad_pad, grad_scale, delta, queries, grad_out, out, lse, *operands)
        backward.key(grad_qkv, grad_k, grad_v, grad_pad, norms, grad_out, lse, delta, queries, *operands)
        if grad_table:
            backward.bias(grad_bias, grad_out, lse, delta, norms, queries, *operands)
    grad_bias_table = grad_padding = None
    if grad_bias is not None and call.table is not None:
        reduced = reduce_bias(grad_bias, table, None if call.index is None else index, backward.reduce)
        grad_bias_table = reduced.view(call.table.shape)
    if padding is not None:
        grad_padding = torch.zeros_like(padding) if grad_pad is None else grad_pad.sum(0).to(padding.dtype)
    if grad_scale is not None and logit_scale is not None:
        grad_scale = grad_scale.flatten(0, -2).sum(0).to(logit_scale.dtype)
    return grad_qkv, grad_k, grad_v, grad_bias_table, grad_padding, grad_scale
