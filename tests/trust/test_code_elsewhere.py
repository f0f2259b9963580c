"""Code that runs elsewhere than in Python, and code that writes elsewhere than to its module."""

from __future__ import annotations

import helpers
import microsoft_models as official
import pytest
import torch
from torch import nn

import swinaccel


class Doubled(nn.Softmax):
    def forward(self, input):
        return torch.softmax(input, -1) * 2


@pytest.mark.parametrize("name", ["attn.softmax", "attn.qkv", "mlp"])
def test_a_scripted_part(name):
    model = helpers.microsoft_block((8, 8), shift=2)
    model.set_submodule(name, torch.jit.script(model.get_submodule(name)))
    helpers.check(model, torch.randn(2, 64, 16), count=1)


def test_scripted_parts_are_told_apart():
    for softmax, count in ((nn.Softmax(-1), 1), (Doubled(-1), 0)):
        model = helpers.microsoft_block((8, 8))
        model.attn.softmax = torch.jit.script(softmax)
        assert len(swinaccel.plan(model).accelerated) == count


SHAPES = []


class Remembering(official.WindowAttention):
    def forward(self, x, mask=None):
        SHAPES.append(x.shape)
        return super().forward(x, mask)


FIRST = {}


class Memo(official.WindowAttention):
    def forward(self, x, mask=None):
        FIRST.setdefault("heads", self.num_heads)
        return super().forward(x, mask)


def test_a_list_elsewhere_that_grows_with_every_call_is_the_reason():
    (entry,) = swinaccel.plan(Remembering(16, (4, 4), 2))
    assert entry.reason == "its forward changes, outside of the module, what its code reads"


def test_what_is_kept_once_does_no_harm():
    helpers.check(helpers.randomize(Memo(16, (4, 4), 2)), torch.randn(4, 16, 16), count=1)
