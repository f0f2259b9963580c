"""The census: builds every known model with random parameters, accelerates it, and compares it with its original.

    python docs/results/supported.py                                            # small, fp32, plain PyTorch on the CPU
    python docs/results/supported.py --write                                    # the same, into docs/supported.md
    TRITON_INTERPRET=1 python docs/results/supported.py --backend triton        # the kernels, interpreted
    python docs/results/supported.py --device cuda --dtype bfloat16 --real --speed --batch 8
    python docs/results/supported.py --only mask2former --json

Each line says how many window attentions were found, how many are accelerated, how many of their calls ran the
original all the same, and how far the outputs are apart, relative to the original's size. In low precision both are
measured against fp64, and what is shown is how many times the original's own error that of the accelerated model is.
The list is tests/zoo's; its last lines are models that are to be left alone. What is no package to install stands
for itself in code of the same structure (tests/descendant_models.py and its like).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "supported.md"
START, END = "<!-- models:start -->", "<!-- models:end -->"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import zoo  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import swinaccel  # noqa: E402
from swinaccel.cli.models import as_device, as_dtype  # noqa: E402


def census(entry: zoo.Entry, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the census, as numbers."""
    row: dict[str, Any] = {"library": entry.library, "model": entry.name}
    torch.manual_seed(0)
    model, inputs, keywords = entry.make(args.real, args.batch)
    model.eval()  # which may return nothing
    randomize(model)
    exact = None
    if args.dtype != torch.float32:
        exact = outputs(model.to(args.device, torch.float64), inputs, keywords, entry.watch)
    model = model.to(args.device, args.dtype)
    try:
        expected = outputs(model, inputs, keywords, entry.watch)
    except RuntimeError:  # an original with masks in fp32, say, runs in lower precision under autocast only
        if exact is None:
            raise
        model, row["autocast"] = Autocast(model.float(), args.dtype), True
        expected = outputs(model, inputs, keywords, f"model.{entry.watch}".rstrip("."))
        entry = entry._replace(watch=f"model.{entry.watch}".rstrip("."))
    row["original_ms"] = milliseconds(model, inputs, keywords) if args.speed else None
    swinaccel.accelerate(model, backend=args.backend)
    found = outputs(model, inputs, keywords, entry.watch)
    report = swinaccel.report(model)
    row |= {
        "found": len(report),
        "accelerated": len(report.accelerated),
        "fallbacks": sum(line.fallbacks for line in report),
        "reasons": sorted({line.reason for line in report if line.reason}),
        "families": sorted({line.family for line in report}),
        "error": distance(found, expected),
    }
    if exact is not None:
        row["error"] = distance(found, exact)
        row["own_error"] = distance(expected, exact)
    row["accelerated_ms"] = milliseconds(model, inputs, keywords) if args.speed else None
    return row


class Autocast(nn.Module):
    """A model whose calls run under autocast."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, *args: Any, **keywords: Any) -> Any:
        with torch.autocast(next(self.parameters()).device.type, self.dtype):
            return self.model(*args, **keywords)


def randomize(model: nn.Module) -> None:
    """Fresh tables and SwinV2's fresh norms are zero, and would hide anything."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith("logit_scale"):
                value = 1.5 + 0.5 * noise
            elif parameter.dim() > 1 and not name.endswith("relative_position_bias_table"):
                value = noise * (1.2 / parameter[0].numel() ** 0.5)
            else:
                value = (1 if name.endswith("weight") else 0) + 0.5 * noise
            parameter.copy_(value)


def outputs(model: nn.Module, inputs: Any, keywords: Any, watch: str = "") -> list[Tensor]:
    """All floating-point tensors that a call, or a part of it, gives, in fp64; infinities of masks are set to zero."""
    seen: list[Any] = []
    hook = model.get_submodule(watch).register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.inference_mode():
        call(model, inputs, keywords)
    hook.remove()
    result = seen[-1]
    return [torch.nan_to_num(t.double(), 0.0, 0.0, 0.0) for t in tensors(result) if t.is_floating_point()]


def call(model: nn.Module, inputs: Any, keywords: Any) -> Any:
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(like) if value.is_floating_point() else value.to(like.device)

    return model(*map(moved, inputs), **{name: moved(value) for name, value in keywords.items()})


def tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):
        yield from tensors(list(result.values()))
    elif isinstance(result, (tuple, list)):
        for value in result:
            yield from tensors(value)


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of any output, relative to that output's largest value."""
    pairs = zip(found, expected, strict=True)
    return max(((one - other).abs().max() / other.abs().max().clamp_min(1e-30)).item() for one, other in pairs)


def milliseconds(model: nn.Module, inputs: Any, keywords: Any) -> float:
    """Median of a call."""
    times = []
    with torch.inference_mode():
        for _ in range(15):
            synchronize()
            start = time.perf_counter()
            call(model, inputs, keywords)
            synchronize()
            times.append(1e3 * (time.perf_counter() - start))
    return sorted(times[3:])[6]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def line(row: dict[str, Any], speed: bool) -> str:
    """A row of the table."""
    head = f"| {row['library']} | {row['model']} |"
    if "skipped" in row:
        return f"{head} skipped: {row['skipped']} |"
    error = f"{row['error']:.0e}"
    if "own_error" in row:
        error = f"{row['error'] / max(row['own_error'], 1e-30):.2f} × {row['own_error']:.0e}"
    text = f"{head} {row['found']} | {row['accelerated']} | {row['fallbacks']} | {error} |"
    if row.get("autocast"):
        text = text.replace(f"{row['model']} |", f"{row['model']}, autocast |", 1)
    if speed:
        before, after = row["original_ms"], row["accelerated_ms"]
        text += f" {before:.2f} | {after:.2f} | {before / after:.2f}× |"
    return text


def header(speed: bool) -> str:
    columns = ["library", "model", "found", "accelerated", "calls that ran the original", "difference"]
    columns += ["original, ms", "accelerated, ms", ""] if speed else []
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=as_device, default=as_device("cpu"))
    parser.add_argument("--dtype", type=as_dtype, default=torch.float32)
    parser.add_argument("--backend", choices=["auto", "triton", "torch"], default="auto")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--real", action="store_true", help="models of a published size")
    parser.add_argument("--speed", action="store_true", help="time both")
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--write", action="store_true", help="write the table into docs/supported.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    args.backend = "torch" if args.backend == "auto" and args.device.type == "cpu" else args.backend

    lines = [header(args.speed)]
    if not args.json:
        print(lines[0], flush=True)
    for entry in zoo.ENTRIES + zoo.NEAR_MISSES:
        if args.only.lower() not in f"{entry.library} {entry.name}".lower():
            continue
        try:
            row = census(entry, args)
        except Exception as error:  # what cannot be built or run here is a line like the others
            text = (str(error).strip().splitlines() or [""])[0]
            row = {"library": entry.library, "model": entry.name, "skipped": f"{type(error).__name__}: {text}"}
        if entry in zoo.NEAR_MISSES:
            row["library"] += ", left alone"
        lines.append(json.dumps(row) if args.json else line(row, args.speed))
        print(lines[-1], flush=True)
        for reason in row.get("reasons", ()):
            print(f"    {reason}", file=sys.stderr)
    if args.write:
        text = PAGE.read_text()
        before, after = text.split(START)[0], text.split(END)[1]
        PAGE.write_text(before + START + "\n" + "\n".join(lines) + "\n" + END + after)


if __name__ == "__main__":
    main()
