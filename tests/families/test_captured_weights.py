"""Attention weights of calls that are captured: what nobody can read is not computed, all else inside the capture."""

from __future__ import annotations

import copy

import changed_models as models
import helpers
import pytest
import torch
from helpers import randomize
from tape import Tape
from torch import nn

import swinaccel
from swinaccel.runtime import weights
from swinaccel.runtime.graphs import capture
from swinaccel.spec.reference import section_weights

KEEPS_VERDICTS = True


class Keeps(nn.Module):
    """It reads none of the weights, and keeps those of the last block, or all where it fails."""

    def __init__(self, stage, fails=False):
        super().__init__()
        self.stage, self.fails, self.kept = stage, fails, []

    def forward(self, x):
        x, mean = self.stage(x)
        self.kept.append(mean)
        if self.fails:
            raise ValueError("late")
        return x


class Streams:
    """Which stream is captured, if one is; and how often weights were computed, and where."""

    def __init__(self, monkeypatch):
        self.current, self.computed = None, []
        monkeypatch.setattr(weights, "captured_stream", lambda: self.current)
        monkeypatch.setattr(weights, "section_weights", self.compute)

    def compute(self, *args):
        self.computed.append(self.current)
        return section_weights(*args)

    def captured(self, model, x, stream=7):
        """Return what a call gives inside a capture, which is over then."""
        self.current = stream
        try:
            return model(x)
        finally:
            self.current = None


@pytest.fixture
def streams(monkeypatch):
    with torch.no_grad():
        yield Streams(monkeypatch)


def accelerated(wrap=lambda stage: stage, **options):
    """Return an original, its accelerated twin, which was called once, and their input."""
    stage, x = models.WeightsStage(16, (8, 8), 2, 4), torch.randn(2, 64, 16)
    model = randomize(wrap(stage)).eval()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch", **options)
    twin(x)
    return model, twin, x


def test_weights_that_nobody_can_read_are_not_computed(streams):
    model, twin, x = accelerated(models.Unread)
    helpers.assert_close(streams.captured(twin, x), model(x))
    assert not streams.computed
    helpers.assert_accelerated(twin, 2)


def test_weights_that_are_read_inside_are_computed_there(streams):
    model, twin, x = accelerated(lambda stage: models.Unread(stage, heatmap=True))
    for one, other in zip(streams.captured(twin, x), model(x), strict=True):
        helpers.assert_close(one + 0, other)
    assert streams.computed == [7, 7]


def test_weights_that_are_returned_are_computed_before_the_capture_is_over(streams):
    model, twin, x = accelerated()
    found = streams.captured(twin, x)
    assert streams.computed == [7, 7]
    helpers.assert_close(found[1] + 0, model(x)[1])
    assert streams.computed == [7, 7]


@pytest.mark.parametrize("fails", [False, True])
def test_weights_that_are_kept_are_computed_before_the_capture_is_over(fails, streams):
    model, twin, x = accelerated(Keeps)
    twin.fails, twin.kept = fails, []
    if fails:
        with pytest.raises(ValueError, match="late"):
            streams.captured(twin, x)
    else:
        streams.captured(twin, x)
    assert streams.computed == [7, 7]
    helpers.assert_close(twin.kept[0] + 0, model.stage(x)[1])
    assert streams.computed == [7, 7]


def test_a_part_of_a_model_that_is_captured_computes_them_at_once(streams):
    """Nobody tells who holds them when its call is over."""
    model, twin, x = accelerated(models.Unread)
    found = streams.captured(twin.stage.blocks[1], x)
    assert type(found[1]) is torch.Tensor
    helpers.assert_close(found[1], model.stage.blocks[1](x)[1])
    assert "a CUDA graph is captured of less than the whole model" in swinaccel.report(twin).entries[1].reason


def test_a_stream_beside_the_captured_one_computes_them_at_once(streams):
    """The end of the call could not wait for it."""

    class Beside(models.Unread):
        def forward(self, x):
            before, streams.current = streams.current, streams.current and 8
            out = super().forward(x)
            streams.current = before
            return out

    model, twin, x = accelerated(Beside)
    helpers.assert_close(streams.captured(twin, x), model(x))
    assert [entry.fallbacks for entry in swinaccel.report(twin)] == [1, 1]


def test_weights_of_before_stay_what_they_are_where_a_capture_reads_them(streams):
    """What is captured runs at replays only."""
    model, twin, x = accelerated(models.Unread)
    found, expected = twin.stage(x)[1], model.stage(x)[1]
    streams.captured(lambda one: one + 0, found)
    assert streams.computed == [7, 7]
    helpers.assert_close(found + 0, expected)
    assert streams.computed == [7, 7, None, None]


def test_many_models_in_one_container(streams):
    model, _, x = accelerated(lambda stage: nn.ModuleList([models.Unread(stage)])[0])
    both = swinaccel.accelerate(nn.Sequential(copy.deepcopy(model), nn.Identity()), backend="torch")
    both(x)
    helpers.assert_close(streams.captured(both, x), model(x))
    assert not streams.computed
    assert not hasattr(nn.Sequential, "_swinaccel")  # it is everybody's
    swinaccel.restore(both)
    assert not any("_swinaccel" in one.__dict__ for one in both.modules())


class Again(Tape):
    """Captured functions that run again at a replay, and are captured on a stream of their own."""

    def capture(self, run):
        def captured():
            return self.streams.captured(lambda _: run(), None)

        outs = captured()

        def replay():
            for old, new in zip(helpers.tensors(outs), helpers.tensors(captured()), strict=True):
                old.copy_(new)

        return replay, outs


@pytest.mark.parametrize("count", [0, 2])
def test_graphs_of_a_whole_model(count, streams, monkeypatch):
    """What it returns is computed by every replay; what it does not is in no graph."""
    monkeypatch.setitem(capture.ENGINES, "cpu", Again)
    monkeypatch.setattr(Again, "streams", streams, raising=False)
    model, twin, x = accelerated((lambda stage: stage) if count else models.Unread, graphs=True)
    for scale in (1, 2, 3, 4):
        found, expected = twin(scale * x), model(scale * x)
        for one, other in zip(helpers.tensors(found), helpers.tensors(expected), strict=True):
            helpers.assert_close(one + 0, other)
    (graph,) = swinaccel.report(twin).graphs
    assert (graph.captured, graph.reason) == (1, None)
    assert graph.replays >= 2
    assert set(streams.computed) == ({7} if count else set())
