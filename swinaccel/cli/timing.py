"""Time variants of one computation, which take turns: their calls, or CUDA graphs of them."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..verify import _flat
from .factory import told

Progress = Callable[[str, int, int], None]

_SAMPLE_MS = 20.0  # a CUDA sample is as many calls as take this long
_GRAPH_MS = 0.5  # and a captured graph as many as take this long
_BUDGET_MS = 20_000.0  # for all samples, where the number of rounds is not given


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        name: "original" (as it came), "SDPA" or "eager attention" (the library's other attention, where it has one),
            "torch.compile" (of the original), "accelerated", "accelerated + torch.compile", each with the mode where
            one was asked for; in inference on a GPU also "original, CUDA graph" and "accelerated, CUDA graph"; other
            engines by their own names.
        latency_ms, p10_ms, p90_ms: median and tenth and ninetieth percentile over the rounds, for one batch.
        images_per_s: batch / median.
        peak_memory_mib: at the height of a call, with parameters and the optimizer's state; None where the device
            does not count it, and for torch.compile's own CUDA graphs, which keep theirs.
        speedup: the original's median over this one's.
        difference: largest difference to the original's output, relative to its largest value.
        timed: "calls", "CUDA graph", or for other engines "calls, in a process of its own".
        error: why it did not run; everything else is None then.
    """

    name: str
    latency_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    images_per_s: float | None = None
    peak_memory_mib: float | None = None
    speedup: float | None = None
    difference: float | None = None
    timed: str | None = None
    error: str | None = None


def measure(
    starters: Mapping[str, Callable[[], Runner]],
    rounds: int | None,
    batch: int = 1,
    progress: Progress | None = None,
    deadline: float | None = None,
    rest_s: float = 0.0,
) -> tuple[tuple[Variant, ...], int]:
    """Return a row for each of `starters`, which take turns, and the number of rounds.

    The first is the yardstick of the others. What fails is a row with its reason, but for "original".

    Args:
        starters: functions that make the variants, by name.
        rounds: samples of each; unless given, as many as about 20 seconds allow, 10 to 50.
        batch: images in a call.
        progress: called with what happens now, the steps done, and the steps in all.
        deadline: a time of `time.monotonic()` after which no further variant is begun.
        rest_s: seconds of rest before a sample.
    """
    tell = progress or (lambda *_: None)
    runners: dict[str, Runner] = {}
    errors: dict[str, str] = {}
    expected: list[Tensor] = []
    for done, (name, start) in enumerate(starters.items()):
        tell(f"warming up: {name}", done, len(starters) + (rounds or 10))
        if deadline is not None and runners and time.monotonic() > deadline:
            errors[name] = "not run: the time was up"
            continue
        try:
            runner = start()
            outputs = runner.warm_up()
        except Exception as error:
            if name == "original":
                raise RuntimeError(f"the model does not run: {told(error)}") from error
            errors[name] = told(error)
            continue
        expected = expected or outputs
        runner.difference = difference(outputs, expected)
        runners[name] = runner
    order = list(runners)
    if rounds is None:
        round_ms = sum(runner.sample_ms for runner in runners.values())
        rounds = max(10, min(50, int(_BUDGET_MS / max(1e-3, round_ms))))
    for index in range(rounds if order else 0):
        tell("measuring", len(starters) + index, len(starters) + rounds)
        first = index % len(order)  # no variant always follows the same one
        for name in order[first:] + order[:first]:
            time.sleep(rest_s)
            runners[name].sample()
    yardstick = runners.get(next(iter(starters)))
    return tuple(
        Variant(name, error=errors[name]) if name in errors else runners[name].row(name, batch, yardstick)
        for name in starters
    ), rounds


class Runner:
    """One variant: its calls, timed.

    Attributes:
        call, inputs: what is timed is `call(*inputs)`.
        own_bytes: of memory that count as the call's although they were there before; None where the height of memory
            says nothing.
        graph: time the kernels alone, as a CUDA graph of some calls, where it can be captured.
        adapt: brings the outputs into the layout of the other variants'.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        inputs: tuple[Any, ...],
        device: torch.device,
        own_bytes: int | None = 0,
        *,
        graph: bool = False,
        adapt: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.call, self.inputs, self.device, self.own_bytes = call, inputs, device, own_bytes
        self.is_cuda = device.type == "cuda"
        self.graph, self.adapt = graph and self.is_cuda, adapt
        self.samples: list[float] = []
        self.calls_per_sample = self.calls_per_graph = 1
        self.sample_ms = self.difference = 0.0
        self.peak_mib: float | None = None
        self.timed = "calls"

    def warm_up(self) -> list[Tensor]:
        """Compile, load and settle; return the outputs of the first call."""
        torch.manual_seed(0)  # drop-path of a training step: the same for all that draw in the original's order
        outputs = [tensor.clone() for tensor in _flat(self.call(*self.inputs))]
        if self.is_cuda:
            for _ in range(4):
                self.call(*self.inputs)
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.call(*self.inputs)
            torch.cuda.synchronize(self.device)
            if self.own_bytes is not None:
                self.peak_mib = (torch.cuda.max_memory_allocated(self.device) - before + self.own_bytes) / 2**20
        self._fill_sample()
        if self.graph:
            self._capture()
        return outputs if self.adapt is None else [self.adapt(output) for output in outputs]

    def _fill_sample(self) -> None:
        """Decide how many calls make a sample."""
        self.calls_per_sample = 1
        call_ms = self._time() * self.calls_per_graph
        if self.is_cuda:
            self.calls_per_sample = max(1, min(50, math.ceil(_SAMPLE_MS / max(1e-3, call_ms))))
        self.sample_ms = call_ms * self.calls_per_sample

    def sample(self) -> None:
        """Take one sample."""
        self.samples.append(self._time())

    def _time(self) -> float:
        """Return milliseconds of a call, the mean of those of a sample."""
        if self.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(self.device):
                start.record()
                for _ in range(self.calls_per_sample):
                    self.call(*self.inputs)
                end.record()
                end.synchronize()
            return start.elapsed_time(end) / self.calls_per_sample / self.calls_per_graph
        begin = time.perf_counter()
        self.call(*self.inputs)
        if self.device.type != "cpu" and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return (time.perf_counter() - begin) * 1e3

    def _capture(self) -> None:
        """Put a graph of some calls in the place of the call; where there can be none, `timed` says why."""
        count = max(1, min(20, math.ceil(_GRAPH_MS * self.calls_per_sample / max(1e-3, self.sample_ms))))
        call = partial(self.call, *self.inputs)
        try:
            with torch.cuda.device(self.device):
                side = torch.cuda.Stream(self.device)
                side.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(side):
                    for _ in range(2):
                        call()
                torch.cuda.synchronize(self.device)
                # The graph keeps the address of cuBLAS's workspace and not its memory, which torch.compile's own graphs
                # give back (pytorch#193402): so it is to be allocated anew, from this graph's own pool.
                torch._C._cuda_clearCublasWorkspaces()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=side):
                    for _ in range(count):
                        call()
                graph.replay()
                torch.cuda.synchronize(self.device)
        except Exception as error:
            self.timed = f"calls with their launches, since there is no CUDA graph: {told(error)}"
            return
        self.captured = call  # what the graph reads lives as long as the call that brought it
        self.call, self.inputs, self.timed, self.calls_per_graph = graph.replay, (), "CUDA graph", count
        self._fill_sample()

    def row(self, name: str, batch: int, yardstick: Runner | None) -> Variant:
        """Return the times as a row, beside those of `yardstick`."""
        median = statistics.median(self.samples)
        tenths = statistics.quantiles(self.samples, n=10, method="inclusive") if len(self.samples) > 1 else [median]
        return Variant(
            name,
            latency_ms=median,
            p10_ms=tenths[0],
            p90_ms=tenths[-1],
            images_per_s=1e3 * batch / median,
            peak_memory_mib=self.peak_mib,
            speedup=None if yardstick is None else statistics.median(yardstick.samples) / median,
            difference=self.difference,
            timed=self.timed,
        )


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference relative to the largest expected value; infinity for NaN and other shapes."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return math.inf
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if other.numel():
            one, other = one.double(), other.double()
            error = ((one - other).abs().max() / other.abs().max().clamp_min(1e-30)).item()
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def compiler_room() -> Any:
    """Return a context in which several models of one class are compiled; dynamo's usual limit is lower."""
    return torch._dynamo.config.patch(recompile_limit=64)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Give PyTorch a number of threads inside, or leave it its own for None."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_name(device: torch.device) -> str:
    """Return a GPU's name, or what a CPU is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name, such as "bfloat16"."""
    return str(dtype).split(".")[-1]


def version(package: str) -> str | None:
    """Return the version of an installed package, else None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
