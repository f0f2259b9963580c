"""The tables of docs/benchmarks.md in one run: attention, sequences, whole models, training, each with its peers.

What fails is a note in its row, and the results are written after every row. Beside each row stand two lower bounds
of its time, from a copy and from matrix products that were measured on the same device just before: the bytes that
any implementation must move (operands once, results once), and the products that it must compute.
"""

from __future__ import annotations

import gc
import importlib
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bench, functional, models, plots
from .backends.triton import first_line
from .failures import failures
from .nn import _position_index
from .spec import reference
from .spec.window import Geometry

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
        ("flash_win_attn_v2", "flash_win_attn_v2_func"),
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
    compile_mode: str | None = None
    seed_repos: Path | None = None
    deadline: float | None = None  # of time.monotonic()
    progress: Callable[[str], None] = lambda text: None


class Row(NamedTuple):
    """One row of one table, not measured yet.

    Attributes:
        section: one of SECTIONS.
        mode: the table in it: "forward", "forward + backward", "inference" or "training".
        name, dtype: the row in the table.
        measure: gives "bytes", "flops", "variants" and whatever else there is to say.
    """

    section: str
    mode: str
    name: str
    dtype: str
    measure: Callable[[Setting], dict[str, Any]]


def attention_row(case: WindowCase | SequenceCase, dtype: str, backward: bool = False) -> Row:
    """A row of attention alone."""
    section, measure = _ATTENTION[type(case)]
    mode = "forward + backward" if backward else "forward"
    return Row(section, mode, str(case), dtype, partial(measure, case=case, dtype=dtype, backward=backward))


def model_row(name: str, batch: int, dtype: str, train: bool = False) -> Row:
    """A row of a whole model."""
    section, mode = ("training", "training") if train else ("models", "inference")
    measure = partial(measure_model, name=name, batch=batch, dtype=dtype, train=train)
    return Row(section, mode, f"{name}, B{batch}", dtype, measure)


def plan(device: torch.device, quick: bool = False, dtype: str | None = None) -> list[Row]:
    """The rows, cheap and important ones first; fewer and smaller ones where `quick`, and on a CPU."""
    is_cuda = device.type == "cuda"
    windows: Sequence[WindowCase]
    windows, sequences = WINDOWS[::3] if quick else WINDOWS, SEQUENCES[:2] if quick else SEQUENCES
    if not is_cuda:
        windows, sequences = [case._replace(batch=case.batch // 16) for case in windows], SEQUENCES[:1]
    half, brain = (dtype or "float16", dtype or "bfloat16") if is_cuda else (dtype or "float32",) * 2
    rows = [attention_row(case, half, backward) for backward in (False, True) for case in windows]
    rest = [attention_row(case, half, backward) for backward in (False, True) for case in sequences]
    if not is_cuda:
        return [*rows, *(model_row(name, b, brain) for b in ((1,) if quick else (1, 8)) for name in CPU_MODELS), *rest]
    trained = [model_row(name, batch, "bfloat16", train=True) for name, batch in TRAINED.items()]
    first = [model_row(name, batch, brain) for name, batch in MODELS.items()]
    if quick:
        return [*rows, *first[:3], *rest, *trained[:1]]
    others = [model_row(name, batch, brain) for batch in (1, 8) for name in MODELS]
    for kind in () if dtype else ("float16", "float32"):
        others += [model_row(name, batch or most, kind) for batch in (None, 1, 8) for name, most in MODELS.items()]
    return [*rows, *first, *rest, *trained, *others]


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
    compile_mode: str | None = None,
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
        compile_mode: `mode` of torch.compile for whole models and training; its own default, and at batch 1 on CUDA
            devices "reduce-overhead" as well, unless given.
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
    setting = Setting(
        device,
        rounds or (5 if quick else 20),
        device.type == "cuda" if compile is None else compile,
        compile_mode,
        None if seed_repos is None else Path(seed_repos).expanduser(),
        None if minutes is None else time.monotonic() + 60 * minutes,
    )
    tell = progress or (lambda *_: None)
    tell("measuring what the device can do", 0, len(chosen))
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
    for index, (row, entry) in enumerate(zip(chosen, document["rows"], strict=True)):
        if setting.deadline is not None and time.monotonic() > setting.deadline:
            entry["note"] = f"not run: the {minutes:g} minutes were up"
        else:
            setting.progress = lambda text, name=row.name, done=index: tell(f"{name}: {text}", done, len(chosen))  # type: ignore[misc]
            entry |= _measured(setting, row, document["runs"][0])
            _clean(setting)
        plots.write(document, folder, draw=index + 1 == len(chosen))
    return document


def _measured(setting: Setting, row: Row, machine: dict[str, Any]) -> dict[str, Any]:
    """What a row gives, or a note why there is nothing."""
    begin = time.monotonic()
    try:
        found = row.measure(setting) | {"note": None}
        found["floor"] = _floor(machine, row.dtype, found)
    except Exception as error:
        found = {"note": first_line(error)}
    if failures:
        found["note"] = "a kernel of swinaccel failed, and PyTorch stood in"
        failures.clear()
    return found | {"seconds": round(time.monotonic() - begin, 1)}


def _chosen(rows: list[Row], only: Iterable[str]) -> list[Row]:
    wanted = [item.partition(":") for item in only]
    for section, _, text in wanted:
        if section not in SECTIONS:
            raise ValueError(f"only must name sections, which are {', '.join(SECTIONS)}; got {section!r}")
        if not any(row.section == section and text in row.name for row in rows):
            raise ValueError(f"only: no row of {section!r} here has {text!r} in its name")
    return [row for row in rows if not wanted or any(row.section == s and text in row.name for s, _, text in wanted)]


def _clean(setting: Setting) -> None:
    """Room for the next row."""
    gc.collect()
    if setting.compile:
        torch._dynamo.reset()  # no row finds its shapes marked as dynamic by an earlier one
    if setting.device.type == "cuda":
        with suppress(Exception):  # a device that is lost fails the next row, too
            torch.cuda.synchronize(setting.device)
            torch.cuda.empty_cache()


# The device.


def _describe(setting: Setting, dtypes: list[str]) -> dict[str, Any]:
    """The machine and its ceilings: GB/s of a copy, read and written, and TFLOP/s of products, by dtype."""
    packages = ("swinaccel", "torch", "triton", "timm", "transformers", "torchvision")
    copy_rate = _copy_rate(setting.device)
    product_rates = {dtype: _product_rate(setting.device, dtype) for dtype in dict.fromkeys(dtypes)}
    _clean(setting)
    return {
        "device": bench.device_name(setting.device),
        "host": platform.platform(),
        "versions": {name: bench.version(name) for name in packages} | {"python": platform.python_version()},
        "begun": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rounds": setting.rounds,
        "fp32_products": torch.get_float32_matmul_precision(),
        "copy_gb_s": copy_rate,
        "matrix_tflop_s": product_rates,
    }


def _copy_rate(device: torch.device) -> float:
    entries = CEILINGS[device.type == "cuda"][0]
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 2**33:
        entries //= 8
    source = torch.randn(entries, device=device)
    negate = partial(torch.neg, source, out=torch.empty_like(source))  # a captured copy is no kernel, and slower
    return 2 * source.nbytes / _seconds(negate, device) / 1e9


def _product_rate(device: torch.device, dtype: str) -> float | None:
    _, half_side, side = CEILINGS[device.type == "cuda"]
    n = half_side if dtype in ("float16", "bfloat16") else side
    try:
        left, right = (torch.randn(n, n, device=device).to(models.as_dtype(dtype)) for _ in range(2))
        return 2 * n**3 / _seconds(partial(torch.mm, left, right), device) / 1e12
    except Exception:
        return None


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    runner = bench.Replayed(call, (), device)
    with torch.no_grad():
        runner.warm_up()
        for _ in range(10):
            runner.sample()
    return statistics.median(runner.samples) / 1e3


def _floor(machine: dict[str, Any], dtype: str, row: dict[str, Any]) -> dict[str, float | None]:
    rate = machine["matrix_tflop_s"].get(dtype)
    return {
        "memory_ms": row["bytes"] / machine["copy_gb_s"] / 1e6,
        "matrix_ms": row["flops"] / rate / 1e9 if rate and row["flops"] else None,
    }


# Attention: calls of a row take turns; on a GPU each is captured, so that the time is that of its kernels.


Call = Callable[[], Tensor]  # forward, or forward and backward; gives the output


def compare(
    setting: Setting,
    makers: Mapping[str, Callable[[], Call]],
    backward: bool,
    cut: Callable[[Tensor], Tensor] = lambda out: out,
) -> dict[str, Any]:
    """The variants of a row, measured by turns; `cut` brings swinaccel's output into the layout of the others'."""

    def start(name: str, make: Callable[[], Call]) -> bench.Replayed:
        return bench.Replayed(make(), (), setting.device, adapt=cut if name == "swinaccel" else None)

    starters = {name: partial(start, name, make) for name, make in makers.items()}
    with torch.set_grad_enabled(backward), bench.compiler_room() if setting.compile else nullcontext():
        variants, _ = bench.measure(
            starters, setting.rounds, progress=lambda text, *_: setting.progress(text), deadline=setting.deadline
        )
    return {"variants": [asdict(variant) for variant in variants]}


def _step(make: Callable[[], Call], wanted: list[Tensor], grad: Tensor | None) -> Call:
    """The call that is made; with the gradients of `wanted` where there is a `grad`."""
    call = make()
    if grad is None:
        return call

    def step() -> Tensor:
        out = call()
        torch.autograd.grad(out, wanted, grad)
        return out.detach()

    return step


class Windows(NamedTuple):
    """What the peers take: windows that are cut already.

    Attributes:
        q, k, v: (W, H, N, HEAD_DIM), contiguous.
        bias: (H, N, N).
        mask: (M, N, N), 0 or -100; window w uses row w % M.
        logit_scale: (H, 1, 1), before its clamp and exponential; None for plain scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    mask: Tensor
    logit_scale: Tensor | None


def eager_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, logit_scale: Tensor | None) -> Tensor:
    """Window attention as the models' own code has it; see `Windows`."""
    if logit_scale is None:
        scores = (q * HEAD_DIM**-0.5) @ k.transpose(-2, -1)
    else:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * logit_scale.clamp(max=math.log(100.0)).exp()
    scores = scores + bias
    scores = scores.unflatten(0, (-1, mask.shape[0])) + mask[:, None]
    return scores.flatten(0, 1).softmax(-1) @ v


def _scaled(q: Tensor, k: Tensor, logit_scale: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Queries, keys, and the factor of their product that makes it the scores."""
    if logit_scale is None:
        return q, k, HEAD_DIM**-0.5
    return F.normalize(q, dim=-1) * logit_scale.clamp(max=math.log(100.0)).exp(), F.normalize(k, dim=-1), 1.0


def _sdpa(given: Windows, backward: bool) -> Call:
    """PyTorch's attention of all windows of an image at once, with the sum of bias and mask (M, H, N, N)."""
    q, k, v, bias, mask, logit_scale = given

    def sum_of_masks() -> Tensor:
        return (bias + mask[:, None]).flatten(0, 1)[None]

    prepared = None if backward else sum_of_masks()

    def call() -> Tensor:
        added = sum_of_masks() if prepared is None else prepared
        one, other, scale = _scaled(q, k, logit_scale)
        one, other, last = (t.view(-1, added.shape[1], *t.shape[2:]) for t in (one, other, v))
        out = F.scaled_dot_product_attention(
            one, other, last, attn_mask=added.expand(one.shape[0], -1, -1, -1), scale=scale
        )
        return out.reshape(q.shape)

    return call


def _flash_bias(repos: Path, given: Windows) -> Call:
    """Its call, with factors of rank 16; it takes and gives (W, N, H, HEAD_DIM)."""
    run = seed_function(repos, "FlashBias, rank 16")
    factors = functional.factorize_bias(given.bias.float(), rank=16)
    q_bias, k_bias = (t.to(given.q.dtype).transpose(0, 1)[None].contiguous() for t in factors[:2])
    q, k, v = (t.transpose(1, 2).contiguous() for t in given[:3])
    mask = given.mask.repeat(q.shape[0] // given.mask.shape[0], 1, 1)[:, None]
    logit_scale = None if given.logit_scale is None else given.logit_scale.view(-1, 1)

    def call() -> Tensor:
        one, other, scale = _scaled(q, k, logit_scale)
        return run(one, other, v, q_bias, k_bias, mask, False, scale).transpose(1, 2)

    return call


def _window_seeds(repos: Path, given: Windows, backward: bool) -> dict[str, Callable[[], Call]]:
    """What makes the calls of the peers' own kernels."""
    makers: dict[str, Callable[[], Call]] = {}
    q, k, v, bias, mask, logit_scale = given
    if logit_scale is not None:
        name = "Flash Window Attention V2"
        makers[name] = lambda: partial(seed_function(repos, name), q, k, v, logit_scale, bias, mask)
    else:
        makers["Flash Window Attention, no mask"] = lambda: partial(
            seed_function(repos, "Flash Window Attention"), q, k, v, bias, HEAD_DIM**-0.5
        )
    if not backward:
        makers["FlashBias, rank 16"] = lambda: _flash_bias(repos, given)
    return makers


def measure_windows(setting: Setting, case: WindowCase, dtype: str, backward: bool) -> dict[str, Any]:
    """From the qkv image to the image; peers get windows, the dense bias and the mask, which are not counted."""
    kind, device, heads = models.as_dtype(dtype), setting.device, case.heads
    geometry = Geometry((case.side,) * 2, (case.window,) * 2, (case.shift,) * 2)
    channels, pixels = heads * HEAD_DIM, case.batch * case.side**2
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, kind)

    def windows(image: Tensor) -> Tensor:
        return reference.split_heads(reference.cut(image, geometry), heads)

    qkv, table = draw(case.batch, case.side, case.side, 3 * channels), 0.5 * draw((2 * case.window - 1) ** 2, heads)
    index = _position_index(geometry.window).to(device)
    logit_scale = torch.full((heads, 1, 1), math.log(10.0), device=device, dtype=kind) if case.cosine else None
    bias = reference.bias_from_table(table, index).contiguous()
    mask = reference.shift_mask(geometry, -100.0, device=device).to(kind)
    q, k, v = (windows(part).contiguous() for part in qkv.chunk(3, -1))
    given = Windows(q, k, v, bias, mask, logit_scale)
    scales = [] if logit_scale is None else [logit_scale]
    grad = draw(*qkv.shape[:-1], channels) if backward else None
    for tensor in (qkv, table, q, k, v, bias, *scales):
        tensor.requires_grad_(backward)

    def ours() -> Tensor:
        return functional.shifted_window_attention(
            qkv, case.window, heads, case.shift, table=table, index=index, logit_scale=logit_scale
        )

    makers: dict[str, Callable[[], Call]] = {
        "eager": lambda: partial(eager_attention, *given),
        "SDPA + mask": lambda: _sdpa(given, backward),
    }
    if setting.compile:
        makers["torch.compile"] = lambda: partial(torch.compile(eager_attention, dynamic=False), *given)
    makers["swinaccel"] = lambda: ours
    if setting.seed_repos is not None:
        makers |= _window_seeds(setting.seed_repos, given, backward)
    wanted, cut_grad = [q, k, v, bias, *scales], None if grad is None else windows(grad).contiguous()
    steps = {name: partial(_step, make, wanted, cut_grad) for name, make in makers.items()}
    steps["swinaccel"] = partial(_step, makers["swinaccel"], [qkv, table, *scales], grad)
    flops = 4.0 * pixels * geometry.tokens * channels  # two products, each 2 N a channel and token
    bounds = _bounds(pixels * channels * kind.itemsize * 4, flops, backward)
    return bounds | compare(setting, steps, backward, windows)


def _bounds(num_bytes: int, flops: float, backward: bool) -> dict[str, float]:
    """What a row must move and compute, from what its forward must."""
    return {
        "bytes": num_bytes * (BACKWARD_BYTES if backward else 1),
        "flops": flops * (BACKWARD_PRODUCTS if backward else 1),
    }


def _sdpa_of_sequence(case: SequenceCase, q: Tensor, k: Tensor, v: Tensor) -> Call:
    size = case.tokens**2 * q.itemsize
    if q.is_cuda and size > torch.cuda.mem_get_info(q.device)[1] / 6:
        raise MemoryError(f"its mask alone is {size / 2**30:.0f} GiB")
    seen = reference.visible_keys(case.tokens // case.block, block_size=1, window_blocks=case.blocks, device=q.device)
    mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -math.inf)
    mask = mask.repeat_interleave(case.block, 0).repeat_interleave(case.block, 1)
    return partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask)


def _flex_attention(case: SequenceCase, q: Tensor, k: Tensor, v: Tensor) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ago = query // case.block - key // case.block
        return (ago >= 0) & (ago < case.blocks)

    mask = create_block_mask(seen, None, None, case.tokens, case.tokens, device=str(q.device), _compile=True)
    fast: Any = torch.compile(flex_attention, dynamic=False)
    return partial(fast, q, k, v, block_mask=mask)


def measure_sequence(setting: Setting, case: SequenceCase, dtype: str, backward: bool) -> dict[str, Any]:
    """Block sliding windows over one sequence."""
    kind, device = models.as_dtype(dtype), setting.device
    generator = torch.Generator().manual_seed(0)
    shape = (1, case.heads, case.tokens, case.head_dim)
    q, k, v, grad = (torch.randn(*shape, generator=generator).to(device, kind) for _ in range(4))
    for tensor in (q, k, v):
        tensor.requires_grad_(backward)
    ours = partial(functional.block_sliding_window_attention, q, k, v, case.block, case.blocks)
    makers: dict[str, Callable[[], Call]] = {"SDPA + mask": lambda: _sdpa_of_sequence(case, q, k, v)}
    if setting.compile:
        makers["FlexAttention, compiled"] = lambda: _flex_attention(case, q, k, v)
    makers["swinaccel"] = lambda: ours
    if (repos := setting.seed_repos) is not None:
        name, rest = "Bloc-Sliding-Window", (case.block, case.blocks, case.head_dim**-0.5)
        makers[name] = lambda: partial(seed_function(repos, name), q, k, v, *rest)
    steps = {name: partial(_step, make, [q, k, v], grad if backward else None) for name, make in makers.items()}
    pairs = case.block**2 * sum(min(n + 1, case.blocks) for n in range(case.tokens // case.block))
    bounds = _bounds(4 * q.nbytes, 4.0 * pairs * case.heads * case.head_dim, backward)
    return bounds | compare(setting, steps, backward)


_ATTENTION: dict[type, tuple[str, Callable[..., dict[str, Any]]]] = {
    WindowCase: ("attention", measure_windows),
    SequenceCase: ("sequence", measure_sequence),
}


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
    launches_matter = batch == 1 and not train and setting.device.type == "cuda"
    modes = (None, "reduce-overhead") if launches_matter and setting.compile_mode is None else setting.compile_mode
    result = bench.run(
        loaded.model,
        inputs,
        rounds=setting.rounds,
        train=train,
        autocast=models.as_dtype(dtype) if train else None,
        compile=setting.compile,
        compile_mode=modes,
        deadline=setting.deadline,
        progress=lambda text, *_: setting.progress(text),
    )
    return {
        "bytes": weights * (6 if train else 1) + sum(t.nbytes for t in inputs if isinstance(t, Tensor)),
        "flops": None if products is None else batch * products * (3 if train else 1),
        "variants": [asdict(variant) for variant in result.variants],
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


def seed_function(repos: Path, peer: str) -> Callable[..., Any]:
    """A peer's function, imported from where it lies under a folder.

    Raises:
        ImportError: where there is none.
    """
    for module, name in SEEDS[peer]:
        path = module.replace(".", "/")
        files = [*repos.rglob(f"{path}/__init__.py"), *repos.rglob(f"{path}.py")]
        for file in sorted(files, key=lambda file: ("vision" not in str(file).lower(), str(file))):
            levels = path.count("/") + (file.name == "__init__.py")
            sys.path.insert(0, os.fspath(file.resolve().parents[levels]))
            try:
                found = getattr(importlib.import_module(module), name)
            finally:
                del sys.path[0]
            return found.apply if isinstance(found, type) and issubclass(found, torch.autograd.Function) else found
    raise ImportError(f"{' or '.join(module for module, _ in SEEDS[peer])} was not found in {repos}")
