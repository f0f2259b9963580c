"""The command `swinaccel`. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from .config import AccelConfig
    from .models import Loaded

_EPILOG = (
    "MODEL is timm:NAME, torchvision:NAME, hf:NAME (an architecture such as swinv2-tiny, a model type,"
    " owner/name of the hub, or a folder), or path/to/file.py:FACTORY, a function that returns a model, with an"
    " optional function example_inputs(batch) beside it."
)

app = typer.Typer(
    name="swinaccel",
    help="Swin-style vision models, faster by one line and never wrong.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Such as timm:swinv2_tiny_window16_256.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Pretrained = Annotated[
    bool,
    typer.Option("--pretrained/--no-pretrained", help="The library's weights (a download), or random ones."),
]
Size = Annotated[int | None, typer.Option(help="Side of the input images, in pixels. Default: the model's own.")]
Batch = Annotated[int, typer.Option(min=1, help="Images in a call.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16, float16 or float64. Default: bfloat16 on CUDA, float32 elsewhere."),
]
Device = Annotated[str | None, typer.Option(help="Such as cuda:1 or cpu. Default: cuda where there is one.")]
Backend = Annotated[str, typer.Option(help="auto, triton or torch.")]
Bias = Annotated[str, typer.Option(help="Form of the position bias: auto, table or factors.")]
BiasEnergy = Annotated[
    float | None,
    typer.Option(help="Energy that bias factors must hold, such as 0.995. Default: all but rounding."),
]

_show_traceback = False


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    global _show_traceback
    _show_traceback = traceback


@app.command(epilog=_EPILOG)
def inspect(model: Model, pretrained: Pretrained = False, size: Size = None, as_json: Json = False) -> None:
    """List the window attentions of a model: what would be accelerated, what not, and why."""
    with _work(as_json) as out:
        loaded = _load(model, pretrained, "float32", "cpu", size)
        from . import plan

        report = plan(loaded.model)
        parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
        out.document = {"model": model, "parameters": parameters, **report.to_dict()}
        out.show(f"{model}: {parameters / 1e6:.1f} M parameters")
        out.show(report if report.entries else report.summary())


@app.command(epilog=_EPILOG)
def verify(
    model: Model,
    batch: Batch = 2,
    dtype: Dtype = None,
    device: Device = None,
    backend: Backend = "auto",
    bias: Bias = "auto",
    bias_energy: BiasEnergy = None,
    pretrained: Pretrained = False,
    size: Size = None,
    as_json: Json = False,
) -> None:
    """Compare a model, accelerated and as it was, with an fp64 reference. Exits with 1 if it did not pass."""
    with _work(as_json) as out:
        options = _options(backend, bias, bias_energy)
        loaded = _load(model, pretrained, dtype, device, size)
        from . import verify as run_verify

        with _status("running it accelerated, as it was, and in fp64"):
            result = run_verify(loaded.model, *loaded.example_inputs(batch), **options)
        out.document = {"model": model, **_place(loaded), "batch": batch, **result.to_dict()}
        if result.report.entries:
            out.show(result.report)
        out.show(f"{model}, {_place(loaded)['dtype']}: {result}")
        out.code = 0 if result.passed else 1


_SUITE_OPTIONS = ("output", "only", "quick", "minutes", "seed_repos", "from_files")
_SHARED_OPTIONS = ("suite", "dtype", "device", "rounds", "compile", "as_json")


@app.command(epilog=_EPILOG)
def bench(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Such as timm:swinv2_tiny_window16_256; or --suite.")
    ] = None,
    batch: Batch = 8,
    dtype: Dtype = None,
    device: Device = None,
    backend: Backend = "auto",
    bias: Bias = "auto",
    bias_energy: BiasEnergy = None,
    pretrained: Pretrained = False,
    size: Size = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Samples of each variant. Default: 10 to 50, for about 20 s.")
    ] = None,
    train: Annotated[
        bool,
        typer.Option("--train", help="Measure training steps; parameters are fp32, and --dtype is that of autocast."),
    ] = False,
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="With the torch.compile variants. Default: on CUDA only."),
    ] = None,
    compile_mode: Annotated[
        str | None, typer.Option(help="Mode of torch.compile, such as reduce-overhead or max-autotune.")
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw the medians into an image.")] = None,
    suite: Annotated[
        bool, typer.Option("--suite", help="No MODEL: every table of the documentation, into a folder.")
    ] = False,
    output: Annotated[str, typer.Option(metavar="DIR", help="--suite: the folder.")] = "swinaccel-suite",
    only: Annotated[
        str | None,
        typer.Option(help="--suite: attention, sequence, models, training, by commas; models:TEXT for rows with TEXT."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="--suite: fewer rows and rounds.")] = False,
    minutes: Annotated[
        float | None, typer.Option(help="--suite: begin no row after so many; the rest is noted as not run.")
    ] = None,
    seed_repos: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="--suite: checkouts of the peers' repositories; adds their kernels."),
    ] = None,
    from_files: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="FILE", help="--suite: measure nothing, draw this suite.json; several merge."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure inference or training: original, its library's other attention, torch.compile, accelerated, and both."""
    with _work(as_json) as out:
        _check_bench(context, model, suite, from_files)
        if suite:
            wanted = only.split(",") if only else []
            _run_suite(
                out, output, from_files, dtype=dtype, device=device, rounds=rounds, compile=compile, only=wanted,
                quick=quick, minutes=minutes, seed_repos=seed_repos,
            )  # fmt: skip
            return
        assert model is not None
        options = _options(backend, bias, bias_energy)
        loaded = _load(model, pretrained, "float32" if train else dtype, device, size)
        from . import bench as benchmark

        autocast = _autocast(dtype, loaded) if train else None

        with _progress() as progress:
            result = benchmark.run(
                loaded.model,
                loaded.example_inputs(batch),
                rounds=rounds,
                train=train,
                autocast=autocast,
                compile=compile,
                compile_mode=compile_mode,
                progress=progress,
                **options,
            )
        out.document = {"model": model, **result.to_dict()}
        out.show(model)
        out.show(result)
        out.show(result.report.summary())
        for reason in dict.fromkeys(entry.reason for entry in result.report if entry.reason):
            out.show(f"original: {reason}")
        if plot is not None:
            result.plot(plot)
            out.show(f"drawn into {plot}")


@app.command(epilog=_EPILOG)
def precompute(
    model: Model,
    dtype: Annotated[str, typer.Option(help="The dtype that the model will run in.")] = "bfloat16",
    device: Device = None,
    bias: Annotated[str, typer.Option(help="The option that the factors are for: factors or auto.")] = "factors",
    bias_energy: BiasEnergy = None,
    pretrained: Pretrained = False,
    size: Size = None,
    as_json: Json = False,
) -> None:
    """Compute the SVD factors of a model's position biases and keep them in the cache."""
    with _work(as_json) as out:
        if bias == "table":
            raise ValueError("bias must be 'factors' or 'auto' here: the table needs no precomputation")
        loaded = _load(model, pretrained, dtype, device, size)
        from .config import AccelConfig, cache_dir

        config = AccelConfig(**_options("auto", bias, bias_energy))
        rows = list(_factorize(loaded, config))
        folder = cache_dir() / "factors"
        if any(row["tokens"] and row["attempted"] for row in rows) and not os.access(folder, os.W_OK):
            raise ValueError(f"the factors could not be kept: {folder} cannot be written (see SWINACCEL_CACHE_DIR)")
        out.document = {
            "model": model,
            **_place(loaded),
            "bias": bias,
            "bias_energy": bias_energy,
            "cache": str(folder),
            "modules": rows,
        }
        out.show(f"{model}, {_place(loaded)['dtype']}, bias={bias!r}")
        out.show(_factor_table(rows))
        found = sum(row["rank"] is not None for row in rows)
        out.show(f"{found} of {len(rows)} modules have factors; kept in {folder}")
        if found and not pretrained and model.split(":")[0] in ("timm", "torchvision", "hf"):
            out.show("These weights are random, and so are their factors; --pretrained takes the library's.")


@app.command(epilog=_EPILOG)
def tune(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Not with --list or --clear.")] = None,
    batch: Batch = 8,
    dtype: Dtype = None,
    device: Device = None,
    pretrained: Pretrained = False,
    size: Size = None,
    train: Annotated[
        bool,
        typer.Option("--train", help="Tune training, too; parameters are fp32, and --dtype is that of autocast."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the problems that MODEL poses and their launches; measure nothing.")
    ] = False,
    listing: Annotated[bool, typer.Option("--list", help="Show all that is tuned.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Forget all that is tuned.")] = False,
    as_json: Json = False,
) -> None:
    """Measure launches of the attention kernels on this GPU, and keep those that are faster than the default ones."""
    with _work(as_json) as out:
        from .backends import tuned

        if (model is None) != (listing or clear) or (listing and clear):
            raise ValueError("give one of MODEL, --list and --clear")
        out.document = {"cache": str(tuned.folder())}
        if clear:
            removed = tuned.clear()
            out.document["removed"] = removed
            out.show(f"{removed} files removed from {tuned.folder()}")
        elif listing:
            found = tuned.stored()
            out.document["tuned"] = [{**place, "launches": launches} for place, launches in found]
            for place, launches in found:
                out.show(", ".join(f"{name} {value}" for name, value in place.items()))
                out.show(_launch_table([{"key": key, **record} for key, record in launches.items()]))
            out.show(f"{sum(len(launches) for _, launches in found)} tuned launches in {tuned.folder()}")
        else:
            loaded = _load(str(model), pretrained, "float32" if train else dtype, device, size)
            arguments: dict[str, Any] = {"train": train, "autocast": _autocast(dtype, loaded) if train else None}
            out.document |= {"model": model, **_place(loaded), "batch": batch, "train": train}
            rows = (_posed if dry_run else _tune)(loaded, loaded.example_inputs(batch), arguments)
            out.document["problems"] = rows
            better = sum(row["tuned"] is not None for row in rows)
            out.show(f"{model}, batch {batch}")
            out.show(_launch_table([row | {"parameters": row["tuned"] or row["default"]} for row in rows]))
            for row in rows:
                if row.get("error"):
                    out.show(f"{row['key']} failed: {row['error']}")
            out.show(f"{better} of {len(rows)} launches are tuned, kept in {tuned.folder()}")


def _tune(loaded: Loaded, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each launch that was looked for."""
    from . import tuning

    with _progress() as progress:
        return [one.to_dict() for one in tuning.run(loaded.model, inputs, progress=progress, **arguments)]


def _posed(loaded: Loaded, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each launch that would be looked for, with what is known of it."""
    from . import tuning
    from .backends import tuned

    with _status("running it once"):
        jobs = tuning.collect(loaded.model, inputs, **arguments)
    rows = []
    for job in jobs:
        record = tuned.read(job.problem.device).get(job.key, {})
        times = {name: record.get(name) for name in ("default_ms", "tuned_ms")}
        default = tuned.parameters(job.default)
        rows.append({"key": job.key, "default": default, "tuned": record.get("parameters"), **times})
    return rows


def _launch_table(rows: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("launch", overflow="fold")
    table.add_column("parameters", overflow="fold")
    for column in ("default ms", "tuned ms", "tried"):
        table.add_column(column, justify="right")
    for row in rows:
        parameters = " ".join(f"{name}={value}" for name, value in row["parameters"].items() if value is not None)
        times = ("" if row[name] is None else f"{row[name]:.4f}" for name in ("default_ms", "tuned_ms"))
        table.add_row(row["key"], parameters, *times, str(row.get("tried", "")))
    return table


def _check_bench(context: typer.Context, model: str | None, suite: bool, from_files: list[str] | None) -> None:
    """No option is given that would do nothing."""
    if suite == (model is not None):
        raise ValueError("give MODEL or --suite, and not both")
    given = [
        parameter
        for parameter in context.command.params
        if parameter.name and getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    ]
    for parameter in given:
        name, option = str(parameter.name), parameter.opts[0]
        if suite and name not in (*_SUITE_OPTIONS, *_SHARED_OPTIONS):
            raise ValueError(f"{option} is not for --suite")
        if not suite and name in _SUITE_OPTIONS:
            raise ValueError(f"{option} is for --suite only")
        if from_files and name not in ("suite", "from_files", "output", "as_json"):
            raise ValueError(f"{option} is for measuring, and --from measures nothing")


def _run_suite(out: _Output, output: str, from_files: list[str] | None, device: str | None, **options: Any) -> None:
    from pathlib import Path

    from . import plots
    from . import suite as benchmarks

    folder = Path(output).expanduser()
    if from_files:
        out.document = benchmarks.load(from_files)
        plots.write(out.document, folder)
    else:
        import torch

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            with _progress() as progress:
                out.document = benchmarks.run(folder, device=device, progress=progress, **options)
        except KeyboardInterrupt:
            typer.echo(f"interrupted; what was measured is in {folder}", err=True)
            out.code = 130
            return
    rows = out.document["rows"]
    notes = sum(row["note"] is not None for row in rows)
    out.show(f"{len(rows) - notes} rows measured, {notes} not (see their notes); in {folder / 'suite.md'}")


class _Output:
    """What a command has to say: as text at once, or as one document at the end."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.document: dict[str, Any] = {}
        self.code = 0

    def show(self, what: Any) -> None:
        if not self.as_json:
            from rich.console import Console

            # In a pipe or a file nothing needs to fit; folding would only break the lines.
            width = None if sys.stdout.isatty() else 160
            Console(width=width, highlight=False).print(what, soft_wrap=isinstance(what, str), markup=False)


@contextlib.contextmanager
def _work(as_json: bool) -> Iterator[_Output]:
    """A command's body: libraries print on stderr, and a user's error is one line and exit code 2."""
    out = _Output(as_json)
    stdout = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            yield out
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
        if _show_traceback:
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        print(json.dumps(_finite(out.document), indent=2), file=stdout)
    raise typer.Exit(out.code)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN; they become the strings "inf" and "nan"."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _options(backend: str, bias: str, bias_energy: float | None) -> dict[str, Any]:
    """The options, checked before anything slow begins."""
    from .config import AccelConfig

    options: dict[str, Any] = {"backend": backend, "bias": bias, "bias_energy": bias_energy}
    AccelConfig(**options)
    return options


def _load(model: str, pretrained: bool, dtype: str | None, device: str | None, size: int | None) -> Loaded:
    import torch

    from . import models

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    with _status(f"loading {model}"):
        return models.load(model, pretrained, dtype, device, size)


def _autocast(dtype: str | None, loaded: Loaded) -> torch.dtype | None:
    """The dtype of autocast in training: what was asked for, bfloat16 on CUDA; None where that is float32."""
    import torch

    from .models import as_dtype

    wanted = as_dtype(dtype or ("bfloat16" if _parameter(loaded).is_cuda else "float32"))
    return wanted if wanted in (torch.bfloat16, torch.float16) else None


def _place(loaded: Loaded) -> dict[str, str]:
    """Where the model is, and in what."""
    parameter = _parameter(loaded)
    return {"device": str(parameter.device), "dtype": str(parameter.dtype).split(".")[-1]}


def _parameter(loaded: Loaded) -> torch.Tensor:
    for parameter in loaded.model.parameters():
        if parameter.is_floating_point():
            return parameter
    raise ValueError("the model has no floating-point parameters")


def _factorize(loaded: Loaded, config: AccelConfig) -> Iterator[dict[str, Any]]:
    """One row for each window attention: its factors are in the cache, or why there are none."""
    import copy

    import torch

    from . import bias, families, plan

    like = _parameter(loaded)
    reasons = {entry.name: entry.reason for entry in plan(loaded.model)}
    found = [(name, loaded.model.get_submodule(name)) for name in reasons]
    with _progress() as progress:
        for done, (name, module) in enumerate(found):
            progress(name, done, len(found))
            row: dict[str, Any] = {"name": name, "tokens": 0, "rank": None, "error": None}
            row |= {"attempted": False, "reason": reasons[name]}
            match = families.match(module)
            if match is not None and row["reason"] is None:
                twin = copy.deepcopy(module)
                example = families.examples(match[0], twin)[0]
                section = match[0].section(
                    twin, *(torch.zeros(a).to(like) if isinstance(a, torch.Size) else a for a in example)
                )
                if isinstance(section, str):
                    row["reason"] = section
                else:
                    row |= _factor_row(section, config, like.dtype, bias)
            yield row


def _factor_row(section: Any, config: AccelConfig, dtype: torch.dtype, bias: Any) -> dict[str, Any]:
    import torch

    tokens = section.geometry.tokens
    if tokens < bias.MIN_TOKENS:
        return {"tokens": tokens, "reason": f"a window of {tokens} tokens keeps its whole bias in registers"}
    if config.bias == "auto" and config.bias_energy is None and dtype == torch.float32:
        return {"tokens": tokens, "reason": "bias='auto' uses the exact table in float32"}
    factors = bias.factors(section, config, dtype)
    if factors is None:
        if config.bias_energy is not None:
            rule = f"holds {config.bias_energy:g} of its energy"
        else:
            rule = f"is exact to rounding in {str(dtype).split('.')[-1]}; --bias-energy 0.995 asks for less"
        return {"tokens": tokens, "attempted": True, "reason": f"no rank that pays {rule}"}
    return {"tokens": tokens, "attempted": True, "rank": factors.rank, "error": factors.error}


def _factor_table(rows: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("module", overflow="fold")
    for column in ("tokens", "rank", "largest error"):
        table.add_column(column, justify="right")
    table.add_column("reason", overflow="fold")
    for row in rows:
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        table.add_row(
            row["name"] or "(model)",
            str(row["tokens"] or ""),
            str(row["rank"] or ""),
            error,
            row["reason"] or "",
        )
    return table


@contextlib.contextmanager
def _status(text: str) -> Iterator[None]:
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A bar on stderr, and the function (text, done, total) that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
