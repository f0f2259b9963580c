"""What modules without tensors do, found by running copies of them: GELU, nothing, or dropping whole samples."""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .watch import has_hooks

# Homes of the surveyed implementations, whose instances differ in nothing but what their family reads; and of layers.
SURVEYED = (
    "timm.models.swin_transformer",
    "torchvision.models.swin_transformer",
    "torchvision.models.video.swin_transformer",
    "transformers.models.",
    "monai.networks.nets.swin_unetr",
)
LIBRARIES = (*SURVEYED, "torch.nn.", "timm.layers.", "torchvision.ops.", "transformers.", "monai.networks.")

_PLAIN = (bool, int, float, str, type(None), types.FunctionType, types.BuiltinFunctionType)
_SHAPES = ((64, 3, 4), (64, 2, 3, 4))
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_verdicts: dict[tuple, bool] = {}


def is_of_library(module: Any) -> bool:
    """Whether its class is one whose code is known."""
    return type(module).__module__.startswith(LIBRARIES)


def passes(module: Any, test: Callable[[Any], bool]) -> bool:
    """Whether a module passes a test of this file, which is made once for each class and its settings."""
    if module._parameters or module._buffers or module._modules:
        return False
    if has_hooks(module):
        return False
    settings = {name: value for name, value in module.__dict__.items() if name[0] != "_"}
    key = (test, type(module), type(module).forward, *settings.items())
    try:
        found = _verdicts.get(key)
    except TypeError:  # a setting that is no plain value
        return False
    if found is None:
        if len(_verdicts) >= 256:  # a rate that changes at every step
            _verdicts.clear()
        found = all(isinstance(value, _PLAIN) for value in settings.values()) and _run(module, test)
        _verdicts[key] = found
    return found


def _run(module: Any, test: Callable[[Any], bool]) -> bool:
    try:
        twin = copy.deepcopy(module)
        before = dict(twin.__dict__)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
            torch.autograd.graph.saved_tensors_hooks(_same, _same),  # no checkpoint counts what is saved here
        ):
            return test(twin) and twin.__dict__ == before  # what counts its calls must be called
    except Exception:
        return False


def _same(tensor: Tensor) -> Tensor:
    return tensor


def does_nothing(module: Any) -> bool:
    """Whether it gives back what it is given, however large or small, and its gradient."""
    inputs = (_numbers(shape, dtype) for shape in _SHAPES for dtype in _DTYPES)
    return all(_is_same(out, x) and _is_same(slope, torch.ones_like(x)) for x, out, slope in _results(module, inputs))


def does_gelu(module: Any) -> bool:
    """Whether it is exact GELU, with its gradient."""
    inputs = [torch.linspace(-12, 12, 4096, device="cpu").view(1, 4, -1).to(dtype) for dtype in _DTYPES]
    inputs += [_numbers(_SHAPES[0], dtype) for dtype in _DTYPES]
    pairs = zip(_results(module, inputs), _results(F.gelu, inputs), strict=True)
    return all(_is_same(out, own) and _is_same(slope, other) for (_, out, slope), (_, own, other) in pairs)


def _numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """From the smallest to the largest that a dtype has, of both signs, in no order; zero, infinities and NaN."""
    limits, count = torch.finfo(dtype), math.prod(shape)
    sizes = torch.logspace(
        math.log2(limits.tiny), math.log2(limits.max), count - 4, 2.0, dtype=torch.float64, device="cpu"
    )
    sizes = sizes.clamp(max=limits.max) * (torch.arange(count - 4, device="cpu") % 2 * 2 - 1)
    numbers = torch.cat([sizes, sizes.new_tensor([0.0, math.inf, -math.inf, math.nan])])
    return numbers[torch.randperm(count, device="cpu")].view(shape).to(dtype)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """The very numbers, in the same dtype."""
    is_alike = one.dtype == other.dtype and one.shape == other.shape
    return is_alike and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def drops_samples(module: Any) -> bool:
    """Whether it multiplies each sample by one number, which is drawn alike whatever the samples are.

    At a rate of a half, which shows it; `p` or `drop_prob` is the rate.
    """
    rate = next((name for name in ("p", "drop_prob") if isinstance(getattr(module, name, None), float)), None)
    if rate is None or not module.training:
        return False
    was = getattr(module, rate)
    setattr(module, rate, 0.5)
    for dtype, close in ((torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        for shape in _SHAPES:
            ones = torch.ones((64,) + (1,) * (len(shape) - 1), dtype=dtype, device="cpu")
            torch.default_generator.manual_seed(0)
            scale = module(ones)
            x = (torch.randn(shape, device="cpu") * 10.0 ** torch.randint(-3, 4, shape, device="cpu")).to(dtype)
            torch.default_generator.manual_seed(0)
            ((x, out, slope),) = _results(module, (x,))
            if scale.shape != ones.shape or scale.dtype is not dtype or out.dtype is not dtype:
                return False
            if not torch.allclose(out, x * scale, rtol=close, atol=0) or not torch.allclose(
                slope, scale.expand_as(slope), rtol=close, atol=0
            ):
                return False
    setattr(module, rate, was)
    return True


def _results(function: Any, inputs: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each input: itself, what a function makes of it, and the slope of that."""
    for given in inputs:
        x = given.clone().requires_grad_()
        out = function(x)
        (slope,) = torch.autograd.grad(out, x, torch.ones_like(out))
        yield given, out.detach(), slope
