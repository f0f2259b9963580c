"""SwinV2's bias table as an operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.triton import bias as backend
from ..backends.triton.launches import BoundLaunch, first_line
from .failures import NOT_THE_KERNELS, failures
from .observed import count_modes, is_observed, is_profiled
from .operators import register

_PROBLEM = ("position_table",)


def position_table(coords: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, weight: Tensor) -> Tensor | None:
    """Return SwinV2's bias table (T, heads) by one kernel, as `backends.triton.bias`; None where that failed."""
    if failures.get(_PROBLEM) is not None:
        return None
    if is_observed():
        return torch.ops.swinaccel.position_table(coords, hidden_weight, hidden_bias, weight)
    return _position_table(coords, hidden_weight, hidden_bias, weight)


def bind(*tensors: Tensor) -> Callable[..., Tensor | None] | None:
    """Return `position_table`, bound to its launch, for contiguous tensors of such shapes; None where it failed before.

    Raises:
        ArgumentError: the shapes do not fit together.
    """
    if failures.get(_PROBLEM) is not None:
        return None
    launch, shape = backend.position_launch(*tensors)
    run = BoundLaunch(launch)

    def bound(coords: Tensor, *weights: Tensor) -> Tensor | None:
        if not count_modes() and not is_profiled():  # `is_observed`, of a call that no compiler traces
            try:
                table = coords.new_empty(shape, dtype=torch.float32)
                run(table, coords, *weights)
                return table.t()
            except NOT_THE_KERNELS:
                raise
            except Exception:  # which the operator meets again, notes, and does without
                pass
        return position_table(coords, *weights)

    return bound


def _position_table(coords: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, weight: Tensor) -> Tensor:
    try:
        return backend.position_table(coords, hidden_weight, hidden_bias, weight)
    except NOT_THE_KERNELS:
        raise
    except Exception as error:
        failures.record(_PROBLEM, first_line(error))
        hidden = torch.relu(coords.view(-1, 2).float() @ hidden_weight.float().t() + hidden_bias.float())
        return 16 * torch.sigmoid(weight.float() @ hidden.t()).t()


register(
    "position_table(Tensor coords, Tensor hidden_weight, Tensor hidden_bias, Tensor weight) -> Tensor",
    _position_table,
    lambda coords, _, __, weight: coords.new_empty((len(weight), coords.numel() // 2), dtype=torch.float32).t(),
    inside=backend.position_table,
)
