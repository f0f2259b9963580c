"""Guards: see whether modules, and all that their code reads, are what they were when a plan was built for them.

A guard is a copy of what a module tree is made of, compared as a whole: settings by value; submodules, parameters,
buffers and hooks by identity. Comparing takes a tenth of the time that reading and judging each of them takes, and
where Python counts the writes to dictionaries, only those that were written to since are compared. Numbers that are
written in place, as all training does, are no change here: tensors are read when a kernel reads them.
"""

from __future__ import annotations

import gc
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from itertools import chain, repeat
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo import guards as compilers_guards

from ..layers import BASE_ATTRIBUTES, HOOKS
from ..spec.window import is_plain

_CONTAINERS = ("_parameters", "_buffers", "_modules")
_MOST_OBJECTS, _MOST_VALUES = 1024, 2**16  # that settings hold, and of one of them: a data set is no setting
_NOT_OPENED = "logging"  # whose objects hold locks, and each other
_forward, _attributes = attrgetter("forward", "__call__", "_call_impl"), attrgetter("__dict__")


class NotGuardable(Exception):
    """A module holds what cannot be compared."""


class _Plain:
    """An object with attributes."""


class _Same:
    """Stand for a tensor that is equal to itself alone, whatever its number is."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __eq__(self, other: object) -> bool:
        return other is self._tensor

    __hash__ = None  # type: ignore[assignment]


def _sees_writes(version_of: Any) -> bool:
    """Return True if the version of a dictionary, which no other one ever has, changes at each kind of write."""

    def assigned(owner: Any) -> None:
        owner.written = object()

    def put(owner: Any) -> None:
        vars(owner)["written"] = object()

    def updated(owner: Any) -> None:
        vars(owner).update(written=object())

    def taken(owner: Any) -> None:
        vars(owner).pop("written")

    def deleted(owner: Any) -> None:
        owner.written = None
        del owner.written

    owners = nn.Identity(), _Plain()
    try:
        seen = [version_of(vars(owner)) for owner in owners]
        for _ in range(32):  # by then Python runs a quicker form of each
            for write in (assigned, put, updated, taken, deleted):
                for owner in owners:
                    write(owner)
                    seen.append(version_of(vars(owner)))
        stays = [version_of(vars(owner)) for owner in owners] == seen[-2:]
    except Exception:
        return False
    return stays and len(set(seen)) == len(seen)


_version_of: Any = getattr(compilers_guards, "dict_version", None)  # the compiler's own guards go by it
_COUNTS_WRITES = _version_of is not None and _sees_writes(_version_of)


class Guard:
    """Modules as they were when this was made, and what their code reads elsewhere.

    Args:
        modules: each by itself, without its submodules. None is kept alive but for its attributes, if it is a `alias`.
        cells: (namespace or object, name, value) outside of them, compared by identity.
        contents: (mapping or list, copy of it) outside of them, compared by value.
        ignored: settings of the modules that may change, since each call's key holds them.
    Raises:
        NotGuardable: for a setting that cannot be compared with itself, or holds modules, which may hold this one, and
            where the first module holds itself, by a bound method or a closure: a guard would keep it alive for ever.
    """

    __slots__ = (
        "_buffers", "_cells", "_classes", "_containers", "_contents", "_copies", "_counts_writes", "_empty", "_fields",
        "_first", "_flat", "_forwards", "_held", "_ignored", "_kept", "_kinds", "_lists", "_names", "_pointers",
        "_settings", "_types", "_versions", "_watched", "_written", "modules", "owners", "values",
    )  # fmt: skip

    def __init__(
        self,
        modules: Iterable[nn.Module],
        cells: Iterable[tuple[Mapping[str, Any], str, Any]] = (),
        contents: Iterable[tuple[Any, Any]] = (),
        ignored: tuple[str, ...] = (),
    ) -> None:
        self.modules = modules = list(modules)
        self._types = list(map(type, modules))
        self._classes = [cls for cls in dict.fromkeys(self._types) if not issubclass(cls, torch.jit.ScriptModule)]
        self._forwards = list(map(_forward, self._classes))
        self._ignored = ignored
        self.values: list[Tensor] = []  # tensors among the settings
        self._settings = []
        owners: dict[int, Any] = {}  # of settings: these modules, and the objects that they name, and those, and so on
        waiting = deque(modules)
        while waiting:
            one = waiting.popleft()
            if id(one) not in owners:
                if len(owners) - len(modules) >= _MOST_OBJECTS:
                    raise NotGuardable
                owners[id(one)] = one
                self._settings.append(_settings(one.__dict__, waiting, self.values))
        self.owners = list(owners.values())
        # Settings that can be written to without a write to their module.
        self._first = list(map(dict, map(_attributes, self.owners)))
        pairs = [
            (now, then[name])
            for first, then in zip(self._first, self._settings, strict=True)
            for name, now in first.items()
            if now is not then[name]
        ]
        # Thousands of names of classes, which all blocks may share, are compared when they were written to.
        self._flat = [now for now, _ in pairs if _is_flat(now)]
        self._lists = [pair for pair in pairs if not _is_flat(pair[0])]
        self._kinds = _kinds(self.owners)
        self._versions = list(map(_version, self.values))
        # What is empty stays the same if it, as a setting, is no other or an empty one too; the rest is looked into.
        places = [(one, name) for one in modules for name in (*HOOKS, *_CONTAINERS)]
        self._empty = [one.__dict__[name] for one, name in places if not one.__dict__[name]]
        self._containers = [(one.__dict__, name) for one, name in places if one.__dict__[name]]
        filled = self._filled()
        # Of other kinds of mappings, the order may change without a write.
        self._counts_writes = _COUNTS_WRITES and {type(one) for one in (*map(vars, self.owners), *filled)} == {dict}
        self._written: list[int] | None = None  # versions of these dictionaries when they were last compared
        self._names, self._kept = list(chain.from_iterable(filled)), _values(filled)
        self._buffers = [one for module in modules for one in module._buffers.values() if one is not None]
        self._pointers = list(map(Tensor.data_ptr, self._buffers))
        cells, contents = {(id(cell[0]), cell[1]): cell for cell in cells}.values(), list(contents)
        spaces = [cell for cell in cells if isinstance(cell[0], Mapping)]
        self._cells = [namespace for namespace, _, _ in spaces], [name for _, name, _ in spaces]
        self._watched = [value for _, _, value in spaces]
        fields = [cell for cell in cells if not isinstance(cell[0], Mapping)]
        self._fields = [one for one, _, _ in fields], [name for _, name, _ in fields]
        self._held = [value for _, _, value in fields]
        self._contents, self._copies = [now for now, _ in contents], [then for _, then in contents]
        if _holds_itself(modules[0].__dict__) or not self.holds():
            raise NotGuardable

    def holds(self) -> bool:
        """Return True if nothing has changed since."""
        try:
            return (
                list(map(type, self.modules)) == self._types
                and list(map(_forward, self._classes)) == self._forwards
                and self._holds_same()
                and not any(self._empty)
                and list(map(Tensor.data_ptr, self._buffers)) == self._pointers  # views of them may have been kept
                and list(map(_version, self.values)) == self._versions
                and all(map(is_, map(getitem, *self._cells), self._watched))
                and all(map(is_, map(getattr, *self._fields, repeat(None)), self._held))
                and self._contents == self._copies
            )
        except Exception:  # a setting that has become something which cannot be compared, a name that is gone
            return False

    def _holds_same(self) -> bool:
        """Return True if settings, parameters, buffers and submodules are what they were."""
        filled = self._filled()
        written = None
        if self._counts_writes:
            written = list(map(_version_of, chain(map(_attributes, self.owners), filled, self._flat)))
            if written == self._written:
                return all(now == then for now, then in self._lists)
        kept = _values(filled)
        if not (
            len(kept) == len(self._kept)
            and all(map(is_, kept, self._kept))
            and list(chain.from_iterable(filled)) == self._names
            and self._has_settings()
        ):
            return False
        if written is not None:
            self._note(written)
        return True

    def _note(self, written: list[int]) -> None:
        """Keep the versions of dictionaries that were found to be what they were.

        Who put something else that can be written to in a place, if an equal one, has all compared from then on.
        """
        before: Iterable[int | None] = self._written or repeat(None)
        for owner, first, now, then in zip(self.owners, self._first, written, before, strict=False):
            if now != then:
                values = vars(owner).items()
                self._counts_writes &= all(value is first.get(name) or is_plain(value) for name, value in values)
        place = len(written) - len(self._flat)
        if self._written is None or written[place:] != self._written[place:]:
            self._counts_writes &= all(map(_is_flat, self._flat))
        self._written = written

    def _has_settings(self) -> bool:
        if not self._ignored:
            return list(map(vars, self.owners)) == self._settings and self._has_kinds()
        now, *others = map(vars, self.owners)
        then = {**self._settings[0], **{name: now[name] for name in self._ignored if name in now}}
        return now == then and others == self._settings[1:]

    def _has_kinds(self) -> bool:
        """Return True if settings are no others that are equal: 1, 1.0 and a tensor of one promote other dtypes."""
        return _kinds(self.owners) == self._kinds or all(
            type(value) is type(first[name]) or isinstance(value, dict)
            for owner, first in zip(self.owners, self._first, strict=True)
            for name, value in vars(owner).items()  # which may be in another order
        )

    def tensors(self) -> list[Tensor]:
        """Return all parameters and buffers of the modules."""
        return [one for one in self._kept if isinstance(one, Tensor)]

    def _filled(self) -> list[dict[str, Any]]:
        return [attributes[name] for attributes, name in self._containers]


def _is_flat(value: Any) -> bool:
    return type(value) is dict and all(map(is_plain, value.values()))


def _holds_itself(attributes: dict[str, Any]) -> bool:
    """Return True if a module can be reached from its attributes by way of anything but classes and globals."""
    waiting: list[Any] = [attributes]
    seen = {id(attributes)}
    while waiting:
        one = waiting.pop()
        if isinstance(one, types.FunctionType):
            found = [one.__closure__, one.__defaults__, one.__kwdefaults__, one.__dict__]
        else:
            found = [] if isinstance(one, (type, types.ModuleType)) else gc.get_referents(one)
        for other in found:
            if isinstance(other, nn.Module) and other.__dict__ is attributes:
                return True
            if id(other) not in seen:
                seen.add(id(other))
                waiting.append(other)
    return False


def _kinds(owners: list[Any]) -> list[type]:
    return list(map(type, chain.from_iterable(vars(one).values() for one in owners)))


def _values(containers: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, containers)))


def _settings(attributes: dict[str, Any], objects: deque[Any], tensors: list[Tensor]) -> dict[str, Any]:
    """Return an owner's attributes, to be compared with what they are later; objects that they name are to follow."""
    try:
        return {
            name: value if name in BASE_ATTRIBUTES else _copied(value, objects, tensors)  # submodules have their own
            for name, value in attributes.items()
        }
    except RecursionError:  # of what holds itself
        raise NotGuardable from None


def _copied(value: Any, objects: deque[Any], tensors: list[Tensor]) -> Any:
    """Return a copy of what can be written to, all the way down; else it would be compared with itself."""
    if is_plain(value):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Same(value) if value.numel() == 1 else value  # others are equal to themselves alone
    if isinstance(value, nn.Module):
        raise NotGuardable
    if hasattr(value, "__dict__"):  # a configuration
        if not type(value).__module__.startswith(_NOT_OPENED):
            objects.append(value)
    elif not isinstance(value, (dict, list, tuple, set)):
        raise NotGuardable
    if isinstance(value, (dict, list, tuple, set)) and len(value) > _MOST_VALUES:
        raise NotGuardable
    if isinstance(value, dict):
        copy = {key: _copied(one, objects, tensors) for key, one in value.items()}
        return OrderedDict(copy) if isinstance(value, OrderedDict) else copy  # whose order is looked at
    if isinstance(value, (list, tuple)):
        copies = [_copied(one, objects, tensors) for one in value]
        return copies if isinstance(value, list) else tuple(copies)
    return set(value) if isinstance(value, set) else value


def _version(tensor: Tensor) -> int:
    if tensor.is_inference():  # of which writes are not counted
        raise NotGuardable
    return tensor._version


def same_tensors(tensors: list[Tensor]) -> Any:
    """Return a function that tells if tensors have the shapes, strides, dtypes, devices and gradients of these.

    It does so for calls in the same autocast, gradient and inference modes. Of tensors without strides nothing is told.
    """
    if not tensors:
        return lambda *_: True
    if any(one.layout is not torch.strided for one in tensors):  # on some of which the function ends the process
        return lambda *_: False
    return compilers_guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
