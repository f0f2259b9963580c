"""Tables, masks and indices of another dtype than the model's."""

from __future__ import annotations

import helpers
import pytest
import torch
from torch import nn

import swinaccel


@pytest.mark.parametrize("name", ["relative_position_bias_table", "attn_mask"])
def test_float64_is_left_to_the_original_which_raises(name):
    model = helpers.microsoft_block((8, 8), shift=2)
    swinaccel.accelerate(model)
    if name == "attn_mask":
        model.attn_mask = model.attn_mask.double()
    else:
        model.attn.relative_position_bias_table = nn.Parameter(model.attn.relative_position_bias_table.double())
    with torch.no_grad(), pytest.raises(RuntimeError, match="Double"):
        model(torch.randn(2, 64, 16))
    (entry,) = swinaccel.report(model)
    assert "is of torch.float64, the input of torch.float32" in entry.reason


def test_an_index_of_int32_is_one():
    model = helpers.microsoft_block((8, 8), shift=2)
    model.attn.relative_position_index = model.attn.relative_position_index.int()
    helpers.check(model, torch.randn(2, 64, 16), count=1)
