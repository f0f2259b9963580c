"""What the tests share: random parameters, comparisons, and tiny models of every library."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import microsoft_models
import pytest
import torch
from torch import Tensor, nn

import swinaccel
from swinaccel.spec import reference
from swinaccel.spec.window import Geometry

# Where backend="triton" runs: on the GPU, or in Triton's interpreter, which takes CPU tensors.
TRITON_DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DEVICES = {"torch": "cpu", "triton": TRITON_DEVICE}
BACKENDS = ("torch", "triton")
both_backends = pytest.mark.parametrize("backend", BACKENDS)
versions = pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])

FP32 = 2e-5  # relative to the largest output; sums of a few hundred products in another order


def skip_interpreted_bfloat16(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and TRITON_DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cannot multiply bfloat16, and a whole model may fall back for it")


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew and set eval mode; logits come out of order 1 to 5.

    Fresh models compare equal for the wrong reason: position tables start at almost zero, and SwinV2 (CR) starts
    with norms of exactly zero weight, behind which the attention does not show at all.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("logit_scale"):
                value = 1.5 + 0.5 * noise
            elif name.endswith("relative_position_bias_table"):
                value = noise
            elif parameter.dim() > 1:
                value = noise * (1.5 / parameter[0].numel() ** 0.5)
            elif name.endswith("weight"):
                value = 1 + 0.3 * noise
            else:
                value = 0.5 * noise
            parameter.copy_(value)
    model.eval()  # of some projects' modules, this returns nothing
    return model


def tensors(output: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for value in values for tensor in tensors(value)]


def difference(found: Any, expected: Any) -> float:
    """Largest difference relative to the largest expected value; infinite where structure or finiteness differ."""
    left, right = tensors(found), tensors(expected)
    if type(found) is not type(expected) or len(left) != len(right) or not right:
        return float("inf")
    worst = 0.0
    for one, other in zip(left, right, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return float("inf")
        if other.numel():
            error = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-30)
            worst = max(worst, error.item() if error == error else float("inf"))
    return worst


def assert_close(found: Any, expected: Any, tolerance: float = FP32) -> None:
    error = difference(found, expected)
    assert error <= tolerance, f"differs by {error:.2e} of its size, allowed {tolerance:.0e}"


def assert_no_worse(found: Tensor, expected: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Against fp64, at most twice the original's largest error and 1.1 times its mean one.

    An original that is exact by luck, as with few roundings, is granted one rounding of the largest output.
    """
    size = exact.abs().max()
    own, ours = ((one.to(exact.device).double() - exact).abs() / size for one in (expected, found))
    rounding = torch.finfo(dtype).eps / 2
    assert ours.max() <= 2 * max(own.max().item(), rounding), f"max {ours.max():.1e}, original {own.max():.1e}"
    assert ours.mean() <= 1.1 * max(own.mean().item(), rounding / 4), (
        f"mean {ours.mean():.1e}, original {own.mean():.1e}"
    )


def assert_accelerated(model: nn.Module, count: int | None = None) -> None:
    """Every recognised module was called and ran no original."""
    report = swinaccel.report(model)
    assert report.accelerated, str(report)
    assert not report.original, str(report)
    assert all(entry.calls > 0 and entry.fallbacks == 0 for entry in report), str(report)
    if count is not None:
        assert len(report) == count, str(report)


def both(
    model: nn.Module,
    *inputs: Any,
    backend: str = "torch",
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, Any, Any]:
    """An accelerated copy of a model, and what the copy and the model give without gradients."""
    device = DEVICES[backend]
    model = copy.deepcopy(model).to(device)
    inputs = tuple(value.to(device) if isinstance(value, Tensor) else value for value in inputs)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend=backend, **options)
    with torch.no_grad():
        expected = model(*inputs, **(arguments or {}))
        found = twin(*inputs, **(arguments or {}))
    return twin, found, expected


def check(
    model: nn.Module,
    *inputs: Any,
    backend: str = "torch",
    tolerance: float = FP32,
    count: int | None = None,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Model and accelerated copy give the same, and the copy ran no original; returns what it gave."""
    twin, found, expected = both(model, *inputs, backend=backend, arguments=arguments, **options)
    assert_accelerated(twin, count)
    assert_close(found, expected, tolerance)
    return found


def check_gradients(model: nn.Module, *inputs: Any, backend: str = "torch", count: int | None = None) -> None:
    """Output and gradients of an accelerated copy err no more than the model's own; what gets none there gets none."""
    found, model = [], copy.deepcopy(model).to(DEVICES[backend])
    twin = swinaccel.accelerate(copy.deepcopy(model), backend=backend)
    for one in (copy.deepcopy(model).double(), model, twin):
        dtype = next(one.parameters()).dtype
        given = [v.detach().to(DEVICES[backend], dtype, copy=True) if isinstance(v, Tensor) else v for v in inputs]
        given[0].requires_grad_()
        out = tensors(one(*given))[0]
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=dtype, device=out.device).view_as(out))
        found.append([out.detach(), given[0].grad, *(parameter.grad for parameter in one.parameters())])
    assert_accelerated(twin, count)
    names = ["output", "input", *(name for name, _ in model.named_parameters())]
    largest = max(one.abs().max() for one in found[0][1:] if one is not None)
    for name, exact, own, ours in zip(names, *found, strict=True):
        assert (exact is None) == (ours is None), name
        if exact is not None:
            errors = [(one - exact).abs().max() for one in (own, ours)]
            # Some gradients are rounding and nothing else, such as that of k's bias.
            assert errors[1] <= max(2 * errors[0], 2e-6 * exact.abs().max(), 5e-7 * largest), (name, errors)


def check_fallback(
    model: nn.Module,
    *inputs: Any,
    reason: str,
    backend: str = "torch",
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """The copy ran its original, with the original's very output, and says why; returns the output."""
    twin, found, expected = both(model, *inputs, backend=backend, arguments=arguments, **options)
    entries = swinaccel.report(twin)
    assert any(reason in (entry.reason or "") for entry in entries), str(entries)
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return found


def doubled(part: nn.Module) -> Any:
    """A part's forward, twice, as no plain function: as those who hook forwards put it on an instance."""
    plain = part.forward
    return functools.partial(lambda plain, x: 2 * plain(x), plain)


def reasons(model: nn.Module) -> list[str | None]:
    return [entry.reason for entry in swinaccel.report(model)]


@contextlib.contextmanager
def poisoned_empty(monkeypatch: Any) -> Any:
    """Uninitialised memory reads as NaN (integers: as a large number), so that what a kernel leaves out is seen."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            if made.numel() and made.device.type != "meta":
                made.fill_(float("nan") if made.is_floating_point() else 77)
            return made

        return poisoned

    with monkeypatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, poison(getattr(owner, name)))
        yield


# Kernel problems.


def position_index(window: tuple[int, ...]) -> Tensor:
    return microsoft_models.position_index(window)


def table_rows(window: tuple[int, ...]) -> int:
    return math.prod(2 * side - 1 for side in window)


def oracle(qkv: Any, geometry: Geometry, **options: Any) -> Tensor:
    """`reference.shifted_window_attention` in fp64 on the CPU."""
    q, k, v = qkv.chunk(3, dim=-1) if isinstance(qkv, Tensor) else qkv
    options = {
        name: value.detach().cpu().double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    if options.get("index") is not None:
        options["index"] = options["index"].cpu()
    return reference.shifted_window_attention(*(part.cpu().double() for part in (q, k, v)), geometry, **options)


# Tiny models. Each gives a model and an input for it; none needs the network.


_TIMM = {"depths": (2, 1), "num_heads": (2, 4), "embed_dim": 32, "num_classes": 5, "drop_path_rate": 0.0}


def timm_v1(img_size: Any = 56, window: Any = 7, **options: Any) -> nn.Module:
    import timm

    settings = {**_TIMM, **options}
    return randomize(
        timm.create_model("swin_tiny_patch4_window7_224", img_size=img_size, window_size=window, **settings)
    )


def timm_v2(img_size: Any = 64, window: Any = 8, **options: Any) -> nn.Module:
    import timm

    settings = {**_TIMM, **options}
    return randomize(timm.create_model("swinv2_tiny_window8_256", img_size=img_size, window_size=window, **settings))


def timm_block(
    resolution: Any, window: Any = 4, shift: int = 0, heads: int = 2, v2: bool = False, **options: Any
) -> nn.Module:
    from timm.models import swin_transformer, swin_transformer_v2

    kind = swin_transformer_v2.SwinTransformerV2Block if v2 else swin_transformer.SwinTransformerBlock
    settings = {"dim": 16, **options}
    try:
        block = kind(input_resolution=resolution, num_heads=heads, window_size=window, shift_size=shift, **settings)
    except RuntimeError as error:
        if v2 and "is invalid for input of size" in str(error):
            pytest.skip("this timm cannot build a V2 block on a size that its window does not divide")
        raise
    return randomize(block)


def microsoft_block(
    resolution: Any, window: int = 4, shift: int = 0, heads: int = 2, dim: int = 16, **options: Any
) -> nn.Module:
    return randomize(microsoft_models.SwinTransformerBlock(dim, resolution, heads, window, shift, **options))


def torchvision_model(v2: bool = False, window: tuple[int, int] = (4, 4), **options: Any) -> nn.Module:
    from torchvision.models import swin_transformer as library

    kinds: dict[str, Any] = {}
    if v2:
        kinds = {"block": library.SwinTransformerBlockV2, "downsample_layer": library.PatchMergingV2}
    settings = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 5, **kinds, **options}
    return randomize(library.SwinTransformer([4, 4], window_size=list(window), stochastic_depth_prob=0.0, **settings))


def torchvision_attention(
    window: tuple[int, int] = (4, 4),
    shift: tuple[int, int] = (0, 0),
    v2: bool = False,
    dim: int = 16,
    heads: int = 2,
    **options: Any,
) -> nn.Module:
    from torchvision.models import swin_transformer as library

    kind = library.ShiftedWindowAttentionV2 if v2 else library.ShiftedWindowAttention
    return randomize(kind(dim, list(window), list(shift), heads, **options))


def _config(kind: str, **options: Any) -> Any:
    settings = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
        "drop_path_rate": 0.0,
        **options,
    }
    if kind == "ClapAudioConfig":
        for name in ("image_size", "embed_dim"):
            settings.pop(name)
    return getattr(importlib.import_module("transformers"), kind)(**settings)


def huggingface(kind: str = "Swin", head: str = "Model", **options: Any) -> nn.Module:
    """`huggingface("Swinv2", "Backbone")` is a tiny transformers.Swinv2Backbone."""
    library = importlib.import_module("transformers")
    return randomize(getattr(library, kind + head)(_config(f"{kind}Config", **options)))


def huggingface_layer(
    kind: str = "Swin",
    resolution: tuple[int, int] = (8, 8),
    window: int = 4,
    shift: int = 0,
    dim: int = 16,
    heads: int = 2,
    **options: Any,
) -> nn.Module:
    names = {"Swin": "swin", "Swinv2": "swinv2", "DonutSwin": "donut", "MaskFormerSwin": "maskformer"}
    folder = names[kind]
    stem = {"donut": "donut_swin", "maskformer": "maskformer_swin"}.get(folder, folder)
    library = importlib.import_module(f"transformers.models.{folder}.modeling_{stem}")
    config_kind = {"MaskFormerSwin": "Swin"}.get(kind, kind)
    if kind == "MaskFormerSwin":
        config = importlib.import_module("transformers").MaskFormerSwinConfig(
            window_size=window, embed_dim=dim, **options
        )
    else:
        config = _config(f"{config_kind}Config", window_size=window, embed_dim=dim, **options)
    if getattr(config, "_attn_implementation", None) is None and kind == "Swin":
        config._attn_implementation = "sdpa"
    arguments = {"shift_size": shift}
    return randomize(getattr(library, f"{kind}Layer")(config, dim, resolution, heads, **arguments))


# Name: (model, sides of an image), of few and small windows.
_SMALL: dict[str, tuple[Callable[..., nn.Module], tuple[int, int]]] = {
    "timm-v1": (functools.partial(timm_v1, 32, 4, embed_dim=16), (32, 32)),
    "timm-v2": (functools.partial(timm_v2, 32, 4, embed_dim=16), (32, 32)),
    "torchvision-v1-padded": (torchvision_model, (28, 20)),
    "torchvision-v2": (functools.partial(torchvision_model, v2=True), (32, 32)),
    "hf-swin-padded": (huggingface, (36, 28)),
    "hf-swinv2": (functools.partial(huggingface, "Swinv2"), (32, 32)),
}


def small_model(name: str, batch: int = 2, **options: Any) -> tuple[nn.Module, Tensor]:
    """A model for tests that interpret many kernels, and an input for it; microsoft's are two blocks."""
    generator = torch.Generator().manual_seed(1)
    if name.startswith("microsoft"):
        blocks = [microsoft_block((8, 8), shift=shift, v2="v2" in name) for shift in (0, 2)]
        return nn.Sequential(*blocks), torch.randn(batch, 64, 16, generator=generator)
    make, sides = _SMALL[name]
    return make(**options), torch.randn(batch, 3, *sides, generator=generator)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Make a model without memory; skip where this version of its library reads numbers while it is made."""
    try:
        with torch.device("meta"):
            yield
    except Exception as error:
        if not any(words in str(error) for words in ("meta tensor", "offline mode", "on the Hub")):
            raise
        pytest.skip(f"this version of the library cannot make it without memory or network: {error}"[:120])
