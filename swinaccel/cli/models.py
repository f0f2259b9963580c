"""Load models by name, for the command line and the benchmark.

==========================  ================================================================================
timm:NAME                   a timm model, such as timm:swin_tiny_patch4_window7_224
torchvision:NAME            a torchvision model, such as torchvision:swin_v2_t
hf:NAME                     an architecture of HUGGINGFACE (hf:swinv2-tiny), a model type of transformers
                            with its default configuration (hf:swin), a hub name (hf:owner/name), or a
                            folder or config.json
path/to/file.py:FACTORY     what FACTORY() of that file returns; a function example_inputs(batch) beside it,
                            or on the model, gives the inputs of a call
==========================  ================================================================================

Without `pretrained` nothing is downloaded, but for the configuration of a hub name.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import factory

ACCEPTED = "timm:NAME, torchvision:NAME, hf:NAME, or path/to/file.py:FACTORY"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_DTYPES |= {"half": torch.float16}

# The published sizes of Swin and SwinV2 as (model type, configuration): no hub is needed for them.
_SIZES = {"tiny": (96, 6), "small": (96, 18), "base": (128, 18), "large": (192, 18)}  # width, depth of the third stage
_KINDS = {"swin": {"image_size": 224, "window_size": 7}, "swinv2": {"image_size": 256, "window_size": 8}}
HUGGINGFACE: dict[str, tuple[str, dict[str, Any]]] = {
    f"{kind}-{size}": (
        kind,
        {"embed_dim": width, "depths": (2, 2, depth, 2), "num_heads": tuple(width // 32 * 2**n for n in range(4))}
        | settings,
    )
    for kind, settings in _KINDS.items()
    for size, (width, depth) in _SIZES.items()
}


class Loaded(NamedTuple):
    """A model in eval mode, and the inputs of a call with `batch` images: `model(*example_inputs(batch))`."""

    model: nn.Module
    example_inputs: Callable[[int], tuple[Any, ...]]


def load(
    name: str,
    pretrained: bool = False,
    dtype: str | torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    size: int | None = None,
) -> Loaded:
    """Load a model by its name, in eval mode.

    Args:
        name: see the module's docstring.
        pretrained: load the library's weights, which downloads them where they are not cached. Otherwise the
            weights are random, and `randomize`d. A FACTORY's weights are its own either way.
        dtype: of its parameters and inputs; a name such as "bfloat16" will do.
        device: where it goes.
        size: of the square input images; None for the model's own.
    Raises:
        ValueError: for a name, dtype, device or size that is none; the message says what is accepted.
        ImportError: where the library is not installed; the message says what to install.
    """
    dtype, device = as_dtype(dtype), as_device(device)
    if size is not None and size < 1:
        raise ValueError(f"size must be a positive number of pixels; got {size}")
    kind, _, rest = name.partition(":")
    if rest and kind in _LOADERS:
        model, example_inputs = _LOADERS[kind](rest, pretrained, size)
        if not pretrained:
            randomize(model)
    elif ".py:" in name:
        model, example_inputs = _from_file(name, size)
    else:
        hint = ", a file without a function of it" if name.endswith(".py") else ""
        hint = ", a folder" if Path((rest and kind) or name).expanduser().is_dir() else hint
        raise ValueError(f"MODEL must be {ACCEPTED}; got {name!r}{hint}")
    with factory.blamed(f"{name} cannot be made a model in {str(dtype).split('.')[-1]} on {device}, in eval mode"):
        model.to(device=device, dtype=dtype)
        model.eval()  # detection backbones' gives nothing
    return Loaded(model, lambda batch: _moved(example_inputs(batch), dtype, device))


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the floating-point dtype of a name such as "bfloat16" or "bf16"."""
    if not isinstance(dtype, torch.dtype) and dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; got {dtype!r}")
    return dtype if isinstance(dtype, torch.dtype) else _DTYPES[dtype]


def as_device(device: str | torch.device) -> torch.device:
    """Return a device; ValueError where this machine has no such one."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be one such as cpu, cuda or cuda:1; got {str(device)!r}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device {str(device)!r} is not there: this machine shows {count} CUDA devices")
    return found


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to what a fresh model starts as a constant or almost so, in place.

    Fresh norms, biases and position tables are zeros and ones, or almost so (the norms of timm's SwinV2 are
    zeros, behind which the attention does not show at all): a comparison would pass for the wrong reason.

    Returns:
        The same object.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if name.endswith("relative_position_bias_table"):
                parameter.copy_(0.5 * noise)
            elif bool((parameter == parameter.flatten()[0]).all()):
                is_scale = parameter.dim() == 1 and name.endswith("weight")
                parameter.copy_((1 if is_scale else parameter) + 0.1 * noise)
    return model


def _timm(name: str, pretrained: bool, size: int | None) -> Loaded:
    timm = library("timm")
    known = name.split(".")[0]
    if not name.startswith(("hf_hub:", "hf-hub:")) and not timm.is_model(known):
        raise ValueError(
            f"timm has no model {name!r}; timm.list_models() names all{_similar(known, timm.list_models())}"
        )
    options = {} if size is None else {"img_size": size}
    model = _made(lambda: timm.create_model(name, pretrained=pretrained, **options), f"timm:{name}", pretrained)
    channels, *sides = model.pretrained_cfg.get("input_size", (3, 224, 224))
    return Loaded(model, _images(channels, *(sides if size is None else (size, size))))


def _torchvision(name: str, pretrained: bool, size: int | None) -> Loaded:
    zoo = library("torchvision").models
    if name not in zoo.list_models():
        raise ValueError(
            f"torchvision has no model {name!r}; torchvision.models.list_models() names all"
            f"{_similar(name, zoo.list_models())}"
        )
    weights = getattr(zoo.get_model_weights(name), "DEFAULT", None)
    options: dict[str, Any] = {"weights": weights if pretrained else None}
    if not pretrained and "weights_backbone" in inspect.signature(zoo.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # detectors load their backbone's otherwise
    make = partial(zoo.get_model, name, **options)
    model = _made(make, f"torchvision:{name}", pretrained)
    crop = getattr(weights.transforms(), "crop_size", None) if weights is not None else None
    side = size or (crop[0] if crop else 224)
    frames = (16,) if name in zoo.list_models(module=zoo.video) else ()
    return Loaded(model, _images(3, *frames, side, side))


def _huggingface(name: str, pretrained: bool, size: int | None) -> Loaded:
    transformers = library("transformers")
    path = Path(name).expanduser()
    is_local = path.exists()
    config = _huggingface_config(transformers, name, pretrained, {} if size is None else {"image_size": size})
    kind = next((k for k in getattr(config, "architectures", None) or () if hasattr(transformers, k)), "AutoModel")
    maker = getattr(transformers, kind)
    if pretrained:
        source = (path.parent if path.is_file() else path) if is_local else name
        make = partial(maker.from_pretrained, source, config=config)
    else:
        make = partial(maker.from_config if kind == "AutoModel" else maker, config)
    model = _made(make, f"hf:{name}", pretrained and not is_local)

    def example_inputs(batch: int) -> tuple[Any, ...]:
        if model.main_input_name != "pixel_values" or not hasattr(config, "image_size"):
            raise ValueError(
                f"hf:{name} is called with {model.main_input_name!r}, which cannot be made up here;"
                " write a factory and example_inputs(batch), and give them as path/to/file.py:FACTORY"
            )
        sides = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
        return _images(getattr(config, "num_channels", 3), *sides)(batch)

    return Loaded(model, example_inputs)


def _huggingface_config(transformers: Any, name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    path = Path(name).expanduser()
    if name in HUGGINGFACE or (name in transformers.CONFIG_MAPPING and not path.exists()):
        if pretrained:
            raise ValueError(
                f"hf:{name} is an architecture without weights; for weights give a hub name such as"
                " hf:microsoft/swin-tiny-patch4-window7-224, or a folder"
            )
        kind, settings = HUGGINGFACE.get(name, (name, {}))
        return transformers.AutoConfig.for_model(kind, **{**settings, **options})
    if not path.exists() and name.count("/") != 1:
        raise ValueError(
            f"hf:{name} is no architecture ({', '.join(HUGGINGFACE)}), no model type of transformers"
            f"{_similar(name, transformers.CONFIG_MAPPING)}, no hub name (owner/name) and no folder or config.json"
        )
    make = partial(transformers.AutoConfig.from_pretrained, path if path.exists() else name, **options)
    return _made(make, f"hf:{name}", downloads=not path.exists())


def _from_file(name: str, size: int | None) -> Loaded:
    model, given = factory.load(name)
    if given is None:
        return Loaded(model, _images(3, size or 224, size or 224))

    def example_inputs(batch: int) -> tuple[Any, ...]:
        with factory.blamed(f"example_inputs({batch}) of {name} fails"):
            inputs = given(batch) if callable(given) else given
        return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)

    return Loaded(model, example_inputs)


_LOADERS: dict[str, Callable[[str, bool, int | None], Loaded]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _huggingface,
}


def library(name: str) -> Any:
    """Import a module of a library that swinaccel does not require.

    Raises:
        ImportError: where the library is not installed; the message says what to install.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in (name, package):
            raise ImportError(f'{package} is not installed; pip install "swinaccel[bench]" brings it') from None
        text = f"{package} cannot be imported: {factory.told(error)}; install versions that fit each other"
        raise ImportError(text) from error


def _made(make: Callable[[], Any], name: str, downloads: bool) -> Any:
    """Return what `make` returns; its errors become one sentence."""
    advice = "; this needs a network, or the cache of an earlier download" if downloads else ""
    with (
        factory.blamed(f"{name} cannot be made", advice),
        _no_retries() if downloads and not name.startswith("torchvision:") else nullcontext(),
    ):
        return make()


@contextmanager
def _no_retries() -> Iterator[None]:
    """Tell the Hugging Face client where its hub cannot be reached, which it tries for most of a minute otherwise."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(url: str, timeout: float = 3.0) -> bool:
    """Return True if a server answers at all, within seconds."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout).close()
        except urllib.error.HTTPError:
            pass
        except Exception:
            return
        answered.set()

    # A thread, since looking a name up has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answered.is_set()


def _similar(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; close to it: {', '.join(close)}" if close else ""


def _images(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Return a function of the batch that gives one tensor of noise, the same at every call."""
    return lambda batch: (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)),)


def _moved(inputs: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return tuple(
        value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
        for value in inputs
    )
