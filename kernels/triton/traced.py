"""Hands kernels to a compiler, which copies their sources into its own code."""

import inspect
from functools import lru_cache
from typing import Any

from triton import JITFunction


class _Copied(JITFunction):
    """A kernel whose source is followed by the named tuples in it: compilers copy functions and constants only."""

    @property
    def src(self) -> str:
        classes = [inspect.getsource(one) for one in _named_tuples(self, {}).values()]
        return "\n".join([self._src, *(["from typing import NamedTuple"] if classes else []), *classes])


@lru_cache(maxsize=256)
def copied(kernel: Any) -> Any:
    """Return a kernel as a compiler is to copy it."""
    return _Copied(kernel.fn)


def _named_tuples(function: Any, found: dict[str, type], seen: tuple[Any, ...] = ()) -> dict[str, type]:
    """Return the named tuples in a function, and in those that it calls, by name."""
    for name in function.fn.__code__.co_names:
        one = function.fn.__globals__.get(name)
        if isinstance(one, type) and issubclass(one, tuple):
            found[name] = one
        elif isinstance(one, JITFunction) and one not in seen:
            _named_tuples(one, found, (*seen, one))
    return found
