"""Find out, on copies of a module, which of its dropouts and rates its family's reading of it gets right.

One at a time drops everything, which no random number decides: dropouts of another kind, as Dropout2d, do that like
any other, and are told by their code.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from ..families import Family
from .compare import PADDED, Inconclusive
from .copies import Setting, Subject, deep_copy, isolated, set_path_rates
from .fingerprint import rates
from .libraries import is_of_library
from .registry import Reading

Compare = Callable[..., str | None]  # of (original, reading, arguments, setting): why they differ, or None


def with_dropouts(subject: Subject, reading: Reading, compared: Callable[[Reading], Compare]) -> Reading:
    """Return a proven reading that also holds what the module's dropouts and rates of dropout do.

    Args:
        compared: what judges a reading.
    """

    def completed(reading: Reading) -> Reading:
        unread, always = _unread(subject, reading, compared(reading))
        return dataclasses.replace(reading, unread=unread, always=always)

    module = subject.module
    found, attention = completed(reading), subject.family.attention(module)
    if all(map(is_of_library, module.modules())):
        return found
    unread = {module.get_submodule(name.rpartition(".")[0]) for name in found.unread}
    names = [name for name, _ in rates(attention)]
    names += [f"{name}.p" for name, part in attention.named_children() if part in unread]
    for name in names:
        candidate = dataclasses.replace(reading, rate=name)
        if _is_rate(name, subject, compared(candidate)):
            return completed(candidate)
    return found


def _unread(subject: Subject, reading: Reading, compared: Compare) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the names of rates of which a family does not do what the original does; and those that count always.

    They are those of dropouts, and numbers around the attention. Of the weights' dropout, which kernels draw for
    themselves, PyTorch must also be told the rate, once a call.
    """
    module, family, moved = subject.module, subject.family, subject.moved
    parts = dict(module.named_modules())
    drops = {f"{path}.p": part for path, part in parts.items() if isinstance(part, _DropoutNd)}
    others = [name for name, part in drops.items() if part in moved and type(part).forward is not nn.Dropout.forward]
    if all(map(is_of_library, module.modules())):
        return tuple(others), frozenset()
    inside = set(family.attention(module).modules())
    around = [(path, part) for path, part in parts.items() if part not in inside and not is_of_library(part)]
    numbers = [f"{path}.{name}".lstrip(".") for path, part in around for name, _ in rates(part)]

    def prepared(name: str, trains: str, rate: float) -> tuple[nn.Module, list[tuple[Any, ...]]]:
        clone, arguments = subject.prepared()
        set_path_rates(clone, 0.0)
        path, _, last = name.rpartition(".")
        dropping = clone.get_submodule(path)
        setattr(dropping, last, rate)
        if trains:
            (dropping if trains == "itself" else clone).train()
        return clone, arguments

    def is_read(name: str, trains: str) -> bool:
        clone, arguments = prepared(name, trains, 1.0 if name in drops else 0.5)  # drop-paths cannot drop everything
        try:
            if not _is_alike(clone, arguments, compared):
                return False
        except Inconclusive:  # the family reads it, and leaves such calls to the original
            return True
        if trains != "itself":
            return True
        clone, arguments = prepared(name, trains, 0.25)
        is_weights = any(_drops_weights(family, clone, reading, args) for args in arguments)
        return not is_weights or _given_rate(subject.original, clone, arguments) == 0.25

    with isolated(), torch.no_grad():
        always = frozenset(name for name in (*drops, *numbers) if not is_read(name, ""))
        for name in (*drops, *numbers):
            settings = ("itself", "all") if name in drops else ("all",)
            if name not in others and not (name not in always and all(is_read(name, trains) for trains in settings)):
                others.append(name)
    return tuple(others), always


def _drops_weights(family: Family, clone: nn.Module, reading: Reading, args: tuple[Any, ...]) -> bool:
    """Return True if the section of a call drops weights."""
    section: Any = family.section(deep_copy(clone), *args)
    if not isinstance(section, str):
        section = reading.apply(section, family.attention(clone), args[0])
    return not isinstance(section, str) and section.dropout > 0


def _is_rate(name: str, subject: Subject, compared: Compare) -> bool:
    """Return True if a number of an attention is the rate at which weights are dropped, in the attention's training.

    At 1 everything is dropped, which shows where; that a rate is taken as it is shows in what PyTorch is told.
    """
    with isolated(), torch.no_grad():
        for is_training, rate in ((False, 1.0), (True, 1.0), (True, 0.25)):
            clone, arguments = subject.prepared()
            attention = subject.family.attention(clone)
            attention.training = is_training
            holder, _, last = name.rpartition(".")
            if holder:
                attention.get_submodule(holder).training = True  # which must not matter
            setattr(attention.get_submodule(holder), last, rate)
            try:
                if rate == 1.0:
                    holds = _is_alike(clone, arguments, compared)
                else:
                    holds = _given_rate(subject.original, clone, arguments) == rate
            except Inconclusive:
                holds = False
            if not holds:
                return False
    return True


def _is_alike(clone: nn.Module, arguments: Iterable[tuple[Any, ...]], compared: Compare) -> bool:
    pairs = [(deep_copy(clone), deep_copy(clone), args, Setting(drops=True)) for args in arguments]
    try:
        return not {compared(*pair) for pair in pairs} - {None, PADDED}
    except Inconclusive:
        raise
    except Exception:  # of code that does not take such a rate
        return False


def _given_rate(original: Callable[..., Any], clone: nn.Module, arguments: Iterable[tuple[Any, ...]]) -> float | None:
    """Return the rate that calls of the original give to PyTorch's functions, once each; None where that varies."""
    heard: list[float] = []

    class RateRecorder(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in _PLACES:
                place, name, default = _PLACES[func]
                rate = float((kwargs or {}).get(name, args[place] if len(args) > place else default))
                is_on = func is F.scaled_dot_product_attention or (kwargs or {}).get("training", (*args, True, True)[2])
                if rate and is_on:
                    is_weights = func is F.scaled_dot_product_attention or _are_weights(*args[:1])
                    heard.append(rate if is_weights else -rate)
            return func(*args, **(kwargs or {}))

    found: set[float] = set()
    for args in arguments:
        heard.clear()
        with contextlib.suppress(Exception), RateRecorder():  # calls that it refuses tell nothing
            original(deep_copy(clone), *args)
            found.add(heard[0] if len(heard) == 1 else 0.0)
    return found.pop() if len(found) == 1 else None


def _are_weights(dropped: Any = None) -> bool:
    """Return True of what a softmax gives, and False of what it weighs."""
    return isinstance(dropped, torch.Tensor) and bool((dropped.sum(-1) - 1).abs().max() < 1e-6)


# Where PyTorch's functions take a rate: its number among the arguments, its name and its default.
_PLACES: dict[Any, tuple[int, str, float]] = {
    F.scaled_dot_product_attention: (4, "dropout_p", 0.0),
    F.dropout: (1, "p", 0.5),
    torch.dropout: (1, "p", 0.5),
}
