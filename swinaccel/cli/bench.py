"""Measure a model as it came, with its library's other attention, compiled, accelerated, both, and in other engines.

All variants run on the same inputs and take turns within every round, so that a machine that gets warmer, or busier,
does so for all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from typing_extensions import Unpack

from .. import api
from ..config import Options
from ..report import Report, as_text
from ..runtime.block import HALVES
from ..runtime.precision import device_reason
from ..verify import _flat
from . import peers as engines
from .models import library
from .terminal import number
from .timing import Progress, Runner, Variant, compiler_room, device_name, dtype_name, measure, version

_FP8 = "accelerated, fp8"  # in half-precision inference, where the GPU has such products
_GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile: they make CUDA graphs, whose memory stays


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
        peers: the version of each other engine that has a row, by its name.
        skipped: why an engine that was asked for has no row, by its name.
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
    peers: Mapping[str, str | None] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Variant:
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise KeyError(f"{name!r} was not measured; there are {', '.join(v.name for v in self.variants)}")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; "effective" says if the accelerated variant ran anything but originals."""
        return asdict(self) | {"report": self.report.to_dict(), "effective": self.report.is_effective}

    def _label(self, variant: Variant) -> str:
        """Return what a row is called: none is accelerated where every call ran the original."""
        if variant.name == "accelerated" and variant.error is None and not self.report.is_effective:
            return "swinaccel, originals"
        return variant.name

    def __str__(self) -> str:
        return as_text(self, 120)

    def __rich__(self) -> Any:
        """Return the table and what explains it, for rich."""
        triton = f", triton {self.triton}" if self.triton else ""
        title = f"{self.device}, torch {self.torch}{triton}, {self.dtype}, batch {self.batch}, {self.mode}"
        table = Table(title=title, box=box.SIMPLE, title_justify="left")
        table.add_column("variant", no_wrap=True)
        cells: dict[str, Callable[[Variant], str]] = {
            "ms / batch": lambda row: number(row.latency_ms),
            "p10 - p90": lambda row: f"{number(row.p10_ms)} - {number(row.p90_ms)}",
            "images / s": lambda row: number(row.images_per_s),
            "peak MiB": lambda row: number(row.peak_memory_mib),
            "speed-up": lambda row: f"{row.speedup:.2f}x",
            "difference": lambda row: "" if row.name == "original" else f"{row.difference:.1e}",
        }
        if all(row.peak_memory_mib is None for row in self.variants):
            del cells["peak MiB"]
        for column in cells:
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.variants:
            failed = [*"-" * (len(cells) - 2), "failed", "-"]
            table.add_row(
                self._label(row), *(failed if row.error is not None else (cell(row) for cell in cells.values()))
            )
        notes = [f"{row.name} failed: {row.error}" for row in self.variants if row.error is not None]
        training = " (of the first step; torch.compile draws random numbers of its own)"
        if not self.report.is_effective:
            notes.append("Nothing ran accelerated: swinaccel's row is the original again, and its speed-up is noise.")
        notes.append(
            f"Medians of {self.rounds} interleaved rounds and their 10th to 90th percentiles. Difference: to the"
            f" original's output, relative to its largest value{training if self.mode == 'training' else ''}."
        )
        notes += [f"{name} was not measured: {reason}." for name, reason in self.skipped.items()]
        ran = [f"{name} {self.peers[name] or ''}".rstrip() for name in self.peers if self[name].error is None]
        if ran:
            notes.append(f"{' and '.join(ran)} ran the original, each in a process of its own, in the same rounds.")
        return Group(table, Text("\n".join(notes)))

    def plot(self, path: str | Path) -> None:
        """Draw the medians as bars into an image file; ImportError, with what to install, without matplotlib."""
        shown = {self._label(row): row.latency_ms for row in self.variants if row.latency_ms is not None}
        figure = library("matplotlib.figure").Figure(figsize=(9, 1.5 + 0.3 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        axes.bar_label(axes.barh(list(shown), list(shown.values())), [f" {number(time)}" for time in shown.values()])
        axes.invert_yaxis()
        axes.set_title(f"ms per batch of {self.batch}, {self.mode}, {self.dtype}, {self.device} (less is better)")
        figure.savefig(path, dpi=130)


def run(
    model: nn.Module,
    inputs: Iterable[Any],
    *,
    rounds: int | None = None,
    train: bool = False,
    autocast: torch.dtype | None = None,
    compile: bool | None = None,
    compile_mode: str | Sequence[str | None] | None = None,
    peers: str | Iterable[str] = (),
    progress: Progress | None = None,
    deadline: float | None = None,
    **options: Unpack[Options],
) -> BenchResult:
    """Measure a model as it is and accelerated, and with what else could make it faster.

    Args:
        model: accelerated or not; it is left as it is. It is run in eval mode, or copies of it are trained.
        inputs: what it is called with; the first tensor's first axis is the batch.
        rounds: how often each variant is sampled; unless given, as often as about 20 seconds allow, 10 to 50 times.
        train: a call is a training step: forward, the mean square of all outputs as loss, backward, AdamW.
        autocast: where `train`, run the forward under autocast to this dtype.
        compile: measure the torch.compile variants too; on CUDA devices, unless given.
        compile_mode: `mode` of torch.compile; or several, each of which gives its own two variants.
        peers: other engines to run the original in, where they are installed: names of `peers.PEERS`, or "all".
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
    asked = engines.chosen(peers)
    if asked and train:
        raise ValueError("peers run inference; leave them out of training")
    device, batch = tensors[0].device, tensors[0].shape[0] if tensors[0].dim() else 1
    compile = device.type == "cuda" if compile is None else compile
    modes = (compile_mode,) if compile_mode is None or isinstance(compile_mode, str) else tuple(compile_mode)
    own_bytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    own_bytes += 2 * sum(t.nbytes for t in model.parameters() if train and t.requires_grad)  # the optimizer's moments

    def start(make: Callable[[], Any], counts: bool = True, graph: bool = False) -> Runner:
        call = _step(make(), device, autocast) if train else make()
        return Runner(call, inputs, device, own_bytes if counts else None, graph=graph)

    dtype = next((t.dtype for t in tensors if t.is_floating_point()), tensors[0].dtype)
    obstacles = {peer: peer.obstacle(device, dtype) for peer in asked}
    measured = [peer for peer in asked if obstacles[peer] is None]
    with compiler_room() if compile else nullcontext(), torch.set_grad_enabled(train), ExitStack() as stack:
        makers, accelerated = _variants(model, modes if compile else (), options, train)
        starters: dict[str, Callable[[], Runner]] = {}
        for name, make in makers.items():
            starters[name] = partial(start, make, counts=not name.endswith(_GRAPH_MODES))
            if name in ("original", "accelerated", _FP8) and device.type == "cuda" and not train:
                starters[f"{name}, CUDA graph"] = partial(start, make, graph=True)
        folder = stack.enter_context(TemporaryDirectory())

        def begin(peer: engines.Peer) -> Runner:
            runner = engines.PeerRunner(peer, _copy(model, train), inputs, Path(folder, peer.title))
            stack.callback(runner.end)
            return runner

        starters |= {peer.title: partial(begin, peer) for peer in measured}
        variants, rounds = measure(starters, rounds, batch, progress, deadline, engines.REST_S if measured else 0.0)
        report = api.report(accelerated)
    return BenchResult(
        variants=variants,
        batch=batch,
        dtype=dtype_name(dtype) + (f", autocast to {dtype_name(autocast)}" if autocast is not None else ""),
        mode="training" if train else "inference",
        device=device_name(device),
        torch=torch.__version__,
        triton=version("triton"),
        threads=torch.get_num_threads(),
        rounds=rounds,
        report=report,
        peers={peer.title: version(peer.modules[0]) for peer in measured},
        skipped={peer.title: reason for peer, reason in obstacles.items() if reason is not None},
    )


def _variants(
    model: nn.Module, modes: Sequence[str | None], options: Options, train: bool
) -> tuple[dict[str, Callable[[], Callable[..., Any]]], nn.Module]:
    """Return functions that make the variants, by name, and the accelerated one."""
    copied = partial(_copy, model, train)
    # Accelerated first: a dispatcher that comes onto a class after a compiled run makes that compile again.
    accelerated, *both = (api.accelerate(copied(), **options) for _ in range(1 + len(modes)))
    tensor = next(model.parameters(), None)
    eighth: Any = None
    if not train and tensor is not None and tensor.dtype in HALVES and device_reason(tensor.device) is None:
        eighth = api.accelerate(copied(), **cast(Options, {**options, "precision": "fp8"}))
    makers: dict[str, Callable[[], Callable[..., Any]]] = {"original": copied}
    other = _other_attention(model)
    if other is not None:
        makers[other[0]] = lambda: other[1](copied())

    def compiled(mode: str | None, fast: nn.Module | None = None) -> Callable[..., Any]:
        return torch.compile(copied() if fast is None else fast, mode=mode)

    labels = [f" {mode}" if mode else "" for mode in modes]
    for mode, label in zip(modes, labels, strict=True):
        makers[f"torch.compile{label}"] = partial(compiled, mode)
    makers["accelerated"] = lambda: accelerated
    if eighth is not None:
        makers[_FP8] = lambda: eighth
    for mode, label, fast in zip(modes, labels, both, strict=True):
        makers[f"accelerated + torch.compile{label}"] = partial(compiled, mode, fast)
    return makers, accelerated


def _copy(model: nn.Module, train: bool) -> nn.Module:
    """Return an unaccelerated copy: in eval mode with the same tensors, or in train mode with its own."""
    shared: dict[int, Any] = {} if train else {id(t): t for t in (*model.parameters(), *model.buffers())}
    copied = api.restore(copy.deepcopy(model, shared))
    copied.train(train)  # which gives nothing where a model says so
    return copied


def _other_attention(model: nn.Module) -> tuple[str, Callable[[nn.Module], nn.Module]] | None:
    """Return the name of the library's other attention and a function that sets it, or None where there is none."""

    def fuse(model: nn.Module) -> nn.Module:  # timm's, of those that could be SDPA's
        for module in model.modules():
            if getattr(module, "fused_attn", None) is False:
                module.fused_attn = True  # type: ignore[assignment]
        return model

    def switch(model: nn.Module) -> nn.Module:  # Hugging Face's
        model.set_attn_implementation("sdpa" if used == "eager" else "eager")  # type: ignore[operator]
        return model

    if any(getattr(module, "fused_attn", None) is False for module in model.modules()):
        return "SDPA", fuse
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if not getattr(model, "_supports_sdpa", False) or used not in ("eager", "sdpa"):
        return None
    return "SDPA" if used == "eager" else "eager attention", switch


def _step(model: Any, device: torch.device, autocast: torch.dtype | None) -> Callable[..., list[Tensor]]:
    """Return a training step of a model, with its optimizer; the step returns the outputs."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")

    def step(*inputs: Any) -> list[Tensor]:
        with torch.autocast(device.type, autocast) if autocast else nullcontext():
            outputs = _flat(model(*inputs))
        torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [output.detach() for output in outputs]

    return step
