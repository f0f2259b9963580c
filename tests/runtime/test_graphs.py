"""Graphs of whole models: never stale, results of the caller's own; on CPUs by a stand-in that replays operators."""

from __future__ import annotations

import copy
import threading

import graphed
import helpers
import pytest
import torch
import zoo
from graphed import accelerate, assert_alike, call, captured, replays
from tape import Tape
from test_states import MODELS
from torch import nn

import swinaccel
from swinaccel.config import CAPTURED_CALL
from swinaccel.ops.failures import failures
from swinaccel.runtime.graphs import capture, replay
from swinaccel.runtime.plan import state_of

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture
def tapes(device):
    if graphed.DEVICE != "cpu":
        pytest.skip("about the stand-in, which is a CPU's")


@pytest.mark.parametrize("name", ["timm", "timm V2", "timm CR", "torchvision", "torchvision 3D", "Hugging Face"])
def test_calls_from_the_third_on_are_replays(name):
    model, twin, x = captured(name)
    calls = [entry.calls for entry in swinaccel.report(model)]
    (graph,) = swinaccel.report(model).graphs
    assert (graph.name, graph.captured, graph.replays, graph.reason) == ("", 1, 1, None)
    assert_alike(model, twin, x, x + 1, torch.randn_like(x))
    assert replays(model) == 4
    assert [entry.calls for entry in swinaccel.report(model)] == [one + 3 for one in calls]
    assert "graph" in str(swinaccel.report(model))


def test_results_are_the_callers_own():
    model, twin, x = captured()
    one, other = call(model, x), call(model, x + 1)
    one.mul_(2)
    helpers.assert_close(other, call(twin, x + 1))
    helpers.assert_close(call(model, x), call(twin, x))
    helpers.assert_close(one, 2 * call(twin, x))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double().float()[:, :, :, :],
        lambda x: torch.cat([x, x]),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x.expand(3, -1, -1, -1),
    ],
)
def test_other_inputs_have_graphs_of_their_own_or_none(change):
    model, twin, x = captured()
    for _ in range(4):
        assert_alike(model, twin, change(x), x)


@pytest.mark.parametrize("way", ["precision", "deterministic", "autocast", "environment", "disabled", "off"])
def test_what_surrounds_a_call_decides(monkeypatch, way):
    model, twin, x = captured()
    before = replays(model)
    if way == "precision":
        torch.set_float32_matmul_precision("high")
        call(model, x)
        torch.set_float32_matmul_precision("highest")
    elif way == "deterministic":
        torch.use_deterministic_algorithms(True)
        call(model, x)
        torch.use_deterministic_algorithms(False)
    elif way == "autocast":
        with torch.autocast(graphed.DEVICE, torch.bfloat16):
            assert call(model, x).dtype == call(twin, x).dtype
    elif way == "environment":
        monkeypatch.setenv("SWINACCEL_GRAPHS", "0")
        call(model, x)
    elif way == "disabled":
        with swinaccel.disabled():
            call(model, x)
    else:
        swinaccel.accelerate(model, backend="torch", graphs=False)
        call(model, x)
        assert not swinaccel.report(model).graphs
        return
    assert replays(model) == before


def test_autocast_is_captured_by_itself():
    model, twin, x = captured()
    for _ in range(2):
        with torch.autocast(graphed.DEVICE, torch.bfloat16), torch.no_grad():
            for _ in range(CAPTURED_CALL + 1):
                helpers.assert_close(model(x).float(), twin(x).float(), 3e-2)
    assert swinaccel.report(model).graphs[0].captured == 2


def latest(model):
    return next(reversed(state_of(model).graphs.captures.values()))


def test_indices_that_changed_are_not_even_read(tapes):
    model, twin, x = captured()
    engine = latest(model)._engine
    for every in (model, twin):
        index = every.layers[0].blocks[0].attn.relative_position_index
        index.copy_(index.flip(0))
    before = engine.replays
    assert_alike(model, twin, x)
    assert engine.replays == before


def test_calls_by_name_do_not_go_ahead_and_are_looked_after_too():
    model, twin, x = captured()
    with torch.no_grad():
        for scale in (0.5, 0.25):
            for every in (model, twin):
                every.layers[0].blocks[0].attn.scale = scale
            before = replays(model)
            for _ in range(CAPTURED_CALL + 2):
                helpers.assert_close(model(x=x), twin(x=x))
            assert replays(model) > before


def test_memory_that_a_replay_may_read_is_kept():
    model, twin, x = captured()
    kept = latest(model)._held
    for every in (model, twin):
        every.norm.weight.data = torch.linspace(0.5, 2, 16, device=graphed.DEVICE)
    assert model.norm.weight.data_ptr() not in [one.data_ptr() for one in kept]
    assert_alike(model, twin, x, x + 1)


def test_autocast_leaves_no_weights_that_are_freed():
    model, twin, x = captured()
    with torch.autocast(graphed.DEVICE, torch.bfloat16), torch.no_grad():
        for _ in range(CAPTURED_CALL):
            model(x)
    for every in (model, twin):
        every.head.fc.weight.data.mul_(-3)
    for _ in range(2):
        with torch.autocast(graphed.DEVICE, torch.bfloat16), torch.no_grad():
            helpers.assert_close(model(x).float(), twin(x).float(), 3e-2)
    assert replays(model) == 5


def test_inference_mode_has_graphs_of_its_own():
    model, _, x = captured()
    with torch.inference_mode():
        assert all(model(x).is_inference() for _ in range(CAPTURED_CALL + 1))
    assert not call(model, x).is_inference()
    assert swinaccel.report(model).graphs[0].captured == 2


def test_layouts_have_graphs_of_their_own():
    model, _, x = captured()
    for _ in range(CAPTURED_CALL):
        call(model, x.contiguous(memory_format=torch.channels_last))
    assert swinaccel.report(model).graphs[0].captured == 2


def test_a_kernel_that_failed_ends_a_graph():
    model, twin, x = captured()
    before = replays(model)
    failures.record(("window", graphed.DEVICE), "no memory")
    assert_alike(model, twin, x)
    assert replays(model) == before


class Scaled(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.gain = body, torch.ones((), device=graphed.DEVICE)  # no buffer

    def forward(self, x):
        return self.body(x) * self.gain


@pytest.mark.parametrize(
    "change",
    [lambda one: one.gain.mul_(2), lambda one: setattr(one.gain, "data", torch.tensor(-3.0, device=graphed.DEVICE))],
)
def test_tensors_that_are_no_buffers_are_followed(change):
    twin = helpers.randomize(Scaled(MODELS["timm"][0]())).eval().to(graphed.DEVICE)
    model, x = accelerate(copy.deepcopy(twin), graphs=True), torch.randn(MODELS["timm"][1], device=graphed.DEVICE)
    for _ in range(CAPTURED_CALL):
        assert_alike(model, twin, x)
    assert replays(model) == 2
    change(model)
    change(twin)
    assert_alike(model, twin, x, x + 1)


class Head(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.top = body, nn.Linear(5, 3)

    def forward(self, x):
        y = self.top(self.body(x))
        return y if y.sum() > 1e9 else -y


def test_auto_is_about_code_that_is_known():
    twin = helpers.randomize(Head(MODELS["timm"][0]())).eval().to(graphed.DEVICE)
    model = accelerate(copy.deepcopy(twin), graphs="auto")
    (graph,) = swinaccel.report(model).graphs
    assert graph.name == "body"
    x = torch.randn(MODELS["timm"][1], device=graphed.DEVICE)
    for _ in range(5):
        assert_alike(model, twin, x)
    assert replays(model) == 3
    blocks = accelerate(zoo.Blocks(helpers.microsoft_block((8, 8))), graphs="auto")
    assert not swinaccel.report(blocks).graphs


def test_a_part_of_another_class_leaves_the_stages():
    model = MODELS["timm"][0]()
    model.head = Head(nn.Identity())
    accelerate(model, graphs="auto")
    assert [graph.name for graph in swinaccel.report(model).graphs] == ["layers.0"]


@pytest.mark.parametrize("kind", ["hooks", "training", "settings", "capture"])
def test_what_cannot_be_captured_is_said_once_and_never_tried_again(monkeypatch, tapes, kind):
    made = []
    monkeypatch.setitem(capture.ENGINES, "cpu", lambda *given: made.append(1) or Tape(*given))
    model, shape = MODELS["timm"][0]().eval(), MODELS["timm"][1]
    if kind == "hooks":
        model.norm.register_forward_hook(lambda *_: None)
    if kind == "training":
        model.layers[0].train()
    if kind == "settings":
        own = type(model).forward_features

        def counting(self, x):
            self.count = getattr(self, "count", 0) + 1
            return own(self, x)

        monkeypatch.setattr(type(model), "forward_features", counting)
    if kind == "capture":
        monkeypatch.setitem(capture.ENGINES, "cpu", lambda *given: made.append(1) or 1 / 0)
    accelerate(model, graphs=True)
    x = torch.randn(shape, device=graphed.DEVICE)
    for _ in range(6):
        call(model, x)
    (graph,) = swinaccel.report(model).graphs
    words = {"hooks": "has hooks", "training": "in training", "settings": "settings", "capture": "ZeroDivisionError"}
    assert words[kind] in graph.reason
    assert graph.replays == 0
    assert len(made) <= 1


def test_limits(monkeypatch, tapes):
    model, twin, x = captured()
    monkeypatch.setattr(replay, "MOST", 2)
    monkeypatch.setattr(replay, "PATIENCE", 0)
    for batch in (2, 3, 4):
        for _ in range(CAPTURED_CALL):
            assert_alike(model, twin, torch.randn(batch, *x.shape[1:], device=graphed.DEVICE))
    graph = swinaccel.report(model).graphs[0]
    assert (graph.captured, graph.nbytes) == (2, 200)
    monkeypatch.setattr(replay, "memory_of", lambda device: 50.0)
    for _ in range(4):
        assert_alike(model, twin, torch.randn(5, *x.shape[1:], device=graphed.DEVICE))
    assert "graphs_memory" in swinaccel.report(model).graphs[0].reason
    for _ in range(3 * CAPTURED_CALL):
        assert_alike(model, twin, x)


def test_more_sizes_than_graphs_do_not_take_turns_to_be_captured(monkeypatch, tapes):
    made = []
    monkeypatch.setitem(capture.ENGINES, "cpu", lambda *given: made.append(1) or Tape(*given))
    monkeypatch.setattr(replay, "PATIENCE", 80)
    model, twin, x = captured()
    sizes = range(1, replay.MOST + 3)
    for batch in [*sizes] * 5:
        assert_alike(model, twin, x[:1].repeat(batch, 1, 1, 1))
    assert len(made) == replay.MOST
    for _ in range(30):
        call(model, x)
    for batch in sizes:
        assert_alike(model, twin, x[:1].repeat(batch, 1, 1, 1))
    assert len(made) == replay.MOST + 1


def test_replicas_of_one_call_are_not_looked_at(monkeypatch):
    rehearsed = []
    monkeypatch.setattr(replay, "compile_ahead", lambda *given: rehearsed.append(1))
    model, twin, x = captured()
    rehearsed.clear()
    for _ in range(CAPTURED_CALL):
        helpers.assert_close(call(model._replicate_for_data_parallel(), x), call(twin, x))
    assert not rehearsed


@pytest.mark.parametrize("what", ["hooks", "training"])
def test_what_is_put_right_is_captured_later(what):
    twin = helpers.randomize(MODELS["timm"][0]()).eval().to(graphed.DEVICE)
    model, x = accelerate(copy.deepcopy(twin), graphs=True), torch.randn(MODELS["timm"][1], device=graphed.DEVICE)
    hook = model.norm.register_forward_hook(lambda *_: None) if what == "hooks" else model.train()
    for _ in range(CAPTURED_CALL):
        call(model, x)
    assert what in swinaccel.report(model).graphs[0].reason
    hook.remove() if what == "hooks" else model.eval()
    for _ in range(CAPTURED_CALL):
        call(model, x)
    assert not replays(model)
    for _ in range(replay.PATIENCE + CAPTURED_CALL):
        call(model, x)
    assert_alike(model, twin, x)
    assert replays(model)
    assert swinaccel.report(model).graphs[0].reason is None


def test_threads_at_once():
    model, twin, x = captured()
    inputs = [x + place for place in range(8)]
    expected = [call(twin, one) for one in inputs]
    found = [None] * 8

    def run(place):
        for _ in range(5):
            found[place] = call(model, inputs[place])

    threads = [threading.Thread(target=run, args=(place,)) for place in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for ours, own in zip(found, expected, strict=True):
        helpers.assert_close(ours, own)


def test_verify_compares_a_replay():
    model, _, x = captured()
    result = swinaccel.verify(model, x)
    assert result, str(result)
    assert replays(model) >= 3


def test_only_the_first_signature_is_rehearsed(monkeypatch):
    rehearsed = []
    monkeypatch.setattr(replay, "compile_ahead", lambda *given: rehearsed.append(torch.is_grad_enabled()))
    model, _, x = captured()
    for batch in (2, 3, 4):
        call(model, torch.cat([x] * batch))
    model(x)
    model(x + 1)
    assert rehearsed == [False, True]


def test_memory_that_fsdp_may_give_back_is_looked_at_before_a_replay(tapes, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model, twin, x = captured()
    (one,) = state_of(model).graphs.captures.values()
    started = []
    monkeypatch.setattr(one, "replay", started.append)
    for every in (model, twin):
        every.head.fc.weight.data = 2 * every.head.fc.weight.data
    assert_alike(model, twin, x)
    assert not started
