"""What tells modules apart before a proof about one is taken for a proof about the other."""

from __future__ import annotations

import functools
import gc
import types
import weakref

import helpers
import microsoft_models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import swinaccel
from swinaccel.trust.fingerprint import Untraceable, fingerprint, is_dead
from swinaccel.trust.registry import Reading, Registry

GAIN = 1.0
CONFIG = types.SimpleNamespace(gain=1.0, table={"gain": 1.0}, steps=[1.0])


class Settings:
    gain = 1.0


def helper(x):
    return x * GAIN


class Module(nn.Module):
    """Reads settings from all kinds of places."""

    by_class = 1.0

    def __init__(self):
        super().__init__()
        self.flag, self.rate, self.count, self.options, self.note = False, 0.5, 1, {"gain": [1.0]}, "unread"
        self.function = F.relu
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        x = helper(self.layer(x)) * self.by_class * self.rate * self.count * self.options["gain"][0]
        x = x * CONFIG.gain * CONFIG.table["gain"] * CONFIG.steps[0] * Settings.gain
        return self.function(-x if self.flag else self.inner(x))

    def inner(self, x):
        return x


def of(module):
    return fingerprint(module.named_modules())


CHANGES = {
    "class": lambda module, patch: patch.setattr(Module, "by_class", 3.0),
    "global of a helper": lambda module, patch: patch.setitem(globals(), "GAIN", 3.0),
    "object": lambda module, patch: patch.setattr(CONFIG, "gain", 3.0),
    "mapping of an object": lambda module, patch: patch.setitem(CONFIG.table, "gain", 3.0),
    "list of an object": lambda module, patch: patch.setattr(CONFIG, "steps", [3.0]),
    "class as a namespace": lambda module, patch: patch.setattr(Settings, "gain", 3.0),
    "method": lambda module, patch: patch.setattr(Module, "inner", lambda self, x: -x),
    "helper": lambda module, patch: patch.setitem(globals(), "helper", lambda x: -x),
    "flag": lambda module, patch: setattr(module, "flag", True),
    "count": lambda module, patch: setattr(module, "count", True),
    "mapping": lambda module, patch: module.options["gain"].__setitem__(0, 3.0),
    "function": lambda module, patch: setattr(module, "function", F.gelu),
    "bound method": lambda module, patch: setattr(module, "function", module.layer.forward),
    "partial": lambda module, patch: setattr(module, "function", functools.partial(F.relu, inplace=True)),
    "forward": lambda module, patch: setattr(module, "forward", functools.partial(Module.forward, module)),
    "submodule": lambda module, patch: setattr(module, "layer", nn.Identity()),
    "function of PyTorch's": lambda module, patch: patch.setattr(F, "relu", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_read_counts(change, monkeypatch):
    module, before = Module(), of(Module())
    assert of(module) == before
    CHANGES[change](module, monkeypatch)
    assert of(module) != before


@pytest.mark.parametrize("name", ["note", "rate", "window_size", "unknown"])
def test_what_is_not_read_or_read_live_does_not_count(name):
    module, before = Module(), of(Module())
    setattr(module, name, 7.0)
    module.layer.weight.data.add_(1)
    assert of(module) == before


class Wrapping(Module):
    """A subclass with a forward that a decorator has wrapped."""

    @functools.wraps(Module.forward)
    def forward(self, x):
        return super().forward(x) * CONFIG.gain


def test_wrapped_methods_are_followed(monkeypatch):
    module, before = Wrapping(), of(Wrapping())
    assert before != of(Module())
    monkeypatch.setattr(Module, "inner", lambda self, x: -x)
    assert of(module) != before


def test_closures_count():
    def make(gain):
        class Scaled(nn.Module):
            def forward(self, x):
                return x * gain

        return Scaled()

    assert of(make(1.0)) == of(make(1.0))
    assert of(make(1.0)) != of(make(2.0))


def test_tensors_count_by_identity_and_version():
    module = Module()
    module.options = torch.ones(1)
    before = of(module)
    assert of(module) == before
    module.options.add_(1)
    assert of(module) != before


def test_what_cannot_be_followed_is_said():
    module = Module()
    module.options = dict.fromkeys(range(5000), 1.0)
    with pytest.raises(Untraceable, match="more values"):
        of(module)
    for value, name in (((number for number in ()), "a generator"), (object(), "a object")):
        module.options = value
        with pytest.raises(Untraceable, match=name):
            of(module)


def test_proofs_keep_no_class_alive():
    def make():
        class Temporary(microsoft_models.WindowAttention):
            def forward(self, x, mask=None):
                return super().forward(x, mask) * 1

        block = helpers.microsoft_block((8, 8), shift=2)
        block.attn = Temporary(16, (4, 4), 2)
        swinaccel.accelerate(helpers.randomize(block), backend="torch")
        with torch.no_grad():
            block(torch.randn(2, 64, 16))
        helpers.assert_accelerated(block)
        swinaccel.restore(block)
        return weakref.ref(Temporary)

    made = [make() for _ in range(3)]
    gc.collect()
    assert [one() for one in made] == [None] * 3


def test_the_registry_drops_what_is_gone(monkeypatch):
    monkeypatch.setattr("swinaccel.trust.registry._MOST", 3)
    registry = Registry()

    def key(number):
        function = types.FunctionType(compile(f"def f(x): return x + {number}", "", "exec").co_consts[0], {})
        holder = type("Holder", (nn.Module,), {"forward": function})()
        return of(holder), holder

    kept = [key(number) for number in range(2)]
    gone, holder = key(5)
    for one in (kept[0][0], kept[1][0], gone):
        registry.record(one, Reading())
    del holder
    gc.collect()
    assert is_dead(gone)
    registry.record(key(6)[0], "no")
    assert registry.verdict(kept[0][0]) == Reading()
    assert len(registry._verdicts) == 3
