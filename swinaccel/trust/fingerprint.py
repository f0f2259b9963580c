"""Fingerprint a module: all that decides what it computes, but for the values of its tensors and of its numbers.

Two modules of one fingerprint run the same code over the same settings, class attributes, module globals and
configuration objects. Code is followed from the methods that run: through the methods, globals, closures and defaults
that they name. Of instance attributes and of objects, what that code names counts.

A fingerprint keeps nothing alive: code and objects are compared by identity, through weak references. Floating-point
attributes are left out, since families read them at each call and the probe moves them; so are the settings in `LIVE`.
"""

from __future__ import annotations

import enum
import functools
import types
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import OWN_ATTRIBUTES, undispatched
from .libraries import is_installed, is_library_function, is_of_library

# Settings that families read at each call, and the marker of accelerated instances.
LIVE = frozenset(("H", "W", "img_size", "input_resolution", "shift_size", "window_size", "_swinaccel"))
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum, type(Ellipsis))
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_WALKS = frozenset(
    "_modules _parameters _buffers children modules named_children named_modules parameters named_parameters buffers"
    " named_buffers __dict__ vars getattr".split()
)
_ALWAYS = ("__call__", "__getattr__", "__getattribute__", "_call_impl")  # run whatever a method names
_MOST_VALUES = 4096
_DEEPEST = 24

Fingerprint = tuple[Hashable, ...]


class Untraceable(Exception):
    """A module's code reads what cannot be followed; the message names it."""


class _Identity:
    """Stand for an object that is compared by identity, without keeping it alive."""

    __slots__ = ("_address", "_reference", "_version")

    def __init__(self, value: Any) -> None:
        self._reference, self._address = weakref.ref(value), id(value)
        self._version = value._version if isinstance(value, Tensor) and not value.is_inference() else None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Identity) or self._version != other._version:
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
    if isinstance(fingerprint, _Identity):
        return fingerprint.is_dead()
    return isinstance(fingerprint, (tuple, frozenset)) and any(map(is_dead, fingerprint))


class Trace:
    """The fingerprint of modules, and where the state outside of them lies that it depends on.

    Attributes:
        fingerprint: see `fingerprint`.
        cells: (namespace, name, value) of globals and class attributes that code outside of libraries reads.
        contents: (mapping or list, copy of it) of the objects that any code reads outside of the modules.
    """

    def __init__(self, parts: Iterable[tuple[str, nn.Module]], methods: Iterable[str]) -> None:
        self.cells: list[tuple[Mapping[str, Any], str, Any]] = []
        self.contents: list[tuple[Any, Any]] = []
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # what is kept until the end, so that no address comes twice
        self._count = 0
        found: list[Hashable] = []
        entries: tuple[str, ...] = (*methods, *_ALWAYS)
        for path, part in parts:
            found.append((path, *self._part(part, entries)))
            entries = ("forward", *_ALWAYS)
        self.fingerprint: Fingerprint = tuple(found)

    def _part(self, part: nn.Module, entries: tuple[str, ...]) -> Iterator[Hashable]:
        """Yield what decides what one module does with its own tensors and submodules."""
        cls, attributes = type(part), part.__dict__
        functions, names = _reached(cls, entries)
        for function in functions:
            yield self._function(function, names)
        for namespace in _bases(cls):
            for name in names & vars(namespace).keys():
                value = vars(namespace)[name]
                if not _is_method(value):
                    yield name, self._value(value, names, 0)
                    if not is_of_library(part):
                        self.cells.append((vars(namespace), name, value))
        # Of layers with parameters and of a library's blocks, numbers are sizes.
        has_sizes = is_of_library(part) and bool(attributes["_parameters"] or attributes["_modules"])
        for name in sorted(attributes.keys() - OWN_ATTRIBUTES - LIVE):
            value = attributes[name]
            if isinstance(value, float) or (has_sizes and _is_size(value)):
                continue
            if name in names or name in entries:  # read by the code, or put over what is called
                yield name, self._value(value, names, 0)
        # A library's families read at each call whether there is a bias or a mask.
        walks = isinstance(part, _CONTAINERS) or not names.isdisjoint(_WALKS)
        for kept in ("_modules",) if is_of_library(part) else ("_parameters", "_buffers", "_modules"):
            held = attributes[kept].items()
            yield kept, tuple((name, value is None) for name, value in held if walks or name in names)

    def _function(self, function: Any, names: frozenset[str], depth: int = 0) -> Hashable:
        """Return what decides what a function does, given the names that the code around it reads."""
        self._tick(depth)
        function = _unwrapped(function)
        code = getattr(function, "__code__", None)
        if code is None:
            return self._value(function, names, depth)
        if (place := self._place(function)) is not None:
            return place
        found: list[Hashable] = [_Identity(code)]
        is_library = is_library_function(function)
        cells = [_content(cell) for cell in function.__closure__ or ()]
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for value in (*cells, *defaults):
            if isinstance(value, types.FunctionType):
                if value is not function:
                    found.append(self._function(value, names, depth))  # which a decorator has wrapped
            elif not is_library or isinstance(value, _PLAIN):
                found.append(self._value(value, names, depth + 1))
        if is_library:
            found += self._library_state(function, names) if depth == 0 else ()
        elif depth == 0 or not is_installed(function):
            for name in sorted(_names(code) & function.__globals__.keys()):
                value = function.__globals__[name]
                self.cells.append((function.__globals__, name, value))
                found.append((name, self._value(value, names | _names(code), depth + 1)))
        return tuple(found)

    def _library_state(self, function: Any, names: frozenset[str]) -> Iterator[Hashable]:
        """Yield the functions that a library's function names, by identity, and the state that it reads."""
        for name in sorted(_names(function.__code__) & function.__globals__.keys()):
            value = function.__globals__[name]
            if isinstance(value, types.FunctionType):
                yield name, _Identity(value.__code__)
            elif not isinstance(value, (types.ModuleType, type)):
                yield name, self._value(value, names, 1)

    def _value(self, value: Any, names: frozenset[str], depth: int) -> Hashable:
        """Return a value as it is compared: plain ones by value, containers and objects by contents, others as such."""
        self._tick(depth)
        if isinstance(value, _PLAIN):
            return type(value), repr(value) if isinstance(value, (float, complex)) else value
        if isinstance(value, types.FunctionType):
            return self._function(value, names, depth)
        if isinstance(value, (types.BuiltinFunctionType, Tensor, nn.Module)):
            return _identity(value)
        if isinstance(getattr(value, "__wrapped__", None), types.FunctionType):  # functools.lru_cache and the like
            return _identity(value), self._function(value.__wrapped__, names, depth + 1)
        if isinstance(value, types.MethodType):
            return self._function(value.__func__, names, depth), _identity(value.__self__)
        if isinstance(value, functools.partial):
            return tuple(self._value(one, names, depth + 1) for one in (value.func, *value.args, value.keywords))
        if isinstance(value, types.ModuleType):
            return _identity(value), *self._namespace(value, names, depth)
        if isinstance(value, type):
            if value.__module__ == "builtins" or is_library_function(value) or issubclass(value, nn.Module):
                return _identity(value)
            return _identity(value), *self._namespace(value, names, depth)
        if (place := self._place(value)) is not None:
            return place
        if isinstance(value, (list, tuple)):
            if isinstance(value, list):
                self.contents.append((value, value.copy()))
            return type(value), *(self._value(one, names, depth + 1) for one in value)
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(self._value(one, names, depth + 1) for one in value)
        return self._object(value, names, depth)

    def _namespace(self, value: Any, names: frozenset[str], depth: int) -> Iterator[Hashable]:
        """Yield what the code around names of a Python module or of a class that it reads."""
        is_opaque = isinstance(value, types.ModuleType) and (value.__name__ or "").split(".")[0] in _OPAQUE
        for name in sorted(names & vars(value).keys()):
            one = vars(value)[name]
            if is_opaque:
                if isinstance(one, (types.FunctionType, types.BuiltinFunctionType)):
                    yield name, _identity(one)
                continue
            if name.startswith("__"):
                continue
            self.cells.append((vars(value), name, one))
            yield name, self._value(_plain_function(one), names, depth + 1)

    def _object(self, value: Any, names: frozenset[str], depth: int) -> Hashable:
        """Return an object by its attributes and, if it is a mapping, its entries."""
        cls = type(value)
        root = cls.__module__.split(".")[0]
        if root in _UNOPENED and not isinstance(value, dict):
            return cls.__qualname__
        found: list[Hashable] = [_identity(cls)]
        attributes = getattr(value, "__dict__", None)
        if attributes is not None:
            self.contents.append((attributes, dict(attributes)))
            # Of a library's own objects (a configuration), the code of that library reads what it names.
            is_read_by_name = is_library_function(cls) and not isinstance(value, Mapping)
            shown = attributes.keys() & names if is_read_by_name else attributes
            found += ((name, self._value(attributes[name], names, depth + 1)) for name in sorted(shown))
        elif slots := [name for base in cls.__mro__ for name in getattr(base, "__slots__", ())]:
            found += ((name, self._value(getattr(value, name, None), names, depth + 1)) for name in slots)
        elif not isinstance(value, (dict, types.MappingProxyType)):
            return _identity(value)
        if isinstance(value, (dict, types.MappingProxyType)):
            self.contents.append((value, dict(value)))
            found += ((key, self._value(one, names, depth + 1)) for key, one in value.items())
        for base in cls.__mro__:
            if base.__module__ != "builtins":
                for name, one in vars(base).items():
                    if name in names or isinstance(one, (*_PLAIN, list, dict)) and not name.startswith("__"):
                        found.append((name, self._value(_plain_function(one), names, depth + 1)))
        return tuple(found)

    def _place(self, value: Any) -> Hashable:
        """Return which of the values met so far this is, or None for a new one."""
        number = self._seen.get(id(value))
        if number is None:
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
            return None
        return "seen", number

    def _tick(self, depth: int) -> None:
        self._count += 1
        if self._count > _MOST_VALUES or depth > _DEEPEST:
            raise Untraceable("its code reads more values from outside of the module than can be kept track of")


# Of these packages, functions that the code names count, and nothing else: what they hold is no setting of a model's.
_OPAQUE = frozenset(("torch", "numpy", "math", "timm", "torchvision", "transformers", "monai", "einops", "builtins"))
# Objects of these are not looked into.
_UNOPENED = frozenset(("logging", "threading", "_thread", "weakref", "re", "typing", "torch", "numpy"))


def _plain_function(value: Any) -> Any:
    """Return the function behind a descriptor of a class."""
    if isinstance(value, property):
        return value.fget
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def _identity(value: Any) -> Hashable:
    try:
        return _Identity(value)
    except TypeError:
        raise Untraceable(
            f"its code reads a {type(value).__name__}, and whether that changes cannot be kept track of"
        ) from None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _is_method(value: Any) -> bool:
    return isinstance(
        value, (types.FunctionType, property, staticmethod, classmethod, functools.cached_property)
    ) or callable(getattr(value, "__wrapped__", None))


def _is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_size, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _bases(cls: type) -> list[type]:
    """Return the classes that define what instances do, without nn.Module and what all objects have."""
    return [base for base in cls.__mro__ if base not in (nn.Module, object)]


def _reached(cls: type, entries: Iterable[str]) -> tuple[list[Any], frozenset[str]]:
    """Return the functions of a class that run when these methods are called, and all names that they read."""
    functions: list[Any] = []
    names: set[str] = set()
    wanted, met = list(entries), set(entries)
    bases = _bases(cls)
    while wanted:
        name = wanted.pop()
        for base in bases:
            if name not in vars(base):
                continue
            for function in map(_unwrapped, _functions(vars(base)[name])):
                if any(function is one for one in functions):
                    continue
                functions.append(function)
                new = _all_names(function)
                names |= new
                fresh = [one for one in new - met if any(_is_method(vars(b).get(one)) for b in bases)]
                wanted += fresh
                met.update(fresh)
    return functions, frozenset(names)


def _unwrapped(function: Any) -> Any:
    """Return a function without our dispatcher, and wrapped but once by a decorator that has wrapped it again.

    transformers wraps a forward that a subclass inherits anew, as FSDP2 makes subclasses.
    """
    function = undispatched(function)
    cells = [_content(cell) for cell in getattr(function, "__closure__", None) or ()]
    for inner in (undispatched(one) for one in cells if isinstance(one, types.FunctionType)):
        if inner is not function and inner.__code__ is function.__code__:
            return _unwrapped(inner)
    return function


def _functions(value: Any) -> Iterator[Any]:
    """Yield the functions behind an attribute of a class."""
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, property):
        yield from (one for one in (value.fget, value.fset) if one is not None)
    elif isinstance(value, (staticmethod, classmethod)):
        yield value.__func__
    elif isinstance(value, functools.cached_property):
        yield value.func
    elif callable(getattr(value, "__wrapped__", None)):
        yield value.__wrapped__


def _all_names(function: Any) -> frozenset[str]:
    """Return the names that a function reads, and those that functions which it wraps do."""
    code = getattr(function, "__code__", None)
    if code is None:
        return frozenset()
    names = _names(code)
    inner = [_content(cell) for cell in function.__closure__ or ()]
    for one in (*inner, getattr(function, "__wrapped__", None)):
        if isinstance(one, types.FunctionType) and one is not function and one.__code__ is not code:
            names |= _all_names(one)
    return names


_known_names: weakref.WeakKeyDictionary[types.CodeType, frozenset[str]] = weakref.WeakKeyDictionary()


def _names(code: types.CodeType) -> frozenset[str]:
    """Return the names that code reads, those in its strings (for getattr) and in its inner functions included."""
    known = _known_names.get(code)
    if known is not None:
        return known
    names = {*code.co_names, *code.co_freevars}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            names.add(constant)
    _known_names[code] = found = frozenset(names)
    return found
