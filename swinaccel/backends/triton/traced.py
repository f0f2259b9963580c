"""Launch kernels while a compiler traces, as an operator of PyTorch's whose kernel the compiler takes into its code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_dtypes
from .launches import Launch


class TracedLaunch:
    """A launch as compilers see it; one with descriptors is none that they can."""

    __slots__ = ("_launch",)

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def __call__(self, *tensors: Tensor | None) -> None:
        from ...kernels.traced import copied

        launch = self._launch
        check_dtypes(launch.names, tensors)
        options = {name: number for name, number in launch.options.items() if name != "maxnreg"}  # they know no other
        kernel = torch.library.wrap_triton(copied(launch.kernel))
        kernel[launch.grid](*tensors, *launch.arguments, **options)


def expected(number: Any) -> Any:
    """Return a size, or of a symbol the size that it was traced with, which tiles are chosen for."""
    return number.node.hint if isinstance(number, torch.SymInt) else number
