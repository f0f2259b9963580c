"""What user code switches, counts or replaces, before accelerate() and after: seen, or the original runs."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import helpers
import microsoft_models
import pytest
import torch
import torch.nn.functional as F
from helpers import TRITON_DEVICE
from torch import nn
from torch.overrides import TorchFunctionMode
from verdicts import statuses

import swinaccel
from swinaccel import layers


class Switched(microsoft_models.WindowAttention):
    """An attention with something of its own, which at first does nothing."""

    def __init__(self, *args, fn=torch.softmax):
        super().__init__(*args)
        self.fn, self.extra, self.flag, self.gates = fn, None, False, {"out": 1.0}
        self.register_parameter("gate", None)

    def scores(self, q, k):
        return super().scores(q, k) if self.extra is None else super().scores(q, k) + self.extra

    def forward(self, x, mask=None):
        out = super().forward(x, mask) * self.gates["out"]
        if self.fn is not torch.softmax:
            out = out + self.fn(out, -1)
        if self.gate is not None:
            out = out * self.gate
        return -out if self.flag else out


def block(**options):
    model = helpers.microsoft_block((8, 8), shift=2)
    model.attn = Switched(16, (4, 4), 2, **options)
    return helpers.randomize(model)


def assert_as_before(model, x):
    with torch.no_grad():
        found = model(x)
        with swinaccel.disabled():
            expected = model(x)
    helpers.assert_close(found, expected)
    return found


KINDS = {
    "function": lambda: block(fn=F.softmin),
    "mapping": lambda: with_gates(0.5),
    "tensor": lambda: with_extra(torch.randn(2, 16, 16)),
}


def with_gates(gate):
    model = block()
    model.attn.gates["out"] = gate
    return model


def with_extra(extra):
    model = block()
    model.attn.extra = extra
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_is_not_judged_by_another(kind):
    assert statuses(swinaccel.accelerate(block(), backend="torch")) == ["accelerated"]
    model = swinaccel.accelerate(KINDS[kind](), backend="torch")
    assert statuses(model) == ["original"]
    assert_as_before(model, torch.randn(2, 64, 16))
    assert statuses(swinaccel.accelerate(block(), backend="torch")) == ["accelerated"]


class Settings:
    gate = 1.0


class Configured(microsoft_models.WindowAttention):
    def __init__(self, *args):
        super().__init__(*args)
        self.settings = Settings()

    def forward(self, x, mask=None):
        return super().forward(x, mask) * self.settings.gate


def test_objects_are_kinds_of_their_own_and_are_not_kept():
    def configured(gate):
        model = helpers.microsoft_block((8, 8), shift=2)
        model.attn = Configured(16, (4, 4), 2)
        model.attn.settings.gate = gate
        return helpers.randomize(model)

    first, second = configured(1.0), configured(0.5)
    assert statuses(swinaccel.accelerate(first, backend="torch")) == ["accelerated"]
    assert statuses(swinaccel.accelerate(second, backend="torch")) == ["original"]
    settings = weakref.ref(first.attn.settings)
    del first
    gc.collect()
    assert settings() is None


class Stepping(microsoft_models.WindowAttention):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, x, mask=None):
        out = super().forward(x, mask)
        return out * 2 if self.step >= 10 else out


class Counting(microsoft_models.WindowAttention):
    calls = 0

    def forward(self, x, mask=None):
        self.calls += 1
        return super().forward(x, mask)


class Noting(microsoft_models.WindowAttention):
    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def forward(self, x, mask=None):
        self.seen.append(tuple(x.shape))
        return super().forward(x, mask)


@pytest.mark.parametrize(
    ("kind", "words"), [(Stepping, "may be a switch"), (Counting, "changes attn.calls"), (Noting, "changes attn.seen")]
)
def test_counters(kind, words):
    model = helpers.microsoft_block((8, 8), shift=2)
    model.attn = kind(16, (4, 4), 2)
    (entry,) = swinaccel.plan(helpers.randomize(model))
    assert entry.status == "original"
    assert words in entry.reason


@pytest.mark.parametrize("kind", ["Swin", "Swinv2"])
def test_arguments_that_only_a_subclass_knows(kind):
    layer = helpers.huggingface_layer(kind, shift=2)

    def forward(self, hidden_states, input_dimensions, *args, prompt=None, **kwargs):
        hidden_states = hidden_states if prompt is None else hidden_states + prompt
        return super(type(self), self).forward(hidden_states, input_dimensions, *args, **kwargs)

    layer.__class__ = type("Prompted", (type(layer),), {"forward": forward, "__module__": __name__})
    x, prompt = torch.randn(2, 64, 16), torch.randn(16)
    with torch.no_grad():
        expected = layer(x, (8, 8), prompt=prompt)[0]
        swinaccel.accelerate(layer, backend="torch")
        helpers.assert_close(layer(x, (8, 8), prompt=prompt)[0], expected)


def test_arguments_that_nobody_knows():
    layer = swinaccel.accelerate(helpers.huggingface_layer("Swinv2", shift=2), backend="torch")
    with torch.no_grad(), pytest.raises(TypeError, match="bogus"):
        layer(torch.randn(2, 64, 16), (8, 8), bogus=1)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_layers_whose_class_was_patched(kind, monkeypatch):
    """At every call, the first and those that remember it."""
    plain = kind.forward

    @functools.wraps(plain)
    def forward(self, x):
        return plain(self, x).clamp(-0.5, 0.5)

    model = helpers.timm_block((8, 8), shift=2).to(TRITON_DEVICE)
    x = torch.randn(2, 8, 8, 16).to(TRITON_DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", forward)
        swinaccel.accelerate(model, backend="triton")
        for _ in range(3):
            assert_as_before(model, x)


def test_what_pytorch_wrote_is_told_by_its_code():
    @functools.wraps(nn.Linear.forward)
    def forward(self, x):
        return x

    assert layers.is_torch_function(nn.Linear.forward)
    assert not layers.is_torch_function(forward)
    assert not layers.is_torch_function(len)
    assert all(layers._FORWARDS.values())


def test_looking_at_a_parametrized_layer_computes_nothing():
    """Spectral norm makes a step of its power iteration whenever its weight is read in training."""
    model = helpers.timm_block((64, 64), shift=2)
    nn.utils.parametrizations.spectral_norm(model.mlp.fc1)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    x = torch.randn(4, 64, 64, 16)
    states = []
    for one in (model, twin):
        one.train()(x)
        states.append(one.mlp.fc1.parametrizations.weight[0]._u)
    assert torch.equal(*states)


def test_modes_that_replace_functions():
    class Limited(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            return out.clamp(-0.1, 0.1) if function is F.linear else out

    model = swinaccel.accelerate(helpers.timm_block((8, 8), shift=2), backend="torch")
    x = torch.randn(2, 8, 8, 16)
    with Limited():
        assert_as_before(model, x)
    assert "a torch function mode is active" in swinaccel.report(model).entries[0].reason
    with torch.device("cpu"), torch.no_grad():
        model(x)
    assert swinaccel.report(model).entries[0].fallbacks == 1
