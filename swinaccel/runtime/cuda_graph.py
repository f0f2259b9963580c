"""Capture functions as CUDA graphs that share one pool of memory."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from itertools import count
from typing import Any

import torch

_PRIORITY = -3  # of the streams that are captured: a kind that nobody else asks for
_STREAMS = 32  # of a priority; PyTorch begins anew then


class _Shared:
    """What all graphs of one device share: memory, in which only one of them runs at a time.

    cuBLAS keeps a workspace for each stream, whose address graphs keep too. So nothing else may run on this stream, and
    nothing runs on it before a capture: that allocates the workspace, in this memory.
    """

    made = count()

    def __init__(self) -> None:
        if next(self.made) >= _STREAMS:
            raise RuntimeError("graphs were made and dropped too often in this process")
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(priority=_PRIORITY)
        self.lock = threading.RLock()
        self.event = torch.cuda.Event()  # after the latest replay


_shared: weakref.WeakValueDictionary[torch.device, _Shared] = weakref.WeakValueDictionary()


class CudaGraphs:
    """The graphs of one call on a CUDA device.

    Attributes:
        nbytes: device memory that capturing took.
        lock: to be held from `start` to `finish`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.nbytes = device, 0
        self._graphs: list[torch.cuda.CUDAGraph] = []
        with torch.cuda.device(device):
            self._shared = _shared.get(device) or _Shared()
        _shared[device] = self._shared
        self.lock = self._shared.lock

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run a function once, since what libraries set up at their first call must not be captured."""
        with torch.cuda.device(self._device):
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                run()
            current.wait_stream(stream)

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return a function that runs the kernels of `run` again, and the output of `run`, which each replay writes."""
        shared, graph = self._shared, torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), shared.lock:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            try:
                # Other threads may allocate and synchronise meanwhile.
                with torch.cuda.graph(graph, shared.pool, shared.stream, "thread_local"):
                    output = run()
            except BaseException:
                _shared.pop(self._device, None)  # its memory may be left in the middle of a capture
                raise
            self.nbytes += max(0, torch.cuda.memory_reserved() - before)
        self._graphs.append(graph)
        return graph.replay, output

    def start(self) -> None:
        """Wait, on the current stream, for the latest replay of any graph that shares the memory."""
        self._shared.event.wait(torch.cuda.current_stream(self._device))

    def finish(self) -> None:
        """Note that the current stream needs nothing more of the memory."""
        self._shared.event.record(torch.cuda.current_stream(self._device))
