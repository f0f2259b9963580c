"""Remember which kernels failed, each for its own problem: for other devices and shapes they are tried all the same."""

from __future__ import annotations

import logging
from collections.abc import Hashable

import torch

from ..errors import ArgumentError

NOT_THE_KERNELS = (torch.OutOfMemoryError, ArgumentError)  # errors that say nothing of a kernel

logger = logging.getLogger("swinaccel")


class Failures:
    """Problems (device, dtype, window, head_dim, ...) whose kernels failed, and why, in one sentence each."""

    def __init__(self) -> None:
        self._reasons: dict[Hashable, str] = {}
        self.count = 0  # goes up with every failure: plans that were made before look whether it was theirs

    def __bool__(self) -> bool:
        return bool(self._reasons)

    def get(self, problem: Hashable) -> str | None:
        """Return why the kernel for a problem failed before, or None."""
        return self._reasons.get(problem) if self._reasons else None

    def record(self, problem: Hashable, error: str) -> str:
        """Note a failure, warn of it once, and return the sentence about it."""
        reason = f"the Triton kernel failed: {error}"
        if reason not in self._reasons.values():
            logger.warning("%s; PyTorch computes the same from now on, at its own speed", reason)
        self._reasons[problem] = reason
        self.count += 1
        return reason

    def clear(self) -> None:
        """Try every kernel again."""
        self._reasons.clear()
        self.count += 1


failures = Failures()
