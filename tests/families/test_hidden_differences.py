"""What a probe of one forward in eval mode would not see: gradients, limits, dtypes and dropout."""

from __future__ import annotations

import copy

import helpers
import microsoft_models
import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, randomize
from torch import nn

import swinaccel

KEEPS_VERDICTS = True


# What a probe of one forward in eval mode would not see.


class DropKey(microsoft_models.WindowAttention):
    def scores(self, q, k):
        scores = super().scores(q, k)
        return scores - 1e4 * torch.bernoulli(torch.full_like(scores, 0.3)) if self.training else scores


class Detached(microsoft_models.WindowAttention):
    def bias(self):
        return super().bias().detach()


class WithoutGradient(microsoft_models.WindowAttention):
    @torch.no_grad()
    def forward(self, x, mask=None):
        return super().forward(x, mask)


class Remembering(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        self.last = super().forward(x, mask)
        return self.last


class Prior(microsoft_models.WindowAttention):
    """A buffer that is zero until it is loaded."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("prior", torch.zeros(16, 16))

    def bias(self):
        return super().bias() + self.prior


class Annealed(microsoft_models.WindowAttention):
    temperature = None

    def __init__(self, *args):
        super().__init__(*args)
        self.temperature = 1.0

    def scores(self, q, k):
        return super().scores(q, k) / self.temperature


class LearnedScale(microsoft_models.WindowAttention):
    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Parameter(torch.full((self.num_heads, 1, 1), self.scale))


class OtherClamp(microsoft_models.WindowAttentionV2):
    def scores(self, q, k):
        cosine = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).mT
        return cosine * self.logit_scale.clamp(max=3.0).exp() + self.bias()


@pytest.mark.parametrize(
    "kind", [DropKey, Detached, WithoutGradient, Remembering, Prior, Annealed, LearnedScale, OtherClamp]
)
def test_differences_that_do_not_show_in_one_forward(kind):
    model = helpers.microsoft_block((8, 8), shift=2, v2=kind is OtherClamp)
    model.attn = kind(16, (4, 4), 2)
    randomize(model)
    if kind is OtherClamp:
        nn.init.constant_(model.attn.logit_scale, 1.0)
    (entry,) = swinaccel.plan(model)
    assert (entry.status, entry.name) == ("original", ""), entry


def limited(name, limit):
    """An attention whose method limits what it gives, as copies do that are to run in fp16."""

    def method(self, *args, **kwargs):
        return limit(getattr(microsoft_models.WindowAttention, name)(self, *args, **kwargs))

    return type("Limited", (microsoft_models.WindowAttention,), {name: method, "__module__": __name__})


LIMITS = {
    "clamp": lambda x: x.clamp(-20.0, 20.0),
    "far": lambda x: x.clamp(-60000.0, 60000.0),
    "minimum": lambda x: torch.minimum(x, torch.full_like(x, 50.0)),
    "gate": lambda x: torch.where(x > 100.0, 0.0, x),
    "dead-zone": lambda x: torch.where(x.abs() < 1e-4, 0.0, x),
    "hardtanh": lambda x: F.hardtanh(x, -30.0, 30.0),
}

HIDDEN = ("scores", "dead-zone")  # which no softmax shows


@pytest.mark.parametrize(
    ("name", "limit"),
    [(name, limit) for name in ("packed", "scores", "forward") for limit in LIMITS if (name, limit) != HIDDEN],
)
def test_limits_of_numbers_are_seen_wherever_they_lie(name, limit):
    model = helpers.microsoft_block((8, 8), shift=2)
    model.attn = limited(name, LIMITS[limit])(16, (4, 4), 2)
    (entry,) = swinaccel.plan(randomize(model))
    assert entry.status == "original"
    assert "outputs differ by" in entry.reason


def finite(self, x, mask=None):
    out = microsoft_models.WindowAttention.forward(self, x, mask)
    return out if out.isfinite().all() else torch.nan_to_num(out)


def in_half(self, x, mask=None):
    out = microsoft_models.WindowAttention.forward(self, x, mask)
    return out.clamp(-1.0, 1.0) if x.dtype is torch.float16 else out


@pytest.mark.parametrize(("forward", "words"), [(finite, "infinities and NaN"), (in_half, "in float16")])
def test_attention_that_decides_by_dtypes_and_what_is_finite(forward, words):
    model = helpers.microsoft_block((8, 8), shift=2)
    model.attn = type("Odd", (microsoft_models.WindowAttention,), {"forward": forward, "__module__": __name__})(
        16, (4, 4), 2
    )
    (entry,) = swinaccel.plan(randomize(model))
    assert entry.status == "original"
    assert words in entry.reason


def test_block_without_gradient_is_accelerated_at_its_attention():
    class WithoutGradient(microsoft_models.SwinTransformerBlock):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    model = randomize(WithoutGradient(16, (8, 8), 2, 4, 2))
    assert [entry.name for entry in swinaccel.plan(model).accelerated] == ["attn"]
    swinaccel.accelerate(model, backend="torch")
    assert not model(torch.randn(1, 64, 16)).requires_grad


class MinusInfinity(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, None if mask is None else torch.where(mask < -50, -1e9, mask))


def test_trap_15_mask_of_minus_infinity_is_another_one():
    """Between ordinary scores it cannot be told from -100."""
    model = helpers.microsoft_block((8, 8), shift=2)
    model.attn = MinusInfinity(16, (4, 4), 2)
    (entry,) = swinaccel.plan(randomize(model))
    assert entry.status == "original"


class DropHead(nn.Module):
    drop_prob = 0.5

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], x.shape[1], 1, 1) > self.drop_prob) / (1 - self.drop_prob)


def test_dropout_of_unknown_code_is_refused():
    model = helpers.timm_block((8, 8), shift=2)
    model.attn.attn_drop = DropHead()
    model.attn.fused_attn = False
    (entry,) = swinaccel.plan(model)
    assert entry.status == "original"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [nn.Dropout2d(0.5), nn.AlphaDropout(0.5)], ids=lambda d: str(type(d)))
def test_other_dropouts_drop_by_themselves(dropout, backend):
    """While they drop nothing they are none; else the original runs."""
    model = helpers.timm_block((8, 8), shift=2).to(helpers.DEVICES[backend])
    model.attn.attn_drop = dropout
    model.attn.fused_attn = False
    model.train()
    twin, x = copy.deepcopy(model), torch.randn(2, 8, 8, 16).to(helpers.DEVICES[backend])
    swinaccel.accelerate(model, backend=backend)
    for mode in (True, False):
        with torch.no_grad():
            outs = []
            for one in (model.train(mode), twin.train(mode)):
                torch.manual_seed(0)
                outs.append(one(x))
        helpers.assert_close(*outs)
    (entry,) = swinaccel.report(model)
    assert (entry.calls, entry.fallbacks) in ((0, 0), (2, 1))
