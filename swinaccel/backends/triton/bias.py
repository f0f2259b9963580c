"""Launch the kernels about biases: the dense form, its gradient, stale factors, SwinV2's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import check_position
from .launches import Launch, keep, launches
from .problem import Problem, as_3d


def expand(problem: Problem, dense: tuple[tuple[int, int, int], torch.dtype], has_largest: bool = False) -> Launch:
    """Return the launch that expands the live table into the dense bias, for each kind of windows with its mask."""
    from ...kernels import bias as bias_kernels
    from ...kernels import softmax

    (heads, rows, cols), dtype = dense
    kinds = problem.kinds
    heads //= kinds
    limit = softmax.LARGEST.value if dtype == torch.float32 else 6e4
    assert problem.table_strides is not None
    return Launch(
        bias_kernels._expand_bias_kernel,
        (-(-rows // 8), -(-cols // 128), -(-heads // 4)),
        (
            rows * cols, cols, *problem.table_strides, problem.table_rows, problem.geometry.tokens, rows, cols, heads,
            *as_3d(problem.geometry.shift, 0), problem.mask_value, problem.window, kinds, has_largest, limit, 4, 8,
            128,
        ),
        ("", "", "table", "index"),
    )  # fmt: skip


def as_table(table: Tensor | None, index: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Return a bias of any form as a table (T, columns), its index, and how many biases rows of windows take in turn.

    A bias (heads, N, N), which has no index, becomes a table with a row for every query and key. That index is made
    anew at each call: one that was kept might have been made inside a CUDA graph's memory.
    """
    if table is None:
        return table, index, 1
    if index is not None:
        return (table, index, 1) if table.dim() != 3 else (table.flatten(1), index, table.shape[1])
    rows = 1
    if table.dim() == 4:
        rows, table = table.shape[0], table.flatten(0, 1)
    if table.dim() != 3:
        return table, index, rows
    tokens = table.shape[-1]
    pairs = torch.arange(tokens * tokens, dtype=torch.int32, device=table.device)
    return table.flatten(1).t(), pairs.view(tokens, tokens), rows


def reduce_bias(parts: Tensor, table: Tensor | None, index: Tensor | None, launch: Launch) -> Tensor:
    """Return the table's gradient (T, columns) from all parts (parts, columns, N, N), or of a dense bias."""
    assert table is not None
    grad_bias = parts[0] if parts.shape[0] == 1 else parts.sum(0)
    if index is None:
        return grad_bias.to(table.dtype)
    grad_table = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
    if torch.are_deterministic_algorithms_enabled():  # the kernel is, unless the index is an unusual one
        grad_table.index_put_((index.view(-1),), grad_bias.flatten(1).t(), accumulate=True)
    else:
        launch(grad_table, grad_bias, index)
    return grad_table.to(table.dtype)


def compare(differs: Tensor, left: Tensor, right: Tensor) -> None:
    """Raise the flag where two contiguous tensors of one shape differ."""
    if left.shape != right.shape:
        differs.fill_(1)
        return
    from ...kernels import bias as bias_kernels

    count = left.numel()
    key = "compare", left.device, count
    run = launches.get(key) or keep(key, Launch(bias_kernels._compare_kernel, (-(-count // 4096),), (count, 4096)))
    run(differs, left, right)


def position_table(
    coords: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    weight: Tensor,
    bound: Callable[[Launch], Any] = lambda launch: launch,
) -> Tensor:
    """Return SwinV2's bias table 16 · sigmoid(MLP(coords)), as one kernel in fp32.

    Args:
        coords: (..., 2), T log-spaced offsets.
        hidden_weight, hidden_bias: (hidden, 2) and (hidden,).
        weight: (heads, hidden).
    Returns:
        (T, heads), fp32; the heads come first in memory.
    """
    run, shape = position_launch(coords, hidden_weight, hidden_bias, weight)
    table = torch.empty(shape, dtype=torch.float32, device=coords.device)
    bound(run)(table, coords.contiguous(), hidden_weight.contiguous(), hidden_bias.contiguous(), weight.contiguous())
    return table.t()


def position_launch(*tensors: Tensor) -> tuple[Launch, tuple[int, int]]:
    """Return the launch for tensors of such shapes, in order, and the table's shape in memory, (heads, T)."""
    shapes = [one.shape for one in tensors]
    key: tuple[Any, ...] = ("position", tensors[0].device, *shapes)
    if (known := launches.get(key)) is not None:
        return known
    from ...kernels import bias as bias_kernels
    from ...kernels.launch import power_of_two

    rows, heads, hidden = check_position(*shapes)
    launch = Launch(
        bias_kernels._position_table_kernel,
        (-(-rows // 16), heads),
        (rows, hidden, 16, min(512, power_of_two(hidden))),
        ("", "coords", "hidden_weight", "hidden_bias", "weight"),
    )
    return keep(key, (launch, (heads, rows)))
