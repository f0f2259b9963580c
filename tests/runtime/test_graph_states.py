"""Random sequences of edits and calls of a model whose calls, of inference and training, are graphs."""

from __future__ import annotations

import os
import time

import hypothesis
import pytest
import test_states
from hypothesis.stateful import run_state_machine_as_test
from tape import Tape

from swinaccel.runtime.graphs import capture

SECONDS = float(os.environ.get("GRAPH_STATES_SECONDS", "600"))  # of the long run


class GraphStates(test_states.States):
    common = {"graphs": True}  # noqa: RUF012
    calls = 3  # by then a way is a graph
    until = float("inf")
    compared = 0

    def compare(self, way: str) -> None:
        if time.monotonic() < self.until:
            super().compare(way)
            GraphStates.compared += 1


@pytest.mark.parametrize("seconds", [12, pytest.param(SECONDS, marks=pytest.mark.long)], ids=["quick", "long"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_states_of_graphs(device, seconds, monkeypatch):
    monkeypatch.setattr(GraphStates, "device", device)
    monkeypatch.setattr(GraphStates, "backend", "triton" if device == "cuda" else "torch")
    if device == "cpu":
        monkeypatch.setitem(capture.ENGINES, "cpu", Tape)
        # Backwards of 16-bit operators on CPUs resize their outputs, which the stand-in cannot record.
        edits = {name: one for name, one in test_states.EDITS.items() if name not in ("half", "bfloat16")}
        monkeypatch.setattr(test_states, "EDITS", edits)
    monkeypatch.setattr(GraphStates, "compared", 0)
    monkeypatch.setattr(GraphStates, "until", time.monotonic() + seconds)
    settings = hypothesis.settings(max_examples=8, stateful_step_count=12)
    while time.monotonic() < GraphStates.until:
        run_state_machine_as_test(GraphStates, settings=settings)
    print(f"{GraphStates.compared} comparisons on {device}")
    assert GraphStates.compared
