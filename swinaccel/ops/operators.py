"""Register operators, and open them where AOTInductor makes a package, which then holds their kernels.

Such a package needs neither Python nor this. Elsewhere operators stay whole: torch.compile calls them in the process
that compiled them, and a program of torch.export that holds no kernels runs on other GPUs too.
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
from ..backends.triton.traced import traced_launch
from ..errors import ArgumentError
from .failures import logger

_library = torch.library.Library("swinaccel", "DEF")


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    gradients: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    inside: Callable[..., Any] | None = None,
    batched: int = 0,
) -> None:
    """Register an operator.

    Args:
        run: computes it, on GPUs and CPUs.
        fake: gives empty tensors of the same forms.
        gradients: its backward, and what sets up a context for that, as autograd takes them.
        inside: computes the same, of the same arguments, by PyTorch's operators and launches `bound` as it is told:
            packages have that in its place.
        batched: how many of the first arguments may have a first size that is a symbol there, the same for all.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    if inside is not None:
        _open_in_packages(name, inside, batched)
    for key in ("CUDA", "CPU"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"swinaccel::{name}", fake, lib=_library)
    if gradients is not None:
        backward, setup = gradients
        torch.library.register_autograd(f"swinaccel::{name}", backward, setup_context=setup, lib=_library)


def _open_in_packages(name: str, inside: Callable[..., Any], batched: int) -> None:
    def decompose(mode: Any, operator: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        is_on_gpu = all(type(one) is FunctionalTensor and one.device.type == "cuda" for _, one in _tensors(args))
        if _is_packaging() and is_on_gpu:
            try:
                if _are_sizes_known(args, batched):
                    with mode:
                        return inside(*args, bound=traced_launch)
                _warn(name, "only the number of images may be any")
            except ArgumentError:
                raise
            except Exception as error:
                _warn(name, first_line(error))
        return mode.__torch_dispatch__(operator, types, args, kwargs or {})

    torch.library.register_torch_dispatch(f"swinaccel::{name}", FunctionalTensorMode, decompose, lib=_library)


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
