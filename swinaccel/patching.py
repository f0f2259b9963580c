"""Put a dispatcher on a class and a marker on an instance, and take both away again.

The dispatcher is a plain function installed with `wrapt.wrap_object`: a `wrapt.FunctionWrapper` must not stand where
dynamo may trace it, since dynamo silently compiles what it wraps. The marker is a string in the instance's `__dict__`,
read as an attribute over the class default None, so that deep copies, EMA copies, pickles and replicas carry it and can
be loaded where swinaccel is not installed, where it means nothing.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import wrapt
from torch import nn

from .config import AccelConfig, env_disabled, may_be_disabled
from .families import CAPTURED, by_name
from .layers import MARKER, PROVEN, as_replacement, owner, without_dispatcher
from .runtime.call import Entry, call
from .runtime.plan import forget_state
from .runtime.traced import proven_facts
from .spec.adapters import Adapter, block_method, is_family

logger = logging.getLogger("swinaccel")


class _Switch:
    """One open block of `disabled`, and those around it."""

    __slots__ = ("is_open", "outer")

    def __init__(self, outer: _Switch | None) -> None:
        self.is_open, self.outer = True, outer


_switch: ContextVar[_Switch | None] = ContextVar("swinaccel_off", default=None)
_open_switches = 0  # blocks of `disabled` open in any thread: dynamo of torch 2.11 cannot trace a ContextVar

_lock = threading.RLock()
_installed: dict[tuple[type, str], Any] = {}  # (class, method): wrapt's handle
_instances: dict[tuple[type, str], weakref.WeakSet[nn.Module]] = {}  # instances that we marked ourselves


def _renew_lock() -> None:
    """Make a lock for a forked process, where the thread that held the old one does not run."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@dataclass(frozen=True)
class Marking:
    """The content of a marker: an adapter (a family, or that of a block around or a neighbour), and options."""

    adapter: Adapter
    config: AccelConfig
    entries: dict[str, Entry] = field(init=False)  # how calls run, by the methods that a dispatcher is needed on

    def __post_init__(self) -> None:
        methods = [self.adapter.method, *([block_method(self.adapter)] if self.config.fuse == "auto" else [])]
        entries = {method: Entry(self.adapter, self.config, method) for method in methods}
        object.__setattr__(self, "entries", entries)


_parsed: dict[str, Marking | None] = {}


@contextmanager
def switched_off() -> Iterator[None]:
    """Let dispatchers run the originals, in this thread and context.

    Compilers and backwards heed it in every thread: autograd calls checkpointed modules from threads of its own. The
    block ends for all of them at once, whatever context it is left in.
    """
    global _open_switches
    switch, counted = _Switch(_switch.get()), False
    try:
        with _lock:
            _open_switches, counted = _open_switches + 1, True
        token = _switch.set(switch)
        yield
    finally:
        switch.is_open = False
        if counted:
            with _lock:
                _open_switches -= 1
        with suppress(ValueError, UnboundLocalError):  # another context closes a generator; an interrupt at the start
            _switch.reset(token)


def _is_off(compiling: bool) -> bool:
    if compiling:
        return _open_switches > 0
    if not _open_switches:
        return False
    switch = _switch.get()
    while switch is not None:
        if switch.is_open:
            return True
        switch = switch.outer
    return torch._C._current_graph_task_id() != -1


def encode(adapter: Adapter, config: AccelConfig) -> str:
    """Return the marker of an instance."""
    text = json.dumps({"family": adapter.name, "options": json.loads(config.to_json())}, sort_keys=True)
    decode(text)
    return text


def decode(marker: str) -> Marking | None:
    """Return the content of a marker, or None if it was written by another version."""
    if marker not in _parsed:
        try:
            content = json.loads(marker)
            adapter = by_name(content["family"])
            _parsed[marker] = None if adapter is None else Marking(adapter, AccelConfig(**content["options"]))
        except (ValueError, TypeError, KeyError):
            _parsed[marker] = None
    return _parsed[marker]


def foreign_reason(module: nn.Module, method: str) -> str | None:
    """Return why a module's method must not be replaced on its class, or None."""
    if method in module.__dict__:
        return f"{method} was replaced on this instance"
    function = vars(owner(type(module), method))[method]
    if not isinstance(function, types.FunctionType) or isinstance(function, wrapt.BaseObjectProxy):
        return f"{type(module).__name__}.{method} was wrapped by someone else"
    return None


def marker(module: nn.Module) -> str | None:
    """Return the marker of an instance, or None."""
    return module.__dict__.get(MARKER)


def marking_of(module: nn.Module) -> Marking | None:
    """Return the content of an accelerated window attention's marker; None for any other module."""
    found = _content(module)
    if found is None or not is_family(found.adapter):
        return None
    # Not only its owner: transformers wraps the inherited forward anew in every subclass, as FSDP2 makes them.
    has_dispatcher = any((base, found.adapter.method) in _installed for base in type(module).__mro__)
    return found if has_dispatcher else None


def is_block_only(module: nn.Module) -> bool:
    """Return True if a module is marked for what is around an attention, or beside it, alone."""
    found = _content(module)
    return found is not None and not is_family(found.adapter)


def is_captured(module: nn.Module) -> bool:
    """Return True if a module is marked for calls that are replayed as graphs."""
    found = _content(module)
    return found is not None and found.adapter is CAPTURED


def _content(module: nn.Module) -> Marking | None:
    text = marker(module)
    return None if text is None else decode(text)


def mark(module: nn.Module, text: str) -> None:
    """Accelerate one instance: its class gets the dispatcher, it gets the marker."""
    found = decode(text)
    if found is None:
        return
    with _lock:
        for key in _keys(module, found):
            _install(*key)
            _instances.setdefault(key, weakref.WeakSet()).add(module)
            setattr(key[0], PROVEN, getattr(key[0], PROVEN) | proven_facts(found.adapter, module))
        module.__dict__[MARKER] = text


def _install_on_loaded(module: nn.Module) -> None:
    """Install dispatchers on a module that came with a marker, from a file or another process.

    Nothing is proven of it here: it runs its originals until `accelerate` is called, and a warning says so.
    """
    found = _content(module)
    with _lock:
        for method in () if found is None else found.entries:
            with suppress(Exception):  # it is not built as the marker says
                if foreign_reason(module, method) is None:
                    _install(owner(type(module), method), method)


def _watch_loading() -> None:
    """Wrap `nn.Module.__setstate__`, to notice modules that are unpickled or copied with a marker."""
    restore = nn.Module.__setstate__

    @functools.wraps(restore)
    def setstate(self: nn.Module, state: Any) -> None:
        restore(self, state)
        if MARKER in self.__dict__:
            _install_on_loaded(self)

    nn.Module.__setstate__ = setstate  # type: ignore[method-assign]


_watch_loading()


def _keys(module: Any, found: Marking) -> list[tuple[type, str]]:
    return [(owner(type(module), method), method) for method in found.entries]


def unmark(modules: Iterable[nn.Module]) -> None:
    """Undo `mark`, and remove the dispatcher from every class without an accelerated instance."""
    with _lock:
        for module in modules:
            module.__dict__.pop(MARKER, None)
            forget_state(module)
        idle = {key for key in _installed if not any(map(marker, _instances.get(key, ())))}
        for key in idle - _keys_of_copies(idle):
            try:
                remove(key)
            except ValueError as error:  # what stays runs originals, and goes when the wrapper on top has gone
                logger.warning("%s.%s keeps a dispatcher that does nothing: %s", key[0].__name__, key[1], error)


@contextmanager
def dropping_compiled_code(model: nn.Module) -> Iterator[None]:
    """Drop the code that `torch.compile` made of a model's forwards where markers change inside: it would run on."""
    before = list(map(marker, model.modules()))
    try:
        yield
    finally:
        dynamo = sys.modules.get("torch._dynamo")  # who compiles has imported it
        if dynamo is not None and list(map(marker, model.modules())) != before:
            bases = {base for module in model.modules() for base in type(module).__mro__}
            for function in (vars(base).get("forward") for base in bases):
                for one in (function, without_dispatcher(function)) if isinstance(function, types.FunctionType) else ():
                    dynamo.eval_frame.reset_code(one.__code__)


def _keys_of_copies(keys: set[tuple[type, str]]) -> set[tuple[type, str]]:
    """Return those of the keys that a marked copy still needs; nobody is told of copies, so they are looked for."""
    found: set[tuple[type, str]] = set()
    if not keys:
        return found
    classes, waiting = set(), [cls for cls, _ in keys]
    while waiting:
        cls = waiting.pop()
        if cls not in classes:
            classes.add(cls)
            waiting += type.__subclasses__(cls)
    # Not `get_objects`, whose list holds the tuples that other threads are about to make: they would fail.
    for instance in gc.get_referrers(*classes):
        if type(instance) in classes and MARKER in instance.__dict__:
            content = decode(instance.__dict__[MARKER])
            if content is not None:
                found.update(_keys(instance, content))
    return found


def _install(cls: type, method: str) -> None:
    if (cls, method) in _installed:
        return
    factory = functools.partial(_dispatcher, name=method)
    _installed[cls, method] = wrapt.wrap_object(cls, method, cast(Any, factory))
    setattr(cls, MARKER, None)
    setattr(cls, PROVEN, getattr(cls, PROVEN, frozenset()))


def remove(key: tuple[type, str]) -> None:
    """Remove the dispatcher from a method of a class; wrapt raises where another wrapper has been put on top of it."""
    cls, method = key
    wrapt.unwrap_object(cls, method, _installed[key])
    del _installed[key]
    _instances.pop(key, None)
    if not any(other == cls for other, _ in _installed):
        for name in (MARKER, PROVEN):
            if name in vars(cls):
                delattr(cls, name)


class _Runtime:
    """The way from a dispatcher to `_run`; pickled (by value, with classes of `__main__`) it is an empty object."""

    def __init__(self) -> None:
        self.run = _run

    def __reduce__(self) -> tuple[Any, ...]:
        return types.SimpleNamespace, ()


def _run(method: Callable[..., Any], name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one call of a method that has a dispatcher: unmarked instances run `method`, marked ones their plans."""
    text = getattr(module, MARKER, None)  # another thread may be taking the class's default away
    compiling = torch.compiler.is_compiling()
    if text is None or _is_off(compiling) or ((compiling or may_be_disabled()) and env_disabled()):
        return method(module, *args, **kwargs)
    found = _parsed.get(text)
    if found is None and not compiling:
        found = decode(text)  # another process may have written it
    entry = None if found is None else found.entries.get(name)
    return method(module, *args, **kwargs) if entry is None else call(entry, module, method, args, kwargs)


def _dispatcher(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return the function that takes the method's place.

    It names nothing global, so that it can be pickled by value, and loaded where swinaccel is not installed.
    """
    checkpoints = method.__code__.co_name == "forward_with_checkpointing"
    partial, runtime = functools.partial, _Runtime()

    def dispatcher(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = getattr(runtime, "run", None)
        if run is None:
            return method(self, *args, **kwargs)
        if checkpoints and self.training and self.gradient_checkpointing:
            # transformers >= 5.20 checkpoints in a wrapper that acts only while it is the class's own forward.
            inner = partial(lambda module, options, *args: run(method, name, module, args, options), self, kwargs)
            return self._gradient_checkpointing_func(inner, *args)
        return run(method, name, self, args, kwargs)

    return as_replacement(dispatcher, method)
