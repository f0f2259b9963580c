"""Puts a dispatcher on a class and a marker on an instance, and takes both away again.

The dispatcher is a plain function installed with `wrapt.wrap_object`: a `wrapt.FunctionWrapper` must not stand
where dynamo may trace it, since dynamo silently compiles what it wraps. The marker is a string in the instance's
`__dict__`, read as an attribute over the class default None, so that deep copies, EMA copies, pickles and replicas
carry it and can be loaded where swinaccel is not installed, where it means nothing.
"""

from __future__ import annotations

import functools
import gc
import json
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
import wrapt
from torch import nn

from . import dispatch
from .config import AccelConfig, env_disabled
from .families import AROUND, Family, Surrounding, by_name
from .watch import DISPATCHER, owner

MARKER = "_swinaccel"

_off: ContextVar[bool] = ContextVar("swinaccel_off", default=False)
_off_anywhere = 0  # blocks of `disabled` open in any thread: dynamo of torch 2.11 cannot trace a ContextVar

_lock = threading.RLock()
_installed: dict[tuple[type, str], Any] = {}  # (class, method): wrapt's handle
_known: dict[tuple[type, str], weakref.WeakSet[nn.Module]] = {}  # instances that we marked ourselves
_stats: weakref.WeakKeyDictionary[nn.Module, dispatch.Stats] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Marked:
    family: Any  # or a surrounding
    config: AccelConfig

    @property
    def is_around(self) -> bool:
        return self.family in AROUND


_parsed: dict[str, _Marked | None] = {}


@contextmanager
def switched_off() -> Iterator[None]:
    """Dispatchers run the originals, in this thread and context.

    In every thread, while a compiler traces, and in backwards: autograd has threads of its own, in which checkpointing
    calls modules again.
    """
    global _off_anywhere
    token = _off.set(True)
    with _lock:
        _off_anywhere += 1
    try:
        yield
    finally:
        _off.reset(token)
        with _lock:
            _off_anywhere -= 1


def _is_off(compiling: bool) -> bool:
    if compiling:
        return _off_anywhere > 0
    return _off.get() or (_off_anywhere > 0 and torch._C._current_graph_task_id() != -1)


def encode(family: Family | Surrounding, config: AccelConfig) -> str:
    """The marker of an instance."""
    text = json.dumps({"family": family.name, "options": json.loads(config.to_json())}, sort_keys=True)
    _decode(text)
    return text


def _decode(marker: str) -> _Marked | None:
    if marker not in _parsed:
        try:
            content = json.loads(marker)
            family = by_name(content["family"])
            _parsed[marker] = None if family is None else _Marked(family, AccelConfig(**content["options"]))
        except (ValueError, TypeError, KeyError):  # written by another version
            _parsed[marker] = None
    return _parsed[marker]


def foreign_reason(module: nn.Module, method: str) -> str | None:
    """Why a module's method is not its class's to replace, or None."""
    if method in module.__dict__:
        return f"{method} was replaced on this instance"
    function = vars(owner(type(module), method))[method]
    if not isinstance(function, type(owner)) or isinstance(function, wrapt.BaseObjectProxy):
        return f"{type(module).__name__}.{method} was wrapped by someone else"
    return None


def marker(module: nn.Module) -> str | None:
    return module.__dict__.get(MARKER)


def marked(module: nn.Module) -> tuple[Family, AccelConfig] | None:
    """Family and options of an accelerated instance, whose class has its dispatcher; None for any other."""
    text = marker(module)
    if text is None:
        return None
    found = _decode(text)
    if found is None or found.is_around:
        return None
    # Not only its owner: transformers wraps the inherited forward anew in every subclass, as FSDP2 makes them.
    has_dispatcher = any((base, found.family.method) in _installed for base in type(module).__mro__)
    return (found.family, found.config) if has_dispatcher else None


def is_around(module: nn.Module) -> bool:
    """Whether a module is marked for what is around its attention alone."""
    text = marker(module)
    found = None if text is None else _decode(text)
    return found is not None and found.is_around


def stats(module: nn.Module) -> dispatch.Stats:
    found = _stats.get(module)
    if found is None:
        found = _stats[module] = dispatch.Stats()
    return found


def mark(module: nn.Module, text: str) -> None:
    """Accelerate one instance: its class gets the dispatcher, it gets the marker."""
    found = _decode(text)
    if found is None:
        return
    with _lock:
        for key in _keys(module, found):
            _install(*key)
            _known.setdefault(key, weakref.WeakSet()).add(module)
        module.__dict__[MARKER] = text


def _keys(module: Any, found: _Marked) -> list[tuple[type, str]]:
    """What an instance with such a marker needs a dispatcher on: its family's method, and that of the whole block."""
    methods = [found.family.method]
    around = getattr(found.family, "block_method", None)
    if around is not None and found.config.fuse == "auto":
        methods.append(around)
    return [(owner(type(module), method), method) for method in methods]


def unmark(modules: Iterable[nn.Module]) -> None:
    """Undo `mark`, and take the dispatcher from every class that no accelerated instance is left of."""
    with _lock:
        for module in modules:
            module.__dict__.pop(MARKER, None)
            _stats.pop(module, None)
        idle = {key for key in _installed if not any(map(marker, _known.get(key, ())))}
        for key in idle - _copied(idle):
            _remove(key)


def _copied(keys: set[tuple[type, str]]) -> set[tuple[type, str]]:
    """Those of the keys that a marked copy is left of: copies are made without our knowledge, so they are sought."""
    found: set[tuple[type, str]] = set()
    if not keys:
        return found
    classes = {cls for cls, _ in keys}
    for instance in gc.get_objects():
        if classes.intersection(type(instance).__mro__) and MARKER in instance.__dict__:
            content = _decode(instance.__dict__[MARKER])
            if content is not None:
                found.update(_keys(instance, content))
    return found


def _install(cls: type, method: str) -> None:
    if (cls, method) in _installed:
        return
    factory = functools.partial(_dispatcher, name=method)
    _installed[cls, method] = wrapt.wrap_object(cls, method, cast(Any, factory))
    setattr(cls, MARKER, None)


def _remove(key: tuple[type, str]) -> None:
    cls, method = key
    wrapt.unwrap_object(cls, method, _installed[key])  # raises where another wrapper came on top of ours since
    del _installed[key]
    _known.pop(key, None)
    if MARKER in vars(cls) and not any(other == cls for other, _ in _installed):
        delattr(cls, MARKER)


def _dispatcher(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function that takes the method's place: unmarked instances run `method`, marked ones `dispatch.run`."""
    checkpoints = method.__code__.co_name == "forward_with_checkpointing"
    partial = functools.partial

    def dispatcher(self: Any, *args: Any, **kwargs: Any) -> Any:
        if checkpoints and self.training and self.gradient_checkpointing:
            # transformers >= 5.20 checkpoints in a wrapper that acts only while it is the class's own forward.
            return self._gradient_checkpointing_func(partial(run, self, **kwargs), *args)
        return run(self, *args, **kwargs)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        text = getattr(self, MARKER, None)  # another thread may be taking the class's default away
        compiling = torch.compiler.is_compiling()
        if text is None or _is_off(compiling) or env_disabled():
            return method(self, *args, **kwargs)
        found = _parsed.get(text)
        if found is None:
            found = None if compiling else _decode(text)  # another process may have written it
            if found is None:
                return method(self, *args, **kwargs)
        family = found.family
        if found.is_around or name != family.method:
            if found.config.fuse != "auto":
                return method(self, *args, **kwargs)
            return dispatch.run_around(family, self, method, found.config, args, kwargs)
        counted = None if compiling else stats(self)
        return dispatch.run(family, self, method, found.config, counted, args, kwargs)

    # torch.jit.script compiles the source of what functools.wraps names, in the globals of what it was given.
    function = types.FunctionType(dispatcher.__code__, method.__globals__, closure=dispatcher.__closure__)
    functools.update_wrapper(function, method)
    # update_wrapper copies it, and dynamo would then take the dispatcher for the original.
    function.__dict__.pop("_torchdynamo_orig_callable", None)
    function.__dict__[DISPATCHER] = function
    return function
