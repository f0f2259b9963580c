"""Models that are captured, their twins, and calls that may be replays."""

from __future__ import annotations

import copy

import helpers
import torch
from test_states import MODELS

import swinaccel
from swinaccel.config import CAPTURED_CALL

DEVICE = "cpu"  # set by the fixture of that name


def accelerate(model, **options):
    return swinaccel.accelerate(model.to(DEVICE), backend="triton" if DEVICE == "cuda" else "torch", **options)


def call(model, x):
    with torch.no_grad():
        return model(x)


def captured(name="timm", **options):
    """Return a model that is captured, its twin, and its input."""
    make, shape = MODELS[name]
    twin = helpers.randomize(make()).eval().to(DEVICE)
    model = accelerate(copy.deepcopy(twin), graphs=True, **options)
    x = torch.randn(shape, device=DEVICE)
    for _ in range(CAPTURED_CALL - 1):
        call(model, x)
    return model, twin, x


def replays(model):
    return sum(graph.replays for graph in swinaccel.report(model).graphs)


def assert_alike(model, twin, *inputs):
    for x in inputs:
        helpers.assert_close(call(model, x), call(twin, x))
