"""Hands kernels to a compiler, which copies their sources into its own code."""

from functools import lru_cache
from typing import Any

from triton import JITFunction


class _Copied(JITFunction):
    """A kernel whose source is followed by the named tuples in it: compilers copy functions and constants only."""

    @property
    def src(self) -> str:
        lines = [self._src, "from collections import namedtuple"]
        for name, one in _named_tuples(self, {}).items():
            lines.append(f"{name} = namedtuple({name!r}, {one._fields}, defaults={(*one._field_defaults.values(),)})")
        return "\n".join(lines) if len(lines) > 2 else self._src


@lru_cache(maxsize=256)
def copied(kernel: Any) -> Any:
    """Return a kernel as a compiler is to copy it."""
    return _Copied(kernel.fn)


def _named_tuples(function: Any, found: dict[str, Any], callers: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Return the named tuples in a function, and in those that it calls, by name."""
    for name in function.fn.__code__.co_names:
        one = function.fn.__globals__.get(name)
        if isinstance(one, type) and issubclass(one, tuple):
            found[name] = one
        elif isinstance(one, JITFunction) and one not in callers:
            _named_tuples(one, found, (*callers, function))
    return found
