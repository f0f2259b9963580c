"""A verdict is about exactly what was run: no setting, dtype, device or forward speaks for another."""

from __future__ import annotations

import functools
import pathlib
import sysconfig
import types

import helpers
import microsoft_models
import pytest
import torch
from helpers import BACKENDS, DEVICES
from torch import nn
from verdicts import assert_like_the_original, block_of, huggingface, statuses

import swinaccel

GAIN = 1.0
CONFIG = types.SimpleNamespace(gain=1.0, fused=False)


class ByClass(microsoft_models.WindowAttention):
    gain = 1.0

    def forward(self, x, mask=None):
        return super().forward(x, mask) * self.gain


class ByGlobal(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * GAIN


class ByConfig(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * CONFIG.gain


CHANGES = {
    "class": (ByClass, lambda patch, gain: patch.setattr(ByClass, "gain", gain)),
    "global": (ByGlobal, lambda patch, gain: patch.setitem(globals(), "GAIN", gain)),
    "object": (ByConfig, lambda patch, gain: patch.setattr(CONFIG, "gain", gain)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES)
def test_settings_outside_of_the_module(change, backend, monkeypatch):
    """Changed after one model was accelerated, before another of the kind is; and for the first at once."""
    kind, set_gain = CHANGES[change]
    x = torch.randn(2, 64, 16).to(DEVICES[backend])
    first, second = (block_of(kind).to(DEVICES[backend]) for _ in range(2))
    swinaccel.accelerate(first, backend=backend)
    for _ in range(2):
        assert_like_the_original(first, x)
    helpers.assert_accelerated(first)
    set_gain(monkeypatch, 3.0)
    swinaccel.accelerate(second, backend=backend)
    assert statuses(second) == ["original"]
    for model in (first, second):
        assert_like_the_original(model, x)
    (entry,) = swinaccel.report(first)
    assert entry.fallbacks == 1
    assert "changed after accelerate()" in entry.reason
    set_gain(monkeypatch, 1.0)
    assert_like_the_original(first, x)
    assert [entry.fallbacks for entry in swinaccel.report(first)] == [1]
    swinaccel.accelerate(second, backend=backend)
    assert statuses(second) == ["accelerated"]


class Odd(microsoft_models.WindowAttention):
    """Limits what is not finite, as code for half precision does."""

    def forward(self, x, mask=None):
        return torch.nan_to_num(super().forward(x, mask))


class Casting(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        out = super().forward(x, mask)
        return out.float() if out.dtype == torch.float16 else out


class HalfOnly(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        out = super().forward(x, mask)
        return out.clamp(-0.01, 0.01) if out.dtype == torch.bfloat16 else out


@pytest.mark.parametrize(("kind", "words"), [(Odd, "NaN"), (Casting, "gives torch.float32"), (HalfOnly, "bfloat16")])
def test_what_code_does_in_other_dtypes(kind, words):
    """By running it there, and not by what it is called."""
    (entry,) = swinaccel.plan(helpers.randomize(kind(16, (4, 4), 2)))
    assert entry.status == "original"
    assert words in entry.reason


class Autocasting(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        with torch.autocast("cuda", enabled=False):
            return super().forward(x, mask)


HALVED = {"xpu", "mps"}


def is_halved(x):
    return x.is_cuda


class ByDeviceType(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * (0.5 if x.device.type in HALVED else 1.0)


class ByDevice(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * (1.0 if x.device == torch.device("cpu") else 0.5)


class ByAFunction(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * (0.5 if is_halved(x) else 1.0)


class Moving(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        if type(self) is Moving and x.device != self.relative_position_index.device:
            self.relative_position_index = self.relative_position_index.to(x.device)
        return super().forward(x, mask) + torch.zeros(1, device=x.device)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Autocasting, "has to do with"),
        (ByDeviceType, "ByDeviceType.forward has to do with device.type, "),
        (ByDevice, "ByDevice.forward has to do with cpu, "),
        (ByAFunction, "test_verdicts.is_halved has to do with is_cuda, "),
    ],
)
def test_what_a_cpu_does_not_show(kind, words):
    (entry,) = swinaccel.plan(block_of(kind))
    assert words in entry.reason
    assert "which no run of a copy shows" in entry.reason


def test_tensors_that_go_where_the_input_is():
    (entry,) = swinaccel.plan(block_of(Moving))
    assert entry.status == "accelerated", entry.reason


class Proxy(nn.Module):
    """Passes on what it does not have."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args):
        self.calls += 1
        return self.module(*args)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


MODELS = {
    "timm": lambda: (helpers.timm_block((8, 8), shift=2), (torch.randn(2, 8, 8, 16),)),
    "timm-v2": lambda: (helpers.timm_block((8, 8), shift=2, v2=True), (torch.randn(2, 8, 8, 16),)),
    "torchvision": lambda: (helpers.torchvision_attention(shift=(2, 2)), (torch.randn(2, 8, 8, 16),)),
    "hf": huggingface,
    "official": lambda: (helpers.microsoft_block((8, 8), shift=2), (torch.randn(2, 64, 16),)),
}


@pytest.mark.parametrize("first", ["wrap", "accelerate"])
@pytest.mark.parametrize("name", MODELS)
def test_proxies_are_not_what_they_stand_for(name, first):
    module, inputs = MODELS[name]()
    if first == "wrap":
        model = swinaccel.accelerate(Proxy(module), backend="torch")
    else:
        model = Proxy(swinaccel.accelerate(module, backend="torch"))
    with torch.no_grad():
        found = helpers.tensors(model(*inputs))[0]
        with swinaccel.disabled():
            expected = helpers.tensors(module(*inputs))[0]
    helpers.assert_close(found, expected)
    assert model.calls == 1
    assert [entry.name for entry in swinaccel.report(model)] == ["module"]
    helpers.assert_accelerated(model, 1)
    assert [entry.name for entry in swinaccel.plan(model)] == ["module"]
    swinaccel.restore(model)
    assert statuses(model) == ["original"]


class Callable:
    def __init__(self, module):
        self.module, self.plain = module, module.forward

    def __call__(self, x):
        return 2 * self.plain(x)


REPLACED = {"partial": lambda part: helpers.doubled(part), "object": Callable}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", REPLACED)
@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "attn.softmax", "mlp.fc1", "norm1"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forwards_replaced_by_no_plain_function(backend, part, kind, when):
    model = helpers.timm_block((8, 8), shift=2).to(DEVICES[backend])
    x = torch.randn(2, 8, 8, 16).to(DEVICES[backend])

    def replace():
        module = model.get_submodule(part)
        module.forward = REPLACED[kind](module)

    if when == "before":
        replace()
    swinaccel.accelerate(model, backend=backend)
    if when == "after":
        assert_like_the_original(model, x)
        replace()
    for _ in range(2):
        assert_like_the_original(model, x)


@pytest.mark.parametrize("name", ["torchvision", "official"])
def test_a_forward_that_was_replaced_before_is_not_said_to_be_accelerated(name):
    model, inputs = MODELS[name]()
    model.forward = functools.partial(lambda own, *args: 2 * own(*args), model.forward)
    with torch.no_grad():
        expected = model(*inputs)
        swinaccel.accelerate(model, backend="torch")
        helpers.assert_close(model(*inputs), expected)
    entry = swinaccel.report(model).entries[0]
    assert (entry.name, entry.status) == ("", "original")
    assert "forward was replaced on this instance" in entry.reason


ADAPTER = """
class Adapter(Linear):
    def forward(self, x):
        return super().forward(x)

    def get_delta_weight(self):
        return self.weight.float() if self.weight.device.type == "cpu" else self.weight
"""


@pytest.mark.parametrize("folder", [sysconfig.get_paths()["purelib"], "/project"])
def test_layers_of_packages_may_merge_otherwise_on_cpus(folder):
    """As peft's do; in code of a project's own the word is enough to leave it alone."""
    path = pathlib.Path(folder, "adapters", "layer.py")
    space = {"Linear": nn.Linear, "__name__": "adapters.layer"}
    exec(compile(ADAPTER, str(path), "exec"), space)
    model = helpers.randomize(microsoft_models.WindowAttentionV2(16, (4, 4), 2))
    model.qkv.__class__ = space["Adapter"]
    (entry,) = swinaccel.plan(model)
    assert (entry.status == "accelerated") == (folder != "/project"), entry.reason
