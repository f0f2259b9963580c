"""Code that runs elsewhere than in Python, and code that writes elsewhere than to its module."""

from __future__ import annotations

import helpers
import microsoft_models as official
import pytest
import torch
import torch.nn.functional as F
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


class TensorClamp(official.WindowAttentionV2):
    """The limit of the logits as the official code has it: a number that was rounded to float32."""

    def scores(self, q, k):
        limit = torch.log(torch.tensor(1.0 / 0.01)).to(q.device)
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        return cosine * self.logit_scale.clamp(max=limit).exp() + self.bias()


@pytest.mark.parametrize(("heads", "shift"), [(2, 1), (8, 2)])
def test_a_constant_in_float32_is_no_other_one(heads, shift):
    block = helpers.microsoft_block((8, 8), 4, shift, heads, v2=True)
    block.attn = TensorClamp(16, (4, 4), heads)
    block.attn.cpb_mlp = nn.Sequential(nn.Linear(2, 32), nn.ReLU(inplace=True), nn.Linear(32, heads, bias=False))
    (entry,) = swinaccel.plan(block)
    assert (entry.family, entry.status) == ("microsoft", "accelerated")
