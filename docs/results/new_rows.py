"""Time attentions and blocks that were found in public code beside their originals, at the sizes that users have.

    python docs/results/new_rows.py --json new_rows.json            # all rows, on one GPU
    python docs/results/new_rows.py --only Pangu --compile          # beside torch.compile too, which takes its time
    python docs/results/new_rows.py --device cpu --small            # in plain PyTorch

The rows are those of real_sizes.py, with random parameters: inference in fp16, forward and backward in bf16, each as
called and as a CUDA graph, the median by turns. Errors are relative to the original in fp32, the original's own and
ours: of the output, or of that, the input's gradient and those of all parameters the largest. A row that is not
accelerated, or whose calls ran the original, says so. Several processes compile at the same time, and then time their
rows one after the other.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from real_sizes import ROWS, Row
from torch import Tensor, nn

import swinaccel
from swinaccel import ops
from swinaccel.cli import timing

TIMING = 50.0  # seconds that all rows together are timed
MODES = {"inference": torch.float16, "with gradients": torch.bfloat16}


def randomize(model: nn.Module) -> nn.Module:
    """Draw parameters anew: fresh tables and norms hide what is wrong."""
    with torch.no_grad():
        for name, one in model.named_parameters():
            noise = torch.randn_like(one)
            if name.endswith("logit_scale"):
                one.copy_(1.5 + 0.5 * noise)
            elif one.dim() > 1 and not name.endswith("bias_table"):
                one.copy_(noise / one[0].numel() ** 0.5)
            else:
                one.copy_((1 if name.endswith("weight") else 0) + 0.3 * noise)
    return model


class Prepared(NamedTuple):
    """A row in one mode, ready to be timed; and what is known of it."""

    calls: dict[str, Callable[[], list[Tensor]]]
    line: dict[str, Any]


def prepare(row: Row, mode: str, options: argparse.Namespace) -> Prepared:
    """Make original and accelerated, run both, and compare them with the original in fp32."""
    torch.manual_seed(0)
    module, args, keywords = row.make(row)
    model = randomize(module.to(options.device)).eval()
    dtype, trained = MODES[mode], mode != "inference"
    exact = outputs(caller(model, args, keywords, torch.float32, trained))
    model = model.to(dtype)
    backend = "torch" if options.device == "cpu" else "auto"
    twin = copy.deepcopy(model)
    if row.by_hand is None:
        swinaccel.accelerate(twin, backend=backend, graphs=False)
    else:
        twin.__class__ = row.by_hand
    calls = {
        "original": caller(model, args, keywords, dtype, trained),
        "accelerated": caller(twin, args, keywords, dtype, trained),
    }
    if options.compile:
        compiled: Any = torch.compile(copy.deepcopy(model), dynamic=False)
        calls["torch.compile"] = caller(compiled, args, keywords, dtype, trained)
    line: dict[str, Any] = {"row": row.name, "mode": mode, "dtype": timing.dtype_name(dtype)}
    line["error"] = {name: distance(outputs(call), exact) for name, call in calls.items()}
    report = swinaccel.report(twin)
    entries = report.accelerated
    line |= {"found": len(report), "accelerated": len(entries), "calls": sum(one.calls for one in entries)}
    line["fallbacks"] = sum(one.fallbacks for one in entries)
    line["reasons"] = sorted({one.reason for one in report if one.reason})
    if row.by_hand is not None:
        line |= {"found": 1, "accelerated": 1, "reasons": []}
    line["kernel_failed"] = ops.has_failures()
    ops.forget_failures()
    return Prepared(calls, line)


def caller(
    model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], dtype: torch.dtype, trained: bool
) -> Callable[[], list[Tensor]]:
    """Return a call in one dtype: its output, or output and gradients of its input and of all parameters."""
    like = next(model.parameters())

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(like.device, dtype if value.is_floating_point() else None)

    given, named = tuple(map(moved, args)), {name: moved(value) for name, value in keywords.items()}
    if not trained:

        def infer() -> list[Tensor]:
            with torch.no_grad():
                return tensors(model(*given, **named))

        return infer

    asked = [given[0].requires_grad_(), *model.parameters()]
    grads: list[Tensor] = []

    def train() -> list[Tensor]:
        out = tensors(model(*given, **named))[0]
        if not grads:
            grads.append(torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out))
        found = torch.autograd.grad(out, asked, grads[0], allow_unused=True)
        return [out.detach(), *(one for one in found if one is not None)]

    return train


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of an output."""
    return [output] if isinstance(output, Tensor) else list(output)


def outputs(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Return what a call gives, in fp32."""
    return [one.float() for one in call()]


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest error of an output, the input's gradient, and all parameters' gradients, by their lengths."""
    if [one.shape for one in found] != [one.shape for one in exact]:
        return math.inf
    errors = []
    for part in (slice(0, 1), slice(1, 2), slice(2, None)):
        one, other = (torch.cat([t.flatten() for t in every[part]] or [torch.ones(1)]) for every in (found, exact))
        errors.append(((one - other).norm() / other.norm()).item())
    return max(one if math.isfinite(one) else math.inf for one in errors)


def timed(prepared: Prepared, options: argparse.Namespace) -> dict[str, Any]:
    """Return milliseconds of each call by "name, called" and "name, graph"; a graph that there is none of says why."""
    device = torch.device(options.device)

    def starter(call: Callable[[], list[Tensor]], graph: bool) -> timing.Runner:
        return timing.Runner(lambda: call()[0], (), device, graph=graph)

    ways = {"called": False, "graph": True} if device.type == "cuda" else {"called": False}
    starters = {
        f"{name}, {way}": partial(starter, call, graph)
        for name, call in prepared.calls.items()
        for way, graph in ways.items()
    }
    variants, _ = timing.measure(starters, options.rounds)
    found: dict[str, Any] = {one.name: one.error or one.latency_ms for one in variants}
    for one in variants:
        if one.name.endswith("graph") and one.error is None and one.timed != "CUDA graph":
            found[one.name] = one.timed
    return found


def told(line: dict[str, Any]) -> str:
    """Return a line of the table."""
    head = f"{line['row']:42} {line['mode']:14} "
    if "failed" in line:
        return head + f"FAILED: {line['failed']}"
    parts = [f"{line['error']['original']:7.0e} {line['error']['accelerated']:7.0e}"]
    for way in ("called", "graph"):
        times = [line.get("ms", {}).get(f"{name}, {way}") for name in ("original", "torch.compile", "accelerated")]
        parts.append(" ".join(f"{one:8.3f}" if isinstance(one, float) else f"{'-':>8}" for one in times))
        first, *_, last = times
        is_known = isinstance(first, float) and isinstance(last, float)
        parts.append(f"{first / last:6.2f}x" if is_known else f"{'-':>7}")
    if not line["accelerated"] or line["accelerated"] < line["found"]:
        parts.append("NOT ACCELERATED: " + "; ".join(line["reasons"]))
    elif line["fallbacks"]:
        parts.append(f"{line['fallbacks']} of {line['calls']} calls RAN THE ORIGINAL: " + "; ".join(line["reasons"]))
    if line["kernel_failed"]:
        parts.append("A KERNEL FAILED, and PyTorch stood in")
    notes = [f"{name}: {one}" for name, one in line.get("ms", {}).items() if isinstance(one, str)]
    return head + "  ".join([*parts, *notes])


def work(rows: list[Row], options: argparse.Namespace, wait: Callable[[], object]) -> Iterator[dict[str, Any]]:
    """Yield the lines of rows, which are all prepared before `wait` is called."""
    ready: list[Prepared] = []
    torch.backends.cudnn.allow_tf32 = False  # of the yardstick
    for row in rows:
        for mode in MODES:
            line: dict[str, Any] = {"row": row.name, "mode": mode}
            if time.time() > options.deadline:
                yield line | {"failed": "not run: the time was up"}
                continue
            try:
                ready.append(prepare(row, mode, options))
            except Exception as error:
                yield line | {"failed": f"{type(error).__name__}: {str(error).strip()[:200]}"}
            gc.collect()
            if options.device != "cpu":
                torch.cuda.empty_cache()
    wait()
    for one in ready:
        if time.time() > options.deadline:
            yield one.line | {"ms": {"original, called": "not timed: the time was up"}}
            continue
        try:
            yield one.line | {"ms": timed(one, options)}
        except Exception as error:
            yield one.line | {"failed": f"{type(error).__name__}: {str(error).strip()[:200]}"}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="part of a row's name")
    parser.add_argument("--small", action="store_true", help="few and small windows")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--rounds", type=int, default=5, help="samples behind each median (%(default)s)")
    parser.add_argument("--jobs", type=int, default=16, help="processes that compile at the same time (%(default)s)")
    parser.add_argument("--seconds", type=float, default=110, help="begin nothing after so many (%(default)s)")
    parser.add_argument("--json", help="a file, written after each line")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.deadline = options.deadline or time.time() + options.seconds
    return options


def lines_of(arguments: list[str], options: argparse.Namespace, rows: list[Row]) -> Iterator[dict[str, Any]]:
    """Yield the lines of all rows, by processes on a GPU."""
    jobs = min(options.jobs, len(rows))
    if options.device == "cpu" or jobs < 2:
        yield from work(rows, options, lambda: None)
        return
    missing = {(row.name, mode) for row in rows for mode in MODES}
    command = [sys.executable, __file__, *arguments, "--deadline", str(options.deadline), "--child"]
    children = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(jobs)
    ]
    try:
        for text in in_turn(children, options.deadline):
            if text.startswith("{"):
                line = json.loads(text)
                missing.discard((line["row"], line["mode"]))
                yield line
    finally:
        for child in children:
            child.kill()
    for name, mode in sorted(missing):
        yield {"row": name, "mode": mode, "failed": "its process ended, or was ended since the time was up"}


def in_turn(children: list[Any], deadline: float) -> Iterator[str]:
    """Yield what processes print, each of which goes on when it is its turn, once it and the others are ready.

    At the deadline less `TIMING` seconds those begin that are ready.
    """
    printed: queue.Queue[tuple[Any, str | None]] = queue.Queue()

    def read(child: Any) -> None:
        for text in child.stdout:
            printed.put((child, text))
        printed.put((child, None))

    for child in children:
        threading.Thread(target=read, args=(child,), daemon=True).start()
    preparing, ready, running = set(children), [], None
    while (preparing or ready or running) and time.time() < deadline + 10:
        with suppress(queue.Empty):
            child, text = printed.get(timeout=0.2)
            if text is None:
                preparing.discard(child)
                running = None if running is child else running
            elif text.strip() == "ready":
                preparing.discard(child)
                ready.append(child)
            else:
                yield text
        if running is None and ready and (not preparing or time.time() > deadline - TIMING):
            running = ready.pop(0)
            with suppress(BrokenPipeError):
                running.stdin.write("go\n")
                running.stdin.flush()


def main(arguments: list[str]) -> int:
    """Time all rows, and return 1 if one of them is not accelerated in inference, or failed."""
    warnings.simplefilter("ignore")
    torch._dynamo.config.recompile_limit = 64  # one code for many rows
    options = parse(arguments)
    rows = [row.small() if options.small else row for row in ROWS if options.only.lower() in row.name.lower()]
    if options.child is not None:
        torch.set_num_threads(max(2, (os.cpu_count() or 2) // options.jobs))

        def wait() -> None:
            print("ready", flush=True)
            sys.stdin.readline()

        for line in work(rows[options.child :: options.jobs], options, wait):
            print(json.dumps(line), flush=True)
        return 0
    name = timing.device_name(torch.device(options.device))
    dtypes = ", ".join(f"{mode} {timing.dtype_name(dtype)}" for mode, dtype in MODES.items())
    print(f"{name}, torch {torch.__version__}; {dtypes}; ms: original, torch.compile, accelerated")
    print(f"{'':57} {'errors':15}  {'as called':26}  {'':7}  {'as a CUDA graph':26}", flush=True)
    found, names = [], [row.name for row in rows]
    for line in lines_of(arguments, options, rows):
        found.append(line)
        print(told(line), flush=True)
        if options.json:
            found.sort(key=lambda one: names.index(one["row"]))
            Path(options.json).write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": found}))
    return 0 if all(map(is_fast, found)) else 1


def is_fast(line: dict[str, Any]) -> bool:
    """Return True if all of a row is accelerated, in its calls too, but for those that record gradients."""
    if "failed" in line or line["kernel_failed"] or not 0 < line["accelerated"] == line["found"]:
        return False
    return not line["fallbacks"] or line["mode"] != "inference"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
