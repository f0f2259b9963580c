"""The results of a suite as JSON, as Markdown tables and as plots."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

FORMAT = "swinaccel suite 1"

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


def merge(documents: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Several documents as one; of a row that two runs on one device measured, the later one stays."""
    runs: list[dict[str, Any]] = []
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
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
    images: list[str] = document.get("plots", [])
    if draw:
        try:
            images = document["plots"] = _draw(document, folder)
        except ImportError as error:
            document["plots_note"] = str(error)
        else:
            document.pop("plots_note", None)
    for name, text in (
        ("suite.json", json.dumps(document, indent=1)),
        ("suite.md", markdown(document, images)),
    ):
        part = folder / f".{name}.part"
        part.write_text(text + "\n")
        os.replace(part, folder / name)


def markdown(document: dict[str, Any], images: Iterable[str] = ()) -> str:
    """All tables of a document."""
    lines = ["# Measured with swinaccel bench --suite", ""]
    for number, run in enumerate(document["runs"]):
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
        rates = ", ".join(f"{n} {_number(rate)}" for n, rate in run["matrix_tflop_s"].items() if rate)
        lines.append(
            f"- Run {number}: {run['device']}; {versions}; {run['host']}; {run['begun']}; {run['rounds']} rounds."
            f" Copy {_number(run['copy_gb_s'])} GB/s (read + write); matrix product, TFLOP/s: {rates or '–'}"
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
            if any(variant["peak_memory_mib"] for row in part for variant in row["variants"]):
                what = "parameters included" if section in ("models", "training") else "beyond the inputs"
                lines += ["", f"Peak memory, MiB, {what}:", "", *_memory(part)]
    if document.get("plots_note"):
        lines += ["", f"No plots: {document['plots_note']}."]
    for image in images:
        lines += ["", f"![{image.removesuffix('.png').replace('-', ' ')}]({image})"]
    return "\n".join(lines)


def best(row: dict[str, Any], ours: bool) -> dict[str, Any] | None:
    """A row's fastest variant of swinaccel's, or of all others; those that compute less do not count."""
    found = [
        v for v in row["variants"] if v["latency_ms"] and is_ours(v["name"]) == ours and "no mask" not in v["name"]
    ]
    return min(found, key=lambda variant: variant["latency_ms"], default=None)


def _times(rows: list[dict[str, Any]]) -> list[str]:
    def floor(row: dict[str, Any]) -> str:
        floors = row.get("floor") or {}
        return " / ".join(_number(floors.get(name)) for name in ("memory_ms", "matrix_ms"))

    def against(row: dict[str, Any]) -> str:
        one, other = best(row, False), best(row, True)
        return f"{one['latency_ms'] / other['latency_ms']:.2f}x" if one and other else "–"

    def of_floor(row: dict[str, Any]) -> str:
        floors, ours = row.get("floor") or {}, best(row, True)
        bound = max((value for value in floors.values() if value), default=None)
        return f"{100 * bound / ours['latency_ms']:.0f} %" if bound and ours else "–"

    def cell(variant: dict[str, Any]) -> str:
        return f"{_number(variant['latency_ms'])} ({_number(variant['p10_ms'])})" if variant["latency_ms"] else "–"

    before = {"floor: memory / matrix": floor}
    return _table(rows, before, cell, {"against the best peer": against, "floor / time": of_floor})


def _memory(rows: list[dict[str, Any]]) -> list[str]:
    return _table(rows, {}, lambda v: f"{v['peak_memory_mib']:,.0f}" if v["peak_memory_mib"] is not None else "–", {})


def _table(
    rows: list[dict[str, Any]],
    before: Mapping[str, Callable[[dict[str, Any]], str]],
    cell: Callable[[dict[str, Any]], str],
    after: Mapping[str, Callable[[dict[str, Any]], str]],
) -> list[str]:
    names = _names(rows)
    has_runs = len({row["run"] for row in rows}) > 1
    header = ["case", "dtype", *(["run"] if has_runs else []), *before, *names, *after]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in rows:
        found = {variant["name"]: variant for variant in row["variants"]}
        cells = [row["name"], row["dtype"], *([str(row["run"])] if has_runs else [])]
        cells += [show(row) for show in before.values()]
        cells += [cell(found[name]) if name in found else "–" for name in names]
        lines.append(f"| {' | '.join([*cells, *(show(row) for show in after.values())])} |")
    return lines


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """The variants of all rows, peers first."""
    names = list(dict.fromkeys(variant["name"] for row in rows for variant in row["variants"]))
    return sorted(names, key=is_ours)


def _notes(rows: list[dict[str, Any]]) -> list[str]:
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
                lines.append(f"{where}, {variant['name']}: its output differs from the first column's by {difference}")
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3 if value >= 0.1 else 4
    return f"{value:,.{digits}f}"


# Plots.


def _draw(document: dict[str, Any], folder: Path) -> list[str]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ImportError('matplotlib is not installed; pip install "swinaccel[bench]" brings it') from None
    files = []

    def save(figure: Any, name: str) -> None:
        figure.savefig(folder / name, dpi=130)
        files.append(name)

    tables: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in document["rows"]:
        if any(variant["latency_ms"] for variant in row["variants"]):
            tables.setdefault((row["section"], row["mode"]), []).append(row)
    for (section, mode), rows in sorted(tables.items(), key=lambda item: list(_TITLES).index(item[0][0])):
        label = section if section in ("models", "training") else f"{section}-{mode.replace(' + ', '-')}"
        save(
            _bars(Figure, rows, "speedup", f"{section}, {mode}: times as fast as the first peer"), f"{label}-speed.png"
        )
        if any(variant["peak_memory_mib"] for row in rows for variant in row["variants"]):
            save(_bars(Figure, rows, "peak_memory_mib", f"{section}, {mode}: peak memory, MiB"), f"{label}-memory.png")
    points = [row for key, rows in tables.items() for row in rows if row.get("floor") and row["bytes"] and row["flops"]]
    if points:
        save(_roofline(Figure, document, points), "roofline.png")
    return files


def _color(name: str, names: list[str]) -> str:
    greens, others = (
        ("#2a7f62", "#5cb78f", "#9ad6b8"),
        ("#9aa5b1", "#d08c3f", "#5b7db1", "#a05195", "#c94f4f", "#7a6a58"),
    )
    ours = [other for other in names if is_ours(other)]
    peers = [other for other in names if not is_ours(other)]
    return greens[ours.index(name) % 3] if is_ours(name) else others[peers.index(name) % 6]


def _bars(figure_class: Any, rows: list[dict[str, Any]], quantity: str, title: str) -> Any:
    names = _names(rows)
    height = 0.8 / len(names)
    figure = figure_class(figsize=(9, 1.5 + len(rows) * (0.25 + 0.14 * len(names))), layout="constrained")
    axes = figure.add_subplot()
    for position, name in enumerate(names):
        places, values = [], []
        for number, row in enumerate(rows):
            value = next((v[quantity] for v in row["variants"] if v["name"] == name), None)
            if value is not None:
                places.append(number + (position + 0.5) * height - 0.4)
                values.append(value)
        axes.barh(places, values, height=height, label=name, color=_color(name, names))
        for place, value in zip(places, values, strict=True):
            axes.text(value, place, f" {value:.2f}" if value < 100 else f" {value:,.0f}", va="center", fontsize=6)
    axes.set_yticks(range(len(rows)), [f"{row['name']}\n{row['dtype']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure


def _roofline(figure_class: Any, document: dict[str, Any], rows: list[dict[str, Any]]) -> Any:
    """Products a second over products a byte: how near each row's best comes to what the device can do."""
    figure = figure_class(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    intensities = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    for number, run in enumerate(document["runs"]):
        bandwidth = run["copy_gb_s"] / 1e3
        for dtype, rate in run["matrix_tflop_s"].items():
            if rate:
                knee = min(max(rate / bandwidth, low), high)
                xs = [low, knee, high]
                label = f"{dtype}, run {number}" if len(document["runs"]) > 1 else dtype
                axes.plot(xs, [min(rate, x * bandwidth) for x in xs], lw=1, label=f"ceiling, {label}")
    for ours, color, label in ((False, "#9aa5b1", "best peer"), (True, "#2a7f62", "best of swinaccel")):
        for marker, section in zip("os^D", _TITLES, strict=True):
            found = [(row, best(row, ours)) for row in rows if row["section"] == section]
            pairs = [(row["flops"] / row["bytes"], row["flops"] / v["latency_ms"] / 1e9) for row, v in found if v]
            if pairs:
                axes.scatter(*zip(*pairs, strict=True), s=22, marker=marker, color=color, label=f"{label}, {section}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP of products per byte that must be moved")
    axes.set_ylabel("TFLOP/s of these products")
    axes.legend(fontsize=7, frameon=False)
    return figure
