"""Measure what docs/results publishes: window attention, block sliding windows, models and training, beside peers.

    python docs/results/measure.py DIR                                  # all rows; on a CPU fewer and smaller ones
    python docs/results/measure.py DIR --only 'models .* B1,' --minutes 9
    python docs/results/measure.py DIR --seed-repos REPOS               # with the peers' kernels, from their checkouts

What fails is a note in its row, and DIR/results.json is written after every row; tables.py makes DIR/results.md and
plots of it in the end. Two lower bounds stand beside each time, from a copy and from matrix products measured on the
same device just before: the bytes that any implementation must move, and the products that it must compute.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import attention
import tables
import torch
from attention import Setting
from torch import Tensor

from swinaccel import ops
from swinaccel.cli import bench, models, timing
from swinaccel.cli.factory import told
from swinaccel.cli.terminal import finite

BACKWARD_BYTES, BACKWARD_PRODUCTS = 11 / 4, 3.5  # of forward and backward, in those of forward
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
SIDES = {(True, True): 4096, (True, False): 8192, (False, True): 1024, (False, False): 256}  # (CUDA, fp32): of products
CPU_MODELS = (*TRAINED, "hf:swin-tiny", "torchvision:swin_v2_t")


class Model(NamedTuple):
    """A whole model with random weights."""

    name: str
    batch: int

    def __str__(self) -> str:
        return f"{self.name}, B{self.batch}"


Case = attention.Windows | attention.Sequence | Model


class Row(NamedTuple):
    """One row of one table, not measured yet; `backward` says training for a model."""

    case: Case
    dtype: str
    backward: bool = False

    def entry(self) -> dict[str, Any]:
        """Return the place of the row: a section of tables.py, a mode, and a name."""
        section, *modes = {
            attention.Windows: ("attention", "forward", "forward + backward"),
            attention.Sequence: ("sequence", "forward", "forward + backward"),
            Model: ("training" if self.backward else "models", "inference", "training"),
        }[type(self.case)]
        return {"section": section, "mode": modes[self.backward], "name": str(self.case), "dtype": self.dtype}

    def __str__(self) -> str:
        return "{section} {mode}: {name}, {dtype}".format(**self.entry())


def plan(is_cuda: bool) -> list[Row]:
    """Return the rows, cheap and important ones first; fewer and smaller ones on a CPU."""
    windows, sequences = attention.WINDOWS, attention.SEQUENCES
    if not is_cuda:
        cases: list[Case] = [*(case._replace(batch=case.batch // 16) for case in windows), sequences[0]]
        whole = [Row(Model(name, batch), "float32") for batch in (1, 8) for name in CPU_MODELS]
        return [*(Row(case, "float32", backward) for backward in (False, True) for case in cases), *whole]
    every: list[Case] = [*windows, *sequences]
    alone = [Row(case, "float16", backward) for backward in (False, True) for case in every]
    trained = [Row(Model(name, batch), "bfloat16", True) for name, batch in TRAINED.items()]
    whole = [
        Row(Model(name, size or batch), dtype)
        for dtype in ("bfloat16", "float16", "float32")
        for size in (None, 1, 8)
        for name, batch in MODELS.items()
    ]
    return [*alone, *trained, *whole]


def run(folder: Path, rows: list[Row], setting: Setting) -> dict[str, Any]:
    """Measure rows, write results.json after each, and return what is in it."""
    document: dict[str, Any] = {"machine": describe(setting, [row.dtype for row in rows])}
    document["rows"] = [row.entry() | {"note": "not run", "variants": []} for row in rows]
    write(document, folder)
    for index, (row, entry) in enumerate(zip(rows, document["rows"], strict=True)):
        print(f"{index + 1} of {len(rows)}: {row}", flush=True)
        if setting.deadline is not None and time.monotonic() > setting.deadline:
            entry["note"] = "not run: the time was up"
        else:
            entry |= _measured(setting, row, document["machine"])
        write(document, folder)
        _clean(setting)
    return document


def write(document: dict[str, Any], folder: Path) -> None:
    """Put results.json into a folder; a reader never finds half a file."""
    part = folder / ".results.json.part"
    part.write_text(json.dumps(finite(document), indent=1) + "\n")
    os.replace(part, folder / "results.json")


def _measured(setting: Setting, row: Row, machine: dict[str, Any]) -> dict[str, Any]:
    """Return the measurements of a row, or a note why there are none."""
    begin = time.monotonic()
    try:
        measure: Callable[..., dict[str, Any]] = measure_model if isinstance(row.case, Model) else measure_attention
        found = measure(setting, *row) | {"note": None}
        found["floor"] = floor(machine, row.dtype, found)
    except Exception as error:
        found = {"note": told(error)}
    if ops.has_failures():
        found["note"] = "a kernel of swinaccel failed, and PyTorch stood in"
        ops.forget_failures()
    return found | {"seconds": round(time.monotonic() - begin, 1)}


def _clean(setting: Setting) -> None:
    """Make room for the next row, which is to find no shape marked as dynamic by an earlier one."""
    gc.collect()
    if setting.compile:
        torch._dynamo.reset()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def describe(setting: Setting, dtypes: list[str]) -> dict[str, Any]:
    """Return the machine and its ceilings: GB/s of a copy, read and written, and TFLOP/s of products, by dtype."""
    packages = ("swinaccel", "torch", "triton", "timm", "transformers", "torchvision")
    is_cuda = setting.device.type == "cuda"
    source = torch.randn(2**28 if is_cuda else 2**25, device=setting.device)
    copy = partial(torch.neg, source, out=torch.empty_like(source))  # a captured copy is no kernel, and slower
    rates: dict[str, float] = {}
    for dtype in dict.fromkeys(dtypes):
        side = SIDES[is_cuda, dtype == "float32"]
        pair = (torch.randn(side, side, device=setting.device).to(models.as_dtype(dtype)) for _ in range(2))
        rates[dtype] = 2 * side**3 / _seconds(partial(torch.mm, *pair), setting.device) / 1e12
    return {
        "device": timing.device_name(setting.device),
        "host": platform.platform(),
        "versions": {name: timing.version(name) for name in packages} | {"python": platform.python_version()},
        "begun": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rounds": setting.rounds,
        "fp32_products": torch.get_float32_matmul_precision(),
        "copy_gb_s": 2 * source.nbytes / _seconds(copy, setting.device) / 1e9,
        "matrix_tflop_s": rates,
    }


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    runner = timing.Runner(call, (), device, graph=True)
    with torch.no_grad():
        runner.warm_up()
        for _ in range(10):
            runner.sample()
    return statistics.median(runner.samples) / 1e3


def floor(machine: dict[str, Any], dtype: str, row: dict[str, Any]) -> dict[str, float | None]:
    """Return the two lower bounds of a row's time."""
    products = row["flops"] and row["flops"] / machine["matrix_tflop_s"][dtype] / 1e9
    return {"memory_ms": row["bytes"] / machine["copy_gb_s"] / 1e6, "matrix_ms": products}


def measure_attention(
    setting: Setting, case: attention.Windows | attention.Sequence, dtype: str, backward: bool
) -> dict[str, Any]:
    """Measure calls of attention, which take turns; on a GPU each as a graph, so that the time is its kernels'."""
    posed = case.pose(setting, models.as_dtype(dtype), backward)

    def start(name: str, make: attention.Make) -> timing.Runner:
        adapt = posed.adapt if name == "swinaccel" else None
        return timing.Runner(make(), (), setting.device, graph=True, adapt=adapt)

    starters = {name: partial(start, name, make) for name, make in posed.makers.items()}
    with torch.set_grad_enabled(backward), timing.compiler_room() if setting.compile else nullcontext():
        variants, _ = timing.measure(starters, setting.rounds, deadline=setting.deadline)
    return {
        "bytes": posed.bytes * (BACKWARD_BYTES if backward else 1),
        "flops": posed.flops * (BACKWARD_PRODUCTS if backward else 1),
        "variants": [asdict(variant) for variant in variants],
    }


def measure_model(setting: Setting, case: Model, dtype: str, train: bool) -> dict[str, Any]:
    """Measure a whole model by `bench.run`; training has fp32 parameters and autocast to `dtype`.

    The floor of memory is that of the parameters, read once (in training they and two moments are also written), and
    of the images; that of products is the original's, counted, thrice in training.
    """
    loaded = models.load(case.name, False, "float32" if train else dtype, setting.device)
    inputs = loaded.example_inputs(case.batch)
    weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
    products = _products(loaded.model, loaded.example_inputs(1))
    launches_matter = case.batch == 1 and not train and setting.device.type == "cuda"
    result = bench.run(
        loaded.model,
        inputs,
        rounds=setting.rounds,
        train=train,
        autocast=models.as_dtype(dtype) if train else None,
        compile=setting.compile,
        compile_mode=(None, "reduce-overhead") if launches_matter else None,
        deadline=setting.deadline,
    )
    return {
        "bytes": weights * (6 if train else 1) + sum(t.nbytes for t in inputs if isinstance(t, Tensor)),
        "flops": None if products is None else case.batch * products * (3 if train else 1),
        "variants": [asdict(variant) for variant in result.variants],
        "report": result.report.summary(),
        "fallbacks": sum(entry.fallbacks for entry in result.report),
    }


def _products(model: torch.nn.Module, inputs: tuple[Any, ...]) -> int | None:
    """Return the FLOP of a forward's matrix products and convolutions; None where they cannot be counted."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        try:
            model(*inputs)
        except Exception:
            return None
    return counter.get_total_flops()


def main(arguments: list[str]) -> int:
    """Measure, and make the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where results.json, results.md and plots go")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--only", default="", metavar="REGEX", help="of rows as they are printed; '.' measures all")
    parser.add_argument("--rounds", type=int, default=20, help="samples behind each median (%(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no row after so many")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="(on CUDA devices)")
    parser.add_argument("--seed-repos", type=Path, metavar="REPOS", help="a folder of checkouts of the peers' kernels")
    options = parser.parse_args(arguments)
    device = models.as_device(options.device)
    is_cuda = device.type == "cuda"
    rows = [row for row in plan(is_cuda) if re.search(options.only, str(row))]
    if not rows:
        parser.error(f"--only: no row matches {options.only!r}")
    if options.seed_repos is not None and not options.seed_repos.is_dir():
        parser.error(f"--seed-repos: there is no folder {options.seed_repos}")
    if is_cuda and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    setting = Setting(device, options.rounds, is_cuda if options.compile is None else options.compile)
    setting.seed_repos = options.seed_repos
    setting.deadline = options.minutes and time.monotonic() + 60 * options.minutes
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        run(options.folder, rows, setting)
    finally:
        tables.main([str(options.folder)])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
