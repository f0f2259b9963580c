"""Graphs of training steps: gradients, statistics and random numbers are those of an untouched twin."""

from __future__ import annotations

import copy
import gc
import weakref

import graphed
import helpers
import pytest
import torch
from edits import EDITS, total
from graphed import accelerate, replays
from test_states import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

import swinaccel
from swinaccel.runtime.plan import state_of

pytestmark = pytest.mark.usefixtures("device")


def pair(model, **options):
    """Return an accelerated model that captures its training, and its twin."""
    twin = helpers.randomize(model).to(graphed.DEVICE).train()
    return accelerate(copy.deepcopy(twin), graphs=True, **options), twin


def made(name="timm", **options):
    make, shape = MODELS[name]
    return *pair(make(), **options), torch.randn(shape, device=graphed.DEVICE)


def captured(name="timm", **options):
    model, twin, x = made(name, **options)
    for _ in range(2):
        step(model, x)
    assert replays(model) == 1, swinaccel.report(model).graphs
    for every in (model, twin):
        every.zero_grad()
    return model, twin, x


def step(model, x, **options):
    torch.manual_seed(0)
    out = model(x)
    total(out).backward(**options)
    return out


def gradients(model):
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def assert_alike(model, twin, tolerance=1e-4):
    ours, own = gradients(model), gradients(twin)
    assert ours.keys() == own.keys()
    scale = max(one.abs().max() for one in own.values())
    for name, one in own.items():
        error = (ours[name] - one).abs().max() / max(one.abs().max(), 1e-2 * scale)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("name", ["timm", "timm V2", "timm CR", "torchvision", "torchvision V2", "Hugging Face"])
def test_steps_of_an_optimizer(name):
    model, twin, x = made(name)
    optimizers = [torch.optim.SGD(every.parameters(), 1e-3, momentum=0.9) for every in (model, twin)]
    for number in range(6):
        for every, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=number % 2 == 0)
            out = step(every, x + number)
        helpers.assert_close(step(model, x - number), step(twin, x - number), 1e-3)  # gradients add up
        assert_alike(model, twin, 1e-3)  # what differs grows from step to step
        assert out is not None
        for optimizer in optimizers:
            optimizer.step()
    for ours, own in zip(model.parameters(), twin.parameters(), strict=True):
        helpers.assert_close(ours.detach(), own.detach(), 1e-3)
    assert replays(model) == 11
    assert {entry.calls for entry in swinaccel.report(model)} == {12}


def test_the_same_numbers_in_all_buffers_change_nothing():
    """DDP of several ranks writes them before each forward, in indices too."""
    model, twin, x = made()
    for number in range(6):
        for one in model.buffers():
            one.copy_(one.clone())
        step(model, x + number)
        step(twin, x + number)
    assert_alike(model, twin)
    assert replays(model) == 5
    for every in (model, twin):
        every.zero_grad()
        index = every.layers[0].blocks[0].attn.relative_position_index
        index.copy_(torch.zeros_like(index))
        step(every, x)
    assert_alike(model, twin)
    assert replays(model) == 5


@pytest.mark.parametrize("edit", EDITS)
def test_edits_after_the_capture(edit):
    if edit in ("half", "bfloat16") and graphed.DEVICE == "cpu":
        pytest.skip("operators of 16-bit backwards on CPUs resize their outputs, which the stand-in cannot record")
    model, twin, x = captured()
    for _ in range(2):
        changed = [EDITS[edit](every, 3) for every in (model, twin)]
        model, twin = (new if new is not None else old for new, old in zip(changed, (model, twin), strict=True))
        for _ in range(3):
            outcomes = []
            for every in (model, twin):
                every.zero_grad()
                torch.manual_seed(0)
                try:
                    out = every(x.to(next(every.parameters()).dtype))
                    if (loss := total(out)).requires_grad:
                        loss.backward()
                    outcomes.append(out)
                except Exception as error:
                    outcomes.append(type(error))
            if isinstance(outcomes[1], type):
                assert outcomes[0] is outcomes[1]
                return
            dtype = next(iter(helpers.tensors(outcomes[1]))).dtype
            tolerance = 1e-4 if dtype.itemsize > 2 else 1e-1
            for ours, own in zip(*map(helpers.tensors, outcomes), strict=True):
                torch.testing.assert_close(ours, own, rtol=tolerance, atol=tolerance, equal_nan=True)
            if not any(one.isnan().any() for one in gradients(twin).values()):
                assert_alike(model, twin, tolerance)


def test_two_forwards_before_their_backwards():
    model, twin, x = captured()
    for every in (model, twin):
        outs = [every(x + number) for number in range(3)]
        for place in (1, 0, 2):
            total(outs[place]).backward()
    assert_alike(model, twin)
    for every in (model, twin):
        every.zero_grad()
        step(every, x)
    assert_alike(model, twin)
    assert replays(model) == 3


@pytest.mark.parametrize("between", [False, True])
def test_a_backward_that_comes_twice(between):
    model, twin, x = captured()
    for every in (model, twin):
        out = step(every, x, retain_graph=True)
        if between:
            step(every, x + 1)
        total(out).backward()
    assert_alike(model, twin)


def test_second_derivatives():
    model, twin, x = captured()
    for every in (model, twin):
        given = x.clone().requires_grad_()
        for _ in range(3):
            (grad,) = torch.autograd.grad(total(every(given)), given, create_graph=True)
        every.zero_grad()
        grad.square().sum().backward()
    assert_alike(model, twin, 1e-3)
    assert {entry.calls for entry in swinaccel.report(model)} == {5}  # forwards that are run anew are no calls


def test_gradients_of_the_input():
    model, twin, x = made()
    found = []
    for every in (model, twin):
        for number in range(4):
            given = (x + number).requires_grad_()
            total(every(2 * given)).backward()
        found.append(given.grad)
    helpers.assert_close(*found, 1e-4)
    assert replays(model) == 3


@pytest.mark.parametrize("way", ["no_grad", "checkpoint", "reentrant", "anomaly", "disabled"])
def test_surroundings_in_which_there_is_no_graph(way):
    model, twin, x = captured()
    before = replays(model)
    for every in (model, twin):
        for _ in range(3):
            torch.manual_seed(0)
            given = x.clone().requires_grad_()
            if way == "no_grad":
                with torch.no_grad():
                    every(given)
            elif way == "anomaly":
                with torch.autograd.detect_anomaly(check_nan=False):
                    total(every(given)).backward()
            elif way == "disabled":
                with swinaccel.disabled():
                    total(every(given)).backward()
            else:
                total(checkpoint(every, given, use_reentrant=way == "reentrant")).backward()
    if way != "no_grad":
        assert_alike(model, twin)
    assert replays(model) == before


def test_frozen_parameters_and_those_that_take_no_part():
    model, twin, x = made()
    for every in (model, twin):
        every.spare = nn.Linear(3, 3, device=graphed.DEVICE)
        every.layers[0].requires_grad_(False)
        for _ in range(4):
            step(every, x)
    assert_alike(model, twin)
    assert replays(model) == 3
    for every in (model, twin):
        every.layers[0].requires_grad_(True)
        every.zero_grad()
        step(every, x)
    assert_alike(model, twin)


class Normalized(nn.Module):
    """A model with statistics, and random numbers, of its own."""

    def __init__(self, body):
        super().__init__()
        self.norm, self.body, self.drop = nn.BatchNorm2d(3), body, nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.body(self.norm(x)))


def test_statistics_and_random_numbers():
    model, twin = pair(Normalized(MODELS["timm"][0]()))
    x = torch.randn(3, 3, 32, 32, device=graphed.DEVICE)
    torch.manual_seed(0)
    for number in range(5):
        outs = []
        for every in (model, twin):
            torch.manual_seed(number)
            outs += [every(x + number), every(x)]
            for out in outs[-2:]:
                total(out).backward()
        for ours, own in zip(outs[:2], outs[2:], strict=True):
            helpers.assert_close(ours, own, 1e-4)
        assert_alike(model, twin)
    for ours, own in zip(model.buffers(), twin.buffers(), strict=True):
        helpers.assert_close(ours, own, 1e-5)
    assert replays(model) > 0


def test_gradients_are_the_callers_own():
    model, twin, x = captured()
    found = [
        [torch.autograd.grad(total(every(x + number)), list(every.parameters())) for number in range(2)]
        for every in (model, twin)
    ]
    for ours, own in zip(*found, strict=True):
        for one, other in zip(ours, own, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


class Twice(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        y = self.body(x)
        return y, y.square()


def test_outputs_that_get_no_gradient():
    model, twin = pair(Twice(MODELS["timm"][0]()))
    x = torch.randn(MODELS["timm"][1], device=graphed.DEVICE)
    for used in ((0, 1), (0, 1), (0, 1), (1,), (0,)):
        for every in (model, twin):
            every.zero_grad()
            outs = every(x)
            sum(total(outs[place]) for place in used).backward()
        assert_alike(model, twin)
    assert replays(model) == 4


def test_a_graph_that_holds_no_more_leaves_no_statistics():
    model, twin = pair(Normalized(MODELS["timm"][0]()))
    x = torch.randn(3, 3, 32, 32, device=graphed.DEVICE)
    for number in range(4):
        for every in (model, twin):
            if number == 3:
                every.norm.momentum = 0.5
            step(every, x + number)
    for ours, own in zip(model.buffers(), twin.buffers(), strict=True):
        helpers.assert_close(ours, own, 1e-5)


def test_a_graph_that_holds_no_more_draws_nothing():
    body = Normalized(MODELS["timm"][0]())
    body.norm = nn.Identity()  # without statistics
    model, twin = pair(body)
    x = torch.randn(3, 3, 32, 32, device=graphed.DEVICE)
    for every in (model, twin):
        torch.manual_seed(0)
        for number in range(5):
            if number == 3:
                every.body.head.fc.weight = nn.Parameter(2 * every.body.head.fc.weight.detach())
            every.zero_grad()
            total(every(x + number)).backward()
    assert_alike(model, twin)
    assert replays(model) > 0


def test_a_later_backward_draws_what_its_forward_drew():
    model, twin = pair(Normalized(MODELS["timm"][0]()))
    x = torch.randn(3, 3, 32, 32, device=graphed.DEVICE)
    for every in (model, twin):
        torch.manual_seed(0)
        outs = [step(every, x + number, retain_graph=True) for number in range(4)]
        every.zero_grad()
        total(outs[2]).backward()
    assert_alike(model, twin)


def triple(parameter):
    parameter.grad.mul_(3)


def test_hooks_of_parameters_are_called():
    model, twin, x = captured()
    for every in (model, twin):
        every.norm.weight.register_hook(lambda grad: 2 * grad)
        every.head.fc.weight.register_post_accumulate_grad_hook(triple)
        step(every, x)
    assert_alike(model, twin)
    assert replays(model) == 2


@pytest.mark.parametrize("kind", ["hook", "checkpointing"])
def test_what_cannot_be_captured(kind):
    model, twin, x = made()
    if kind == "hook":
        for every in (model, twin):
            every.norm.register_full_backward_hook(lambda *_: None)
    else:
        for every in (model, twin):
            every.set_grad_checkpointing()
    for every in (model, twin):
        for _ in range(4):
            step(every, x)
    assert_alike(model, twin)
    (graph,) = swinaccel.report(model).graphs
    assert ("hooks" if kind == "hook" else "checkpoints") in graph.reason


def test_auto_leaves_training_alone():
    model = accelerate(helpers.randomize(MODELS["timm"][0]()).train(), graphs="auto")
    for _ in range(5):
        step(model, torch.randn(MODELS["timm"][1], device=graphed.DEVICE))
    assert not replays(model)


def test_evaluation_and_training_take_turns():
    model, twin, x = captured()
    for _ in range(3):
        for every in (model, twin):
            every.eval()
        with torch.no_grad():
            for _ in range(3):
                helpers.assert_close(model(x), twin(x), 1e-4)
        for every in (model, twin):
            every.train()
            every.zero_grad()
            step(every, x)
        assert_alike(model, twin)
    assert swinaccel.report(model).graphs[0].captured == 2


def test_models_are_not_kept_alive():
    model, _, _ = captured()
    held = weakref.ref(next(iter(state_of(model).graphs.captures.values())))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert held() is None
