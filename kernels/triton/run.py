"""Runs compiled kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from triton import knobs
from triton.runtime.cache import triton_key


def read_sources() -> None:
    """Let Triton read its own sources, which the names of compiled kernels depend on; it keeps what it found."""
    triton_key()


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
