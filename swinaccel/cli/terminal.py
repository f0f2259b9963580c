"""Print text or one document, end with one sentence for an error, and set the exit code."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from .. import disabled
from .factory import blamed, told
from .models import library

show_traceback = False  # where an error comes from, in place of the sentence


class _Stdout(Console):
    def on_broken_pipe(self) -> None:  # rich's own would end the process
        raise BrokenPipeError(errno.EPIPE, "nobody reads it any more")


class Output:
    """The output of a command: text at once, or one document at the end."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.document: dict[str, Any] = {}
        self.code = 0

    def show(self, what: Any) -> None:
        """Print a text or a table, unless a document is wanted."""
        if not self.as_json:
            # In a pipe or a file nothing needs to fit; folding would only break the lines.
            width = None if sys.stdout.isatty() else 160
            with _printing(sys.stdout):
                _Stdout(width=width, highlight=False).print(what, soft_wrap=isinstance(what, str), markup=False)


@contextlib.contextmanager
def _printing(stdout: Any) -> Iterator[None]:
    """Print something inside; where that fails, end with the exit code that says so."""
    try:
        yield
        stdout.flush()
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise typer.Exit(141) from None  # as of any command whose reader has left: 128 + SIGPIPE
        typer.echo(f"error: the output cannot be written: {error.strerror}", err=True)
        raise typer.Exit(2) from None


@contextlib.contextmanager
def work(as_json: bool) -> Iterator[Output]:
    """Run a command's body: with a document, libraries print on stderr; an error is one line and exit code 2."""
    out = Output(as_json)
    stdout = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            yield out
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (Exception, SystemExit) as error:
        if show_traceback:
            raise
        typer.echo(f"error: {_sentence(error)}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        with _printing(stdout):
            print(json.dumps(finite(out.document), indent=2), file=stdout)
    raise typer.Exit(out.code)


def _sentence(error: BaseException) -> str:
    """Return an error's message: our own as it is, others' in one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    own = (ValueError, TypeError, ImportError, RuntimeError, OSError)
    is_own = isinstance(error, own) and len(str(error).strip().splitlines()) == 1
    text = str(error).strip() if is_own else told(error)
    return text if is_own and error.__cause__ is None else f"{text} (swinaccel --traceback shows where)"


@contextlib.contextmanager
def running(model: nn.Module, inputs: tuple[Any, ...]) -> Iterator[None]:
    """Run a model inside; where that fails and the untouched model fails as well, say so in the error."""
    try:
        yield
    except (Exception, SystemExit):
        shapes = ", ".join("x".join(map(str, one.shape)) for one in inputs if isinstance(one, torch.Tensor))
        what = f"the model does not run on its example inputs ({shapes or 'no tensor'})"
        advice = "; example_inputs(batch) beside a factory gives others"
        with blamed(what, advice), disabled(), torch.no_grad():
            model(*inputs)
        raise


def image_path(option: str, path: str | None) -> Path | None:
    """Return the place of an image that is to be drawn; ValueError, before the work, where none can be."""
    if path is None:
        return None
    kinds = library("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes()
    place = Path(path).expanduser()
    kind = place.suffix.lstrip(".").lower()
    if kind not in kinds and not place.is_dir():
        raise ValueError(f"{option} {path} names no kind of image; end it in .png, .svg or .pdf")
    was_there = place.exists()
    try:
        place.open("ab").close()
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {error.strerror}; give another path") from None
    if not was_there:
        place.unlink()
    return place


def finite(value: Any) -> Any:
    """Return a value for JSON, which has no infinity and no NaN: in any nesting they become strings."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> str:
    """Return three significant digits (of 0.01 or more), and no fewer than all before the point."""
    if value is None:
        return "–"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3 if value >= 0.1 else 4
    return f"{value:,.{digits}f}"


def status(text: str) -> contextlib.AbstractContextManager[Any]:
    """Show on stderr what happens inside."""
    return Console(stderr=True).status(text)


@contextlib.contextmanager
def progress() -> Iterator[Any]:
    """Show a bar on stderr; the function (text, done, total) moves it."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)
