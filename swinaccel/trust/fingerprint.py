"""Fingerprint a module: all that decides what it computes, but for the values of its tensors and of its numbers.

Two modules of one fingerprint run the same code over the same settings, class attributes, module globals and
configuration objects. Code is followed from the methods that run: through the methods, globals, closures and defaults
that they name. Of instance attributes and of libraries' objects, what that code names counts; of a user's objects,
everything.

A fingerprint keeps nothing alive: code and objects are compared by identity, through weak references. Floating-point
attributes are left out, since families read them at each call and the probe moves them; so are the settings in `LIVE`.
"""

from __future__ import annotations

import collections
import contextvars
import enum
import functools
import itertools
import math
import threading
import types
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import BASE_ATTRIBUTES, CALLED, DISPATCHER, MARKER, PROVEN
from .libraries import is_installed, is_installed_class, is_library_function, is_of_library, is_surveyed_function
from .names import bases_of, cell_content, functions_behind, is_method, names_in, reachable, unwrapped, wrapped_function

# Settings that families read at each call, and what accelerated instances and classes hold.
LIVE = frozenset(("H", "W", "img_size", "input_resolution", "shift_size", "window_size"))
OURS = frozenset((MARKER, PROVEN))
# Of transformers' layers: whether and by what a call is checkpointed, which changes no number.
_CHECKPOINTS = frozenset(("gradient_checkpointing", "_gradient_checkpointing_func"))

_PLAIN: tuple[type, ...] = (
    bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
    type(Ellipsis), range, slice,
)  # fmt: skip
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_WALKS = frozenset((
    "_modules", "_parameters", "_buffers", "children", "modules", "named_children", "named_modules", "parameters",
    "named_parameters", "buffers", "named_buffers", "__dict__", "vars",
))  # fmt: skip
_REPLACED_IN_PLACE = "__code__", "__defaults__", "__kwdefaults__"  # of functions, as notebooks do that reload files
_ASKS = frozenset(("getattr", "hasattr"))
_PROTOCOL_METHODS = (
    "__call__", "__getattr__", "__getattribute__", "__getitem__", "__get__", "__missing__", "_call_impl",
)  # fmt: skip
# Of these packages, functions and plain values that the code names count: what else they hold is no model's setting.
_OPAQUE = frozenset(("torch", "numpy", "math", "timm", "torchvision", "transformers", "monai", "einops", "builtins"))
# Objects of these are not looked into.
_NOT_OPENED = frozenset(("_thread", "logging", "re", "typing", "torch", "warnings"))
_PER_THREAD = (threading.local, contextvars.ContextVar)  # which hold another value in every thread or context
_MOST_VALUES = 4096
_DEEPEST = 24

Fingerprint = tuple[Hashable, ...]


class Untraceable(Exception):
    """A module's code reads what cannot be followed; the message names it."""


class Identity:
    """Stand for an object that is compared by identity, a tensor by its version too, without keeping it alive."""

    __slots__ = ("_address", "_reference", "_version")

    def __init__(self, value: Any) -> None:
        self._reference, self._address = weakref.ref(value), id(value)
        self._version = value._version if isinstance(value, Tensor) and not value.is_inference() else None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Identity) or self._version != other._version:
            return False
        value = self._reference()
        return value is not None and value is other._reference()

    def __hash__(self) -> int:
        return self._address

    def is_dead(self) -> bool:
        return self._reference() is None


def fingerprint(parts: Iterable[tuple[str, nn.Module]], methods: Iterable[str] = ("forward",)) -> Fingerprint:
    """Return the fingerprint of modules.

    Args:
        parts: modules and their names; each counts by itself, without its submodules.
        methods: what is called of the first of them. Of the others it is forward.
    Raises:
        Untraceable: where the code reads an object that cannot be compared, or too many values.
    """
    return Trace(parts, methods).fingerprint


def is_dead(fingerprint: Hashable) -> bool:
    """Return True if code or an object of this fingerprint is gone, so that it equals no other any more."""
    if isinstance(fingerprint, Identity):
        return fingerprint.is_dead()
    return isinstance(fingerprint, (tuple, frozenset)) and any(map(is_dead, fingerprint))


def rates(part: nn.Module) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a module that are called rates of dropout, and that its code reads."""
    found = [(name, value) for name, value in part.__dict__.items() if isinstance(value, float) and "drop" in name]
    if found:
        _, names = reachable(type(part), ("forward",))
        yield from ((name, value) for name, value in found if name in names)


class Trace:
    """The fingerprint of modules, and where the state outside of them lies that it depends on.

    Attributes:
        fingerprint: see `fingerprint`.
        cells: (namespace or owner, name, value) of globals, class attributes and the like that code reads; a
            closure's cell stands for a namespace of one name.
        contents: (mapping, list or set, copy of it) of the objects that any code reads outside of the modules.
    """

    def __init__(self, parts: Iterable[tuple[str, nn.Module]], methods: Iterable[str]) -> None:
        self.cells: list[tuple[Any, str, Any]] = []
        self.contents: list[tuple[Any, Any]] = []
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # what is kept until the end, so that no address comes twice
        self._count = 0
        parts = list(parts)
        self._modules = {part for _, part in parts}
        self._has_own_code = not all(map(is_of_library, self._modules))
        found: list[Hashable] = []
        entries = (*methods, *_PROTOCOL_METHODS)
        for path, part in parts:
            found.append((path, *self._part(part, entries)))
            entries = ("forward", *_PROTOCOL_METHODS)
        self.fingerprint: Fingerprint = tuple(found)

    def _part(self, part: nn.Module, entries: tuple[str, ...]) -> Iterator[Hashable]:
        """Yield what decides what one module does with its own tensors and submodules."""
        if isinstance(part, torch.jit.ScriptModule):
            yield str(part.inlined_graph)
            return
        cls, attributes, is_library = type(part), part.__dict__, is_of_library(part)
        functions, names = reachable(cls, entries)
        for base, name, function in functions:
            if name != "forward":  # a guard looks at every class's forward by itself
                self._watch_class(cls, base, name)
            yield self._function(function, names)
        yield from self._class(cls, names)
        if not is_library and not names.isdisjoint(_ASKS):  # for what the class may be given later
            self.cells += ((cls, name, None) for name in names if not hasattr(cls, name))
        # Of layers with parameters and of a library's blocks, numbers are sizes.
        has_sizes = is_library and bool(attributes["_parameters"] or attributes["_modules"])
        for name in sorted(attributes.keys() - BASE_ATTRIBUTES - LIVE - OURS - (_CHECKPOINTS if is_library else set())):
            value = attributes[name]
            if has_sizes and _is_size(value):
                continue
            if isinstance(value, float):
                if not is_library and name in names and "drop" not in name:
                    yield name, _sign_and_kind(value)
                continue
            if name in names or name in entries:  # read by the code, or put over what is called
                yield name, self._value(value, names, 0)
        if not is_library:
            yield from ((name, _sign_and_kind(one.item())) for name, one in sorted(_numbers(attributes["_buffers"])))
        elif self._has_own_code:  # which may ask a layer for its bias and its sizes
            held = attributes["_parameters"].items()
            yield tuple((name, None if one is None else tuple(one.shape)) for name, one in held)
        # A library's families read at each call whether there is a bias or a mask.
        walks = isinstance(part, _CONTAINERS) or not names.isdisjoint(_WALKS)
        for kept in ("_modules",) if is_library else ("_parameters", "_buffers", "_modules"):
            held = attributes[kept].items()
            yield kept, tuple((name, value is None) for name, value in held if walks or name in names)

    def _class(self, cls: type, names: frozenset[str]) -> Iterator[Hashable]:
        """Yield the attributes of a class and of its metaclass that code reads, without functions."""
        metaclasses = [one for one in type.mro(type(cls)) if one not in (type, object)]
        for base in (*bases_of(cls), *metaclasses):
            is_meta = issubclass(base, type)
            for name in sorted(names & vars(base).keys() - OURS):
                value = vars(base)[name]
                if is_method(value) and not is_meta:
                    continue
                self._watch_class(cls, base, name)
                for one in functions_behind(value) if is_method(value) else (value,):
                    yield name, self._value(one, names, 0)

    def _watch(self, namespace: Mapping[str, Any], name: str) -> None:
        self.cells.append((namespace, name, namespace[name]))

    def _watch_class(self, cls: type, base: type, name: str) -> None:
        """Watch an attribute of a class, which something that comes into the class itself, or between, would hide."""
        value = getattr(cls, name, None)
        if value is None or value is not getattr(cls, name):  # made anew at each look
            self._watch(vars(base), name)
        else:
            self.cells.append((cls, name, value))

    def _function(self, function: Any, names: frozenset[str], depth: int = 0) -> Hashable:
        """Return what decides what a function does, given the names that the code around it uses."""
        self._count_value(depth)
        function = unwrapped(function)
        code = getattr(function, "__code__", None)
        if code is None:
            return self._value(function, names, depth)
        if (place := self._seen_before(function)) is not None:
            return place
        found: list[Hashable] = [Identity(code)]
        is_library, names = is_library_function(function), names | names_in(code)
        for cell in function.__closure__ or ():
            value = cell_content(cell)
            if isinstance(value, types.FunctionType):
                if value is not function:
                    found.append(self._function(value, names, depth))  # which a decorator has wrapped
            elif not is_library or isinstance(value, _PLAIN):
                if not is_library:
                    self.cells.append((cell, "cell_contents", value))
                found.append(self._value(value, names, depth + 1))
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if not is_library or isinstance(value, _PLAIN):
                found.append(self._value(value, names, depth + 1))
        if is_library:
            found += self._library_state(function) if depth == 0 else ()
        elif depth == 0 or not is_installed(function):
            own, by_name = vars(function), function.__kwdefaults__ or {}
            self.cells += ((function, name, getattr(function, name)) for name in _REPLACED_IN_PLACE)
            self.contents.append((by_name, dict(by_name)))
            for namespace, used in ((function.__globals__, names_in(code)), (own, names)):
                for name in sorted(used & namespace.keys() - {DISPATCHER, "__wrapped__"}):
                    self._watch(namespace, name)
                    found.append((name, self._value(namespace[name], names, depth + 1)))
        return tuple(found)

    def _library_state(self, function: Any) -> Iterator[Hashable]:
        """Yield the functions that a library's function names, its own and PyTorch's, and the state that it reads."""
        names = names_in(function.__code__)
        for name in sorted(names & function.__globals__.keys()):
            value = function.__globals__[name]
            if isinstance(value, types.FunctionType):
                self._watch(function.__globals__, name)
                yield name, Identity(value.__code__)
                if is_surveyed_function(value) and self._seen_before(value) is None:
                    yield from self._library_state(value)
            elif isinstance(value, types.ModuleType) and value.__name__.split(".")[0] == "torch":
                yield from self._namespace(value, names.difference(CALLED), 1)
            elif not isinstance(value, (types.ModuleType, type)):
                yield name, self._value(value, names, 1)

    def _value(self, value: Any, names: frozenset[str], depth: int) -> Hashable:
        """Return a value as it is compared: plain ones by value, containers and objects by contents, others as such."""
        self._count_value(depth)
        if isinstance(value, _PLAIN):
            return type(value), repr(value) if isinstance(value, (float, complex, range, slice)) else value
        if isinstance(value, enum.Enum):
            extra = {name: one for name, one in vars(value).items() if not name.startswith("_")}
            self.cells += ((value, name, one) for name, one in extra.items())
            return type(value), value.name, self._value(extra, names, depth + 1)
        if isinstance(value, types.FunctionType):
            return self._function(value, names, depth)
        if isinstance(value, types.MethodType):
            return self._function(value.__func__, names, depth), self._value(value.__self__, names, depth + 1)
        if isinstance(value, types.BuiltinFunctionType):
            return _identity(value)
        if isinstance(value, functools.partial):
            return tuple(self._value(one, names, depth + 1) for one in (value.func, *value.args, value.keywords))
        if isinstance(value, (types.ModuleType, type)):
            return _identity(value), *self._namespace(value, names, depth)
        if (place := self._seen_before(value)) is not None:
            return place
        if isinstance(value, (list, collections.deque, set)):
            self.contents.append((value, value.copy()))
        if isinstance(value, (list, tuple, collections.deque, set, frozenset)):
            own = self._object(value, names, depth) if hasattr(value, "__dict__") else ()
            entries = (self._value(one, names, depth + 1) for one in value)
            return type(value), own, frozenset(entries) if isinstance(value, (set, frozenset)) else tuple(entries)
        if isinstance(value, Tensor):
            if depth:
                raise Untraceable("its code reads a tensor that is no part of the module; register it as a buffer")
            return _identity(value)
        if isinstance(value, nn.Module) and value in self._modules:  # which counts by itself
            return _identity(value)
        if isinstance(value, nn.Module):
            raise Untraceable(f"its code reads a {type(value).__name__} that is no submodule of it; assign it as one")
        if (inner := wrapped_function(value)) is not None:  # of functools.lru_cache and the like
            return _identity(value), self._function(inner, names, depth + 1)
        return self._object(value, names, depth)

    def _namespace(self, value: Any, names: frozenset[str], depth: int) -> Iterator[Hashable]:
        """Yield what code uses of a Python module or of a class; of a user's class all that is no function."""
        if value is type or getattr(value, "__module__", None) == "builtins":
            return
        if isinstance(value, enum.EnumMeta):
            members: Mapping[str, Any] = value.__members__  # of which the class's own namespace may hold descriptors
            for name in sorted(names & members.keys()):
                yield name, self._value(members[name], names, depth + 1)
        if isinstance(value, type):
            is_opaque = is_library_function(value) or issubclass(value, (Tensor, enum.Enum))
            shown = names if is_opaque or issubclass(value, nn.Module) else names | vars(value).keys()
        else:
            is_opaque, shown = (value.__name__ or "").split(".")[0] in _OPAQUE, names
        for name in sorted(shown & vars(value).keys() - OURS):
            one = vars(value)[name]
            if name.startswith("__") or isinstance(one, _SLOTS) or (name not in names and is_method(one)):
                continue
            if is_opaque and isinstance(one, types.ModuleType) and one.__name__ == f"{value.__name__}.{name}":
                yield name, *self._namespace(one, names, depth + 1)
                continue
            if is_opaque and not isinstance(one, (types.FunctionType, types.BuiltinFunctionType, *_PLAIN)):
                continue
            self._watch(vars(value), name)
            if is_opaque and not isinstance(one, _PLAIN):
                yield name, _identity(one)
                continue
            for inner in functions_behind(one) if is_method(one) else (one,):
                yield name, self._value(inner, names, depth + 1)

    def _object(self, value: Any, names: frozenset[str], depth: int) -> Hashable:
        """Return an object by its attributes and, if it is a mapping, its entries."""
        cls = type(value)
        if isinstance(value, _PER_THREAD):
            raise Untraceable(f"its code reads a {cls.__name__}, which holds another value in every thread or context")
        if cls.__module__.split(".")[0] in _NOT_OPENED and not isinstance(value, dict):
            return cls.__qualname__
        found: list[Hashable] = [_identity(cls)]
        attributes = getattr(value, "__dict__", None)
        is_mapping = isinstance(value, (dict, types.MappingProxyType))
        if attributes is not None:
            self.contents.append((attributes, dict(attributes)))
            # Of a library's own objects (a configuration), the code of that library reads what it names.
            is_read_by_name = is_library_function(cls) and not isinstance(value, Mapping)
            shown = attributes.keys() & names if is_read_by_name else attributes
            found += ((name, self._value(attributes[name], names, depth + 1)) for name in sorted(shown))
        members = itertools.chain(*(vars(base).items() for base in cls.__mro__ if "__slots__" in vars(base)))
        slots = [name for name, one in members if isinstance(one, types.MemberDescriptorType)]
        for name in slots:
            one = getattr(value, name, None)
            self.cells.append((value, name, one))
            found.append((name, self._value(one, names, depth + 1)))
        if attributes is None and not slots and not is_mapping:
            raise Untraceable(f"its code reads a {cls.__name__}, and whether that changes cannot be seen")
        if is_mapping:
            self.contents.append((value, dict(value)))
            found += ((key, self._value(one, names, depth + 1)) for key, one in value.items())
        for base in cls.__mro__:
            if base.__module__ != "builtins" and not is_installed_class(base):
                found += self._namespace(base, names | frozenset(_PROTOCOL_METHODS), depth)
                for name in sorted(vars(base).keys() & set(_PROTOCOL_METHODS)):
                    found += (self._value(one, names, depth + 1) for one in functions_behind(vars(base)[name]))
            elif base.__module__ != "builtins" and isinstance(value, Mapping):
                for name, one in vars(base).items():  # where a library's registry keeps what is registered
                    if isinstance(one, dict) and not name.startswith("__"):
                        found.append((name, self._value(one, names, depth + 1)))
        return tuple(found)

    def _seen_before(self, value: Any) -> Hashable:
        """Return which of the values met so far this is, or None for a new one."""
        number = self._seen.get(id(value))
        if number is None:
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
            return None
        return "seen", number

    def _count_value(self, depth: int) -> None:
        self._count += 1
        if self._count > _MOST_VALUES or depth > _DEEPEST:
            raise Untraceable("its code reads more values from outside of the module than can be kept track of")


def _identity(value: Any) -> Hashable:
    try:
        return Identity(value)
    except TypeError:
        raise Untraceable(f"its code reads a {type(value).__name__}, and whether that changes cannot be seen") from None


def _sign_and_kind(number: float) -> Hashable:
    """Return what the probe, which moves numbers, does not move: sign, infinity, NaN; other types by value."""
    if type(number) is not float:
        return type(number), repr(number)
    return number < 0, number == 0, math.isfinite(number), math.isnan(number)


def _numbers(buffers: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Return the buffers that hold one floating-point number, which may be a switch."""
    found = ((name, one) for name, one in buffers.items() if isinstance(one, Tensor) and one.numel() == 1)
    return [(name, one) for name, one in found if one.is_floating_point() and not one.is_meta]


def _is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_size, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)
