"""Read off code which names it uses, and which functions of a class run when a method is called."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..layers import without_dispatcher

_known: weakref.WeakKeyDictionary[types.CodeType, frozenset[str]] = weakref.WeakKeyDictionary()


def names_in(code: types.CodeType) -> frozenset[str]:
    """Return the names that code uses, those in its strings (for getattr) and in its inner functions included.

    Where it reads the type of something's device, "device.type" is one of them.
    """
    known = _known.get(code)
    if known is None:
        names = {*code.co_names, *code.co_freevars}
        if {"device", "type"} <= names:
            loads = [one.argval if one.opname == "LOAD_ATTR" else None for one in dis.get_instructions(code)]
            names |= {"device.type"} if ("device", "type") in itertools.pairwise(loads) else set()
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                names |= names_in(constant)
            elif isinstance(constant, str) and constant.isidentifier():
                names.add(constant)
        known = _known[code] = frozenset(names)
    return known


def names_of(function: Any) -> frozenset[str]:
    """Return the names that a function uses, and those that functions which it wraps do."""
    code = getattr(function, "__code__", None)
    if code is None:
        return frozenset()
    names = names_in(code)
    for one in (*map(cell_content, function.__closure__ or ()), vars(function).get("__wrapped__")):
        if isinstance(one, types.FunctionType) and one.__code__ is not code:
            names |= names_of(one)
    return names


def helpers_of(function: Any) -> Iterator[Any]:
    """Yield the functions that a function names, of its own module and of modules that it names."""
    names, namespace = names_of(function), getattr(function, "__globals__", {})
    values = [namespace[name] for name in sorted(names & namespace.keys())]
    for value in values:
        if isinstance(value, types.FunctionType):
            yield value
        elif isinstance(value, types.ModuleType):
            found = (vars(value).get(name) for name in sorted(names))
            yield from (one for one in found if isinstance(one, types.FunctionType))


def bases_of(cls: type) -> list[type]:
    """Return the classes that define what instances do, without nn.Module and what all objects have."""
    return [base for base in cls.__mro__ if base not in (nn.Module, object)]


def reachable(cls: type, entries: Iterable[str]) -> tuple[list[tuple[type, str, Any]], frozenset[str]]:
    """Return the functions of a class that run when these methods are called, and all names that they use.

    Returns:
        (class, name there, function) of each, and the names.
    """
    functions: list[tuple[type, str, Any]] = []
    names: set[str] = set()
    wanted, met = list(entries), set(entries)
    bases = bases_of(cls)
    while wanted:
        name = wanted.pop()
        for base in bases:
            for function in map(unwrapped, functions_behind(vars(base).get(name))):
                if any(function is one for _, _, one in functions):
                    continue
                functions.append((base, name, function))
                new = names_of(function)
                names |= new
                fresh = [one for one in sorted(new - met) if any(is_method(vars(other).get(one)) for other in bases)]
                wanted += fresh
                met.update(fresh)
    return functions, frozenset(names)


def unwrapped(function: Any) -> Any:
    """Return a function without our dispatchers, and wrapped but once by a decorator that has wrapped it again.

    transformers wraps a forward that a subclass inherits anew, as FSDP2 makes subclasses.
    """
    while (inner := without_dispatcher(function)) is not function:  # that of a model, upon that of auto mode
        function = inner
    cells = map(cell_content, getattr(function, "__closure__", None) or ())
    for inner in (without_dispatcher(one) for one in cells if isinstance(one, types.FunctionType)):
        if inner is not function and inner.__code__ is function.__code__:
            return unwrapped(inner)
    return function


def cell_content(cell: Any) -> Any:
    """Return what a cell of a closure holds; None if nothing was assigned yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def wrapped_function(value: Any) -> Any:
    """Return the Python function that a callable object was made around, as functools.lru_cache does; else None."""
    inner = inspect.getattr_static(value, "__wrapped__", None)
    return inner if isinstance(inner, types.FunctionType) else None


def is_method(value: Any) -> bool:
    """Return True if an attribute of a class is a function, or makes one run."""
    return next(functions_behind(value), None) is not None


def functions_behind(value: Any) -> Iterator[Any]:
    """Yield the functions behind an attribute of a class."""
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, property):
        yield from (one for one in (value.fget, value.fset) if one is not None)
    elif isinstance(value, (staticmethod, classmethod)):
        yield value.__func__
    elif isinstance(value, functools.cached_property):
        yield value.func
    elif value is not None and (inner := wrapped_function(value)) is not None:
        yield inner
