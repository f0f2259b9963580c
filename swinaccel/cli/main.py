"""The command `swinaccel`. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import terminal

if TYPE_CHECKING:
    import torch
    from torch import nn

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
    terminal.show_traceback = traceback


@app.command(epilog=_EPILOG)
def inspect(model: Model, pretrained: Pretrained = False, size: Size = None, as_json: Json = False) -> None:
    """List the window attentions of a model: what would be accelerated, what not, and why."""
    with terminal.work(as_json) as out:
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
    with terminal.work(as_json) as out:
        options = _options(backend, bias, bias_energy)
        loaded = _load(model, pretrained, dtype, device, size)
        from . import verify as run_verify

        inputs = loaded.example_inputs(batch)
        with terminal.status("running it accelerated, as it was, and in fp64"), terminal.running(loaded.model, inputs):
            result = run_verify(loaded.model, *inputs, **options)
        out.document = {"model": model, **_place(loaded), "batch": batch, **result.to_dict()}
        if result.report.entries:
            out.show(result.report)
        out.show(f"{model}, {_place(loaded)['dtype']}: {result}")
        out.code = 0 if result.passed else 1


_SUITE_OPTIONS = {"output", "only", "quick", "minutes", "seed_repos", "from_files"}
_SHARED_OPTIONS = {"suite", "dtype", "device", "rounds", "compile", "compile_mode", "as_json"}
_DRAWING_OPTIONS = {"suite", "from_files", "output", "as_json"}


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
        bool,
        typer.Option("--suite", help="No MODEL: tables of attention, block windows, models, training, into a folder."),
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
    with terminal.work(as_json) as out:
        _check_bench(context, model, suite, from_files)
        if suite:
            wanted = only.split(",") if only else []
            options: dict[str, Any] = {"dtype": dtype, "device": device or _default_device(), "rounds": rounds}
            options |= {
                "compile": compile,
                "compile_mode": compile_mode,
                "only": wanted,
                "quick": quick,
                "minutes": minutes,
                "seed_repos": seed_repos,
            }
            _run_suite(out, output, from_files, options)
            return
        assert model is not None
        options = _options(backend, bias, bias_energy)
        terminal.check_writable("--plot", plot)
        loaded = _load(model, pretrained, "float32" if train else dtype, device, size)
        from . import bench as benchmark

        options |= {"train": train, "autocast": _autocast(dtype, loaded) if train else None}
        options |= {"rounds": rounds, "compile": compile, "compile_mode": compile_mode}
        inputs = loaded.example_inputs(batch)
        with terminal.progress() as progress, terminal.running(loaded.model, inputs):
            result = benchmark.run(loaded.model, inputs, progress=progress, **options)
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
    with terminal.work(as_json) as out:
        if bias == "table":
            raise ValueError("bias must be 'factors' or 'auto' here: the table needs no precomputation")
        loaded = _load(model, pretrained, dtype, device, size)
        from . import bias as factors
        from . import cache
        from .config import AccelConfig, cache_dir

        config = AccelConfig(**_options("auto", bias, bias_energy))
        folder = cache_dir() / factors.FOLDER
        cache.check(folder)
        rows = list(_factorize(loaded.model, config, _parameter(loaded)))
        out.document = {"model": model, **_place(loaded), "bias": bias, "bias_energy": bias_energy}
        out.document |= {"cache": str(folder), "modules": rows}
        out.show(f"{model}, {_place(loaded)['dtype']}, bias={bias!r}")
        out.show(terminal.table(("module", "tokens", "rank", "largest error", "reason"), map(_factor_cells, rows)))
        found = sum(row["rank"] is not None for row in rows)
        out.show(f"{found} of {len(rows)} modules have factors; kept in {folder}")
        if found and not pretrained and model.split(":")[0] in ("timm", "torchvision", "hf"):
            out.show("These weights are random, and so are their factors; --pretrained takes the library's.")


def _check_bench(context: typer.Context, model: str | None, suite: bool, from_files: list[str] | None) -> None:
    """No option is given that would do nothing."""
    if suite == (model is not None):
        raise ValueError("give MODEL or --suite, and not both")
    for parameter in context.command.params:
        name, option = str(parameter.name), parameter.opts[0]
        if getattr(context.get_parameter_source(name), "name", "") != "COMMANDLINE":
            continue
        if suite and name not in _SUITE_OPTIONS | _SHARED_OPTIONS:
            raise ValueError(f"{option} is not for --suite")
        if not suite and name in _SUITE_OPTIONS:
            raise ValueError(f"{option} is for --suite only")
        if from_files and name not in _DRAWING_OPTIONS:
            raise ValueError(f"{option} is for measuring, and --from measures nothing")


def _run_suite(out: terminal.Output, output: str, from_files: list[str] | None, options: dict[str, Any]) -> None:
    from pathlib import Path

    from . import plots
    from . import suite as benchmarks

    folder = Path(output).expanduser()
    terminal.check_writable("--output", output)
    if from_files:
        out.document = plots.load(from_files)
        plots.write(out.document, folder)
    else:
        try:
            with terminal.progress() as progress:
                out.document = benchmarks.run(folder, progress=progress, **options)
        except KeyboardInterrupt:
            typer.echo(f"interrupted; what was measured is in {folder}", err=True)
            out.code = 130
            return
    rows = out.document["rows"]
    notes = sum(row["note"] is not None for row in rows)
    out.show(f"{len(rows) - notes} rows measured, {notes} not (see their notes); in {folder / 'suite.md'}")


def _options(backend: str, bias: str, bias_energy: float | None) -> dict[str, Any]:
    """The options, checked before anything slow begins."""
    from .config import AccelConfig

    options: dict[str, Any] = {"backend": backend, "bias": bias, "bias_energy": bias_energy}
    AccelConfig(**options)
    return options


def _load(model: str, pretrained: bool, dtype: str | None, device: str | None, size: int | None) -> Loaded:
    from . import models

    device = device or _default_device()
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    with terminal.status(f"loading {model}"):
        return models.load(model, pretrained, dtype, device, size)


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


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


def _factorize(model: nn.Module, config: AccelConfig, like: torch.Tensor) -> Iterator[dict[str, Any]]:
    """One row for each window attention: its factors are in the cache, or why there are none."""
    from . import plan

    entries = plan(model).entries
    with terminal.progress() as progress:
        for done, entry in enumerate(entries):
            progress(entry.name, done, len(entries))
            row = {"name": entry.name, "tokens": 0, "rank": None, "error": None}
            row["reason"] = entry.reason
            yield row if entry.reason else row | _factor_row(model.get_submodule(entry.name), config, like)


def _factor_row(module: nn.Module, config: AccelConfig, like: torch.Tensor) -> dict[str, Any]:
    import copy

    import torch

    from . import bias, families

    twin = copy.deepcopy(module)
    family = families.match(module)[0]  # type: ignore[index]
    example = families.examples(family, twin)[0]
    section = family.section(twin, *(torch.zeros(a).to(like) if isinstance(a, torch.Size) else a for a in example))
    if isinstance(section, str):
        return {"reason": section}
    tokens = section.geometry.tokens
    if tokens < bias.MIN_TOKENS:
        return {"tokens": tokens, "reason": f"a window of {tokens} tokens keeps its whole bias in registers"}
    if not bias.wanted(config):
        return {"tokens": tokens, "reason": "bias='auto' uses the exact table unless --bias-energy is given"}
    factors = bias.factors(section, config, like.dtype)
    if factors is not None:
        return {"tokens": tokens, "rank": factors.rank, "error": factors.error}
    rule = f"is exact to rounding in {str(like.dtype).split('.')[-1]}; --bias-energy 0.995 asks for less"
    if config.bias_energy is not None:
        rule = f"holds {config.bias_energy:g} of its energy"
    return {"tokens": tokens, "reason": f"no rank that pays {rule}"}


def _factor_cells(row: dict[str, Any]) -> list[str]:
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    return [row["name"] or "(model)", str(row["tokens"] or ""), str(row["rank"] or ""), error, row["reason"] or ""]


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # of a terminal that knows ASCII only
    app()


if __name__ == "__main__":
    main()
