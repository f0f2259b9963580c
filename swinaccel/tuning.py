"""Which launch of each kernel is the fastest here? What `swinaccel tune` does.

A model is run once to see which problems it poses. Each is then posed alone, with random numbers: a search walks from
the default launch to neighbours of it (half or twice a tile, one stage more, ...) for as long as one is faster. A
launch that does not compile or fit, or whose results differ from the default's, is left out; one that is not faster
by `LEAST_GAIN`, measured in turns with the default, is not kept. Winners go to `backends.tuned`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import api, bench
from .backends import triton as backend
from .backends import tuned
from .config import AccelConfig
from .nn import _position_index
from .spec import reference
from .verify import _flat

Timer = Callable[[Callable[[], Any], torch.device], float]

LEAST_GAIN = 0.03  # of the default's time

_STEPS = 2  # of a search: so far may a winner lie from the default
_TURNS = 3  # of default and winner in the end
_SAMPLE_MS = 30.0
_FLUSHED = 1 << 28  # bytes, more than any cache
_REGISTERS: tuple[int | None, ...] = (None, 168, 128)


@dataclass(frozen=True)
class Job:
    """One kernel of one problem.

    Attributes:
        key: what it is, as `tuned.describe` says.
        kernel: one of `tuned.KERNELS`.
        problem: the backend's.
        default: the launch that it has without tuning.
        grad_bias: whether its backward computes the gradient of the bias.
    """

    key: str
    kernel: str
    problem: Any
    default: Any
    grad_bias: bool

    @property
    def is_backward(self) -> bool:
        return self.kernel not in ("small", "large")


@dataclass(frozen=True)
class Outcome:
    """What was found for one job.

    Attributes:
        key: what was tuned, as `tuned.describe` says.
        default, tuned: launch parameters; tuned is None where the default stays.
        default_ms, tuned_ms: of the whole forward or backward, medians.
        tried: launches measured, the default included.
        skipped: why others were not, by how many.
        error: why nothing could be measured, or None.
    """

    key: str
    default: dict[str, int | None]
    tuned: dict[str, int | None] | None = None
    default_ms: float | None = None
    tuned_ms: float | None = None
    tried: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    error: str | None = None

    @property
    def speedup(self) -> float:
        return 1.0 if self.tuned_ms is None or self.default_ms is None else self.default_ms / self.tuned_ms

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**dataclasses.asdict(self), "speedup": self.speedup}


def run(
    model: nn.Module,
    inputs: Iterable[Any],
    *,
    train: bool = False,
    autocast: torch.dtype | None = None,
    timer: Timer | None = None,
    progress: bench.Progress | None = None,
    keep: bool = True,
    **options: Any,
) -> list[Outcome]:
    """Tune the launches of all window-attention problems that a model poses.

    Args:
        model: accelerated or not; copies of it are run, and it is left as it is.
        inputs: what it is called with.
        train: also tune what a training step poses.
        autocast: run under autocast to this dtype.
        timer: from (a function that launches kernels, the device) to milliseconds; `graph_timer` unless given.
        progress: called with what happens now, the jobs done, and the jobs in all.
        keep: write winners to the cache directory.
        **options: the fields of `AccelConfig`.
    Raises:
        RuntimeError: without a GPU, unless a timer is given; where the model poses no problem to the kernels.
        OSError: where the winners cannot be written.
    """
    jobs = collect(model, inputs, train=train, autocast=autocast, measurable=timer is not None, **options)
    outcomes = []
    for done, job in enumerate(jobs):

        def tell(text: str, key: str = job.key, done: int = done) -> None:
            if progress is not None:
                progress(f"{key}: {text}", done, len(jobs))

        found = search(job, timer or graph_timer, tell)
        outcomes.append(found)
        if keep:  # at once: whoever interrupts a long search has what was found so far
            record = {"parameters": found.tuned, "default_ms": found.default_ms, "tuned_ms": found.tuned_ms}
            tuned.write(job.problem.device, {job.key: None if found.tuned is None else record})
            backend.forget_launches()
    return outcomes


def collect(
    model: nn.Module,
    inputs: Iterable[Any],
    *,
    train: bool = False,
    autocast: torch.dtype | None = None,
    measurable: bool = False,
    **options: Any,
) -> list[Job]:
    """The jobs that a model poses; see `run`.

    Args:
        measurable: there is a way of measuring without a GPU.
    """
    inputs = tuple(inputs)
    config = AccelConfig(**options)
    devices = {tensor.device for tensor in (*model.parameters(), *_flat(inputs))} or {torch.device("cpu")}
    device = max(devices, key=lambda device: device.type == "cuda")
    if device.type != "cuda" and not measurable:
        seen = "" if torch.cuda.is_available() else ", and PyTorch sees no CUDA device"
        raise RuntimeError(f"tuning measures the Triton kernels, which needs a GPU; this model is on {device}{seen}")
    if config.backend == "torch":
        raise ValueError("backend must be 'auto' or 'triton' here: plain PyTorch has no launches to tune")
    # Accelerated first, run later: a dispatcher on a class is there for all of its instances.
    twin = api.accelerate(api.restore(copy.deepcopy(model)), **options)
    with posed() as found:
        twin.eval()
        with torch.no_grad():
            bench.forward(twin, inputs, device, autocast)
        if train:
            twin.train()
            with torch.enable_grad():
                outputs = [out for out in bench.forward(twin, inputs, device, autocast) if out.requires_grad]
                if outputs:
                    bench.mean_square(outputs).backward()
    if not found:
        report = api.report(twin)
        reason = next((entry.reason for entry in report if entry.reason), "it holds no window attention")
        raise RuntimeError(f"the model poses no problem to the Triton kernels: {reason}")
    return list(found.values())


@contextlib.contextmanager
def posed() -> Iterator[dict[str, Job]]:
    """Gives what is planned inside, by its key; default launches serve."""
    found: dict[str, Job] = {}

    def note(kernel: str, problem: Any, default: Any, grad_bias: bool) -> Any:
        key = tuned.describe(kernel, problem, grad_bias)
        found.setdefault(key, Job(key, kernel, problem, default, grad_bias))
        return default

    with _fresh(note):
        yield found


@contextlib.contextmanager
def _fresh(chooser: Callable[[str, Any, Any, bool], Any]) -> Iterator[None]:
    """Inside, every problem is planned anew, with launches that the function chooses; after it, too, with its own."""
    backend.forget_launches()
    try:
        with tuned.choosing(chooser):
            yield
    finally:
        backend.forget_launches()


def search(job: Job, timer: Timer, tell: Callable[[str], None] = lambda text: None) -> Outcome:
    """The best launch for a job, by walking from the default one."""
    default = tuned.parameters(job.default)
    tolerance = _tolerance(job.problem)
    skipped: dict[str, int] = {}
    try:
        call = _caller(job)
        with _using(job, job.default):
            expected = _results(call)
            times = {job.default: _timed(call, timer, job)}
    except Exception as error:
        return Outcome(job.key, default, error=backend.first_line(error))

    def measure(launch: Any) -> None:
        if launch in times:
            return
        times[launch] = math.inf
        try:
            with _using(job, launch):
                if bench.difference(_results(call), expected) <= tolerance:
                    times[launch] = _timed(call, timer, job)
                    return
            reason = "other results"
        except Exception as error:  # does not compile, does not fit, or has too many registers
            reason = type(error).__name__
        skipped[reason] = skipped.get(reason, 0) + 1

    best = job.default
    for step in range(_STEPS):
        near = neighbours(job, best)
        for index, launch in enumerate(near):
            tell(f"step {step + 1} of up to {_STEPS}, {index + 1} of {len(near)}")
            measure(launch)
        fastest = min(times, key=lambda launch: times[launch])
        if times[fastest] > (1 - LEAST_GAIN / 3) * times[best]:
            break
        best = fastest
    tried = sum(time < math.inf for time in times.values())
    unchanged = Outcome(job.key, default, None, times[job.default], None, tried, skipped)
    if best == job.default:
        return unchanged
    tell("the winner and the default, in turns")
    turns: dict[Any, list[float]] = {job.default: [], best: []}
    for launch in [*turns] * _TURNS:
        with _using(job, launch):
            turns[launch].append(_timed(call, timer, job))
    before, after = map(statistics.median, turns.values())
    if after > (1 - LEAST_GAIN) * before:
        return dataclasses.replace(unchanged, default_ms=before)
    return Outcome(job.key, default, tuned.parameters(best), before, after, tried, skipped)


def neighbours(job: Job, launch: Any) -> list[Any]:
    """Launches that differ from one in a step of one parameter, or in the shape of the tile."""
    given = tuned.parameters(launch)
    is_small = job.kernel in ("small", "small_backward")
    tokens = 1 << (job.problem.geometry.tokens - 1).bit_length()
    most = {
        "block_m": min(128, tokens),
        "block_n": min(128, tokens),
        "num_warps": 8,
        "num_stages": 4,
        "images": max(1, job.problem.batch),
        "windows": max(1, job.problem.geometry.num_windows),
    }
    changes: list[dict[str, int | None]] = []
    for name, value in given.items():
        if name == "max_registers":
            if torch.version.hip is None:
                changes += [{name: other} for other in _REGISTERS if other != value]
        elif value is None or (is_small and name == "block_n"):
            continue
        elif name == "num_stages":
            changes += [{name: other} for other in (value + 1, value - 1) if other <= most[name]]
        else:
            changes += [{name: other} for other in (value * 2, value // 2) if other <= most[name]]
    if not is_small:
        for one, other in (("block_m", "block_n"), ("block_n", "block_m")):
            longer, shorter = 2 * getattr(launch, one), getattr(launch, other) // 2
            changes += [{one: longer, other: shorter}] if longer <= most[one] else []
    made = (tuned.parse({**given, **change}, job.kernel, job.default) for change in changes)
    return [launch for launch in made if launch is not None]


def _using(job: Job, launch: Any) -> contextlib.AbstractContextManager[None]:
    """Inside, one launch for the job's kernel, and the defaults for all others."""
    return _fresh(lambda kernel, problem, default, grad_bias: launch if kernel == job.kernel else default)


def _timed(call: Callable[[], Any], timer: Timer, job: Job) -> float:
    call()
    time = timer(call, job.problem.device)
    if not 0 < time < math.inf:
        raise RuntimeError(f"a measured time of {time} ms")
    return time


def _results(call: Callable[[], Iterable[Tensor | None]]) -> list[Tensor]:
    """What a call gives, as pairs: which numbers are finite, and these."""
    found = [tensor for tensor in call() if tensor is not None]
    return [part for tensor in found for part in (tensor.isfinite(), tensor.nan_to_num(0.0, 0.0, 0.0))]


def _caller(job: Job) -> Callable[[], tuple[Tensor | None, ...]]:
    """A function that poses a problem to the backend, forward or backward, on tensors of random numbers."""
    problem, geometry = job.problem, job.problem.geometry
    random = partial(_random, torch.Generator(problem.device).manual_seed(0))
    width = (3 if problem.packed else 1) * problem.channels
    channels = (problem.num_heads, problem.head_dim) if problem.heads_apart else (width,)
    image = (problem.batch, *geometry.size, *channels)
    qkv = random(image, problem.dtype, problem.strides)
    k, v = (None if problem.packed else random(image, problem.dtype, problem.strides) for _ in range(2))
    options, factors = _options(problem, random), None
    if problem.rank:
        stored = torch.float32 if problem.dtype == torch.float32 else torch.float16
        shape = (problem.num_heads, geometry.tokens, problem.rank)
        q_factor, k_factor = (random(shape, stored) / problem.rank for _ in range(2))
        factors = (q_factor, k_factor, options["table"].contiguous(), options["index"].clone())

    def forward() -> tuple[Tensor, Any]:
        return backend.shifted_window_attention(
            qkv, k, v, geometry, **options, factors=factors, for_backward=problem.for_backward
        )

    if not job.is_backward:
        return forward
    out, lse = forward()
    grad = random(out.shape, out.dtype, out.stride())

    def backward() -> tuple[Tensor | None, ...]:
        return backend.shifted_window_attention_backward(
            grad, out, lse, qkv, k, v, geometry, **options, grad_table=job.grad_bias
        )

    return backward


def _random(
    generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None
) -> Tensor:
    made = torch.empty(shape, dtype=dtype, device=generator.device)
    if strides is not None:
        made = torch.empty_strided(shape, strides, dtype=dtype, device=generator.device)
    return made.normal_(generator=generator)


def _options(problem: Any, random: Callable[..., Tensor]) -> dict[str, Any]:
    """What a problem's forward and backward take beside the tokens."""
    device, geometry, table, index = problem.device, problem.geometry, None, None
    if problem.table_strides is not None:
        rows = math.prod(2 * side - 1 for side in geometry.window)
        table = random((rows, problem.num_heads), problem.dtype, problem.table_strides)
        index = _position_index(geometry.window).to(device)
    return {
        "num_heads": problem.num_heads,
        "table": table,
        "index": index,
        "padding": random((3 * problem.channels,), problem.dtype) if problem.is_padded else None,
        "mask": reference.shift_mask(geometry, problem.mask_value, device=device) if problem.has_mask else None,
        "mask_value": problem.mask_value,
        "scale": problem.scale,
        "logit_scale": torch.full((problem.num_heads,), 2.0, device=device) if problem.cosine else None,
        "dropout": problem.dropout,
        "seed": torch.zeros(1, dtype=torch.int64, device=device) if problem.dropout else None,
    }


def _tolerance(problem: Any) -> float:
    """How far, relative to the largest, results may differ that are summed in another order: by some roundings."""
    if problem.dtype == torch.float32:
        return 1e-4 if problem.precision == "ieee" else 4 * 2**-10
    return 4 * torch.finfo(problem.dtype).eps


def graph_timer(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds that the device takes, the median of many runs, each with a cold cache and nothing to wait for."""
    with torch.cuda.device(device):
        flushed = torch.empty(_FLUSHED, dtype=torch.int8, device=device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()

        def sample(count: int) -> list[float]:
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
            for start, end in events:
                flushed.zero_()
                start.record()
                graph.replay()
                end.record()
            torch.cuda.synchronize(device)
            return [start.elapsed_time(end) for start, end in events]

        sample(3)
        guess = statistics.median(sample(5))
        return statistics.median(sample(max(20, min(200, int(_SAMPLE_MS / max(guess, 1e-3))))))
