"""A plan: what one kind of call of a module runs, with all small decisions made in advance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..ops.failures import failures
from .guard import Guard, same_tensors
from .state import State


class Plan:
    """What one kind of call runs, for as long as its module's guard holds and so does this.

    Attributes:
        run: the call.
        problem: what failures of the attention's kernels are kept under, or None.
        counted: whose call it is, in the report, where that is not the module itself.
    """

    __slots__ = ("_failures", "_fits", "_index", "_tensors", "_version", "counted", "problem", "run")

    def __init__(
        self,
        run: Callable[..., Any],
        problem: tuple | None,
        guard: Guard | None,
        index: Tensor | None = None,
        counted: State | None = None,
    ) -> None:
        self.run, self.problem, self.counted = run, problem, counted
        self._failures, self._index = failures.count, index
        self._version = _version(index)
        self._tensors = [] if guard is None else guard.tensors()
        self._fits = same_tensors(self._tensors)

    def holds(self) -> bool:
        """Return True if tensors are laid out as they were, no kernel failed, and the bias index holds what it did."""
        return (
            self._failures == failures.count
            and self._fits(*self._tensors)
            and (self._index is None or _version(self._index) == self._version)
        )

    def failure(self) -> str | None:
        """Return why a kernel of this plan failed since it was made, or None."""
        return None if self._failures == failures.count else failures.get(self.problem)


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version
