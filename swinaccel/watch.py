"""Whether modules are what they were at an earlier look: what lets a call use again what another has worked out.

A watch is a copy of all that a module is made of, compared as a whole: settings by value; submodules, parameters,
buffers and hooks by identity. Comparing takes a tenth of the time that reading and judging each of them takes. What is
written in place, as all training does, is no change here: tensors are read when a kernel reads them.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

DISPATCHER = "_swinaccel_dispatcher"  # attribute of a function that takes a method's place: itself
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
METHODS = (types.FunctionType, types.MethodType)  # what is one where it is found among an instance's attributes
_CONTAINERS = ("_parameters", "_buffers", "_modules")
_OWN = frozenset(nn.Module().__dict__)  # PyTorch's, of which `_HOOKS` and `_CONTAINERS` are looked into
_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type, types.FunctionType, types.BuiltinFunctionType, torch.dtype,
    torch.device,
)  # fmt: skip


class Unwatchable(Exception):
    """A module holds what cannot be compared."""


def twin(module: nn.Module) -> nn.Module:
    """A second object with the very attributes of a module: what keeps it does not keep the module alive."""
    other = object.__new__(type(module))
    other.__dict__ = module.__dict__
    return other


_forward = attrgetter("forward")
_TORCH = os.path.dirname(torch.__file__) + os.sep


def is_pytorchs(function: Any) -> bool:
    """Whether a function was written in PyTorch: what takes its place may carry its name and module, not its code."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(_TORCH)


_LAYERS = (nn.LayerNorm, nn.Linear, nn.GELU, nn.Identity, nn.Dropout, nn.Conv2d)
_OWN_FORWARD = {cls: cls.forward if is_pytorchs(cls.forward) else None for cls in _LAYERS}


def is_own(module: Any, cls: type) -> bool:
    """Whether this is PyTorch's very layer, one of those named above, whose class nobody has patched."""
    return type(module) is cls and cls.forward is _OWN_FORWARD[cls]


def has_hooks(module: nn.Module) -> bool:
    """Whether anyone wants to see what this module is given or gives, or the gradients of that."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_own_forward(module: nn.Module) -> bool:
    """Whether forward was replaced on this instance; reading it is what makes a compiler guard the answer."""
    return module.forward is None or "forward" in module.__dict__


def owner(cls: type, method: str) -> type:
    """The class that defines the method which instances of `cls` run."""
    return next(base for base in cls.__mro__ if method in vars(base))


def own_method(cls: type, method: str) -> Callable[..., Any]:
    """The class's own method, unbound, without a dispatcher of ours."""
    function: Any = vars(owner(cls, method))[method]
    # Itself: functools.wraps copies attributes, and what wraps a dispatcher is none.
    is_ours = getattr(function, DISPATCHER, None) is function
    return function.__wrapped__ if is_ours else function


class Watch:
    """Modules, as they were when this was made.

    Args:
        modules: each by itself, without its submodules. None is kept alive but for its attributes, if it is a `twin`.
        unhooked: those of them that must have no hooks now and later.
        frames: modules of which only what they hold matters: no setting, and not where their buffers lie.
    Raises:
        Unwatchable: for a setting that is no plain value, list or set of those, or object of such.
    """

    __slots__ = (
        "buffers", "classes", "contents", "empty", "forwards", "keepers", "kept", "layouts", "modules", "names",
        "owners", "settings", "types",
    )  # fmt: skip

    def __init__(
        self, modules: Iterable[nn.Module], unhooked: Iterable[nn.Module], frames: Iterable[nn.Module] = ()
    ) -> None:
        modules, frames = list(modules), list(frames)
        self.modules = [*modules, *frames]
        self.types = list(map(type, self.modules))
        self.classes = list(dict.fromkeys(self.types))
        self.forwards = list(map(_forward, self.classes))
        self.owners: list[Any] = modules[:]  # of settings: these modules, and the objects that they name
        settings = [_settings(one.__dict__, self.owners) for one in modules]
        self.settings = settings + [_attributes(one.__dict__) for one in self.owners[len(modules) :]]
        # What is empty stays the same if it, as a setting, is no other or an empty one too; the rest is looked into.
        places = [(one, name) for one in modules for name in _CONTAINERS]
        self.empty = [one.__dict__[name] for one in unhooked for name in _HOOKS]
        self.empty += [one.__dict__[name] for one, name in places if not one.__dict__[name]]
        places = [(one, name) for one, name in places if one.__dict__[name]]
        places += [(one, name) for one in frames for name in _CONTAINERS]
        self.keepers, self.kept = [one for one, _ in places], [name for _, name in places]
        containers = self._containers()
        self.names, self.contents = list(chain.from_iterable(containers)), _values(containers)
        self.buffers = [one for module in modules for one in module._buffers.values() if one is not None]
        self.layouts = self._layouts()
        if not self.holds():
            raise Unwatchable

    def holds(self) -> bool:
        """Whether nothing has changed since."""
        try:
            containers = self._containers()
            contents = _values(containers)
            return (
                list(map(type, self.modules)) == self.types
                and all(map(is_, map(_forward, self.classes), self.forwards))
                and len(contents) == len(self.contents)
                and all(map(is_, contents, self.contents))
                and list(chain.from_iterable(containers)) == self.names
                and list(map(vars, self.owners)) == self.settings
                and not any(self.empty)
                and self._layouts() == self.layouts
            )
        except Exception:  # a setting that has become something which cannot be compared
            return False

    def _containers(self) -> list[dict[str, Any]]:
        return list(map(getitem, map(vars, self.keepers), self.kept))

    def _layouts(self) -> list[tuple]:
        """Where buffers lie: views of them may have been kept, and stay behind where their `data` is replaced."""
        return [(one.data_ptr(), one.shape, one.stride(), one.dtype) for one in self.buffers]


def _values(containers: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, containers)))


def _settings(attributes: dict[str, Any], owners: list[Any]) -> dict[str, Any]:
    """A module's attributes, to be compared with what they are later; objects that they name join the owners."""
    found = {}
    for name, value in attributes.items():
        if name in _OWN or is_plain(value):
            found[name] = value
        elif type(value) in (list, set) and all(map(is_plain, value)):
            found[name] = value.copy()  # else it would be compared with itself
        elif isinstance(value, (Tensor, nn.Module, list, dict, set)) or not hasattr(value, "__dict__"):
            raise Unwatchable
        else:  # a configuration
            found[name] = value
            if not any(value is owner for owner in owners):
                owners.append(value)
    return found


def _attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """The same of an object: values by value, what holds others by identity."""
    return {name: list(value) if type(value) is list else value for name, value in attributes.items()}


def is_plain(value: Any) -> bool:
    """Whether a value is one that nothing can write to: a number, a word, a function and the like, tuples of them."""
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(is_plain, value)))
