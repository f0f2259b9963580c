"""Functions and methods that somebody replaces, in PyTorch, in a library or in a class, before accelerate or after."""

from __future__ import annotations

import copy

import helpers
import microsoft_models as official
import pytest
import timm.models.swin_transformer as timm_swin
import torch
import torch.nn.functional as F
import torchvision.models.swin_transformer as torchvision_swin
from tape import Tape
from torch import nn

import swinaccel
from swinaccel.config import CAPTURED_CALL
from swinaccel.runtime.graphs import capture

MODELS = {
    "timm": lambda: helpers.timm_block((8, 8), shift=2),
    "torchvision": helpers.torchvision_attention,
    "torchvision V2": lambda: helpers.torchvision_attention(v2=True),
    "official": lambda: helpers.microsoft_block((8, 8), shift=2),
}
INPUTS = {"official": (2, 64, 16)}


def twins(name):
    twin = helpers.randomize(MODELS[name]())
    return copy.deepcopy(twin), twin, torch.randn(INPUTS.get(name, (2, 8, 8, 16)))


def call(model, x):
    with torch.no_grad():
        return model(x)


def doubled(function):
    return lambda *args, **options: 2 * function(*args, **options)


@pytest.mark.parametrize("first", ["accelerated first", "patched first"])
@pytest.mark.parametrize(
    ("name", "namespace", "function"),
    [
        ("official", F, "softmax"),  # by nn.Softmax
        ("official", nn.Softmax, "forward"),
        ("torchvision", F, "softmax"),
        ("torchvision", torchvision_swin, "shifted_window_attention"),
        ("torchvision V2", F, "normalize"),
        ("timm", F, "scaled_dot_product_attention"),  # which this block does not call, and plain PyTorch might
        ("timm", timm_swin, "window_partition"),
        ("timm", timm_swin.WindowAttention, "_get_rel_pos_bias"),
        ("official", nn.Module, "_call_impl"),
        ("timm", nn.Linear, "__call__"),
        ("official", nn.LayerNorm, "_call_impl"),
    ],
)
def test_functions_that_are_replaced(name, namespace, function, first, monkeypatch):
    model, twin, x = twins(name)
    expected = call(twin, x)
    if first == "accelerated first":
        helpers.assert_close(call(swinaccel.accelerate(model), x), expected)
    with monkeypatch.context() as patch:
        own = getattr(namespace, function)
        if namespace is nn.Module:  # of one kind of layer, as tools look at
            patch.setattr(namespace, function, lambda one, *x, **y: own(one, *x, **y) * (1 + (type(one) is nn.Softmax)))
        else:
            patch.setattr(namespace, function, doubled(own))
        if first == "patched first":
            swinaccel.accelerate(model)
        helpers.assert_close(call(model, x), call(twin, x))
    helpers.assert_close(call(model, x), expected)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_functions_of_a_library_that_are_replaced_after_a_capture(library, monkeypatch):
    make, namespace = {
        "timm": (helpers.timm_v1, timm_swin),
        "torchvision": (helpers.torchvision_model, torchvision_swin),
    }[library]
    function = {"timm": "window_reverse", "torchvision": "_get_relative_position_bias"}[library]
    monkeypatch.setitem(capture.ENGINES, "cpu", Tape)
    twin = helpers.randomize(make())
    model = swinaccel.accelerate(copy.deepcopy(twin), backend="torch", graphs=True)
    x = torch.randn(1, 3, 56, 56)
    for _ in range(CAPTURED_CALL):
        call(model, x)
    assert swinaccel.report(model).graphs[0].replays
    monkeypatch.setattr(namespace, function, doubled(getattr(namespace, function)))
    helpers.assert_close(call(model, x), call(twin, x))


class Plain(official.WindowAttention):
    """Code whose class may be given more, later."""

    def forward(self, x, mask=None):
        return super().forward(x, mask) * getattr(self, "gain", 1.0)


@pytest.mark.parametrize("attribute", ["gain", "scores", "__call__"])
def test_what_a_class_is_given_later(attribute):
    cls = type("Later", (Plain,), {})
    twin = helpers.randomize(cls(16, (4, 4), 2))
    model, x = swinaccel.accelerate(copy.deepcopy(twin)), torch.randn(4, 16, 16)
    helpers.assert_close(call(model, x), call(twin, x))
    helpers.assert_accelerated(model)
    setattr(cls, attribute, 2.0 if attribute == "gain" else doubled(getattr(cls, attribute)))
    helpers.assert_close(call(model, x), call(twin, x))


class Float32Softmax(official.WindowAttention):
    """Weights in float32, as Hugging Face's code asks for them."""

    def forward(self, x, mask=None):
        q, k, v = self.packed(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.scores(q, k)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def test_softmax_in_float32():
    model = helpers.randomize(Float32Softmax(16, (4, 4), 2))
    helpers.check(model, torch.randn(4, 16, 16), backend="torch", count=1)


class Averaging(official.WindowAttention):
    """Statistics in training."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x, mask=None):
        if self.training:
            self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
        return super().forward(x, mask)


def test_a_reason_is_not_of_a_mask_that_was_not_left_out():
    (entry,) = swinaccel.plan(Averaging(16, (4, 4), 2))
    assert entry.reason == "in training, its forward changes mean"


@pytest.mark.parametrize("function", ["linear", "gelu"])
def test_functions_that_are_replaced_around_a_compiled_block(function, monkeypatch):
    """One operator stands for all that follows an attention, in half precision, until somebody else's has to run."""
    block = helpers.randomize(MODELS["timm"]()).to(helpers.TRITON_DEVICE, torch.float16)
    model, twin = swinaccel.accelerate(copy.deepcopy(block), backend="triton"), copy.deepcopy(block)
    x = torch.randn(2, 8, 8, 16).to(helpers.TRITON_DEVICE, torch.float16)
    compiled = torch.compile(model, backend="eager")
    helpers.assert_close(call(compiled, x), call(twin, x), 1e-2)
    monkeypatch.setattr(F, function, doubled(getattr(F, function)))
    helpers.assert_close(call(compiled, x), call(twin, x), 1e-2)
