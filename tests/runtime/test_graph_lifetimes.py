"""Graphs let go of what they hold, and leave nothing behind."""

from __future__ import annotations

import copy
import gc
import weakref

import graphed
import helpers
import pytest
import torch
from graphed import accelerate, assert_alike, call, captured, replays
from test_graphs import Head, Scaled
from test_states import MODELS

import swinaccel
from swinaccel.config import CAPTURED_CALL
from swinaccel.runtime.plan import state_of

pytestmark = pytest.mark.usefixtures("device")


def test_restore_and_copies_leave_graphs_behind():
    model, twin, x = captured()
    held = weakref.ref(next(iter(state_of(model).graphs.captures.values())))
    other = copy.deepcopy(model)
    assert not replays(other)
    with torch.no_grad():
        other.norm.weight.mul_(3)
    helpers.assert_close(call(model, x), call(twin, x))
    swinaccel.restore(model)
    gc.collect()
    assert held() is None
    assert_alike(model, twin, x)


def wrapped(model):  # as Hugging Face's accelerate does for autocast
    model._original_forward = model.forward


def hooked(model):
    model.norm.weight.register_hook(lambda grad: model and grad)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("change", [None, wrapped, hooked], ids=["plain", "bound method", "closure"])
def test_models_are_not_kept_alive(change, graphs):
    twin = helpers.randomize(MODELS["timm"][0]()).eval().to(graphed.DEVICE)
    model, x = accelerate(copy.deepcopy(twin), graphs=graphs), torch.randn(MODELS["timm"][1], device=graphed.DEVICE)
    if change is not None:
        change(model)
    if change is wrapped:
        change(model.layers[0].blocks[0])
    for _ in range(CAPTURED_CALL):
        helpers.assert_close(call(model, x), call(twin, x))
    references = weakref.ref(model), weakref.ref(model.layers[0].blocks[0])
    del model
    gc.collect()
    assert [one() for one in references] == [None, None]


class Finalized(Scaled):
    finalized = 0

    def __del__(self):
        Finalized.finalized += 1


def test_what_is_finalized_is_not_copied():
    model = accelerate(Finalized(MODELS["timm"][0]()).eval(), graphs=True)
    for _ in range(CAPTURED_CALL):
        call(model, torch.randn(MODELS["timm"][1], device=graphed.DEVICE))
    swinaccel.restore(model)
    gc.collect()
    assert not Finalized.finalized


def test_a_capture_that_fails_leaves_the_process_as_it_was():
    if graphed.DEVICE == "cpu":
        pytest.skip("the stand-in captures what reads results, which a CUDA graph cannot")
    twin = helpers.randomize(Head(MODELS["timm"][0]())).eval().to(graphed.DEVICE)
    model = accelerate(copy.deepcopy(twin), graphs=True)
    for _ in range(4):
        x = torch.randn(MODELS["timm"][1], device=graphed.DEVICE)
        assert_alike(model, twin, x)
    (graph,) = swinaccel.report(model).graphs
    assert "capturing failed" in graph.reason
    assert not graph.replays
    swinaccel.accelerate(model, graphs="auto")
    for _ in range(4):
        assert_alike(model, twin, x)
    assert replays(model) == 2


def test_memory_is_given_back():
    model, _, _ = captured()
    assert swinaccel.report(model).graphs[0].nbytes > 0
    swinaccel.restore(model)
    gc.collect()
    if graphed.DEVICE == "cuda":
        for _ in range(3):
            del model
            model, _, x = captured()
            assert_alike(model, model, x)
            swinaccel.restore(model)
            gc.collect()
            torch.cuda.empty_cache()
            reserved = torch.cuda.memory_reserved()
        assert reserved - torch.cuda.memory_allocated() < 2**28
