"""A model's first call on a GPU is rehearsed, and leaves all as it was, or is not."""

from __future__ import annotations

import random
from contextlib import suppress
from types import SimpleNamespace

import graphed
import pytest
import torch
from test_graph_contents import Overwriting, Written
from torch import nn

from swinaccel.runtime import guard
from swinaccel.runtime.graphs import rehearsal

MODES = pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])


pytestmark = pytest.mark.usefixtures("device")


GENERATOR, HOLDER = random.Random(0), SimpleNamespace(generator=torch.Generator())


class Drawing(nn.Module):
    """A model that draws from a generator of its module."""

    def forward(self, x):
        return x * GENERATOR.random()


@MODES
@pytest.mark.parametrize("way", ["input", "numbers of the input", "own generator"])
def test_a_rehearsal_leaves_inputs_and_generators(way, trained):
    """Kernels of a call are compiled by a call whose results are thrown away, on a GPU alone."""
    model = Written(way) if way == "own generator" else Overwriting(way == "input")
    model, x = model.to(graphed.DEVICE), torch.ones(2, 3, 32, 32, device=graphed.DEVICE)
    states = [one.generator.getstate() for one in model.modules() if getattr(one, "generator", None)]
    with torch.set_grad_enabled(trained):
        rehearsal._rehearse(model, lambda module, inputs: module(*inputs), [x])
    assert torch.equal(x, torch.ones_like(x))
    assert states == [one.generator.getstate() for one in model.modules() if getattr(one, "generator", None)]


class DrawingTensors(nn.Module):
    """A model that draws from a generator of PyTorch's, in an object of its module."""

    def forward(self, x):
        return x * torch.rand((), generator=HOLDER.generator)


class Finalized(nn.Module):
    def __del__(self):
        pass


def hooked():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(lambda *_: None)
    return model


def with_data():
    model = nn.Linear(2, 2)
    model.samples = [0] * (guard._MOST_VALUES + 1)
    return model


@pytest.mark.parametrize("make", [Drawing, DrawingTensors, Finalized, hooked, with_data])
def test_what_cannot_be_undone_is_not_rehearsed(monkeypatch, make):
    looked_at, on_a_gpu = [], [SimpleNamespace(device=torch.device("cuda"))]
    monkeypatch.setattr(rehearsal, "Contents", lambda *given: looked_at.append(given))
    rehearsal.compile_ahead(make(), lambda module, inputs: None, on_a_gpu)
    assert not looked_at
    with suppress(AttributeError):
        rehearsal.compile_ahead(nn.Linear(2, 2), lambda module, inputs: None, on_a_gpu)
    assert looked_at
