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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import api
from .report import Report
from .verify import _flat

Progress = Callable[[str, int, int], None]

_SAMPLE_MS = 20.0  # a CUDA sample is as many calls as take this long
_BUDGET_MS = 20_000.0  # for all samples, where the number of rounds is not given


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        name: "original" (as it came, the yardstick of the others), "SDPA" or "eager attention" (the library's
            other attention, where it has one), "torch.compile" (of the original), "accelerated",
            "accelerated + torch.compile".
        latency_ms: median over the rounds, for one batch.
        p10_ms, p90_ms: a tenth of the rounds was faster, and slower, than these.
        images_per_s: batch / median.
        peak_memory_mib: at the height of a call, with parameters and the optimizer's state; None where the device
            does not count it.
        speedup: the original's median over this one's.
        difference: largest difference to the original's output, relative to its largest value.
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
        shallow = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return shallow | {
            "variants": [asdict(variant) for variant in self.variants],
            "report": self.report.to_dict(),
        }

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
        has_memory = any(variant.peak_memory_mib is not None for variant in self.variants)
        table.add_column("variant", no_wrap=True)
        for column in ("ms / batch", "p10 - p90", "images / s", *(["peak MiB"] if has_memory else ())):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("speed-up", justify="right", no_wrap=True)
        table.add_column("difference", justify="right", no_wrap=True)
        for row in self.variants:
            if row.latency_ms is None or row.p10_ms is None or row.p90_ms is None:
                table.add_row(row.name, "-", "-", "-", *(["-"] if has_memory else ()), "failed", "-")
                continue
            table.add_row(
                row.name,
                _digits(row.latency_ms),
                f"{_digits(row.p10_ms)} - {_digits(row.p90_ms)}",
                _digits(row.images_per_s or 0.0),
                *([_digits(row.peak_memory_mib or 0.0)] if has_memory else ()),
                f"{row.speedup:.2f}x",
                "" if row.name == "original" else f"{row.difference:.1e}",
            )
        notes = [f"{row.name} failed: {row.error}" for row in self.variants if row.error is not None]
        notes.append(
            f"Medians of {self.rounds} interleaved rounds and their 10th to 90th percentiles."
            " Difference: to the original's output, relative to its largest value"
            + (
                " (of the first step; torch.compile draws random numbers of its own)."
                if self.mode == "training"
                else "."
            )
        )
        return Group(table, Text("\n".join(notes)))

    def plot(self, path: str | Path) -> None:
        """Draw the medians as bars, with their percentiles, into an image file.

        Raises:
            ImportError: without matplotlib; the message says what to install.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            raise ImportError('matplotlib is not installed; pip install "swinaccel[bench]" brings it') from None
        rows = [row for row in self.variants if row.latency_ms is not None]
        medians = [row.latency_ms or 0.0 for row in rows]
        spread = [
            [median - (row.p10_ms or 0.0) for row, median in zip(rows, medians, strict=True)],
            [(row.p90_ms or 0.0) - median for row, median in zip(rows, medians, strict=True)],
        ]
        figure = Figure(figsize=(8, 1.2 + 0.5 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        colors = ["#2a7f62" if row.name.startswith("accelerated") else "#9aa5b1" for row in rows]
        names = [row.name for row in rows]
        axes.barh(names, medians, xerr=spread, color=colors, error_kw={"ecolor": "#444444", "capsize": 3})
        top = max((row.p90_ms or 0.0 for row in rows), default=1.0)
        for position, row in enumerate(rows):
            axes.text((row.p90_ms or 0.0) + 0.015 * top, position, f"{row.speedup:.2f}x", va="center")
        axes.set_xlim(0, 1.12 * top)
        axes.invert_yaxis()
        call = "training step" if self.mode == "training" else "batch"
        axes.set_xlabel(f"ms per {call} of {self.batch}, {self.dtype}, {self.device} (less is better)")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)


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
        autocast: run forward and loss under autocast to this dtype, as training usually does.
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
    device = tensors[0].device
    is_cuda = device.type == "cuda"
    compile = is_cuda if compile is None else compile
    modes = (compile_mode,) if compile_mode is None or isinstance(compile_mode, str) else tuple(compile_mode)
    own_bytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    with _compiler_room() if compile else nullcontext(), torch.set_grad_enabled(train):
        makers, accelerated = _variants(model, modes if compile else (), options, train, autocast)
        batch = tensors[0].shape[0] if tensors[0].dim() else 1
        variants, rounds = _measure(
            makers, lambda call: _Runner(call, inputs, device, own_bytes), rounds, progress, batch, deadline
        )  # fmt: skip
        report = api.report(accelerated)
    return BenchResult(
        variants=variants,
        batch=batch,
        dtype=_dtypes(tensors, autocast),
        mode="training" if train else "inference",
        device=_device_name(device),
        torch=torch.__version__,
        triton=_version("triton"),
        threads=torch.get_num_threads(),
        rounds=rounds,
        report=report,
    )


def _measure(
    makers: Mapping[str, Callable[[], Any]],
    start: Callable[[Any], _Runner],
    rounds: int | None,
    progress: Progress | None,
    batch: int,
    deadline: float | None = None,
) -> tuple[tuple[Variant, ...], int]:
    """A row for each of `makers`, which took turns, and the number of rounds.

    `start` makes a runner of what a maker makes. What fails is a row with its reason, but for "original".
    """
    tick = _Ticker(progress, len(makers) + (rounds or 10))
    runners: dict[str, _Runner] = {}
    errors: dict[str, str] = {}
    expected: list[Tensor] = []
    for name, make in makers.items():
        tick(f"warming up: {name}")
        if deadline is not None and runners and time.monotonic() > deadline:
            errors[name] = "not run: the time was up"
            continue
        try:
            runner = start(make())
            outputs = runner.warm_up()
        except Exception as error:
            if name == "original":
                text = str(error).strip().splitlines()
                raise RuntimeError(
                    f"the model does not run: {type(error).__name__}: {text[0] if text else ''}"
                ) from error
            errors[name] = _sentence(error)
            continue
        expected = expected or outputs
        runner.difference = _difference(outputs, expected)
        runners[name] = runner
    order = list(runners)
    if rounds is None:
        round_ms = sum(runner.sample_ms for runner in runners.values())
        rounds = max(10, min(50, int(_BUDGET_MS / max(1e-3, round_ms))))
        tick.total = len(makers) + rounds
    for index in range(rounds if order else 0):
        tick("measuring")
        first = index % len(order)  # no variant always follows the same one
        for name in order[first:] + order[:first]:
            runners[name].sample()
    first_name = next(iter(makers))
    yardstick = statistics.median(runners[first_name].samples) if first_name in runners else None
    return tuple(
        runners[name].row(name, batch, yardstick) if name in runners else Variant(name, error=errors[name])
        for name in makers
    ), rounds


def _variants(
    model: nn.Module,
    modes: Sequence[str | None],
    options: dict[str, Any],
    train: bool,
    autocast: torch.dtype | None,
) -> tuple[dict[str, Callable[[], Callable[..., Any]]], nn.Module]:
    """What makes each variant, by its name; and the accelerated one."""

    def twin() -> nn.Module:
        return _trained_twin(model) if train else _twin(model)

    # Accelerated first: a dispatcher that comes onto a class after a compiled run makes that compile again.
    accelerated, *both = (api.accelerate(twin(), **options) for _ in range(1 + len(modes)))
    makers: dict[str, Callable[[], Callable[..., Any]]] = {"original": twin}
    other = _other_attention(model)
    if other is not None:
        name, choose = other
        makers[name] = lambda: choose(twin())

    def compiled(mode: str | None, make: Callable[[], nn.Module]) -> Callable[[], Callable[..., Any]]:
        return lambda: torch.compile(make(), mode=mode)

    labels = [f" {mode}" if mode and len(modes) > 1 else "" for mode in modes]
    for mode, label in zip(modes, labels, strict=True):
        makers[f"torch.compile{label}"] = compiled(mode, twin)
    makers["accelerated"] = lambda: accelerated
    for mode, label, fast in zip(modes, labels, both, strict=True):
        makers[f"accelerated + torch.compile{label}"] = compiled(mode, lambda fast=fast: fast)  # type: ignore[misc]
    if train:
        return {name: lambda make=make: _Step(make(), autocast) for name, make in makers.items()}, accelerated  # type: ignore[misc]
    if autocast is not None:
        return {name: lambda make=make: _under(make(), autocast) for name, make in makers.items()}, accelerated  # type: ignore[misc]
    return makers, accelerated


def _twin(model: nn.Module) -> nn.Module:
    """A copy with the same parameters and buffers, unaccelerated and in eval mode."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return api.restore(copy.deepcopy(model, shared)).eval()


def _trained_twin(model: nn.Module) -> nn.Module:
    """A copy with parameters of its own, unaccelerated and in train mode."""
    return api.restore(copy.deepcopy(model)).train()


def _under(model: Callable[..., Any], autocast: torch.dtype) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        with torch.autocast(inputs[0].device.type, autocast):
            return model(*inputs)

    return call


class _Step:
    """A training step of one model, with its optimizer."""

    def __init__(self, model: Any, autocast: torch.dtype | None) -> None:
        self.model, self.autocast = model, autocast
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        is_cuda = self.parameters[0].device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=is_cuda)

    def __call__(self, *inputs: Any) -> list[Tensor]:
        device = inputs[0].device.type
        with torch.autocast(device, self.autocast) if self.autocast else nullcontext():
            outputs = [tensor for tensor in _flat(self.model(*inputs)) if tensor.is_floating_point()]
            loss = torch.stack([output.float().square().mean() for output in outputs]).sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return [output.detach() for output in outputs]


def _other_attention(model: nn.Module) -> tuple[str, Callable[[nn.Module], nn.Module]] | None:
    """The attention that the model's library offers besides the one in use: its name, and what chooses it."""
    if any(getattr(module, "fused_attn", None) is False for module in model.modules()):  # timm
        return "SDPA", _timm_fused
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if getattr(model, "_supports_sdpa", False) and implementation in ("sdpa", "eager"):  # Hugging Face
        name, value = ("SDPA", "sdpa") if implementation == "eager" else ("eager attention", "eager")
        return name, lambda twin: _huggingface_attention(twin, value)
    return None


def _timm_fused(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if getattr(module, "fused_attn", None) is False:
            module.fused_attn = True  # type: ignore[assignment]
    return model


def _huggingface_attention(model: nn.Module, implementation: str) -> nn.Module:
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    return model


class _Runner:
    """One variant: its calls, timed."""

    def __init__(self, call: Callable[..., Any], inputs: tuple[Any, ...], device: torch.device, own_bytes: int) -> None:
        self.call, self.inputs, self.device = call, inputs, device
        self.is_cuda = device.type == "cuda"
        self.own_bytes = own_bytes
        if isinstance(call, _Step):
            self.own_bytes += 2 * sum(t.nbytes for t in call.parameters)  # the optimizer's moments
        self.samples: list[float] = []
        self.calls_per_sample = 1
        self.sample_ms = 0.0
        self.peak_mib: float | None = None
        self.difference = 0.0

    def warm_up(self) -> list[Tensor]:
        """Compile, load and settle; the output of a call."""
        torch.manual_seed(0)  # drop-path of a training step: the same for all that draw in the original's order
        outputs = [tensor.clone() for tensor in _flat(self.call(*self.inputs))]
        for _ in range(4 if self.is_cuda else 0):
            self.call(*self.inputs)
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.call(*self.inputs)
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device) - before + self.own_bytes
            self.peak_mib = peak / 2**20
        call_ms = self._time()
        if self.is_cuda:
            self.calls_per_sample = max(1, min(50, math.ceil(_SAMPLE_MS / max(1e-3, call_ms))))
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
        _synchronize(self.device)
        return (time.perf_counter() - begin) * 1e3

    def row(self, name: str, batch: int, yardstick: float | None) -> Variant:
        median = statistics.median(self.samples)
        tenths = statistics.quantiles(self.samples, n=10, method="inclusive") if len(self.samples) > 1 else [median]
        return Variant(
            name,
            latency_ms=median,
            p10_ms=tenths[0],
            p90_ms=tenths[-1],
            images_per_s=1e3 * batch / median,
            peak_memory_mib=self.peak_mib,
            speedup=None if yardstick is None else yardstick / median,
            difference=self.difference,
        )


class _Ticker:
    """Tells `progress` of each step as it begins."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, text: str) -> None:
        if self.progress is not None:
            self.progress(text, self.done, self.total)
        self.done += 1


@contextmanager
def _compiler_room() -> Iterator[None]:
    """Several models of one class get compiled; at dynamo's usual limit the last would run uncompiled."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference relative to the largest expected value; infinite where shape or finiteness does."""
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


def _synchronize(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda") and torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return str(device)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text}"[:200]


def _digits(value: float) -> str:
    """Three significant digits, and no fewer than all before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
