"""Open operators where AOTInductor makes a package, which then holds their kernels, and needs neither Python nor this.

Elsewhere operators stay whole: torch.compile calls them in the process that compiled them, and a program of
torch.export that holds no kernels runs on other GPUs too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from ..backends.triton.launches import first_line
from ..backends.triton.traced import TracedLaunch
from ..errors import ArgumentError
from .failures import logger


def open_in_packages(library: Any, name: str, inside: Callable[..., Any], batched: int) -> None:
    """Let packages have what is inside of an operator.

    Args:
        inside: computes the same, of the same arguments, by PyTorch's operators and launches `bound` as it is told.
        batched: how many of the first arguments may have a first size that is a symbol, the same for all.
    """

    def decompose(mode: Any, operator: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        is_on_gpu = all(type(one) is FunctionalTensor and one.device.type == "cuda" for _, one in _tensors(args))
        if _is_packaging() and is_on_gpu:
            try:
                if _are_sizes_known(args, batched):
                    with mode:
                        return inside(*args, bound=TracedLaunch)
                _warn(name, "only the number of images may be any")
            except ArgumentError:
                raise
            except Exception as error:
                _warn(name, first_line(error))
        return mode.__torch_dispatch__(operator, types, args, kwargs or {})

    torch.library.register_torch_dispatch(f"swinaccel::{name}", FunctionalTensorMode, decompose, lib=library)


@lru_cache(maxsize=64)
def _warn(name: str, reason: str) -> None:
    """Say it once, of all the times that a compiler traces an operator."""
    logger.warning("the package calls %s, and needs Python and swinaccel: %s", name, reason)


def _is_packaging() -> bool:
    inductor = sys.modules.get("torch._inductor.virtualized")  # who packages has imported it
    return inductor is not None and inductor.V.aot_compilation


def _tensors(args: tuple[Any, ...]) -> list[tuple[int, Tensor]]:
    return [(place, one) for place, one in enumerate(args) if isinstance(one, Tensor)]


def _are_sizes_known(args: tuple[Any, ...], batched: int) -> bool:
    """Return True if all sizes are numbers, but the batch, which may be a symbol that has a number for now."""
    batches: set[str] = set()
    for place, one in _tensors(args):
        sizes = list(one.shape)
        if place < batched:
            batches.add(_name(sizes.pop(0)))
        if any(map(_name, (*sizes, *one.stride()))):
            return False
    return len(batches) <= 1


def _name(size: Any) -> str:
    """Return the expression of a size, or "" for a number."""
    return str(size.node.expr) if isinstance(size, torch.SymInt) else ""
