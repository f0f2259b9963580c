"""Edits of models, and ways to call them, after their calls became graphs."""

from __future__ import annotations

import helpers
import pytest
import torch
from edits import EDITS, WAYS
from graphed import call, captured, replays

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("name", ["timm", "Hugging Face"])
@pytest.mark.parametrize("edit", EDITS)
def test_edits_after_the_capture(edit, name):
    for number in (3,):
        model, twin, x = captured(name)
        for one in range(2):
            replayed = replays(model)
            changed = [EDITS[edit](every, number + one) for every in (model, twin)]
            model, twin = (new if new is not None else old for new, old in zip(changed, (model, twin), strict=True))
            outcomes = []
            for every in (model, twin):
                torch.manual_seed(0)
                try:
                    outcomes.append([call(every, x.to(next(every.parameters()).dtype)) for _ in range(4)])
                except Exception as error:
                    outcomes.append(type(error))
            if isinstance(outcomes[1], type):
                assert outcomes[0] is outcomes[1]
                break
            for found, expected in zip(*outcomes, strict=True):
                dtype = next(iter(helpers.tensors(expected))).dtype
                tolerance = 1e-5 if dtype.itemsize > 2 else 5e-2
                for ours, own in zip(helpers.tensors(found), helpers.tensors(expected), strict=True):
                    torch.testing.assert_close(ours, own, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert replayed


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_call_after_the_capture(way):
    model, twin, x = captured()
    found, expected = [], []
    for every, outcomes in ((model, found), (twin, expected)):
        for _ in range(2):
            torch.manual_seed(0)
            outcomes.append(WAYS[way](every, (x,)))
    for ours, own in zip(helpers.tensors(found), helpers.tensors(expected), strict=True):
        torch.testing.assert_close(ours.float(), own.float(), rtol=2e-2, atol=2e-2)
    helpers.assert_close(call(model, x), call(twin, x), 1e-3)
