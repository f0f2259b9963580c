"""Find out, on copies of a module, which of its dropouts and rates its family reads right.

Each in turn drops everything (p = 1), so that no random number decides. Dropouts of another kind, as Dropout2d, do the
same then, and are told apart by their code.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from ..families import Family
from .compare import PADDED, NotNow
from .copies import Setting, calls, isolated, random_copy
from .fingerprint import rates
from .libraries import is_of_library
from .registry import Reading

Compare = Callable[..., str | None]  # of (original, reading, arguments, setting): why they differ, or None


class _Subject(NamedTuple):
    """A module, its family, the modules whose numbers are moved in copies (see `random_copy`), and its own method."""

    module: nn.Module
    family: Family
    moved: set[nn.Module]
    original: Callable[..., Any]

    def copy(self) -> tuple[nn.Module, list[tuple[Any, ...]]]:
        """Return a random copy, which drops nothing, and the arguments of its calls."""
        clone = random_copy(self.module, self.moved, Setting())
        return clone, calls(self.family, clone, Setting())


def with_dropouts(
    module: nn.Module,
    family: Family,
    moved: set[nn.Module],
    original: Callable[..., Any],
    reading: Reading,
    comparison: Callable[[Reading], Compare],
) -> Reading:
    """Return a proven reading that also holds what the module's dropouts and rates of dropout do.

    Args:
        moved: as for `random_copy`.
        comparison: of a reading with the original.
    """
    subject, attention = _Subject(module, family, moved, original), family.attention(module)

    def completed(reading: Reading) -> Reading:
        return dataclasses.replace(reading, unread_dropouts=_unread(subject, reading, comparison(reading)))

    found = completed(reading)
    if all(map(is_of_library, module.modules())):
        return found
    unread = {module.get_submodule(path) for path in found.unread_dropouts}
    names = [name for name, _ in rates(attention)]
    names += [f"{name}.p" for name, part in attention.named_children() if part in unread]
    for name in names:
        candidate = dataclasses.replace(reading, rate=name)
        if _is_rate(name, subject, comparison(candidate)):
            return completed(candidate)
    return found


def _unread(subject: _Subject, reading: Reading, comparison: Compare) -> tuple[str, ...]:
    """Return the paths of dropouts that a family neither reads nor calls as the original does.

    Of the weights' dropout, which kernels draw for themselves, PyTorch must also be told the rate, once a call.
    """
    module, family, moved, original = subject
    drops = {path: part for path, part in module.named_modules() if isinstance(part, _DropoutNd)}
    unread = [path for path, part in drops.items() if part in moved and type(part).forward is not nn.Dropout.forward]
    if all(map(is_of_library, module.modules())):
        return tuple(unread)
    with isolated(), torch.no_grad():
        for path in [path for path in drops if path not in unread]:
            clone, arguments = subject.copy()
            dropping = clone.get_submodule(path).train()
            dropping.p = 1.0  # type: ignore[assignment]
            try:
                is_read = _is_alike(clone, arguments, comparison)
            except NotNow:  # the family reads it, and leaves such calls to the original
                continue
            if is_read:
                dropping.p = 0.25  # type: ignore[assignment]
                is_weights = any(_drops_weights(family, clone, reading, args) for args in arguments)
                is_read = not is_weights or _rate_told_to_torch(original, clone, arguments) == 0.25
            if not is_read:
                unread.append(path)
    return tuple(unread)


def _drops_weights(family: Family, clone: nn.Module, reading: Reading, args: tuple[Any, ...]) -> bool:
    """Return True if the section of a call drops weights."""
    section: Any = family.section(copy.deepcopy(clone), *args)
    if not isinstance(section, str):
        section = reading.apply(section, family.attention(clone), args[0])
    return not isinstance(section, str) and section.dropout > 0


def _is_rate(name: str, subject: _Subject, comparison: Compare) -> bool:
    """Return True if a number of an attention is the rate at which weights are dropped, in the attention's training.

    At 1 everything is dropped, which shows where; that a rate is taken as it is shows in what PyTorch is told.
    """
    holder, _, last = name.rpartition(".")
    with isolated(), torch.no_grad():
        for is_training, rate in ((False, 1.0), (True, 1.0), (True, 0.25)):
            clone, arguments = subject.copy()
            attention = subject.family.attention(clone)
            attention.training = is_training
            if holder:
                attention.get_submodule(holder).training = True  # which must not matter
            setattr(attention.get_submodule(holder), last, rate)
            try:
                if rate == 1.0:
                    holds = _is_alike(clone, arguments, comparison)
                else:
                    holds = _rate_told_to_torch(subject.original, clone, arguments) == rate
            except NotNow:
                holds = False
            if not holds:
                return False
    return True


def _is_alike(clone: nn.Module, arguments: Iterable[tuple[Any, ...]], comparison: Compare) -> bool:
    pairs = [(copy.deepcopy(clone), copy.deepcopy(clone), args, Setting()) for args in arguments]
    return not {comparison(*pair) for pair in pairs} - {None, PADDED}


def _rate_told_to_torch(
    original: Callable[..., Any], clone: nn.Module, arguments: Iterable[tuple[Any, ...]]
) -> float | None:
    """Return the rate that calls of the original give to PyTorch's functions, once each; None where that varies."""
    heard: list[float] = []

    class RateListener(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in _RATE_ARGUMENTS:
                place, name, default = _RATE_ARGUMENTS[func]
                rate = float((kwargs or {}).get(name, args[place] if len(args) > place else default))
                is_on = func is F.scaled_dot_product_attention or (kwargs or {}).get("training", (*args, True, True)[2])
                if rate and is_on:
                    is_weights = func is F.scaled_dot_product_attention or _are_weights(*args[:1])
                    heard.append(rate if is_weights else -rate)
            return func(*args, **(kwargs or {}))

    found: set[float] = set()
    for args in arguments:
        heard.clear()
        with contextlib.suppress(Exception), RateListener():  # calls that it refuses tell nothing
            original(copy.deepcopy(clone), *args)
            found.add(heard[0] if len(heard) == 1 else 0.0)
    return found.pop() if len(found) == 1 else None


def _are_weights(dropped: Any = None) -> bool:
    """Return True if a tensor consists of attention weights, which sum to one, rather than of values."""
    return isinstance(dropped, torch.Tensor) and bool((dropped.sum(-1) - 1).abs().max() < 1e-6)


# Where PyTorch's functions take a rate: its number among the arguments, its name and its default.
_RATE_ARGUMENTS: dict[Any, tuple[int, str, float]] = {
    F.scaled_dot_product_attention: (4, "dropout_p", 0.0),
    F.dropout: (1, "p", 0.5),
    torch.dropout: (1, "p", 0.5),
}
