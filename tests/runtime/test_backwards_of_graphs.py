"""What may happen between a forward that was replayed and its backward, and what is an error."""

from __future__ import annotations

import graphed
import helpers
import pytest
import torch
from edits import total
from graphed import replays
from test_states import MODELS
from test_training_graphs import assert_alike, captured, made, pair, step
from torch import nn

pytestmark = pytest.mark.usefixtures("device")


def test_what_has_changed_before_a_backward_is_an_error():
    model, twin, x = captured()
    for every in (model, twin):
        out = every(x)
        with torch.no_grad():
            every.head.fc.weight.mul_(2)
        with pytest.raises(RuntimeError, match="inplace"):
            total(out).backward()
    out = model(x)
    model.norm.weight.data = torch.ones(16, device=graphed.DEVICE)
    with pytest.raises(RuntimeError, match="replaced"):
        total(out).backward()


def test_what_is_frozen_before_a_backward_gets_no_gradient():
    model, twin, x = captured()
    for wanted in (False, True):
        for every in (model, twin):
            every.zero_grad()
            out = every(x)
            every.layers[0].requires_grad_(wanted)
            total(out).backward()
        assert_alike(model, twin)
    assert replays(model) == 2


class Scaled(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.drop = body, nn.Dropout(0.3)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(2.0))

    def forward(self, x):
        return self.drop(self.body(x)) * self.scale + self.shift


def test_a_buffer_that_is_written_to_before_a_backward_that_reads_it():
    model, twin = pair(Scaled(MODELS["timm"][0]()))
    x = torch.randn(MODELS["timm"][1], device=graphed.DEVICE)
    for number in range(4):
        for every in (model, twin):
            every.zero_grad()
            torch.manual_seed(0)
            out = every(x)
            every.shift.add_(1)
            if number == 3:
                every.scale.mul_(2)
                with pytest.raises(RuntimeError, match="inplace"):
                    total(out).backward()
            else:
                total(out).backward()
    assert replays(model) == 3


@pytest.mark.parametrize("change", [lambda one: one.eval(), lambda one: setattr(one, "scale", one.scale * 2)])
def test_a_forward_that_cannot_be_run_anew_is_an_error(change):
    model, _ = pair(Scaled(MODELS["timm"][0]()))
    x = torch.randn(MODELS["timm"][1], device=graphed.DEVICE)
    for _ in range(3):
        step(model, x)
    out = model(x)
    change(model)
    with pytest.raises(RuntimeError, match="changed"):
        total(out).backward(create_graph=True)


def test_a_batch_of_gradients():
    model, twin, x = captured()
    found = []
    for every in (model, twin):
        out = every(x)
        grads = torch.eye(out.numel(), device=graphed.DEVICE).view(-1, *out.shape)
        found += torch.autograd.grad(out, [every.head.fc.weight], grads, is_grads_batched=True)
    helpers.assert_close(*found, 1e-4)


def test_other_replays_come_between_a_forward_and_its_backward():
    """What a forward has left for its backward lies in no memory that graphs of before have freed."""
    teacher, _, x = made()
    teacher.eval()
    with torch.no_grad():
        for _ in range(3):
            teacher(x)
    other, _, _ = captured()
    model, twin, _ = captured("timm V2")
    for every in (model, twin):
        out = every(x)
        with torch.no_grad():
            teacher(x)
        between = other(x)
        total(between).backward()
        total(out).backward()
    assert_alike(model, twin, 1e-3)
    assert (replays(teacher), replays(other), replays(model)) == (4, 3, 2)
