"""Launch kernels while a compiler traces, as an operator of PyTorch's whose kernel the compiler takes into its code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import check_dtypes
from .launches import Launch


def traced_launch(launch: Launch) -> Callable[..., None]:
    """Return a launch as compilers see it; one with descriptors is none that they can."""
    from ...kernels.traced import copied

    known = "num_warps", "num_stages"  # to compilers
    options = {name: launch.options[name] for name in known if name in launch.options}
    arguments = (*launch.arguments[:-1], False) if "launch_pdl" in launch.options else launch.arguments

    def run(*tensors: Tensor | None) -> None:
        check_dtypes(launch.names, tensors)
        kernel = torch.library.wrap_triton(copied(launch.kernel))
        kernel[launch.grid](*tensors, *arguments, **options)

    return run
