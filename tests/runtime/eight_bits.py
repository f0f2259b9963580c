"""Models whose products are of 8 bits, and what their reports say."""

from __future__ import annotations

import copy

import helpers
import timm
import torch
import torchvision
import transformers
from blocks import HALF, random
from helpers import TRITON_DEVICE
from torch import nn

import swinaccel
from swinaccel.runtime.plan import state_of

EIGHT = torch.float8_e4m3fn
TINY = {"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10}
HF = {"image_size": 32, "window_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}

MODELS = {
    "timm": lambda: timm.create_model("swin_tiny_patch4_window7_224", **TINY),
    "timm v2": lambda: timm.create_model("swinv2_tiny_window8_256", **TINY),
    "torchvision": lambda: torchvision.models.SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=10),
    "hf": lambda: transformers.SwinModel(transformers.SwinConfig(**HF)),
    "hf v2": lambda: transformers.Swinv2Model(transformers.Swinv2Config(**HF)),
}


def quantised(x):
    """Return what rows are in 8 bits, in fp64; `torch` rounds to e4m3 from fp32."""
    scale = x.double().abs().amax(-1, keepdim=True) / 448
    return (x.double() / scale).float().to(EIGHT).double() * scale


def hidden_scale(x, weight, bias):
    """Return the scales of GELU(x weightᵀ + bias) in 8 bits, (rows, 1), of operands that are quantised; in fp64."""
    largest = 0 if bias is None else bias.double().abs().max()
    return (x.norm(dim=-1, keepdim=True) * weight.norm(dim=-1).max() + largest) * (1 + 2**-6) / 448


def relative(found, expected):
    found, expected = found.double().cpu(), expected.double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def first(output):
    return output if isinstance(output, torch.Tensor) else helpers.tensors(output)[0]


def call(model, *x):
    with torch.no_grad():
        return first(model(*x))


def made(name="timm", dtype=HALF):
    return helpers.randomize(MODELS[name]()).to(TRITON_DEVICE, dtype)


def accelerated(model, **options):
    return swinaccel.accelerate(copy.deepcopy(model), backend="triton", precision="fp8", **options)


X = random(1, 3, 32, 32, dtype=HALF)


def knows(model):
    """Return what is known of each block's products."""
    return [known for part in model.modules() if (known := state_of(part).precision) is not None]


def assert_runs(model):
    """All blocks multiplied in 8 bits in their latest call, and the report says so."""
    report = swinaccel.report(model)
    assert len(report) == len(knows(model)) == 4
    for entry in report:
        assert entry.precision.startswith("fp8, error ")
        assert (entry.reason, entry.fallbacks) == (None, 0)


def replaced(layer):
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def under_autocast(model):
    with torch.autocast(TRITON_DEVICE, dtype=HALF):
        call(model, X.float())
