"""The tables of edits and ways, and the choice of a place in a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

EDITS: dict[str, Callable[[nn.Module, int], Any]] = {}
WAYS: dict[str, Callable[[nn.Module, tuple[Any, ...]], Any]] = {}
SCOPES: set[str] = set()  # ways that concern swinaccel


def edit(function: Callable) -> Callable:
    EDITS[function.__name__] = function
    return function


def way(function: Callable) -> Callable:
    WAYS[function.__name__] = function
    return function


def scope(function: Callable) -> Callable:
    SCOPES.add(function.__name__)
    return way(function)


# Choosing. Two models that are alike have the same names in the same order.


def places(model: nn.Module, suits: Callable[[str, nn.Module], bool]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return (parent, name, module) of all children that suit."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if suits(name, child)
    ]


def chosen(found: list, number: int) -> Any:
    return found[number % len(found)] if found else None


def of_type(*types: type) -> Callable[[str, nn.Module], bool]:
    return lambda name, module: isinstance(module, types)


def replace(model: nn.Module, number: int, suits: Callable, make: Callable[[nn.Module], nn.Module]) -> None:
    place = chosen(places(model, suits), number)
    if place is not None:
        parent, name, child = place
        made = make(child)
        made.train(child.training)
        parent._modules[name] = made


def numbers(like: Tensor, number: int) -> Tensor:
    """Random numbers of a tensor's form, the same for all tensors of that form."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)


def parameter(model: nn.Module, number: int) -> tuple[nn.Module, str, nn.Parameter]:
    found = [
        (owner, name, one) for owner in model.modules() for name, one in owner._parameters.items() if one is not None
    ]
    return chosen(found, number)


def buffer(model: nn.Module, number: int, floating: bool) -> tuple[nn.Module, str, Tensor] | None:
    found = [
        (owner, name, one)
        for owner in model.modules()
        for name, one in owner._buffers.items()
        if one is not None and one.is_floating_point() == floating
    ]
    return chosen(found, number)
