"""Make tables (results.md) and plots of a results.json that measure.py wrote.

python docs/results/tables.py DIR
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from swinaccel.cli.terminal import number

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]

SECTIONS = {
    "attention": (
        "Window attention, ms",
        "From the qkv image to the image, table and shift mask included, is swinaccel's part. The peers get q, k and v"
        " already shifted and partitioned, the dense bias and the mask; that is not counted. SDPA's sum of bias and"
        " mask is counted in forward + backward only. Gradients: tokens, bias, and logit_scale where there is one.",
    ),
    "sequence": (
        "Block sliding-window attention, ms",
        "One sequence, all gradients of q, k and v in forward + backward.",
    ),
    "models": (
        "Whole models, ms per batch",
        "Random weights. Calls with their launches: rows of small batches depend on the host.",
    ),
    "training": (
        "Whole models, ms per training step",
        "fp32 parameters, autocast to the dtype given, AdamW (fused on a GPU), random weights.",
    ),
}
LEGEND = (
    "Medians, tenth percentiles in brackets; the variants of a row took turns. Floors: what any implementation must"
    " move at the speed of this device's copy, and the products that it must compute at the rate of this device's"
    " matrix product (of whole models: parameters and images once; all products and convolutions). Data that stay in"
    " the device's cache between calls can go below the floor of memory. Against the best peer: the best of all that"
    " is not swinaccel over the best that is."
)


def is_ours(variant: str) -> bool:
    """Return True if a variant is one of swinaccel's."""
    return variant.startswith(("accelerated", "swinaccel"))


def best(row: Row, ours: bool) -> float | None:
    """Return the time of the fastest variant of swinaccel's, or of all others, less those that compute less."""
    return min(
        (v["latency_ms"] for v in row["variants"] if v["latency_ms"] and is_ours(v["name"]) == ours
         and "no mask" not in v["name"]),
        default=None,
    )  # fmt: skip


def parts(document: dict[str, Any]) -> Iterator[tuple[str, str, list[Row]]]:
    """Yield section, mode and rows of every table."""
    for section in SECTIONS:
        for mode in dict.fromkeys(row["mode"] for row in document["rows"] if row["section"] == section):
            yield section, mode, [r for r in document["rows"] if (r["section"], r["mode"]) == (section, mode)]


def markdown(document: dict[str, Any]) -> str:
    """Return all tables."""
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    rates = ", ".join(f"{dtype} {number(rate)}" for dtype, rate in machine["matrix_tflop_s"].items())
    lines = [
        "# Results", "",
        f"{machine['device']}; {versions}; {machine['host']}; {machine['begun']}; {machine['rounds']} rounds. Copy"
        f" {number(machine['copy_gb_s'])} GB/s (read + write); matrix product, TFLOP/s: {rates} (fp32 products:"
        f" {machine['fp32_products']}).", "", LEGEND,
    ]  # fmt: skip
    last = None
    for section, mode, rows in parts(document):
        if section != last:
            title, reading = SECTIONS[section]
            lines += ["", f"## {title}", "", reading]
        last = section
        lines += ["", f"### {mode.capitalize()}", "", *_table(rows, _times(rows)), "", *_notes(rows)]
        if any(variant["peak_memory_mib"] for row in rows for variant in row["variants"]):
            counted = "parameters included" if section in ("models", "training") else "beyond the inputs"
            columns = _columns(rows, lambda v: number(v["peak_memory_mib"]))
            lines += ["", f"Peak memory, MiB, {counted}:", "", *_table(rows, columns)]
    return "\n".join(lines) + "\n"


def _times(rows: list[Row]) -> Columns:
    def floors(row: Row) -> str:
        found = row.get("floor") or {}
        return " / ".join(number(found.get(name)) for name in ("memory_ms", "matrix_ms"))

    def against(row: Row) -> str:
        one, other = best(row, False), best(row, True)
        return f"{one / other:.2f}x" if one and other else "–"

    def of_floor(row: Row) -> str:
        time, found = best(row, True), [value for value in (row.get("floor") or {}).values() if value]
        return f"{100 * max(found) / time:.0f} %" if found and time else "–"

    def time(variant: Row) -> str:
        return f"{number(variant['latency_ms'])} ({number(variant['p10_ms'])})" if variant["latency_ms"] else "–"

    last: Columns = {"against the best peer": against, "floor / time": of_floor}
    return {"floor: memory / matrix": floors} | _columns(rows, time) | last


def _names(rows: list[Row]) -> list[str]:
    """Return the variants of all rows, peers first."""
    return sorted(dict.fromkeys(v["name"] for row in rows for v in row["variants"]), key=is_ours)


def _columns(rows: list[Row], show: Callable[[Row], str]) -> Columns:
    """Return a column for each variant."""

    def cell(name: str, row: Row) -> str:
        return next((show(variant) for variant in row["variants"] if variant["name"] == name), "–")

    return {name: partial(cell, name) for name in _names(rows)}


def _table(rows: list[Row], columns: Columns) -> list[str]:
    cells = [[row["name"], row["dtype"], *(show(row) for show in columns.values())] for row in rows]
    head = ["case", "dtype", *columns]
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells)]


def _notes(rows: list[Row]) -> list[str]:
    """Return notes on failures, on variants timed otherwise than the rest, and on outputs that differ."""
    found = []
    for row in rows:
        if row["note"]:
            found.append((row, "", row["note"]))
        if row.get("fallbacks"):
            calls = f"{row['fallbacks']} calls of accelerated attention ran the original; {row['report']}"
            found.append((row, "", calls))
        for variant in row["variants"]:
            where = f", {variant['name']}"
            if variant["error"]:
                found.append((row, where, variant["error"]))
            elif "since" in variant["timed"]:
                found.append((row, where, variant["timed"]))
            # Infinity comes as a word, and is no number below 0.1 either way.
            if not variant["error"] and row["mode"] != "training" and not float(variant["difference"]) < 0.1:
                relative = f"{float(variant['difference']):.2g}"
                found.append((row, where, f"its output differs from the first column's by {relative}"))
    return [f"- {row['name']}, {row['dtype']}{where}: {text}" for row, where, text in found]


def draw(document: dict[str, Any], folder: Path) -> list[str]:
    """Draw the speed-ups of every table, and peak memory, as bars; return the files' names."""
    files = []
    for section, mode, rows in parts(document):
        measured = [row for row in rows if best(row, True) or best(row, False)]
        for quantity, title in {"speedup": "times as fast as the first peer", "peak_memory_mib": "peak MiB"}.items():
            if any(variant[quantity] for row in measured for variant in row["variants"]):
                files.append(f"{section}-{mode.replace(' + ', '-')}-{quantity.split('_')[-2:][0]}.png")
                _bars(measured, quantity, f"{section}, {mode}: {title}", folder / files[-1])
    return files


def _bars(rows: list[Row], quantity: str, title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    names = _names(rows)
    palettes = {
        True: cycle(("#2a7f62", "#5cb78f", "#9ad6b8")),
        False: cycle(("#9aa5b1", "#d08c3f", "#5b7db1", "#a05195")),
    }
    height = 0.8 / len(names)
    figure = Figure(figsize=(9, 1.5 + len(rows) * (0.25 + 0.14 * len(names))), layout="constrained")
    axes = figure.add_subplot()
    for position, name in enumerate(names):
        found = {
            place + (position + 0.5) * height - 0.4: variant[quantity]
            for place, row in enumerate(rows)
            for variant in row["variants"]
            if variant["name"] == name and variant[quantity] is not None
        }
        color = next(palettes[is_ours(name)])
        drawn = axes.barh(list(found), list(found.values()), height=height, label=name, color=color)
        axes.bar_label(drawn, [f" {number(value)}" for value in found.values()], fontsize=6)
    axes.set_yticks(range(len(rows)), [f"{row['name']}\n{row['dtype']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)


def main(arguments: list[str]) -> int:
    """Make results.md, and plots where matplotlib is installed."""
    folder = Path(arguments[0])
    document = json.loads((folder / "results.json").read_text())
    text = markdown(document)
    try:
        text += "".join(f"\n![{name.removesuffix('.png')}]({name})\n" for name in draw(document, folder))
    except ImportError as error:
        print(f"no plots: {error}; where matplotlib is installed, tables.py draws them", file=sys.stderr)
    (folder / "results.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
