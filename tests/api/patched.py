"""What the tests of dispatchers and markers share: small models of every library, and what shows a patched one."""

from __future__ import annotations

import helpers
import pytest
import torch
from helpers import randomize
from torch import nn

import swinaccel

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))

# name: (model, input); all of one input, small enough to compile.
MODELS = {
    "timm": lambda: helpers.timm_v1(img_size=32, window=4),
    "timm-v2": lambda: helpers.timm_v2(img_size=32, window=4),
    "torchvision": lambda: helpers.torchvision_model(),
    "hf-swin": lambda: helpers.huggingface("Swin", "ForImageClassification"),
    "hf-swinv2": lambda: helpers.huggingface("Swinv2", "ForImageClassification"),
    "microsoft": lambda: Microsoft(),
}


class Microsoft(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(*(helpers.microsoft_block((8, 8), shift=shift) for shift in (0, 2)))
        randomize(self)

    def forward(self, x):
        return self.blocks(self.embed(x).flatten(2).transpose(1, 2))


every_model = pytest.mark.parametrize("name", MODELS)


def output(model, x=X):
    with torch.no_grad():
        return helpers.tensors(model(x))[0]


def accelerate(model, **options):
    return swinaccel.accelerate(model, backend="torch", **options)


def classes_of(model):
    return {kind for module in model.modules() for kind in type(module).__mro__}


def snapshot(model):
    """Everything that is not to change: dictionaries of classes and instances."""
    return {kind: dict(vars(kind)) for kind in classes_of(model)}, {
        name: set(vars(module)) for name, module in model.named_modules()
    }


def is_accelerated(model, x=X):
    """Whether a call runs the section; counted calls are proof, the marker alone is none."""
    before = sum(entry.calls - entry.fallbacks for entry in swinaccel.report(model))
    output(model, x)
    entries = list(swinaccel.report(model))
    return sum(entry.calls - entry.fallbacks for entry in entries) == before + len(entries) > before
