"""SwinV2's bias table as an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.triton import bias as backend
from ..backends.triton.launches import BoundLaunch, Launch, first_line
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


class BoundPosition:
    """SwinV2's bias table, bound to its launch; see `bind`."""

    __slots__ = ("_launch", "_shape")

    def __init__(self, launch: Launch, shape: tuple[int, int]) -> None:
        self._launch, self._shape = BoundLaunch(launch), shape

    def run(self, coords: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, weight: Tensor) -> Tensor | None:
        """Return what `position_table` gives; the tensors are contiguous and of the shapes that were bound."""
        if not count_modes() and not is_profiled():  # `is_observed`, of a call that no compiler traces
            try:
                table = coords.new_empty(self._shape, dtype=torch.float32)
                self._launch(table, coords, hidden_weight, hidden_bias, weight)
                return table.t()
            except NOT_THE_KERNELS:
                raise
            except Exception:  # which the operator meets again, notes, and does without
                pass
        return position_table(coords, hidden_weight, hidden_bias, weight)


def bind(*tensors: Tensor) -> BoundPosition | None:
    """Bind the table of a position MLP, of tensors of such shapes, to its launch; None where that failed before.

    Raises:
        ArgumentError: the shapes do not fit together.
    """
    return None if failures.get(_PROBLEM) is not None else BoundPosition(*backend.position_launch(*tensors))


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
