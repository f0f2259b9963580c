"""Capturing a call, and a replay that is thrown away, leave models and generators as they were."""

from __future__ import annotations

import collections
import copy
import random
import threading
from contextlib import suppress
from types import SimpleNamespace

import graphed
import helpers
import numpy
import pytest
import torch
import torch.nn.functional as F
from edits import total
from graphed import replays
from tape import Tape
from test_states import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

import swinaccel
from swinaccel.runtime.graphs import training
from swinaccel.runtime.graphs.rehearsal import Contents

MODES = pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])


pytestmark = pytest.mark.usefixtures("device")


COUNTS, TOTAL = [0], 0
CAPTURED = "buffer", "counter", "dropout", "numbers of a parameter"


def gradient_of(parameter):  # a method that names it has no graph at all
    return parameter.grad.sum()


class Written(nn.Module):
    """A model whose forward writes to what it holds."""

    def __init__(self, way):
        super().__init__()
        self.body, self.way, self.gain = MODELS["timm"][0](), way, 1.0
        self.number, self.values, self.names, self.free = 0, [], {}, torch.ones((), device=graphed.DEVICE)
        self.object, self.nested, self.entries = SimpleNamespace(number=0), {"numbers": [0]}, set()
        self.flag, self.generator = False, random.Random(0) if way == "own generator" else None
        self.factor = nn.Parameter(torch.ones(()), requires_grad=False)
        self.register_buffer("mean", torch.ones(()))
        self.register_buffer("count", torch.ones((), dtype=torch.long))

    def forward(self, x):
        y = self.body(x) * self.gain
        if self.way == "number":
            self.number += 1
            return y * self.number
        if self.way == "list":
            self.values.append(1)
            return y * len(self.values)
        if self.way == "dict":
            self.names[len(self.names)] = 1
            return y * len(self.names)
        if self.way == "tensor":
            return y * self.free.mul_(1.5)
        if self.way == "buffer":
            return y * self.mean.mul_(0.9).add_(x.mean())
        if self.way == "another buffer":
            self.mean = self.mean * 0.9
            return y * self.mean
        if self.way == "counter":
            return y * self.count.add_(1)
        if self.way == "parameter":
            with torch.no_grad():
                self.body.norm.bias.data = self.body.norm.bias * 1.1
            return y
        if self.way == "object":
            self.object.number += 1
            return y * self.object.number
        if self.way == "nested":
            self.nested["numbers"][0] += 1
            return y * self.nested["numbers"][0]
        if self.way == "set":
            self.entries.add(len(self.entries))
            return y * len(self.entries)
        if self.way == "global":
            COUNTS[0] += 1
            return y * COUNTS[0]
        if self.way == "replaced global":
            global TOTAL
            TOTAL = TOTAL + 1
            return y * TOTAL
        if self.way == "to and fro":
            self.flag = not self.flag
            return y * 2 if self.flag else y
        if self.way == "numbers of a parameter":
            return y * self.factor.data.mul_(1.1)
        if self.way == "gradient":
            with torch.enable_grad():
                self.body.norm.bias.sum().backward()
            return y * gradient_of(self.body.norm.bias)
        if self.way == "own generator":
            return y * self.generator.random()
        if self.way == "dropout":
            return y * F.dropout(torch.ones_like(y), 0.5, True)
        if self.way == "random":
            return y * random.random()
        if self.way == "numpy":
            return y * float(numpy.random.rand())  # noqa: NPY002
        return y


def pair(model, trained):
    twin = helpers.randomize(model).to(graphed.DEVICE).train(trained)
    return graphed.accelerate(copy.deepcopy(twin), graphs=True), twin


def outcomes(model, trained, edit=None, setting="highest"):
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002
    global TOTAL
    COUNTS[0] = TOTAL = 0
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32, device=graphed.DEVICE).view(2, 3, 32, 32)
    found = []
    with torch.set_grad_enabled(trained):
        for number in range(6):
            if number == 4:
                torch.set_float32_matmul_precision(setting)
                model.gain = 1.0 if edit is None else edit
            model.zero_grad()
            found.append(model(x).detach())
            torch.set_float32_matmul_precision("highest")
    return found


@MODES
@pytest.mark.parametrize("change", ["nothing", "a setting", "the surroundings"])
@pytest.mark.parametrize(
    "way",
    [
        "number",
        "list",
        "dict",
        "tensor",
        "buffer",
        "another buffer",
        "counter",
        "parameter",
        "dropout",
        "random",
        "numpy",
        "object",
        "nested",
        "set",
        "global",
        "replaced global",
        "to and fro",
        "numbers of a parameter",
        "gradient",
        "own generator",
    ],
)
def test_what_a_forward_writes_to_and_draws(way, change, trained):
    if way not in CAPTURED and change != "nothing":
        pytest.skip("it is no graph")
    options = {"a setting": {"edit": 2.0}, "the surroundings": {"setting": "high"}}.get(change, {})
    model, twin = pair(Written(way), trained)
    for ours, own in zip(outcomes(model, trained, **options), outcomes(twin, trained, **options), strict=True):
        helpers.assert_close(ours, own, 1e-3)
    for ours, own in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        helpers.assert_close(ours.double(), own.double(), 1e-4)
    assert (replays(model) > 0) == (way in CAPTURED), str(swinaccel.report(model))


class Overwriting(nn.Module):
    """A model that writes to its input."""

    def __init__(self, is_counted):
        super().__init__()
        self.body, self.is_counted = MODELS["timm"][0](), is_counted

    def forward(self, x):
        (x if self.is_counted else x.data).mul_(0.5)
        return self.body(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("is_counted", [True, False])
def test_an_input_that_is_written_to(is_counted, mode):
    model, twin = pair(Overwriting(is_counted), False)
    for _ in range(5):
        inputs = [torch.ones(2, 3, 32, 32, device=graphed.DEVICE) for _ in range(2)]
        with mode():
            helpers.assert_close(model(inputs[0]), twin(inputs[1]), 1e-4)
        assert torch.equal(*inputs)
    assert "writes to its input" in swinaccel.report(model).graphs[0].reason


@pytest.mark.parametrize("returns", ["what has no gradient", "something else"])
def test_captures_that_fail_leave_statistics(returns):
    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.body = nn.BatchNorm2d(3), MODELS["timm"][0]()

        def forward(self, x):
            y = self.body(self.norm(x))
            return y.detach() if returns == "what has no gradient" else (y, self)

    model, twin = pair(Normalized(), True)
    x = torch.randn(2, 3, 32, 32, device=graphed.DEVICE)
    for _ in range(4):
        model(x)
        twin(x)
    (graph,) = swinaccel.report(model).graphs
    assert graph.reason is not None
    assert graph.captured == 0
    for ours, own in zip(model.buffers(), twin.buffers(), strict=True):
        helpers.assert_close(ours.double(), own.double(), 1e-5)


def trained_pair():
    model, twin = pair(MODELS["timm"][0](), True)
    x = torch.randn(2, 3, 32, 32, device=graphed.DEVICE)
    for _ in range(3):
        total(model(x)).backward()
    model.zero_grad()
    assert replays(model) > 0
    return model, twin, x


def assert_alike(model, twin):
    for ours, own in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, own.grad, rtol=1e-3, atol=1e-3 * float(own.grad.abs().max()))


def test_a_checkpoint_is_shown_no_replay():
    model, twin, x = trained_pair()  # the input wants no gradient, as in the calls that were captured
    for every in (model, twin):
        total(checkpoint(every, x, use_reentrant=False)).backward()
    assert_alike(model, twin)


def test_a_backward_does_not_wait_for_who_captures(monkeypatch):
    if graphed.DEVICE != "cpu":
        pytest.skip("about the stand-in's lock; the next test is about the device's")
    monkeypatch.setattr(training, "_PATIENCE", 0.05)
    model, twin, x = trained_pair()
    is_held, is_done = threading.Event(), threading.Event()

    def hold():
        with Tape.lock:
            is_held.set()
            is_done.wait(60)

    out = model(x)
    other = threading.Thread(target=hold)
    other.start()
    is_held.wait()
    backward = threading.Thread(target=lambda: total(out).backward(), daemon=True)
    backward.start()
    backward.join(30)
    is_late = backward.is_alive()
    is_done.set()
    other.join()
    assert not is_late
    total(twin(x)).backward()
    assert_alike(model, twin)


@pytest.mark.gpu
def test_a_capture_beside_another_threads_backward():
    if graphed.DEVICE == "cpu":
        pytest.skip("CPUs run a backward on the thread that asks for it")
    model, twin, x = trained_pair()
    begun = threading.Event()

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = MODELS["timm"][0]()

        def forward(self, x):
            if begun.wait(0):
                threading.Event().wait(0.5)  # for the other thread's backward to reach the lock
            y = self.body(x)
            begun.set()
            return y

    other, _ = pair(Slow(), True)
    total(other(x)).backward()  # the second step is captured
    out = model(x)

    def capturing():
        total(other(x)).backward()

    threads = [threading.Thread(target=one, daemon=True) for one in (capturing, lambda: total(out).backward())]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert not any(one.is_alive() for one in threads)
    total(twin(x)).backward()
    assert_alike(model, twin)


def test_calls_inside_a_backward_are_no_replays():
    twin = helpers.randomize(MODELS["timm"][0]()).to(graphed.DEVICE).eval()
    model = graphed.accelerate(copy.deepcopy(twin), graphs=True)
    x = torch.randn(2, 3, 32, 32, device=graphed.DEVICE)
    found = []

    @torch.no_grad()
    def teach(gradient):
        found.append(model(x))

    with torch.no_grad():
        for _ in range(3):
            model(x)
        expected = twin(x)
    before = replays(model)
    given = x.clone().requires_grad_()
    given.register_hook(teach)
    given.sum().backward()
    helpers.assert_close(found[0], expected)
    assert replays(model) == before


class Collecting(nn.Module):
    """A model that writes to a list that it is given."""

    def __init__(self):
        super().__init__()
        self.body = MODELS["timm"][0]()

    def forward(self, x, features):
        y = self.body(x)
        features.append(2 * y)
        return y


@MODES
def test_a_list_that_is_written_to(trained):
    model, twin = pair(Collecting(), trained)
    x = torch.ones(2, 3, 32, 32, device=graphed.DEVICE)
    for _ in range(5):
        found = [], []
        with torch.set_grad_enabled(trained):
            model(x, found[0])
            twin(x, found[1])
        helpers.assert_close(found[0][0], found[1][0], 1e-4)
        assert len(found[0]) == 1
    assert "list" in swinaccel.report(model).graphs[0].reason


def moved(values):
    values.move_to_end("one")


def counted(values):
    values["one"] += 1


def swapped(values):
    del values["one"]
    values["three"] = 3


@pytest.mark.parametrize("change", [moved, counted, swapped])
@pytest.mark.parametrize("kind", [collections.OrderedDict, collections.Counter])
def test_dictionaries_hold_what_they_did(change, kind):
    model = nn.Identity()
    model.values = kind(one=1, two=2)
    contents = Contents(model)
    with suppress(AttributeError):
        change(model.values)
    contents.restore()
    assert model.values == kind(one=1, two=2)


def test_parameters_lie_where_they_did():
    model = MODELS["timm"][0]().to(graphed.DEVICE)
    weight = model.norm.weight
    contents, place, then = Contents(model), weight.data_ptr(), weight.detach().clone()
    weight.data = 2 * weight.data
    contents.restore()
    assert weight.data_ptr() == place
    assert torch.equal(weight, then)
