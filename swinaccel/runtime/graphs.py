"""Replay calls of a whole model as a CUDA graph, while all that the graph was captured from is as it was.

A graph runs what was captured, on the memory that was captured, and looks at nothing. So each is kept under all that
decides what a call runs (its signature), holds on to the memory that it reads, and is replayed only where parameters
and buffers still lie there. All else, hooks and settings of every module, is compared while the device works, before
the result is given out. In-place changes of numbers need nothing: a replay reads them.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..layers import PLAIN_TENSORS, alias, has_hooks
from ..ops.failures import failures
from ..ops.observed import count_modes
from .guard import Guard, NotGuardable
from .plan import State, known_states

logger = logging.getLogger("swinaccel")

FIRST = 3  # the call of a signature that is captured: by then kernels are compiled, and blocks have their plans
MOST = 8  # signatures of one module

Engine = Callable[[Callable[[], Any], torch.device], Any]


class NotCapturable(Exception):
    """A call cannot be a graph; the message says why."""


class _Device:
    """What all graphs of one device share: memory, in which only one of them runs at a time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.lock = threading.RLock()
        self.event = torch.cuda.Event()  # after the latest replay


_devices: dict[torch.device, _Device] = {}


class CudaGraph:
    """One captured call on a CUDA device.

    Attributes:
        output: of the captured call; each replay writes it anew.
        nbytes: device memory that capturing took.
        runs: how often the call was run to capture it.
        lock: to be held from `start` to `finish`.
    """

    runs = 2

    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            shared = _devices.setdefault(device, _Device())
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                run()  # what libraries set up for a stream must not be captured
            current.wait_stream(stream)
            before = torch.cuda.memory_reserved()
            try:
                # Other threads may allocate and synchronise meanwhile.
                with shared.lock, torch.cuda.graph(self._graph, shared.pool, stream, "thread_local"):
                    self.output = run()
            except BaseException:
                _devices.pop(device, None)  # its memory may be left in the middle of a capture
                raise
            self.nbytes = max(0, torch.cuda.memory_reserved() - before)
        self._device, self._event, self.lock = device, shared.event, shared.lock

    def start(self) -> None:
        """Wait, on the current stream, for the latest replay of any graph that shares the memory."""
        self._event.wait(torch.cuda.current_stream(self._device))

    def replay(self) -> None:
        """Run what was captured, on the current stream."""
        self._graph.replay()

    def finish(self) -> None:
        """Note that the current stream needs nothing more of the memory."""
        self._event.record(torch.cuda.current_stream(self._device))


ENGINES: dict[str, Any] = {"cuda": CudaGraph}  # by type of device


class Capture:
    """One signature of a module, captured.

    Args:
        run: the call, of another input.
        x: its input.
    """

    def __init__(self, module: nn.Module, run: Callable[[Tensor], Any], x: Tensor) -> None:
        root = alias(module)
        modules = [root, *(part for part in module.modules() if part is not module)]
        if any(map(has_hooks, modules[1:])):  # its own run outside of its forward
            raise NotCapturable("a module in it has hooks, which a graph does not call; remove them")
        if any(part.training for part in modules):
            raise NotCapturable("a module in it is in training; call eval()")
        try:
            self._guard = Guard(modules)
        except NotGuardable:
            raise NotCapturable("a module in it holds a setting that cannot be compared") from None
        self._tensors = self._guard.tensors() + self._guard.values
        self._counted = [one for one in self._tensors if not one.is_floating_point() and not one.is_inference()]
        self._held = [one.detach() for one in self._tensors]  # what a graph reads must stay where it is
        self._places, self._versions, self._failures = self._where(), self._counts(), failures.count
        if any(one.device != x.device for one in self._tensors):
            raise NotCapturable("its parameters and buffers are on several devices")
        self._x = torch.empty_like(x)
        self._x.copy_(x)
        states = known_states(modules)
        before = [(one, one.calls, one.fallbacks) for one in states]
        with without_autocast_cache():
            self._graph = ENGINES[x.device.type](lambda: run(self._x), x.device)
        # Of one call; the engine has run it several times, for nobody.
        self._calls: list[tuple[State, int, int]] = []
        for state, calls, fallbacks in before:
            runs = self._graph.runs
            self._calls.append((state, (state.calls - calls) // runs, (state.fallbacks - fallbacks) // runs))
            state.calls, state.fallbacks = calls, fallbacks
        self._leaves, self._form = tree_flatten(self._graph.output)
        for leaf in self._leaves:
            if not isinstance(leaf, (int, float, str, type(None))) and type(leaf) is not Tensor:
                raise NotCapturable(f"it returns a {type(leaf).__name__}, which a graph does not compute")
        if not self._guard.holds():
            raise NotCapturable("its forward changes settings of its own")
        self.nbytes: int = self._graph.nbytes

    def lies(self) -> bool:
        """Return True if all memory that the graph reads is still that of the module; else it must not be replayed."""
        return self._where() == self._places and self._counts() == self._versions

    def holds(self, module: nn.Module) -> bool:
        """Return True if the module, and all in it, is what it was."""
        root = self._guard.modules[0]
        is_same = root.__dict__ is module.__dict__ and type(root) is type(module)
        return is_same and self._failures == failures.count and self._guard.holds() and self.lies()

    def replay(self, x: Tensor) -> Any:
        """Return what the call returns for x, in memory of the caller's own."""
        graph = self._graph
        with graph.lock:
            graph.start()
            self._x.copy_(x)
            graph.replay()
            clones: dict[int, Tensor] = {}
            leaves = [
                clones.setdefault(id(one), one.clone()) if isinstance(one, Tensor) else one for one in self._leaves
            ]
            graph.finish()
        return tree_unflatten(leaves, self._form)

    def count(self) -> None:
        """Count the calls of the modules inside, which a replay does not make."""
        for state, calls, fallbacks in self._calls:
            state.calls += calls
            state.fallbacks += fallbacks

    def _where(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))

    def _counts(self) -> list[int]:
        return [one._version for one in self._counted]  # of indices, through which kernels read


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Let autocast convert weights anew inside: a graph must not read what the cache is about to free."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Graphs:
    """The captured signatures of one module, the latest used last.

    Attributes:
        reason: why the latest signature that is no graph is none, or None.
        replays: calls that were replays.
    """

    def __init__(self) -> None:
        self.captures: OrderedDict[tuple, Capture] = OrderedDict()
        self.reason: str | None = None
        self.replays = 0
        self._seen: dict[tuple, int] = {}
        self._refused: dict[tuple, str] = {}

    @property
    def nbytes(self) -> int:
        """Return how much device memory the graphs take."""
        return sum(one.nbytes for one in self.captures.values())

    def replay(self, module: nn.Module, key: tuple, x: Tensor) -> tuple[Any] | None:
        """Return the result of a replay, alone in a tuple, or None where there is no graph, or none that holds."""
        capture = self.captures.get(key)
        if capture is None:
            return None
        if capture.lies():
            result = capture.replay(x)
            if capture.holds(module):
                with suppress(KeyError):  # another thread took it away
                    self.captures.move_to_end(key)
                capture.count()
                self.replays += 1
                return (result,)
        self.captures.pop(key, None)
        self._seen.pop(key, None)
        return None

    def is_due(self, key: tuple) -> bool:
        """Return True if a call of this signature, which is counted here, should be captured."""
        if key in self._refused:
            self.reason = self._refused[key]
            return False
        if len(self._seen) > 16 * MOST:  # sizes that never come back
            self._seen.clear()
        self._seen[key] = self._seen.get(key, 0) + 1
        return self._seen[key] >= FIRST

    def capture(self, module: nn.Module, key: tuple, run: Callable[[Tensor], Any], x: Tensor, limit: float) -> None:
        """Capture a call, if it can be captured, in at most so much of the device's memory."""
        try:
            capture = Capture(module, run, x)
        except Exception as error:  # of the call itself it will be raised again, by the call
            self.refuse(key, str(error) if isinstance(error, NotCapturable) else f"capturing failed: {_line(error)}")
            return
        while self.captures and (len(self.captures) >= MOST or self.nbytes + capture.nbytes > limit):
            self.captures.popitem(last=False)
        if capture.nbytes > limit:
            self.refuse(key, f"its graph takes {capture.nbytes / 2**20:.0f} MiB; raise graphs_memory for it")
            return
        self.reason, self.captures[key] = None, capture

    def refuse(self, key: tuple, reason: str) -> None:
        """Run calls of a signature without a graph from now on."""
        if len(self._refused) > 16 * MOST:
            self._refused.clear()
        self._refused[key] = self.reason = reason
        logger.info("swinaccel: no graph, and results are right: %s", reason)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:160]}"


def call(
    state: State,
    module: nn.Module,
    run: Callable[..., Any],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    share: float,
) -> Any:
    """Run one call of a module whose calls may be captured.

    Args:
        run: the module's own forward, unbound.
        x: the input, one of the arguments.
        share: of the device's memory, how much the graphs of this module may take.
    """
    key = signature(x, args, kwargs)
    if key is None:
        return run(module, *args, **kwargs)
    graphs = state.graphs = state.graphs or Graphs()
    found = graphs.replay(module, key, x)
    if found is None and graphs.is_due(key):
        root = alias(module)  # which does not keep the module alive

        def again(other: Tensor) -> Any:
            given = [other if one is x else one for one in args]
            return run(root, *given, **{name: other if one is x else one for name, one in kwargs.items()})

        graphs.capture(module, key, again, x, share * memory_of(x.device))
        found = graphs.replay(module, key, x)
    return run(module, *args, **kwargs) if found is None else found[0]


def memory_of(device: torch.device) -> float:
    """Return how much memory a device has, in bytes."""
    return float("inf") if device.type != "cuda" else torch.cuda.get_device_properties(device).total_memory


def signature(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
    """Return all that decides what an inference call runs, beside the module; None for a call that is no graph."""
    device = x.device.type
    if device not in ENGINES or torch.is_grad_enabled() or x.requires_grad or type(x) not in PLAIN_TENSORS:
        return None
    if count_modes() or (device == "cuda" and torch.cuda.is_current_stream_capturing()):
        return None
    others = [("", one) for one in args] + [*kwargs.items()]
    if not all(one is x or _is_plain(one) for _, one in others) or not x.numel() or not _is_dense(x):
        return None
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    rest = tuple((name, None if one is x else (type(one), one)) for name, one in others)
    modes = torch.is_inference_mode_enabled(), autocast, x.is_inference()
    return x.shape, x.stride(), x.dtype, x.device, len(args), rest, modes, _settings()


def _settings() -> tuple[Any, ...]:
    """Return PyTorch's own settings that decide which kernels run."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    try:
        precision: Any = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # the process configures precision through torch.backends.*.fp32_precision
        parts: tuple[Any, ...] = torch.backends, cuda.matmul, *(getattr(cudnn, name, None) for name in ("conv", "rnn"))
        precision = tuple(getattr(part, "fp32_precision", None) for part in parts)
    return (
        precision,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        (cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction),
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str, type(None))) or (type(value) is tuple and all(map(_is_plain, value)))


def _is_dense(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
