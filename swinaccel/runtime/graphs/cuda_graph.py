"""Capture functions as CUDA graphs that share a stream, and mostly a pool of memory."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

_PRIORITY = -3  # of the streams that are captured: a kind that nobody else asks for
_WIDTH = 64  # of products for which cuBLAS wants its workspace


class _Pool:
    """Memory of graphs of a device that live at the same time."""

    def __init__(self) -> None:
        self.id = torch.cuda.graph_pool_handle()


class _Shared:
    """State that graphs of one device share: a stream to capture on, and memory in which one of them runs at a time.

    cuBLAS keeps a workspace for each stream and thread, and graphs keep its address. Others may make PyTorch free all
    workspaces (torch.compile does), so these lie in a pool of their own, which a graph that never runs keeps for ever.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream(priority=_PRIORITY)  # nobody else's, or its workspace would be theirs too
        self.lock = threading.RLock()
        self.event = torch.cuda.Event()  # after the latest replay
        self.was_default = False  # which ran on the default stream
        self._pool: weakref.ref[_Pool] | None = None
        self.workspaces = torch.cuda.graph_pool_handle()
        self.kept: list[Any] = []  # in that pool
        with torch.inference_mode(False):
            self.factors: list[Tensor] = [
                torch.zeros(_WIDTH, _WIDTH, device="cuda", dtype=dtype, requires_grad=True)
                for dtype in (torch.float32, torch.float16)
            ]
        self.multiply()  # at its first product in a process cuBLAS sets itself up, which cannot be captured

    def multiply(self) -> None:
        """Multiply on this thread, and on the one that runs its backwards."""
        with torch.inference_mode(False), torch.enable_grad():
            outs = [torch.nn.functional.linear(one, one, one[0]) @ one for one in self.factors]
            torch.autograd.grad([one.sum() for one in outs], self.factors)

    def pool(self) -> _Pool:
        """Return the pool of the graphs that live now; it is given back when the last of them has gone."""
        found = None if self._pool is None else self._pool()
        if found is None:
            found = _Pool()
            self._pool = weakref.ref(found)
        return found


_shared: dict[torch.device, _Shared] = {}


class CudaGraphs:
    """The graphs of one call on a CUDA device.

    Args:
        shares_memory: what the graphs write may be written over as soon as `finish` is called. What a graph frees while
            it is captured, later ones of its pool take.

    Attributes:
        nbytes: device memory that capturing took.
        lock: to be held from `start` to `finish`.
    """

    def __init__(self, device: torch.device, shares_memory: bool = True) -> None:
        self._device, self.nbytes = device, 0
        self._graphs: list[torch.cuda.CUDAGraph] = []
        with torch.cuda.device(device):
            self._shared = _shared[device] = _shared.get(device) or _Shared()
            self.lock = self._shared.lock
            self._pool = self._shared.pool() if shares_memory else _Pool()
        self._make_workspaces()

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run a function once, since what libraries set up at their first call must not be captured."""
        with self.aside():
            run()

    @contextmanager
    def aside(self) -> Iterator[torch.cuda.Stream]:
        """Run what is inside on the stream that captures use; what it holds is freed for others by the next capture."""
        with torch.cuda.device(self._device), self.lock:
            current, stream = torch.cuda.current_stream(), self._shared.stream
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                yield stream
            current.wait_stream(stream)

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return a function that runs the kernels of `run` again, and the output of `run`, which each replay writes."""
        graph = torch.cuda.CUDAGraph()
        with self.lock:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(self._device)
            with self._captured(graph, self._pool.id):
                output = run()
            self.nbytes += max(0, torch.cuda.memory_reserved(self._device) - before)
        self._graphs.append(graph)
        return graph.replay, output

    def _make_workspaces(self) -> None:
        """Make the workspaces of this thread, and of the one that runs its backwards, if they are not there."""
        graph, shared = torch.cuda.CUDAGraph(), self._shared
        with self.lock, self._captured(graph, shared.workspaces):
            shared.multiply()
        if not shared.kept:
            shared.kept.append(graph)

    @contextmanager
    def _captured(self, graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
        """Capture what is inside; other threads may allocate and synchronise meanwhile."""
        with torch.cuda.device(self._device):
            try:
                with torch.cuda.graph(graph, pool, self._shared.stream, "thread_local"):
                    yield
            except BaseException:
                _shared.pop(self._device, None)  # its memory and stream may be left in the middle of a capture
                _mend()
                raise

    def start(self) -> None:
        """Wait, on the current stream, for the latest replay of any graph that shares the memory."""
        is_default = not torch._C._cuda_getCurrentRawStream(self._device.index)
        if not (is_default and self._shared.was_default):  # a stream waits for itself
            self._shared.event.wait(torch.cuda.current_stream(self._device))
        self._shared.was_default = is_default

    def finish(self) -> None:
        """Note that the current stream needs nothing more of the memory."""
        self._shared.event.record(torch.cuda.current_stream(self._device))


def _mend() -> None:
    """Let random numbers be drawn again: a capture that fails leaves PyTorch's generator in the middle of it."""
    with suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph(), None, torch.cuda.Stream(), "thread_local"):
        torch.zeros(1, device="cuda")
