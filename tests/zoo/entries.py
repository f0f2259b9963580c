"""Lines of the census."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """A model in eval mode, and the arguments of a call."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = MappingProxyType({})


class Entry(NamedTuple):
    """One line of the census.

    Attributes:
        library, name: as the table has them.
        make: from whether the size is to be a real one, and the batch.
        tolerance: of the largest difference in fp32, relative to the output's size.
        watch: the part whose output the census compares, where the model ranks tokens by scores that may tie.
    """

    library: str
    name: str
    make: Callable[[bool, int], Call]
    tolerance: float = 2e-5
    watch: str = ""


ENTRIES: list[Entry] = []
NEAR_MISSES: list[Entry] = []


def entry(library: str, name: str, entries: list[Entry] = ENTRIES, **options: Any) -> Callable:
    def add(make: Callable[[bool, int], Call]) -> Callable:
        entries.append(Entry(library, name, make, **options))
        return make

    return add


def images(batch: int, *size: int) -> Tensor:
    return torch.randn(batch, 3, *(size * 2 if len(size) == 1 else size))


def library(name: str) -> Any:
    return importlib.import_module(name)
