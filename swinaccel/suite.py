"""Every table of docs/benchmarks.md in one run: attention, sequences, whole models, training, each with its peers.

What fails is a note in its row, and the results are written after every row. Beside each row stand two lower bounds
of its time, from a copy and from matrix products that were measured on the same device just before: the bytes that
any implementation must move (operands once, results once), and the products that it must compute.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bench, functional, models, ops, plots, reference, sequence_ops
from .spec import Geometry

SECTIONS = ("attention", "sequence", "models", "training")
HEAD_DIM = 32  # of every published Swin
BACKWARD_BYTES, BACKWARD_PRODUCTS = 11 / 4, 3.5  # of forward and backward, in those of forward

# Whether on CUDA: fp32 numbers in the copy, sides of the products in half precision (slow on many CPUs) and in fp32.
CEILINGS = {True: (2**28, 8192, 4096), False: (2**25, 256, 1024)}

# The peers' own repositories: modules to look for, and the function in them.
SEEDS = {
    "Flash Window Attention": (("flash_swin_attn", "flash_swin_attn_func"),),
    "Flash Window Attention V2": (
        ("fwca", "FlashWindowCosineAttention"),
        ("flash_win_attn_v2", "flash_win_attn_v2"),
        ("flash_win_attn_2", "FlashWindowAttention2"),
    ),
    "FlashBias, rank 16": (("flash_bias_triton", "flash_bias_func"),),
    "Bloc-Sliding-Window": (("kernel.SWBA", "attention"),),
}


class WindowCase(NamedTuple):
    """Attention within the windows of square images."""

    name: str
    batch: int
    side: int
    heads: int
    window: int
    shift: int
    cosine: bool = False

    def __str__(self) -> str:
        side = f"{self.side}x{self.side}"
        return f"{self.name}, B{self.batch}, {side}, {self.heads} heads, w{self.window} s{self.shift}"


class SequenceCase(NamedTuple):
    """Attention with block sliding windows."""

    tokens: int
    heads: int = 12
    head_dim: int = 64
    block: int = 256
    blocks: int = 16

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, {self.heads} heads, blocks of {self.block}, windows of {self.blocks}"


WINDOWS = (
    WindowCase("Swin-B stage 1", 64, 56, 4, 7, 3),
    WindowCase("Swin-B stage 3", 64, 14, 16, 7, 3),
    WindowCase("SwinV2-B stage 1", 64, 64, 4, 8, 4, True),
    WindowCase("SwinV2", 16, 64, 6, 16, 8, True),
    WindowCase("SwinV2", 32, 48, 8, 12, 6, True),
    WindowCase("SwinV2", 16, 96, 4, 24, 12, True),
)
SEQUENCES = tuple(SequenceCase(tokens) for tokens in (4096, 16384, 65536, 131072))
MODELS = {  # and the largest batch
    "timm:swin_base_patch4_window7_224": 64,
    "timm:swinv2_base_window8_256": 64,
    "timm:swinv2_base_window12to24_192to384": 32,
    "hf:swin-base": 64,
    "hf:swinv2-base": 64,
    "torchvision:swin_b": 64,
    "torchvision:swin_v2_b": 64,
}
TRAINED = {"timm:swin_tiny_patch4_window7_224": 128, "timm:swinv2_tiny_window16_256": 64}
CPU_MODELS = (
    "timm:swin_tiny_patch4_window7_224",
    "timm:swinv2_tiny_window16_256",
    "hf:swin-tiny",
    "torchvision:swin_v2_t",
)


@dataclass
class Setting:
    """What all rows share."""

    device: torch.device
    rounds: int
    compile: bool
    seed_repos: Path | None = None
    deadline: float | None = None
    progress: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Row:
    """One row of one table, not measured yet.

    Attributes:
        section, mode: the table: one of SECTIONS, and "forward", "forward + backward", "inference" or "training".
        name, dtype: the row in it.
        measure: gives "bytes", "flops", "variants" and whatever else there is to say.
    """

    section: str
    name: str
    mode: str
    dtype: str
    measure: Callable[[Setting], dict[str, Any]] = field(repr=False)


def plan(device: torch.device, quick: bool = False, dtype: str | None = None) -> list[Row]:
    """The rows, cheap and important ones first; fewer and smaller ones where `quick`, and on a CPU."""
    is_cuda = device.type == "cuda"
    half, brain = (dtype or "float16", dtype or "bfloat16") if is_cuda else (dtype or "float32",) * 2
    windows = list(WINDOWS[::3] if quick else WINDOWS)
    sequences = SEQUENCES[:2] if quick else SEQUENCES
    if not is_cuda:
        windows, sequences = [case._replace(batch=case.batch // 16) for case in windows], SEQUENCES[:1]
    rows = [
        Row("attention", str(case), mode, half, lambda s, c=case, m=mode: measure_windows(s, c, half, m != "forward"))  # type: ignore[misc]
        for mode in ("forward", "forward + backward")
        for case in windows
    ]
    rest = [
        Row("sequence", str(case), mode, half, lambda s, c=case, m=mode: measure_sequence(s, c, half, m != "forward"))  # type: ignore[misc]
        for mode in ("forward", "forward + backward")
        for case in sequences
    ]
    if not is_cuda:
        return [*rows, *(_model(name, b, brain) for b in (1, 8)[: 1 if quick else 2] for name in CPU_MODELS), *rest]
    trained = [_model(name, batch, "bfloat16", train=True) for name, batch in TRAINED.items()]
    if quick:
        few = [_model(name, MODELS[name], brain) for name in list(MODELS)[:3]]
        return [*rows, *few, *rest, *trained[:1]]
    others = (dtype,) if dtype else ("bfloat16", "float16", "float32")
    all_models = [
        _model(name, largest if batch is None else batch, kind)
        for kind in others
        for batch in (None, 1, 8)
        for name, largest in MODELS.items()
    ]
    return [*rows, *all_models[: len(MODELS)], *rest, *trained, *all_models[len(MODELS) :]]


def run(
    output: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
    only: Iterable[str] = (),
    quick: bool = False,
    minutes: float | None = None,
    rounds: int | None = None,
    compile: bool | None = None,
    seed_repos: str | Path | None = None,
    rows: list[Row] | None = None,
    progress: bench.Progress | None = None,
) -> dict[str, Any]:
    """Measure the suite and write suite.json, suite.md and plots into a folder.

    Args:
        output: the folder; made where it is not there. Files of an earlier run in it are replaced.
        device: where to measure.
        dtype: the only one to measure, instead of those of the tables.
        only: sections, or section:TEXT for the rows of a section whose name holds TEXT; all where empty.
        quick: fewer rows and rounds.
        minutes: no row is begun after so many; what is left is noted as not run.
        rounds: samples behind each median; 20, or 5 where `quick`, unless given.
        compile: with the torch.compile variants; on CUDA devices, unless given.
        seed_repos: a checkout of a peer's repository, or a folder of several; gives their kernels columns.
        rows: what to measure instead of `plan(...)`.
        progress: called with what happens now, the rows done, and the rows in all.
    Returns:
        What is in suite.json.
    Raises:
        ValueError, OSError: for an argument that is none of these, before anything is measured.
    """
    folder, device = Path(output).expanduser(), models.as_device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if dtype is not None:
        dtype = str(models.as_dtype(dtype)).split(".")[-1]
    if minutes is not None and minutes <= 0:
        raise ValueError(f"minutes must be positive; got {minutes}")
    if seed_repos is not None and not Path(seed_repos).expanduser().is_dir():
        raise ValueError(f"seed_repos must be a folder; there is no {str(seed_repos)!r}")
    chosen = _chosen(plan(device, quick, dtype) if rows is None else rows, only)
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(device, rounds or (5 if quick else 20), device.type == "cuda" if compile is None else compile)
    setting.seed_repos = None if seed_repos is None else Path(seed_repos).expanduser()
    setting.deadline = None if minutes is None else time.monotonic() + 60 * minutes
    if progress is not None:
        progress("measuring what the device can do", 0, len(chosen))
    document: dict[str, Any] = {
        "format": plots.FORMAT,
        "runs": [_describe(setting, [row.dtype for row in chosen])],
        "rows": [
            {"section": row.section, "name": row.name, "mode": row.mode, "dtype": row.dtype, "run": 0}
            | {"note": "not run", "variants": []}
            for row in chosen
        ],
    }
    plots.write(document, folder, draw=False)
    lost: str | None = None
    for index, (row, entry) in enumerate(zip(chosen, document["rows"], strict=True)):
        setting.progress = partial(_tell, progress, row, index, len(chosen))
        if lost is not None:
            entry["note"] = f"not run: {lost}"
        elif setting.deadline is not None and time.monotonic() > setting.deadline:
            entry["note"] = f"not run: the {minutes:g} minutes were up"
        else:
            begin = time.monotonic()
            try:
                entry |= row.measure(setting) | {"note": None}
                entry["floor"] = _floor(document["runs"][0], entry)
            except Exception as error:
                entry["note"] = bench._sentence(error)
            for module in (ops, sequence_ops):
                if module.has_failures():
                    entry["note"] = "a kernel of swinaccel failed, and PyTorch stood in"
                    module.forget_failures()
            entry["seconds"] = round(time.monotonic() - begin, 1)
            lost = _clean(setting)
        plots.write(document, folder, draw=index + 1 == len(chosen))
    return document


def _tell(progress: bench.Progress | None, row: Row, done: int, total: int, text: str) -> None:
    if progress is not None:
        progress(f"{row.name}: {text}", done, total)


def _chosen(rows: list[Row], only: Iterable[str]) -> list[Row]:
    wanted = [item.partition(":") for item in only]
    for section, _, text in wanted:
        if section not in SECTIONS:
            raise ValueError(f"only must name sections, which are {', '.join(SECTIONS)}; got {section!r}")
        if not any(row.section == section and text in row.name for row in rows):
            raise ValueError(f"only: no row of {section!r} here has {text!r} in its name")
    return [row for row in rows if not wanted or any(row.section == s and text in row.name for s, _, text in wanted)]


def _clean(setting: Setting) -> str | None:
    """Room for the next row; or why there will be none."""
    device = setting.device
    gc.collect()
    if setting.compile:
        torch._dynamo.reset()  # no row finds its shapes marked as dynamic by an earlier one
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception as error:
        return f"the device was lost: {bench._sentence(error)}"
    return None


# The device.


def _describe(setting: Setting, dtypes: list[str]) -> dict[str, Any]:
    """The machine and its ceilings: GB/s of a copy, read and written, and TFLOP/s of products, by dtype."""
    device = setting.device
    is_cuda = device.type == "cuda"
    entries, half_side, side = CEILINGS[is_cuda]
    if is_cuda and torch.cuda.mem_get_info(device)[0] < 2**33:
        entries //= 8
    source = torch.randn(entries, device=device)
    negate = partial(torch.neg, source, out=torch.empty_like(source))  # a captured copy is no kernel, and slower
    copy = 2 * source.nbytes / _seconds(negate, device) / 1e9
    del negate
    del source
    rates: dict[str, float | None] = {}
    for name in dict.fromkeys(dtypes):
        try:
            n = half_side if name in ("float16", "bfloat16") else side
            left, right = (torch.randn(n, n, device=device).to(models.as_dtype(name)) for _ in range(2))
            rates[name] = 2 * n**3 / _seconds(partial(torch.mm, left, right), device) / 1e12
        except Exception:
            rates[name] = None
    _clean(setting)
    return {
        "device": bench._device_name(device),
        "host": platform.platform(),
        "versions": {
            name: bench._version(name)
            for name in ("swinaccel", "torch", "triton", "timm", "transformers", "torchvision")
        }
        | {"python": platform.python_version()},
        "begun": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rounds": setting.rounds,
        "fp32_products": torch.get_float32_matmul_precision(),
        "copy_gb_s": copy,
        "matrix_tflop_s": rates,
    }


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    runner = Replayed(call, device)
    with torch.no_grad():
        runner.warm_up()
        for _ in range(10):
            runner.sample()
    return statistics.median(runner.samples) / 1e3


def _floor(machine: dict[str, Any], entry: dict[str, Any]) -> dict[str, float | None]:
    rate = machine["matrix_tflop_s"].get(entry["dtype"])
    return {
        "memory_ms": entry["bytes"] / machine["copy_gb_s"] / 1e6,
        "matrix_ms": entry["flops"] / rate / 1e9 if rate and entry["flops"] else None,
    }


# Calls: those of a row take turns; on a GPU each is captured, so that the time is that of its kernels.


class Replayed(bench._Runner):
    """A call without inputs, timed as a CUDA graph of some of them where it can be captured, else as it is."""

    def __init__(
        self, call: Callable[[], Any], device: torch.device, adapt: Callable[[Tensor], Tensor] = lambda out: out
    ) -> None:
        super().__init__(call, (), device, 0)
        self.adapt, self.repeat = adapt, 1
        self.timed = "calls"

    def warm_up(self) -> list[Tensor]:
        """As that of every runner; outputs are brought into one layout."""
        outputs = super().warm_up()
        if self.is_cuda:
            self._capture()
        return [self.adapt(output) for output in outputs]

    def _capture(self) -> None:
        repeat = max(1, min(20, math.ceil(self.calls_per_sample * 0.5 / max(1e-3, self.sample_ms))))  # about 0.5 ms
        try:
            with torch.cuda.device(self.device):
                side = torch.cuda.Stream(self.device)
                side.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(side):
                    for _ in range(2):
                        self.call()
                torch.cuda.synchronize(self.device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=side):
                    for _ in range(repeat):
                        self.call()
                graph.replay()
                torch.cuda.synchronize(self.device)
        except Exception as error:
            self.timed = f"calls with their launches, since there is no CUDA graph: {bench._sentence(error)}"
            return
        self.captured = self.call  # what the graph reads lives as long as the call that brought it
        self.call, self.repeat, self.calls_per_sample, self.timed = graph.replay, repeat, 1, "CUDA graph"
        replay_ms = self._time() * repeat
        self.calls_per_sample = max(1, min(50, math.ceil(bench._SAMPLE_MS / max(1e-3, replay_ms))))

    def _time(self) -> float:
        return super()._time() / self.repeat


Made = tuple[Callable[[], Any], Callable[[Tensor], Tensor]]


def compare(setting: Setting, makers: Mapping[str, Callable[[], Made]], backward: bool) -> dict[str, Any]:
    """The variants of a row: each maker gives a call without inputs, and what brings its output into one layout."""
    by_name: dict[str, Replayed] = {}

    def start(named: tuple[str, Made]) -> Replayed:
        name, (call, adapt) = named
        by_name[name] = Replayed(call, setting.device, adapt)
        return by_name[name]

    with torch.set_grad_enabled(backward), bench._compiler_room() if setting.compile else nullcontext():
        variants, _ = bench._measure(
            {name: lambda name=name, make=make: (name, make()) for name, make in makers.items()},  # type: ignore[misc]
            start, setting.rounds, lambda text, *_: setting.progress(text), 1, setting.deadline,
        )  # fmt: skip
    return {"variants": [_cells(variant, getattr(by_name.get(variant.name), "timed", None)) for variant in variants]}


def _cells(variant: bench.Variant, timed: str | None) -> dict[str, Any]:
    """A variant, JSON-ready: an infinite difference is a word."""
    cells = asdict(variant) | {"timed": timed if variant.error is None else None}
    finite = variant.difference is None or math.isfinite(variant.difference)
    return cells if finite else cells | {"difference": str(variant.difference)}


def _step(call: Callable[[], Tensor], wanted: list[Tensor], grad: Tensor | None) -> Callable[[], Tensor]:
    """Forward, and the gradients of `wanted` where there is a `grad`."""
    if grad is None:
        return call

    def step() -> Tensor:
        out = call()
        torch.autograd.grad(out, wanted, grad)
        return out.detach()

    return step


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, logit_scale: Tensor | None, scale: float
) -> Tensor:
    """Window attention as the models' own code has it, on windows that are cut already."""
    if logit_scale is None:
        scores = (q * scale) @ k.transpose(-2, -1)
    else:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * logit_scale.clamp(max=math.log(100.0)).exp()
    scores = scores + bias
    scores = scores.unflatten(0, (-1, mask.shape[0])) + mask[:, None]
    return scores.flatten(0, 1).softmax(-1) @ v


def measure_windows(setting: Setting, case: WindowCase, dtype: str, backward: bool) -> dict[str, Any]:
    """From the qkv image to the image; peers get windows, the dense bias and the mask, which are not counted."""
    kind, device, heads = models.as_dtype(dtype), setting.device, case.heads
    geometry = Geometry((case.side,) * 2, (case.window,) * 2, (case.shift,) * 2)
    channels, tokens = heads * HEAD_DIM, geometry.tokens
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, kind)

    place = torch.cartesian_prod(torch.arange(case.window), torch.arange(case.window))
    apart = place[:, None] - place[None, :] + case.window - 1
    index = (apart[..., 0] * (2 * case.window - 1) + apart[..., 1]).to(device)
    qkv, table = draw(case.batch, case.side, case.side, 3 * channels), 0.5 * draw((2 * case.window - 1) ** 2, heads)
    logit_scale = torch.full((heads, 1, 1), math.log(10.0), device=device, dtype=kind) if case.cosine else None
    scale = HEAD_DIM**-0.5

    def windows(image: Tensor) -> Tensor:
        return reference.split_heads(reference.cut(image, geometry), heads)

    q, k, v = (windows(part).contiguous() for part in qkv.chunk(3, -1))
    bias = reference.bias_from_table(table, index).contiguous()
    mask = reference.shift_mask(geometry, -100.0, device=device).to(kind)
    grad, grad_windows = None, None
    if backward:
        grad = draw(*qkv.shape[:-1], channels)
        grad_windows = windows(grad).contiguous()
        for tensor in (qkv, table, q, k, v, bias, *([] if logit_scale is None else [logit_scale])):
            tensor.requires_grad_()
    scales = [] if logit_scale is None else [logit_scale]
    wanted = [q, k, v, bias, *scales]

    def sum_of_masks() -> Tensor:
        return (bias + mask[:, None]).flatten(0, 1)[None]

    prepared = None if backward else sum_of_masks()

    def sdpa() -> Tensor:
        one, other = q, k
        if logit_scale is not None:
            one = F.normalize(q, dim=-1) * logit_scale.clamp(max=math.log(100.0)).exp()
            other = F.normalize(k, dim=-1)
        added = (sum_of_masks() if prepared is None else prepared).expand(case.batch, -1, -1, -1)
        one, other, last = (t.view(case.batch, -1, tokens, HEAD_DIM) for t in (one, other, v))
        out = F.scaled_dot_product_attention(one, other, last, attn_mask=added, scale=1.0 if scales else scale)
        return out.reshape(q.shape)

    def peer(call: Callable[[], Tensor], wanted: list[Tensor] = wanted) -> Made:
        return _step(call, wanted, grad_windows), lambda out: out

    def ours() -> Tensor:
        return functional.shifted_window_attention(
            qkv, case.window, heads, case.shift, table=table, index=index, logit_scale=logit_scale
        )

    def compiled() -> Made:
        fast = torch.compile(eager_attention, dynamic=False)
        return peer(lambda: fast(q, k, v, bias, mask, logit_scale, scale))

    makers: dict[str, Callable[[], Made]] = {
        "eager": lambda: peer(lambda: eager_attention(q, k, v, bias, mask, logit_scale, scale)),
        "SDPA + mask": lambda: peer(sdpa),
    }
    if setting.compile:
        makers["torch.compile"] = compiled
    makers["swinaccel"] = lambda: (_step(ours, [qkv, table, *scales], grad), windows)
    if setting.seed_repos is not None:
        if case.cosine:
            seed = partial(seed_function, setting.seed_repos, "Flash Window Attention V2")
            makers["Flash Window Attention V2"] = lambda: peer(partial(seed(), q, k, v, logit_scale, bias, mask))
        else:
            seed = partial(seed_function, setting.seed_repos, "Flash Window Attention")
            makers["Flash Window Attention, no mask"] = lambda: peer(partial(seed(), q, k, v, bias, scale))
        if not backward:
            makers["FlashBias, rank 16"] = lambda: (
                _flash_bias(setting.seed_repos, q, k, v, bias, mask, logit_scale),
                lambda out: out.transpose(1, 2),
            )

    pixels = case.batch * case.side**2
    flops = 4.0 * pixels * tokens * channels  # two products, each 2 N a channel and token
    return {
        "bytes": pixels * channels * kind.itemsize * 4 * (BACKWARD_BYTES if backward else 1),
        "flops": flops * (BACKWARD_PRODUCTS if backward else 1),
    } | compare(setting, makers, backward)


def _flash_bias(
    repos: Path | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, logit_scale: Tensor | None
) -> Callable[[], Tensor]:
    """Its call, with factors of rank 16: (windows, N, heads, D) in and out."""
    run = seed_function(repos, "FlashBias, rank 16")
    factors = functional.factorize_bias(bias.float(), rank=16)
    q_bias, k_bias = (t.to(q.dtype).transpose(0, 1)[None].contiguous() for t in factors[:2])
    one, other, last = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    added = mask.repeat(q.shape[0] // mask.shape[0], 1, 1)[:, None]

    def call() -> Tensor:
        if logit_scale is None:
            return run(one, other, last, q_bias, k_bias, added, False, HEAD_DIM**-0.5)
        scaled = F.normalize(one, dim=-1) * logit_scale.clamp(max=math.log(100.0)).exp().view(-1, 1)
        return run(scaled, F.normalize(other, dim=-1), last, q_bias, k_bias, added, False, 1.0)

    return call


def measure_sequence(setting: Setting, case: SequenceCase, dtype: str, backward: bool) -> dict[str, Any]:
    """Block sliding windows over one sequence."""
    kind, device = models.as_dtype(dtype), setting.device
    generator = torch.Generator().manual_seed(0)
    shape = (1, case.heads, case.tokens, case.head_dim)
    q, k, v, grad = (torch.randn(*shape, generator=generator).to(device, kind) for _ in range(4))
    for tensor in (q, k, v):
        tensor.requires_grad_(backward)

    def made(call: Callable[[], Tensor]) -> Made:
        return _step(call, [q, k, v], grad if backward else None), lambda out: out

    def sdpa() -> Made:
        size = case.tokens**2 * kind.itemsize
        if device.type == "cuda" and size > torch.cuda.mem_get_info(device)[1] / 6:
            raise MemoryError(f"its mask alone is {size / 2**30:.0f} GiB")
        seen = reference.visible_keys(case.tokens // case.block, block_size=1, window_blocks=case.blocks, device=device)
        mask = torch.zeros(seen.shape, dtype=kind, device=device).masked_fill(~seen, -math.inf)
        mask = mask.repeat_interleave(case.block, 0).repeat_interleave(case.block, 1)
        return made(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

    def flex() -> Made:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            ago = query // case.block - key // case.block
            return (ago >= 0) & (ago < case.blocks)

        size = case.tokens
        mask = create_block_mask(seen, None, None, size, size, device=str(device), _compile=True)
        fast: Any = torch.compile(flex_attention, dynamic=False)
        return made(lambda: fast(q, k, v, block_mask=mask))

    makers: dict[str, Callable[[], Made]] = {"SDPA + mask": sdpa}
    if setting.compile:
        makers["FlexAttention, compiled"] = flex
    makers["swinaccel"] = lambda: made(
        lambda: functional.block_sliding_window_attention(q, k, v, case.block, case.blocks)
    )
    if setting.seed_repos is not None:
        name, scale = "Bloc-Sliding-Window", case.head_dim**-0.5
        makers[name] = lambda: made(
            partial(seed_function(setting.seed_repos, name), q, k, v, case.block, case.blocks, scale)
        )
    pairs = case.block**2 * sum(min(n + 1, case.blocks) for n in range(case.tokens // case.block))
    return {
        "bytes": 4 * q.nbytes * (BACKWARD_BYTES if backward else 1),
        "flops": 4.0 * pairs * case.heads * case.head_dim * (BACKWARD_PRODUCTS if backward else 1),
    } | compare(setting, makers, backward)


def _model(name: str, batch: int, dtype: str, train: bool = False) -> Row:
    section, mode = ("training", "training") if train else ("models", "inference")
    return Row(section, f"{name}, B{batch}", mode, dtype, lambda s: measure_model(s, name, batch, dtype, train))


def measure_model(setting: Setting, name: str, batch: int, dtype: str, train: bool = False) -> dict[str, Any]:
    """A whole model, by `bench.run`; training has fp32 parameters and autocast to `dtype`.

    The floor of memory is that of the parameters, read once (in training they and two moments are also written), and
    of the images; that of products is the original's, counted, thrice in training.
    """
    setting.progress("loading")
    loaded = models.load(name, False, "float32" if train else dtype, setting.device)
    inputs = loaded.example_inputs(batch)
    weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
    products = _products(loaded.model, loaded.example_inputs(1))
    modes = (None, "reduce-overhead") if batch == 1 and not train and setting.device.type == "cuda" else None
    result = bench.run(
        loaded.model, inputs, rounds=setting.rounds, train=train, autocast=models.as_dtype(dtype) if train else None,
        compile=setting.compile, compile_mode=modes, deadline=setting.deadline,
        progress=lambda text, *_: setting.progress(text),
    )  # fmt: skip
    return {
        "bytes": weights * (6 if train else 1) + sum(t.nbytes for t in inputs if isinstance(t, Tensor)),
        "flops": None if products is None else batch * products * (3 if train else 1),
        "variants": [_cells(variant, "calls") for variant in result.variants],
        "report": result.report.summary(),
        "fallbacks": sum(entry.fallbacks for entry in result.report),
    }


def _products(model: torch.nn.Module, inputs: tuple[Any, ...]) -> int | None:
    """FLOP of the matrix products and convolutions of a forward; None where they cannot be counted."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        try:
            model(*inputs)
        except Exception:
            return None
    return counter.get_total_flops()


# The peers' own repositories.


def seed_function(folder: Path | None, peer: str) -> Callable[..., Any]:
    """A peer's function, imported from where it lies under a folder.

    Raises:
        ImportError: where there is none.
    """
    assert folder is not None
    for module, name in SEEDS[peer]:
        parts = module.split(".")
        files = [*folder.rglob("/".join((*parts, "__init__.py"))), *folder.rglob("/".join(parts) + ".py")]
        for file in sorted(files, key=lambda file: ("vision" not in str(file).lower(), str(file))):
            levels = len(parts) + (file.name == "__init__.py")
            sys.path.insert(0, os.fspath(file.resolve().parents[levels - 1]))
            try:
                found = getattr(importlib.import_module(module), name)
            finally:
                del sys.path[0]
            return found.apply if isinstance(found, type) and issubclass(found, torch.autograd.Function) else found
    raise ImportError(f"{' or '.join(module for module, _ in SEEDS[peer])} was not found in {folder}")


def load(files: Iterable[str | Path]) -> dict[str, Any]:
    """The documents of several runs as one: of a row that two runs on one device measured, the later file's stays.

    Raises:
        ValueError: for a file that is none of a suite.
    """
    documents = []
    for file in files:
        try:
            document = json.loads(Path(file).expanduser().read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
        if not isinstance(document, dict) or document.get("format") != plots.FORMAT:
            raise ValueError(f"{file} was not written by bench --suite of this version")
        documents.append(document)
    return plots.merge(documents)
