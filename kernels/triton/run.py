"""Runs compiled kernels."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from triton import knobs
from triton.runtime import driver
from triton.runtime.cache import triton_key


def read_sources() -> None:
    """Let Triton read its own sources, which the names of compiled kernels depend on; it keeps what it found."""
    triton_key()


class _Loading:
    """Keeps the kernels that are loaded to be run apart from those that threads build ahead.

    Triton 3.6 imports a launcher for each signature, all under one name: threads that do so at the same time may be
    given one another's, and a kernel is then launched with what another one takes.
    """

    def __init__(self) -> None:
        self._changed, self._builders, self._is_loading = threading.Condition(), 0, False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Let others that share it in, but nobody who loads what will be run."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_loading)
            self._builders += 1
        try:
            yield
        finally:
            with self._changed:
                self._builders -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let nobody else in."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_loading and not self._builders)
            self._is_loading = True
        try:
            yield
        finally:
            with self._changed:
                self._is_loading = False
                self._changed.notify_all()


_loading = _Loading()


def launch_first(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Launch a kernel by Triton's own path, and return what is compiled for such arguments; the interpreter's is None.

    Threads do so one after the other.
    """
    with _loading.alone():
        return kernel[grid](*arguments, **options)


def builds_launchers() -> bool:
    """Return True if Triton builds a launcher for each signature, for the GPUs of this process."""
    return hasattr(sys.modules[driver.active.launcher_cls.__module__], "make_launcher")


def compile_ahead(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Compile a kernel for such arguments, and what launches it; `launch_first` finds both, and only loads them.

    Launchers are built by a C compiler, by threads at the same time: each loads its own into a copy, which may hold
    that of another kernel afterwards, and is thrown away. Where all kernels have one launcher, nothing is built.
    """
    compiled = kernel.warmup(*arguments, grid=grid, **options)
    if builds_launchers() and not hasattr(compiled, "__del__"):  # which would unload what it shares
        with _loading.shared():
            copy.copy(compiled)[grid]
    else:
        with _loading.alone():
            compiled[grid]


def runner(
    compiled: Any,
    grid: tuple[int, ...],
    numbers: tuple[Any, ...],
    stream_of: Callable[[int], int] | None,
    device: int,
) -> Callable[[Sequence[Any]], None]:
    """Return a function that runs a compiled kernel on a device, which must be the current one, on its tensors.

    It is run as torch.compile runs it: the runner of Triton's own makes a dictionary about each launch, for hooks
    that hardly anybody sets, and is left for where someone did.

    Args:
        numbers: the kernel's other arguments, which come after its tensors.
        stream_of: gives a device's current stream; None: Triton knows better.
    """
    whole = compiled[grid]
    if stream_of is None or not all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
        return lambda tensors: whole(*tensors, *numbers)
    runtime, run, function, metadata = knobs.runtime, compiled.run, compiled.function, compiled.packed_metadata
    x, y, z = grid

    def launch(tensors: Sequence[Any]) -> None:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            whole(*tensors, *numbers)
        else:
            run(x, y, z, stream_of(device), function, metadata, None, None, None, *tensors, *numbers)

    return launch
