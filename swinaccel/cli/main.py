"""The commands inspect, verify, bench, precompute and doctor."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Column, Table
from torch import nn

from .. import __version__, families, plan
from .. import verify as run_verify
from ..bias import cache
from ..bias import table as position_bias
from ..config import AccelConfig, cache_dir
from . import bench as benchmark
from . import doctor as diagnosis
from . import models, terminal, timing
from . import peers as engines

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
    bool, typer.Option("--pretrained/--no-pretrained", help="The library's weights (a download), or random ones.")
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
    float | None, typer.Option(help="Energy that bias factors must hold, such as 0.995. Default: all but rounding.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
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
        report = plan(loaded.model)
        parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
        out.document = {"model": model, "parameters": parameters, **report.to_dict()}
        out.show(f"{model}: {parameters / 1e6:.1f} M parameters")
        out.show(report if report.entries else report.summary())


@app.command(epilog=_EPILOG)
def verify(
    model: Model,
    batch: Batch = 2,
    size: Size = None,
    pretrained: Pretrained = False,
    dtype: Dtype = None,
    device: Device = None,
    backend: Backend = "auto",
    bias: Bias = "auto",
    bias_energy: BiasEnergy = None,
    precision: Annotated[
        str, typer.Option(help="fp8: show what products of 8 bits err by, beside the rest.")
    ] = "model",
    as_json: Json = False,
) -> None:
    """Compare a model, accelerated and as it was, with an fp64 reference. Exits with 1 if it did not pass."""
    with terminal.work(as_json) as out:
        options = _options(backend, bias, bias_energy, precision)
        loaded = _load(model, pretrained, dtype, device, size)
        inputs = loaded.example_inputs(batch)
        with terminal.status("running it accelerated, as it was, and in fp64"), terminal.running(loaded.model, inputs):
            result = run_verify(loaded.model, *inputs, **options)
        out.document = {"model": model, **_place(loaded), "batch": batch, **result.to_dict()}
        if result.report.entries:
            out.show(result.report)
        out.show(f"{model}, {_place(loaded)['dtype']}: {result}")
        out.code = 0 if result.passed else 1


@app.command(epilog=_EPILOG)
def bench(
    model: Model,
    batch: Batch = 8,
    train: Annotated[
        bool,
        typer.Option("--train", help="Measure training steps; parameters are fp32, and --dtype is that of autocast."),
    ] = False,
    size: Size = None,
    pretrained: Pretrained = False,
    dtype: Dtype = None,
    device: Device = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Samples of each variant. Default: 10 to 50, for about 20 s.")
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="With the torch.compile variants. Default: on CUDA only."),
    ] = None,
    compile_mode: Annotated[
        str | None, typer.Option(help="Mode of torch.compile, such as reduce-overhead or max-autotune.")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Other engines: openvino, onnxruntime, tensorrt, with commas, or all."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on the CPU. Default: PyTorch's own.")] = None,
    backend: Backend = "auto",
    bias: Bias = "auto",
    bias_energy: BiasEnergy = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw the medians into an image.")] = None,
    as_json: Json = False,
) -> None:
    """Measure inference or training: original, its library's other attention, torch.compile, accelerated, and both."""
    with terminal.work(as_json) as out, timing.threads(threads):
        options = _options(backend, bias, bias_energy)
        names = () if peers is None else peers
        engines.chosen(names)
        picture = terminal.image_path("--plot", plot)
        loaded = _load(model, pretrained, "float32" if train else dtype, device, size)
        options |= {"train": train, "autocast": _autocast(dtype, loaded) if train else None}
        options |= {"rounds": rounds, "compile": compile, "compile_mode": compile_mode, "peers": names}
        inputs = loaded.example_inputs(batch)
        with terminal.progress() as progress, terminal.running(loaded.model, inputs):
            result = benchmark.run(loaded.model, inputs, progress=progress, **options)
        out.document = {"model": model, **result.to_dict()}
        out.show(model)
        out.show(result)
        out.show(result.report.summary())
        for reason in dict.fromkeys(entry.reason for entry in result.report if entry.reason):
            out.show(f"original: {reason}")
        if picture is not None:
            result.plot(picture)
            out.show(f"drawn into {picture}")


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
        config = AccelConfig(**_options("auto", bias, bias_energy))
        folder = cache_dir() / position_bias.FOLDER
        cache.check(folder)
        rows = list(_factorize(loaded.model, config, _parameter(loaded)))
        out.document = {"model": model, **_place(loaded), "bias": bias, "bias_energy": bias_energy}
        out.document |= {"cache": str(folder), "modules": rows}
        out.show(f"{model}, {_place(loaded)['dtype']}, bias={bias!r}")
        columns = (Column(name, overflow="fold") for name in ("module", "tokens", "rank", "largest error", "reason"))
        table = Table(*columns, box=box.SIMPLE)
        for row in rows:
            error = "" if row["error"] is None else f"{row['error']:.1e}"
            cells = row["name"] or "(model)", row["tokens"], row["rank"], error, row["reason"]
            table.add_row(*(str(cell or "") for cell in cells))
        out.show(table)
        found = sum(row["rank"] is not None for row in rows)
        out.show(f"{found} of {len(rows)} modules have factors; kept in {folder}")
        if found and not pretrained and model.split(":")[0] in ("timm", "torchvision", "hf"):
            out.show("These weights are random, and so are their factors; --pretrained takes the library's.")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what would run on this machine and why, and what is missing. Exits with 1 where something is in the way."""
    with terminal.work(as_json) as out:
        with terminal.status("running one attention"):
            found = diagnosis.examine()
        out.document = found.to_dict()
        out.show(str(found))
        out.code = 1 if found.problems else 0


def _options(backend: str, bias: str, bias_energy: float | None, precision: str = "model") -> dict[str, Any]:
    """Return the options of `accelerate`, checked before anything slow begins."""
    options: dict[str, Any] = {"backend": backend, "bias": bias, "bias_energy": bias_energy, "precision": precision}
    AccelConfig(**options)
    return options


def _load(model: str, pretrained: bool, dtype: str | None, device: str | None, size: int | None) -> models.Loaded:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    with terminal.status(f"loading {model}"):
        return models.load(model, pretrained, dtype, device, size)


def _autocast(dtype: str | None, loaded: models.Loaded) -> torch.dtype | None:
    """Return the dtype of autocast in training: the one asked for, else bfloat16 on CUDA; None for float32."""
    wanted = models.as_dtype(dtype or ("bfloat16" if _parameter(loaded).is_cuda else "float32"))
    return wanted if wanted in (torch.bfloat16, torch.float16) else None


def _place(loaded: models.Loaded) -> dict[str, str]:
    """Return the device and the dtype of a model, for a document."""
    parameter = _parameter(loaded)
    return {"device": str(parameter.device), "dtype": timing.dtype_name(parameter.dtype)}


def _parameter(loaded: models.Loaded) -> torch.Tensor:
    for parameter in loaded.model.parameters():
        if parameter.is_floating_point():
            return parameter
    raise ValueError("the model has no floating-point parameters")


def _factorize(model: nn.Module, config: AccelConfig, like: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Yield a row for each window attention: its factors, which are in the cache then, or why there are none."""
    entries = plan(model).entries
    with terminal.progress() as progress:
        for done, entry in enumerate(entries):
            progress(entry.name, done, len(entries))
            row = {"name": entry.name, "tokens": 0, "rank": None, "error": None, "reason": entry.reason}
            yield row if entry.reason else row | _factor_row(model.get_submodule(entry.name), config, like)


def _factor_row(module: nn.Module, config: AccelConfig, like: torch.Tensor) -> dict[str, Any]:
    """Compute the factors of one module, and return their part of its row."""
    copied = copy.deepcopy(module)
    family = families.match(module)[0]  # type: ignore[index]
    example = families.examples(family, copied)[0]
    section = family.section(copied, *(torch.zeros(a).to(like) if isinstance(a, torch.Size) else a for a in example))
    if isinstance(section, str):
        return {"reason": section}
    tokens = section.geometry.tokens
    if section.table is None:
        return {"tokens": tokens, "reason": "it has no position bias"}
    if tokens < position_bias.MIN_TOKENS:
        return {"tokens": tokens, "reason": f"a window of {tokens} tokens keeps its whole bias in registers"}
    if not position_bias.wanted(config):
        return {"tokens": tokens, "reason": "bias='auto' uses the exact table unless --bias-energy is given"}
    factors = position_bias.factors(section, config, like.dtype)
    if factors is not None:
        return {"tokens": tokens, "rank": factors.rank, "error": factors.error}
    rule = f"is exact to rounding in {timing.dtype_name(like.dtype)}; --bias-energy 0.995 asks for less"
    if config.bias_energy is not None:
        rule = f"holds {config.bias_energy:g} of its energy"
    return {"tokens": tokens, "reason": f"no rank that pays {rule}"}


def main() -> None:
    """Run the command line; characters that the terminal's encoding lacks are shown by their codes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app()
