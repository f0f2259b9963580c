"""The results of a suite as JSON, as Markdown tables and as plots."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from .models import library

FORMAT = "swinaccel suite 1"

Row = dict[str, Any]  # of a document
Columns = dict[str, Callable[[Row], str]]

_TITLES = {
    "attention": "Window attention, ms",
    "sequence": "Block sliding-window attention, ms",
    "models": "Whole models, ms per batch",
    "training": "Whole models, ms per training step",
}
_READING = {
    "attention": (
        "From the qkv image to the image, table and shift mask included, is swinaccel's part. The peers get q, k and v"
        " already shifted and partitioned, the dense bias and the mask; that is not counted. SDPA's sum of bias and"
        " mask is counted in forward + backward only. Gradients: tokens, bias, and logit_scale where there is one."
    ),
    "sequence": "One sequence, all gradients of q, k and v in forward + backward.",
    "models": "Random weights. Calls with their launches: rows of small batches depend on the host.",
    "training": "fp32 parameters, autocast to the dtype given, AdamW (fused on a GPU), random weights.",
}
_LEGEND = (
    "Medians, tenth percentiles in brackets; the variants of a row took turns. Floors: what any implementation must"
    " move at the speed of this device's copy, and the products that it must compute at the rate of this device's"
    " matrix product (of whole models: parameters and images once; all products and convolutions). Data that stay in"
    " the device's cache between calls can go below the floor of memory. Against the best peer: the best of all that"
    " is not swinaccel over the best that is."
)


def is_ours(variant: str) -> bool:
    """Whether a variant's name is one of swinaccel's."""
    return variant.startswith(("accelerated", "swinaccel"))


def load(files: Iterable[str | Path]) -> dict[str, Any]:
    """The documents of several runs as one; see `merge`.

    Raises:
        ValueError: for a file that is none of a suite.
    """
    documents = []
    for file in files:
        try:
            document = json.loads(Path(file).expanduser().read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"{file} was not written by bench --suite of this version")
        documents.append(document)
    return merge(documents)


def merge(documents: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Several documents as one; of a row that two runs on one device measured, the later one stays."""
    runs: list[dict[str, Any]] = []
    rows: dict[tuple[str, ...], Row] = {}
    for document in documents:
        offset = len(runs)
        runs += document["runs"]
        for row in document["rows"]:
            run = row["run"] + offset
            key = (runs[run]["device"], row["section"], row["mode"], row["dtype"], row["name"])
            if key not in rows or row["note"] is None or rows[key]["note"] is not None:
                rows[key] = row | {"run": run}
    return {"format": FORMAT, "runs": runs, "rows": list(rows.values())}


def write(document: dict[str, Any], folder: Path, draw: bool = True) -> None:
    """Put suite.json, suite.md and the plots into a folder; a reader never finds half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    if draw:
        try:
            document["plots"] = _draw(document, folder)
        except ImportError as error:
            document["plots_note"] = str(error)
        else:
            document.pop("plots_note", None)
    texts = {"suite.json": json.dumps(finite(document), indent=1), "suite.md": markdown(document)}
    for name, text in texts.items():
        part = folder / f".{name}.part"
        part.write_text(text + "\n")
        os.replace(part, folder / name)


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN; in any nesting they become the strings "inf" and "nan"."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def markdown(document: dict[str, Any]) -> str:
    """All tables of a document, and its plots."""
    lines = ["# Measured with swinaccel bench --suite", ""]
    for place, run in enumerate(document["runs"]):
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
        rates = ", ".join(f"{n} {number(rate)}" for n, rate in run["matrix_tflop_s"].items() if rate)
        lines.append(
            f"- Run {place}: {run['device']}; {versions}; {run['host']}; {run['begun']}; {run['rounds']} rounds."
            f" Copy {number(run['copy_gb_s'])} GB/s (read + write); matrix product, TFLOP/s: {rates or '–'}"
            f" (fp32 products: {run['fp32_products']})."
        )
    lines += ["", _LEGEND]
    for section, title in _TITLES.items():
        rows = [row for row in document["rows"] if row["section"] == section]
        if not rows:
            continue
        lines += ["", f"## {title}", "", _READING[section]]
        for mode in dict.fromkeys(row["mode"] for row in rows):
            part = [row for row in rows if row["mode"] == mode]
            lines += ["", f"### {mode.capitalize()}", "", *_times(part), "", *_notes(part)]
            if _has_memory(part):
                what = "parameters included" if section in ("models", "training") else "beyond the inputs"
                lines += ["", f"Peak memory, MiB, {what}:", "", *_table(part, _columns(part, _memory))]
    if document.get("plots_note"):
        lines += ["", f"No plots: {document['plots_note']}."]
    for image in document.get("plots", ()):
        lines += ["", f"![{image.removesuffix('.png').replace('-', ' ')}]({image})"]
    return "\n".join(lines)


def best(row: Row, ours: bool) -> dict[str, Any] | None:
    """A row's fastest variant of swinaccel's, or of all others; those that compute less do not count."""
    found = [
        v for v in row["variants"] if v["latency_ms"] and is_ours(v["name"]) == ours and "no mask" not in v["name"]
    ]
    return min(found, key=lambda variant: variant["latency_ms"], default=None)


def _times(rows: list[Row]) -> list[str]:
    def floors(row: Row) -> str:
        found = row.get("floor") or {}
        return " / ".join(number(found.get(name)) for name in ("memory_ms", "matrix_ms"))

    def against(row: Row) -> str:
        one, other = best(row, False), best(row, True)
        return f"{one['latency_ms'] / other['latency_ms']:.2f}x" if one and other else "–"

    def of_floor(row: Row) -> str:
        ours = best(row, True)
        bound = max((value for value in (row.get("floor") or {}).values() if value), default=None)
        return f"{100 * bound / ours['latency_ms']:.0f} %" if bound and ours else "–"

    def time(variant: dict[str, Any]) -> str:
        return f"{number(variant['latency_ms'])} ({number(variant['p10_ms'])})" if variant["latency_ms"] else "–"

    last = {"against the best peer": against, "floor / time": of_floor}
    return _table(rows, {"floor: memory / matrix": floors} | _columns(rows, time) | last)


def _has_memory(rows: list[Row]) -> bool:
    return any(variant["peak_memory_mib"] for row in rows for variant in row["variants"])


def _memory(variant: dict[str, Any]) -> str:
    return "–" if variant["peak_memory_mib"] is None else f"{variant['peak_memory_mib']:,.0f}"


def _columns(rows: list[Row], show: Callable[[dict[str, Any]], str]) -> Columns:
    """A column for each variant."""

    def cell(name: str, row: Row) -> str:
        return next((show(variant) for variant in row["variants"] if variant["name"] == name), "–")

    return {name: partial(cell, name) for name in _names(rows)}


def _table(rows: list[Row], columns: Columns) -> list[str]:
    first: Columns = {"case": lambda row: row["name"], "dtype": lambda row: row["dtype"]}
    if len({row["run"] for row in rows}) > 1:
        first["run"] = lambda row: str(row["run"])
    columns = first | columns
    lines = [columns, ["---"] * len(columns), *([show(row) for show in columns.values()] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _names(rows: list[Row]) -> list[str]:
    """The variants of all rows, peers first."""
    names = list(dict.fromkeys(variant["name"] for row in rows for variant in row["variants"]))
    return sorted(names, key=is_ours)


def _notes(rows: list[Row]) -> list[str]:
    """What did not run, what was timed otherwise than the rest, and whose output is another."""
    lines = []
    for row in rows:
        where = f"- {row['name']}, {row['dtype']}"
        if row["note"]:
            lines.append(f"{where}: {row['note']}")
        if row.get("fallbacks"):
            lines.append(
                f"{where}: {row['fallbacks']} calls of accelerated attention ran the original; {row['report']}"
            )
        for variant in row["variants"]:
            if variant["error"]:
                lines.append(f"{where}, {variant['name']}: {variant['error']}")
            elif "since" in (variant["timed"] or ""):
                lines.append(f"{where}, {variant['name']}: {variant['timed']}")
            difference = variant["difference"]  # infinity is no number in JSON everywhere, and may come as a word
            if difference is not None and row["mode"] != "training" and not float(difference) < 0.1:
                relative = f"{float(difference):.2g}"
                lines.append(f"{where}, {variant['name']}: its output differs from the first column's by {relative}")
    return lines


def number(value: float | None) -> str:
    """Three significant digits (of 0.01 or more), and no fewer than all before the point."""
    if value is None:
        return "–"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3 if value >= 0.1 else 4
    return f"{value:,.{digits}f}"


# Plots.


def _draw(document: dict[str, Any], folder: Path) -> list[str]:
    """All plots of a document, in a folder; their names."""
    files = []
    measured = [row for row in document["rows"] if any(variant["latency_ms"] for variant in row["variants"])]
    tables = sorted({(list(_TITLES).index(row["section"]), row["section"], row["mode"]) for row in measured})
    for _, section, mode in tables:
        rows = [row for row in measured if (row["section"], row["mode"]) == (section, mode)]
        label = section if section in ("models", "training") else f"{section}-{mode.replace(' + ', '-')}"
        files.append(f"{label}-speed.png")
        bars(rows, "speedup", f"{section}, {mode}: times as fast as the first peer", folder / files[-1])
        if _has_memory(rows):
            files.append(f"{label}-memory.png")
            bars(rows, "peak_memory_mib", f"{section}, {mode}: peak memory, MiB", folder / files[-1])
    points = [row for row in measured if row.get("floor") and row["bytes"] and row["flops"]]
    if points:
        files.append("roofline.png")
        _roofline(document["runs"], points, folder / files[-1])
    return files


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure, sizes in inches, and its axes."""
    figure = library("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _colors(names: list[str]) -> dict[str, str]:
    """Greens for swinaccel's variants, others for its peers."""
    greens, others = ("2a7f62", "5cb78f", "9ad6b8"), ("9aa5b1", "d08c3f", "5b7db1", "a05195", "c94f4f", "7a6a58")
    palettes = {True: cycle(greens), False: cycle(others)}
    return {name: f"#{next(palettes[is_ours(name)])}" for name in names}


def bars(rows: list[Row], quantity: str, title: str, path: str | Path) -> None:
    """Draw a quantity of the rows' variants as bars into an image file.

    Raises:
        ImportError: without matplotlib; the message says what to install.
    """
    names = _names(rows)
    colors, height = _colors(names), 0.8 / len(names)
    figure, axes = _figure(9, 1.5 + len(rows) * (0.25 + 0.14 * len(names)))
    for position, name in enumerate(names):
        found = {
            place + (position + 0.5) * height - 0.4: variant[quantity]
            for place, row in enumerate(rows)
            for variant in row["variants"]
            if variant["name"] == name and variant[quantity] is not None
        }
        drawn = axes.barh(list(found), list(found.values()), height=height, label=name, color=colors[name])
        labels = [f" {value:.2f}" if value < 100 else f" {value:,.0f}" for value in found.values()]
        axes.bar_label(drawn, labels, fontsize=6)
    axes.set_yticks(range(len(rows)), [f"{row['name']}\n{row['dtype']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)


def _roofline(runs: list[dict[str, Any]], rows: list[Row], path: Path) -> None:
    """Products a second over products a byte: how near each row's best comes to what the device can do."""
    figure, axes = _figure(9, 6)
    intensities = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    for place, run in enumerate(runs):
        bandwidth = run["copy_gb_s"] / 1e3
        for dtype, rate in run["matrix_tflop_s"].items():
            if rate:
                xs = [low, min(max(rate / bandwidth, low), high), high]
                label = f"{dtype}, run {place}" if len(runs) > 1 else dtype
                axes.plot(xs, [min(rate, x * bandwidth) for x in xs], lw=1, label=f"ceiling, {label}")
    for ours, color, label in ((False, "#9aa5b1", "best peer"), (True, "#2a7f62", "best of swinaccel")):
        for marker, section in zip("os^D", _TITLES, strict=True):
            found = [(row, best(row, ours)) for row in rows if row["section"] == section]
            pairs = [(row["flops"] / row["bytes"], row["flops"] / v["latency_ms"] / 1e9) for row, v in found if v]
            if pairs:
                axes.scatter(*zip(*pairs, strict=True), s=22, marker=marker, color=color, label=f"{label}, {section}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP of products per byte that must be moved",
        ylabel="TFLOP/s of these products",
    )
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)
