"""Reports: which modules with window attention are accelerated, which are not, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

from .spec.window import Axes


@dataclass(frozen=True)
class Entry:
    """One module.

    Attributes:
        name: its path in the model, "" for the model itself.
        family: that recognised it; "unknown" where none did, although it looks like window attention.
        status: "accelerated" or "original".
        reason: why it, or its last call that did so, runs the original, or what is around it does; None otherwise.
        window, shift: (rows, columns) or (depth, rows, columns), now.
        num_heads, head_dim: of its attention.
        bias: the form in use, such as "table" or "factors, rank 16, error 1.2e-03"; None before the first call.
        calls, fallbacks: calls so far, and how many of them ran the original. Compiled calls are not counted.
        precision: of its block's products in the latest call, where `precision="fp8"` was asked for: "fp8, error
            2.5e-02" (relative, of the block's output, against the block without), or "model"; None otherwise.
    """

    name: str
    family: str
    status: str
    reason: str | None
    window: Axes
    shift: Axes
    num_heads: int
    head_dim: int
    bias: str | None = None
    calls: int = 0
    fallbacks: int = 0
    precision: str | None = None


@dataclass(frozen=True)
class Graph:
    """One module whose calls are replayed as CUDA graphs.

    Attributes:
        name: its path in the model, "" for the model itself.
        captured: signatures of calls (shapes, dtypes, modes) that are graphs now.
        replays: calls that were replays.
        nbytes: device memory that the graphs take, in bytes.
        reason: why the latest signature that is no graph is none, or None.
    """

    name: str
    captured: int
    replays: int
    nbytes: int
    reason: str | None

    def __str__(self) -> str:
        """Return one line."""
        size, why = f"{self.nbytes / 2**20:.0f} MiB", "" if self.reason is None else f"; not all, for {self.reason}"
        return f"{self.name or '(model)'}: {self.captured} graphs of {size}, {self.replays} replays{why}"


def as_text(shown: Any, width: int) -> str:
    """Return what rich shows of something, in so many columns."""
    from rich.console import Console

    text = StringIO()
    Console(file=text, width=width, highlight=False).print(shown.__rich__())
    return text.getvalue().rstrip()


class Report:
    """Entries in the order of the model, unknown families last; iterates, counts and prints as a table.

    Attributes:
        graphs: one `Graph` for each module whose calls are replayed.
    """

    def __init__(self, entries: list[Entry], graphs: Iterable[Graph] = ()) -> None:
        self.entries, self.graphs = tuple(entries), tuple(graphs)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def accelerated(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == "accelerated"]

    @property
    def original(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == "original"]

    @property
    def is_effective(self) -> bool:
        """Return False if nothing is accelerated, or every call so far ran an original all the same."""
        return any(not entry.calls or entry.calls > entry.fallbacks for entry in self.accelerated)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: {"accelerated": count, "original": count, "entries": [...], "graphs": [...]}."""
        return {
            "accelerated": len(self.accelerated),
            "original": len(self.original),
            "entries": [asdict(entry) for entry in self.entries],
            "graphs": [asdict(graph) for graph in self.graphs],
        }

    def summary(self) -> str:
        """Return one line about all entries."""
        if not self.entries:
            return "swinaccel: no window attention found"
        text = f"{len(self.accelerated)} of {len(self.entries)} window attentions accelerated"
        if self.accelerated and not self.is_effective:
            text = f"every call of {len(self.accelerated)} window attentions ran the original"
        return f"swinaccel: {text}"

    def __repr__(self) -> str:
        return f"<{self.summary()}>"

    def __str__(self) -> str:
        return as_text(self, 140) if self.entries else self.summary()

    def __rich__(self) -> Any:
        """Return the table, for rich."""
        from rich import box
        from rich.table import Table

        table = Table(title=self.summary(), box=box.SIMPLE, title_justify="left", caption_justify="left")
        notes = [str(graph) for graph in self.graphs if graph.captured or graph.reason]
        if any(entry.status == "original" or entry.fallbacks for entry in self.entries):
            notes.append("Originals are the model's own code: results are right, and as fast as they were.")
        has_precision = any(entry.precision for entry in self.entries)
        if has_precision:
            notes.append("Calls that were compiled multiply in the model's own precision.")
        table.caption = "\n".join(notes) or None
        columns = ["module", "family", "status", "window", "shift", "heads", "bias", "calls", "reason"]
        if has_precision:
            columns.insert(-2, "precision")
        for column in columns:
            table.add_column(column, overflow="fold", no_wrap=column != "reason")
        for entry in self.entries:
            calls = f"{entry.calls}" + (f" ({entry.fallbacks} original)" if entry.fallbacks else "")
            table.add_row(
                entry.name or "(model)",
                entry.family,
                entry.status,
                "x".join(map(str, entry.window)),
                "x".join(map(str, entry.shift)),
                f"{entry.num_heads}x{entry.head_dim}",
                entry.bias or "",
                *([entry.precision or ""] if has_precision else []),
                calls,
                entry.reason or "",
            )
        return table
