"""Edits of a part of a module: their description, and functions that make changes for the tables of `test_edits`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

KEPT = True  # the part's kernels run after an edit as before


class Edit(NamedTuple):
    """What is done to a module; of a change made by `patch`, a class's, model and twin see both.

    Attributes:
        change: of (model, patch); returns a handle if that undoes it.
        kept: the part's kernels run after it as before; or None where either is right.
        reason: words of the report.
        modes: of the calls.
    """

    change: Callable[[nn.Module, pytest.MonkeyPatch], Any]
    kept: bool | None = False
    reason: str = ""
    modes: tuple[str, ...] = ("eager",)


def unguarded(change: Callable) -> Callable:
    """Mark an edit of which compiled code is not told: whoever makes it compiles after it."""
    change.is_unguarded = True
    return change


def quietly(change: Callable[[nn.Module], Any]) -> Callable:
    """Make an edit of a function that may return anything."""
    return lambda model, _: (change(model), None)[1]


def hook(part: str, kind: str = "forward_hook", function: Any = lambda *_: None) -> Callable:
    return unguarded(lambda model, _: getattr(model.get_submodule(part), f"register_{kind}")(function))


def doubling_hook(part: str) -> Callable:
    return hook(part, "forward_hook", lambda module, args, out: 2 * out)


def setting(part: str, name: str, value: Any) -> Callable:
    return lambda model, _: setattr(model.get_submodule(part), name, value)


def method(part: str, name: str = "forward") -> Callable:
    """Replace a method of an instance by one that adds one."""

    def change(model: nn.Module, _: Any) -> None:
        module = model.get_submodule(part)
        plain = getattr(module, name)
        setattr(module, name, lambda *args, **kwargs: plain(*args, **kwargs) + 1)

    return unguarded(change)


def compiled(part: str) -> Callable:
    """Let calls of a part run what was compiled of it alone; this compiler doubles."""

    def change(model: nn.Module, _: Any) -> None:
        module = model.get_submodule(part)
        plain = module._call_impl
        module._compiled_call_impl = lambda *args, **kwargs: 2 * plain(*args, **kwargs)

    return change


def class_method(part: str, name: str = "forward", only: bool = False) -> Callable:
    """Replace a method of a class by one that doubles, of all instances, or only of this part."""

    def change(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        module = model.get_submodule(part)
        plain = getattr(type(module), name)

        @functools.wraps(plain)
        def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = plain(self, *args, **kwargs)
            return 2 * out if self is module or not only else out

        patch.setattr(type(module), name, doubled)

    return unguarded(change)


def replaced(part: str, make: Callable[[nn.Module], nn.Module | None]) -> Callable:
    """Put another module, made of a part, in the part's place."""
    owner, _, name = part.rpartition(".")

    def change(model: nn.Module, _: Any) -> None:
        made = make(model.get_submodule(part))
        setattr(model.get_submodule(owner), name, made if made is None else made.to(next(model.parameters())))

    return change


def tensor(part: str, name: str, make: Callable[[torch.Tensor], Any]) -> Callable:
    """Put another tensor, made of a parameter or buffer, in its place."""
    return lambda model, _: setattr(owner := model.get_submodule(part), name, make(getattr(owner, name)))


def data(part: str, name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    return lambda model, _: setattr(
        getattr(model.get_submodule(part), name), "data", make(getattr(model.get_submodule(part), name).data)
    )


def other(like: torch.Tensor) -> torch.Tensor:
    """Random numbers of a tensor's form, the same for model and twin."""
    generator = torch.Generator().manual_seed(like.numel())
    return torch.randn(like.shape, generator=generator).to(like)


def new(like: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(other(like))


def in_place(part: str, how: Callable[[nn.Parameter], Any]) -> Callable:
    def change(model: nn.Module, _: Any) -> None:
        with torch.no_grad():
            for one in model.get_submodule(part).parameters():
                how(one)

    return change


def all_data(part: str) -> Callable:
    return in_place(part, lambda one: setattr(one, "data", one.data + 0.1))


def loaded(assign: bool) -> Callable:
    def load(model: nn.Module, _: Any) -> None:
        state = {
            name: one + 0.3 * other(one) if one.is_floating_point() and "mask" not in name else one.clone()
            for name, one in model.state_dict().items()
        }
        model.load_state_dict(state, assign=assign)

    return load


def all_hooks(kind: type) -> Callable:
    """Hook the forwards of all modules there are."""

    def change(_: nn.Module, patch: pytest.MonkeyPatch) -> Any:
        if hasattr(nn.modules.module, "_hooked"):
            return None  # by the first of model and twin
        patch.setattr(nn.modules.module, "_hooked", True, raising=False)
        register = nn.modules.module.register_module_forward_hook
        return register(lambda module, _, out: 2 * out if type(module) is kind else None)

    return change


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def parametrized(part: str) -> Callable:
    return quietly(lambda model: nn.utils.parametrizations.weight_norm(model.get_submodule(part)))
