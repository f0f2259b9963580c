"""Tables, masks, indices and projections of another dtype than the model's."""

from __future__ import annotations

import copy

import helpers
import microsoft_models
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


class Converting(microsoft_models.WindowAttention):
    """Computes in its weights' dtype, whatever the block around it has."""

    def forward(self, x, mask=None):
        inside = self.qkv.weight.dtype
        return super().forward(x.to(inside), None if mask is None else mask.to(inside)).to(x.dtype)


@helpers.both_backends
@pytest.mark.parametrize("when", ["converted first", "accelerated first"])
def test_an_attention_that_converts_at_its_door(when, backend):
    model = helpers.microsoft_block((8, 8), shift=2)
    model.attn.__class__ = Converting
    device = helpers.DEVICES[backend]
    twin, x = copy.deepcopy(model.to(device)), torch.randn(2, 64, 16, device=device)
    if when == "accelerated first":
        helpers.assert_close(swinaccel.accelerate(model, backend=backend)(x), twin(x))
    for one in (model, twin):
        one.attn.half()
    if when == "converted first":
        swinaccel.accelerate(model, backend=backend)
    with torch.no_grad():
        helpers.assert_close(model(x), twin(x))
    (entry,) = swinaccel.report(model)
    assert "only its own code may convert" in entry.reason
