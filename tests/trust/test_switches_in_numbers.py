"""Numbers, sizes, chances and wrappers that act as switches: what one proof must not be taken from another for."""

from __future__ import annotations

import copy
import os

import descendant_models
import helpers
import microsoft_models
import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import swinaccel

X = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(1))


class Clipped(microsoft_models.WindowAttention):
    clip = float("inf")

    def forward(self, x, mask=None):
        return super().forward(x, mask).clamp(max=self.clip)


class Capped(microsoft_models.WindowAttention):
    cap = -1.0

    def forward(self, x, mask=None):
        out = super().forward(x, mask)
        return out if self.cap < 0 else out.tanh()


class Gained(microsoft_models.WindowAttention):
    gain = numpy.float64(1.0)

    def forward(self, x, mask=None):
        return super().forward(x, mask) * self.gain


class Buffered(microsoft_models.WindowAttention):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("limit", torch.tensor(float("inf")))

    def forward(self, x, mask=None):
        return super().forward(x, mask).clamp(max=self.limit)


class WithoutBias(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * (2.0 if self.qkv.bias is None else 1.0)


class Narrow(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * (2.0 if self.qkv.in_features > 16 else 1.0)


class Skipping(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        out = super().forward(x, mask)
        return 0 * out if self.training and torch.rand(1).item() < 0.01 else out


class Environed(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * float(os.getenv("FACTOR_OF_A_TEST", "1"))


def block(kind, dim=16, **changes):
    model = helpers.microsoft_block((8, 8), shift=2, dim=dim)
    model.attn = kind(dim, (4, 4), 2)
    for name, value in changes.items():
        setattr(model.attn, name, value)
    return helpers.randomize(model)


def assert_alike(model, x=X):
    twin = copy.deepcopy(model)
    swinaccel.accelerate(model, backend="torch")
    with torch.no_grad():
        helpers.assert_close(model(x), twin(x))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Clipped, {"clip": 0.1}),
        (Capped, {"cap": 1.0}),
        (Gained, {"gain": numpy.float64(0.5)}),
    ],
)
def test_numbers_that_switch(kind, changes):
    assert_alike(block(kind, **{name: getattr(kind, name) for name in changes}))
    assert_alike(block(kind, **changes))


def test_buffers_of_one_number():
    assert_alike(block(Buffered))
    model = block(Buffered)
    model.attn.limit.fill_(0.1)
    assert_alike(model)


def test_biases_that_layers_lack():
    assert_alike(block(WithoutBias))
    model = block(WithoutBias)
    model.attn.qkv.bias = None
    assert_alike(model)


def test_sizes_of_layers():
    assert_alike(block(Narrow))
    assert_alike(block(Narrow, dim=32), torch.randn(2, 64, 32))


@pytest.mark.parametrize("kind", [Skipping, Environed])
def test_chance_and_environment_are_refused(kind):
    (entry,) = swinaccel.plan(block(kind))
    assert entry.status == "original"


class Own(microsoft_models.SwinTransformerBlock):
    def forward(self, x):
        return super().forward(x)


def test_a_class_that_was_replaced_spoils_no_other_model(caplog):
    kind = Own
    model = helpers.randomize(kind(16, (8, 8), 2, 4, 2))
    own = vars(kind)["forward"]
    swinaccel.accelerate(model, backend="torch")
    ours = kind.forward
    kind.forward = lambda self, x: own(self, x)
    swinaccel.restore(model)
    assert "keeps a dispatcher" in caplog.text
    other = swinaccel.accelerate(block(microsoft_models.WindowAttention), backend="torch")
    swinaccel.restore(other)
    kind.forward = ours
    swinaccel.restore(model)
    assert vars(kind)["forward"] is own


def test_precision_by_names(monkeypatch):
    """PyTorch refuses to give its older setting once the newer ones were used."""

    def refuse():
        raise RuntimeError("mix of legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    assert_alike(nn.Sequential(block(microsoft_models.WindowAttention, dim=16)), torch.randn(8, 64, 16))


class FewWindows(microsoft_models.WindowAttention):
    """Leaves out the mask of one window."""

    def forward(self, x, mask=None):
        return super().forward(x, None if mask is not None and len(mask) == 1 else mask)


class Squeezed(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask).squeeze(0)


@pytest.mark.parametrize("kind", [FewWindows, Squeezed])
def test_what_one_window_shows(kind):
    (entry,) = swinaccel.plan(helpers.randomize(kind(16, (4, 4), 2)))
    assert entry.status == "original"


class ShiftingOnlyLarger(descendant_models.SwinIRBlock):
    def forward(self, x, x_size):
        own, self.shift_size = self.shift_size, 0 if min(x_size) <= self.window_size else self.shift_size
        try:
            return super().forward(x, x_size)
        finally:
            self.shift_size = own


def test_what_an_image_of_one_window_shows():
    (entry, *_) = swinaccel.plan(helpers.randomize(ShiftingOnlyLarger(16, (8, 8), 2, 4, 2)))
    assert entry.status == "original" or entry.family == "window_attention"


class Wrapped(microsoft_models.WindowAttention):
    """Drops its weights, and what else `drop` says."""

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.scores(q, k)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)
        return self.proj(self.mix(self.softmax(scores), v).transpose(1, 2).flatten(2))

    def mix(self, weights, v):
        return self.attn_drop(weights) @ v


class Twice(Wrapped):
    def mix(self, weights, v):
        return self.attn_drop(self.attn_drop(weights)) @ v


class Harder(Wrapped):
    def mix(self, weights, v):
        return F.dropout(weights, min(1.0, 2 * self.attn_drop.p), self.attn_drop.training) @ v


class OfValues(Wrapped):
    def mix(self, weights, v):
        return weights @ self.attn_drop(v)


class ByRows(Wrapped):
    def mix(self, weights, v):
        return (weights * self.attn_drop(torch.ones_like(weights[..., :1, :]))) @ v


@pytest.mark.parametrize("kind", [Wrapped, Twice, Harder, OfValues, ByRows])
def test_weights_are_dropped_at_their_rate(kind):
    model = helpers.randomize(kind(16, (4, 4), 2)).to(helpers.TRITON_DEVICE)
    swinaccel.accelerate(model, backend="triton")
    assert swinaccel.report(model).accelerated
    model.train()
    model.attn_drop.p = 0.3
    model(torch.randn(6, 16, 16).to(helpers.TRITON_DEVICE))
    (entry,) = swinaccel.report(model)
    assert entry.fallbacks == (kind is not Wrapped), entry.reason
