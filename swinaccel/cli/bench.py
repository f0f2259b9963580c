"""How fast is a model as it came, with its library's other attention, compiled, accelerated, and both?

All variants run on the same inputs and share their parameters, and they take turns within every round, so
that a machine that gets warmer, or busier, does so for all of them.
"""

from __future__ import annotations

import copy
import importlib.metadata
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import api, plots
from .backends.triton import first_line
from .report import Report
from .verify import _flat

Progress = Callable[[str, int, int], None]

SAMPLE_MS = 20.0  # a CUDA sample is as many calls as take this long
_BUDGET_MS = 20_000.0  # for all samples, where the number of rounds is not given
_GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile: they make CUDA graphs, whose memory stays


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        name: "original" (as it came, the yardstick of the others), "SDPA" or "eager attention" (the library's
            other attention, where it has one), "torch.compile" (of the original), "accelerated",
            "accelerated + torch.compile", each with the mode where one was asked for; and, in inference on a GPU,
            "original, CUDA graph" and "accelerated, CUDA graph": their kernels without the launches.
        latency_ms: median over the rounds, for one batch.
        p10_ms, p90_ms: a tenth of the rounds was faster, and slower, than these.
        images_per_s: batch / median.
        peak_memory_mib: at the height of a call, with parameters and the optimizer's state; None where the device
            does not count it, and for torch.compile's own CUDA graphs, which keep theirs.
        speedup: the original's median over this one's.
        difference: largest difference to the original's output, relative to its largest value.
        timed: what the times are of: "calls", or "CUDA graph".
        error: why it did not run, and everything above is None; None otherwise.
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


@dataclass(frozen=True)
class BenchResult:
    """All rows, and what is needed to read them.

    Attributes:
        variants: in the order in which they are shown; the first is the original.
        batch, dtype: of the inputs; the dtype of autocast, too, where there is one.
        mode: "inference" or "training".
        device, torch, triton: where they ran; triton is None where it is not installed.
        threads: of PyTorch, on the CPU.
        rounds: samples behind each median.
        report: of the accelerated variant, after its calls.
    """

    variants: tuple[Variant, ...]
    batch: int
    dtype: str
    mode: str
    device: str
    torch: str
    triton: str | None
    threads: int
    rounds: int
    report: Report

    def __getitem__(self, name: str) -> Variant:
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise KeyError(f"{name!r} was not measured; there are {', '.join(v.name for v in self.variants)}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"report": self.report.to_dict()}

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=120, highlight=False).print(self.__rich__())
        return text.getvalue().rstrip()

    def __rich__(self) -> Any:
        """The table and what explains it, for rich."""
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        triton = f", triton {self.triton}" if self.triton else ""
        table = Table(
            title=f"{self.device}, torch {self.torch}{triton}, {self.dtype}, batch {self.batch}, {self.mode}",
            box=box.SIMPLE,
            title_justify="left",
        )
        cells: dict[str, Callable[[Variant], str]] = {
            "ms / batch": lambda row: plots.number(row.latency_ms),
            "p10 - p90": lambda row: f"{plots.number(row.p10_ms)} - {plots.number(row.p90_ms)}",
            "images / s": lambda row: plots.number(row.images_per_s),
            "peak MiB": lambda row: plots.number(row.peak_memory_mib),
            "speed-up": lambda row: f"{row.speedup:.2f}x",
            "difference": lambda row: "" if row.name == "original" else f"{row.difference:.1e}",
        }
        if all(row.peak_memory_mib is None for row in self.variants):
            del cells["peak MiB"]
        table.add_column("variant", no_wrap=True)
        for column in cells:
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.variants:
            failed = [*"-" * (len(cells) - 2), "failed", "-"]
            table.add_row(row.name, *(failed if row.error is not None else (cell(row) for cell in cells.values())))
        notes = [f"{row.name} failed: {row.error}" for row in self.variants if row.error is not None]
        training = " (of the first step; torch.compile draws random numbers of its own)"
        notes.append(
            f"Medians of {self.rounds} interleaved rounds and their 10th to 90th percentiles. Difference: to the"
            f" original's output, relative to its largest value{training if self.mode == 'training' else ''}."
        )
        return Group(table, Text("\n".join(notes)))

    def plot(self, path: str | Path) -> None:
        """Draw the medians as bars into an image file.

        Raises:
            ImportError: without matplotlib; the message says what to install.
        """
        row = {"name": self.mode, "dtype": self.dtype, "variants": [asdict(variant) for variant in self.variants]}
        call = "training step" if self.mode == "training" else "batch"
        plots.bars([row], "latency_ms", f"ms per {call} of {self.batch}, {self.device} (less is better)", path)


def run(
    model: nn.Module,
    inputs: Iterable[Any],
    *,
    rounds: int | None = None,
    train: bool = False,
    autocast: torch.dtype | None = None,
    compile: bool | None = None,
    compile_mode: str | Sequence[str | None] | None = None,
    progress: Progress | None = None,
    deadline: float | None = None,
    **options: Any,
) -> BenchResult:
    """Measure a model as it is and accelerated, and with what else could make it faster.

    Args:
        model: accelerated or not; it is left as it is. It is run in eval mode, or copies of it are trained.
        inputs: what it is called with; the first tensor's first axis is the batch.
        rounds: how often each variant is sampled; unless given, as often as about 20 seconds allow, 10 to 50 times.
        train: a call is a training step: forward, the mean square of all outputs as loss, backward, AdamW.
        autocast: where `train`, run the forward under autocast to this dtype, as is usual.
        compile: measure the torch.compile variants too; on CUDA devices, unless given.
        compile_mode: `mode` of torch.compile, such as "reduce-overhead" or "max-autotune"; or several, each of which
            gives its own two variants.
        progress: called with what happens now, the steps done, and the steps in all.
        deadline: a time of `time.monotonic()` after which no further variant is begun.
        **options: the fields of `AccelConfig`.
    Raises:
        ValueError, TypeError: for an argument that is none of these.
        RuntimeError: where the original itself does not run on these inputs.
    """
    inputs = tuple(inputs)
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if not tensors:
        raise ValueError("inputs must hold a tensor: run(model, (images,))")
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    if autocast is not None and not train:
        raise ValueError("autocast is for train=True")
    device, batch = tensors[0].device, tensors[0].shape[0] if tensors[0].dim() else 1
    compile = device.type == "cuda" if compile is None else compile
    modes = (compile_mode,) if compile_mode is None or isinstance(compile_mode, str) else tuple(compile_mode)
    own_bytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    own_bytes += 2 * sum(t.nbytes for t in model.parameters() if train and t.requires_grad)  # the optimizer's moments

    def start(make: Callable[[], Any], counts: bool) -> Runner:
        return Runner(_Step(make(), autocast) if train else make(), inputs, device, own_bytes if counts else None)

    def replay(make: Callable[[], Any]) -> Runner:
        return Replayed(make(), inputs, device, own_bytes)

    with compiler_room() if compile else nullcontext(), torch.set_grad_enabled(train):
        makers, accelerated = _variants(model, modes if compile else (), options, train)
        starters: dict[str, Callable[[], Runner]] = {}
        for name, make in makers.items():
            starters[name] = partial(start, make, not name.endswith(_GRAPH_MODES))
            if name in ("original", "accelerated") and device.type == "cuda" and not train:
                starters[f"{name}, CUDA graph"] = partial(replay, make)
        variants, rounds = measure(starters, rounds, batch, progress, deadline)
        report = api.report(accelerated)
    return BenchResult(
        variants=variants,
        batch=batch,
        dtype=_dtypes(tensors, autocast),
        mode="training" if train else "inference",
        device=device_name(device),
        torch=torch.__version__,
        triton=version("triton"),
        threads=torch.get_num_threads(),
        rounds=rounds,
        report=report,
    )


def measure(
    starters: Mapping[str, Callable[[], Runner]],
    rounds: int | None,
    batch: int = 1,
    progress: Progress | None = None,
    deadline: float | None = None,
) -> tuple[tuple[Variant, ...], int]:
    """A row for each of `starters`, which take turns, and the number of rounds; arguments as those of `run`.

    The first is the yardstick of the others. What fails is a row with its reason, but for "original".
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
                raise RuntimeError(f"the model does not run: {first_line(error)}") from error
            errors[name] = first_line(error)
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
            runners[name].sample()
    yardstick = runners.get(next(iter(starters)))
    return tuple(
        Variant(name, error=errors[name]) if name in errors else runners[name].row(name, batch, yardstick)
        for name in starters
    ), rounds


def _variants(
    model: nn.Module, modes: Sequence[str | None], options: dict[str, Any], train: bool
) -> tuple[dict[str, Callable[[], Callable[..., Any]]], nn.Module]:
    """What makes each variant, by its name; and the accelerated one."""
    twin = partial(_twin, model, train)
    # Accelerated first: a dispatcher that comes onto a class after a compiled run makes that compile again.
    accelerated, *both = (api.accelerate(twin(), **options) for _ in range(1 + len(modes)))
    makers: dict[str, Callable[[], Callable[..., Any]]] = {"original": twin}
    other = _other_attention(model)
    if other is not None:
        makers["SDPA" if other == "sdpa" else "eager attention"] = lambda: _with_attention(twin(), other)

    def compiled(mode: str | None, fast: nn.Module | None = None) -> Callable[..., Any]:
        return torch.compile(twin() if fast is None else fast, mode=mode)

    labels = [f" {mode}" if mode else "" for mode in modes]
    for mode, label in zip(modes, labels, strict=True):
        makers[f"torch.compile{label}"] = partial(compiled, mode)
    makers["accelerated"] = lambda: accelerated
    for mode, label, fast in zip(modes, labels, both, strict=True):
        makers[f"accelerated + torch.compile{label}"] = partial(compiled, mode, fast)
    return makers, accelerated


def _twin(model: nn.Module, train: bool) -> nn.Module:
    """An unaccelerated copy: in eval mode with the same parameters and buffers, or in train mode with its own."""
    shared: dict[int, Any] = {} if train else {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = api.restore(copy.deepcopy(model, shared))
    twin.train(train)  # which gives nothing where a model says so
    return twin


def _other_attention(model: nn.Module) -> str | None:
    """The attention that the model's library offers besides the one in use: "sdpa", "eager" or None."""
    if _unfused(model):
        return "sdpa"
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    has_both = getattr(model, "_supports_sdpa", False) and implementation in ("eager", "sdpa")  # Hugging Face
    return ("sdpa" if implementation == "eager" else "eager") if has_both else None


def _with_attention(model: nn.Module, implementation: str) -> nn.Module:
    """The same model, with its library's other attention."""
    unfused = _unfused(model)
    for module in unfused:
        module.fused_attn = True
    if not unfused:
        model.set_attn_implementation(implementation)  # type: ignore[operator]
    return model


def _unfused(model: nn.Module) -> list[Any]:
    """timm's attentions that could be SDPA's."""
    return [module for module in model.modules() if getattr(module, "fused_attn", None) is False]


def forward(
    model: Callable[..., Any], inputs: Iterable[Any], device: torch.device, autocast: torch.dtype | None
) -> list[Tensor]:
    """All floating-point outputs of a model, under autocast to a dtype or without."""
    with torch.autocast(device.type, autocast) if autocast else nullcontext():
        return _flat(model(*inputs))


def mean_square(outputs: Sequence[Tensor]) -> Tensor:
    """A loss, fp32: the sum of the outputs' mean squares."""
    return torch.stack([output.float().square().mean() for output in outputs]).sum()


class _Step:
    """A training step of one model, with its optimizer."""

    def __init__(self, model: Any, autocast: torch.dtype | None) -> None:
        self.model, self.autocast = model, autocast
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = parameters[0].device
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=self.device.type == "cuda")

    def __call__(self, *inputs: Any) -> list[Tensor]:
        outputs = forward(self.model, inputs, self.device, self.autocast)
        mean_square(outputs).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return [output.detach() for output in outputs]


class Runner:
    """One variant: its calls, timed."""

    timed = "calls"

    def __init__(
        self, call: Callable[..., Any], inputs: tuple[Any, ...], device: torch.device, own_bytes: int | None = 0
    ) -> None:
        self.call, self.inputs, self.device, self.own_bytes = call, inputs, device, own_bytes
        self.is_cuda = device.type == "cuda"
        self.samples: list[float] = []
        self.calls_per_sample = 1
        self.sample_ms = 0.0
        self.peak_mib: float | None = None
        self.difference = 0.0

    def warm_up(self) -> list[Tensor]:
        """Compile, load and settle; the output of a call."""
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
        call_ms = self._time()
        if self.is_cuda:
            self.calls_per_sample = max(1, min(50, math.ceil(SAMPLE_MS / max(1e-3, call_ms))))
        self.sample_ms = call_ms * self.calls_per_sample
        return outputs

    def sample(self) -> None:
        self.samples.append(self._time())

    def _time(self) -> float:
        """Milliseconds of a call, the mean of `calls_per_sample` in a row."""
        if self.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(self.device):
                start.record()
                for _ in range(self.calls_per_sample):
                    self.call(*self.inputs)
                end.record()
                end.synchronize()
            return start.elapsed_time(end) / self.calls_per_sample
        begin = time.perf_counter()
        self.call(*self.inputs)
        if self.device.type != "cpu" and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return (time.perf_counter() - begin) * 1e3

    def row(self, name: str, batch: int, yardstick: Runner | None) -> Variant:
        """The times as a row, beside those of `yardstick`."""
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


class Replayed(Runner):
    """A variant whose calls are timed as a CUDA graph of some of them where they can be captured, else as they are.

    Args:
        adapt: what brings the outputs into the layout of the other variants'.
    """

    def __init__(self, *args: Any, adapt: Callable[[Tensor], Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapt, self.repeat = adapt, 1

    def warm_up(self) -> list[Tensor]:
        outputs = super().warm_up()
        if self.is_cuda:
            self._capture()
        return outputs if self.adapt is None else [self.adapt(output) for output in outputs]

    def _capture(self) -> None:
        repeat = max(1, min(20, math.ceil(self.calls_per_sample * 0.5 / max(1e-3, self.sample_ms))))  # about 0.5 ms
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
                    for _ in range(repeat):
                        call()
                graph.replay()
                torch.cuda.synchronize(self.device)
        except Exception as error:
            self.timed = f"calls with their launches, since there is no CUDA graph: {first_line(error)}"
            return
        self.captured = call  # what the graph reads lives as long as the call that brought it
        self.call, self.inputs, self.timed = graph.replay, (), "CUDA graph"
        self.repeat, self.calls_per_sample = repeat, 1
        replay_ms = self._time() * repeat
        self.calls_per_sample = max(1, min(50, math.ceil(SAMPLE_MS / max(1e-3, replay_ms))))

    def _time(self) -> float:
        return super()._time() / self.repeat


def compiler_room() -> Any:
    """Several models of one class get compiled; at dynamo's usual limit the last would run uncompiled."""
    return torch._dynamo.config.patch(recompile_limit=64)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference relative to the largest expected value; infinite where shapes differ, or one is not finite."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return math.inf
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if other.numel():
            one, other = one.double(), other.double()
            error = ((one - other).abs().max() / other.abs().max().clamp_min(1e-30)).item()
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def _dtypes(tensors: list[Tensor], autocast: torch.dtype | None) -> str:
    dtype = str(next((t.dtype for t in tensors if t.is_floating_point()), tensors[0].dtype)).split(".")[-1]
    return dtype if autocast is None else f"{dtype}, autocast to {str(autocast).split('.')[-1]}"


def device_name(device: torch.device) -> str:
    """A GPU's name, or what a CPU is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return str(device)


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
