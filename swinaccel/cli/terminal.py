"""What the command line says, and how it ends: text or one document, one sentence for an error, the exit code."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from torch import nn

show_traceback = False  # where an error comes from, in place of the sentence


class Output:
    """What a command has to say: as text at once, or as one document at the end."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.document: dict[str, Any] = {}
        self.code = 0

    def show(self, what: Any) -> None:
        if not self.as_json:
            from rich.console import Console

            class Plain(Console):
                def on_broken_pipe(self) -> None:  # rich's own would end the process
                    raise BrokenPipeError(errno.EPIPE, "nobody reads it any more")

            # In a pipe or a file nothing needs to fit; folding would only break the lines.
            width = None if sys.stdout.isatty() else 160
            with _printing(sys.stdout):
                Plain(width=width, highlight=False).print(what, soft_wrap=isinstance(what, str), markup=False)


@contextlib.contextmanager
def _printing(stdout: Any) -> Iterator[None]:
    """Inside, something is printed; where that fails, nothing more is, and the exit code says so."""
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
    """A command's body: libraries print on stderr, and an error is one line and exit code 2."""
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
        from .plots import finite

        with _printing(stdout):
            print(json.dumps(finite(out.document), indent=2), file=stdout)
    raise typer.Exit(out.code)


def _sentence(error: BaseException) -> str:
    """Return what an error is about: our own words as they are, and others' in one line."""
    from .factory import told

    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    own = (ValueError, TypeError, ImportError, RuntimeError, OSError)
    is_own = isinstance(error, own) and len(str(error).strip().splitlines()) == 1
    text = str(error).strip() if is_own else told(error)
    return text if is_own and error.__cause__ is None else f"{text} (swinaccel --traceback shows where)"


@contextlib.contextmanager
def running(model: nn.Module, inputs: tuple[Any, ...]) -> Iterator[None]:
    """Inside, a model is run; where that fails, and the untouched model fails as well, the error says so."""
    try:
        yield
    except (Exception, SystemExit):
        import torch

        from . import disabled
        from .factory import blamed

        shapes = ", ".join("x".join(map(str, one.shape)) for one in inputs if isinstance(one, torch.Tensor))
        what = f"the model does not run on its example inputs ({shapes or 'no tensor'})"
        advice = "; example_inputs(batch) beside a factory gives others"
        with blamed(what, advice), disabled(), torch.no_grad():
            model(*inputs)
        raise


def check_writable(option: str, path: str | None) -> None:
    """Raise where nothing can be written to a path, before there is something to write."""
    if path is None:
        return
    from pathlib import Path

    place = Path(path).expanduser()
    if option == "--plot":
        from .models import library

        library("matplotlib")
        reason = "it is a folder" if place.is_dir() else None
        first = place if place.exists() else place.parent
    else:
        reason = "it is no folder" if place.exists() and not place.is_dir() else None
        first = next((one for one in (place, *place.parents) if one.exists()), place)
    if reason is None and not first.exists():
        reason = f"there is no folder {first}"
    if reason is None and not os.access(first, os.W_OK):
        reason = f"{first} is closed to this user"
    if reason is not None:
        raise ValueError(f"{option} {path} cannot be written: {reason}; give another path")


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextlib.contextmanager
def progress() -> Iterator[Any]:
    """A bar on stderr, and the function (text, done, total) that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)
