"""Tensors of other shapes, set after accelerate(): the original's answer, or the original's error."""

from __future__ import annotations

import copy

import helpers
import microsoft_models
import pytest
import torch
from helpers import BACKENDS, DEVICES
from torch import nn

import swinaccel

KEEPS_VERDICTS = True

MODELS = {
    "timm": lambda: helpers.timm_block((8, 8), shift=2),
    "timm-v2": lambda: helpers.timm_block((8, 8), shift=2, v2=True),
    "torchvision": lambda: helpers.torchvision_attention(shift=(2, 2)),
    "torchvision-v2": lambda: helpers.torchvision_attention(shift=(2, 2), v2=True),
}


def named(model, end):
    """Yield owners and names of the parameters whose names end so."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if name.endswith(end) and value is not None:
                yield module, name, value.detach()


def remade(end, change):
    def apply(model):
        for module, name, value in list(named(model, end)):
            made = change(value)
            module._parameters[name] = None if made is None else nn.Parameter(made.clone())

    return apply


CHANGES = {
    "table-of-one-axis": (("timm", "torchvision"), remade("bias_table", lambda one: one[:, 0])),
    "table-of-one-head": (("timm", "torchvision"), remade("bias_table", lambda one: one[:, :1])),
    "no-logit-scale": (("timm-v2", "torchvision-v2"), remade("logit_scale", lambda one: None)),
    "logit-scale-of-one-axis": (("timm-v2", "torchvision-v2"), remade("logit_scale", lambda one: one.flatten())),
    "logit-scale-of-one": (("timm-v2", "torchvision-v2"), remade("logit_scale", lambda one: one[:1])),
    "qkv-bias-of-one": (
        ("torchvision", "torchvision-v2"),
        lambda model: setattr(model.qkv, "bias", nn.Parameter(torch.full((1,), 0.3))),
    ),
    "qkv-bias-of-two-axes": (
        ("torchvision", "torchvision-v2"),
        lambda model: setattr(model.qkv, "bias", nn.Parameter(model.qkv.bias.detach()[None].clone())),
    ),
    "norms-shorter": (("timm", "timm-v2"), lambda model: remade("weight", lambda one: one[:-1])(model.norm1)),
    "norms-longer": (("timm", "timm-v2"), lambda model: remade("bias", lambda one: torch.cat((one, one)))(model.norm2)),
    "norms-of-one": (("timm",), lambda model: remade("weight", lambda one: one[:1])(model.norm2)),
}


def outcome(model, x):
    with torch.no_grad():
        try:
            return model(x)
        except Exception as error:
            return error


# Of padded images alone is the bias of a projection read by itself.
CASES = [(kind, name, 8) for name, (kinds, _) in CHANGES.items() for kind in kinds]
CASES += [(kind, name, 7) for kind, name, _ in CASES if name.startswith("qkv")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "change", "size"), CASES)
def test_tensors_of_other_shapes(kind, change, size, backend):
    model = MODELS[kind]().eval().to(DEVICES[backend])
    twin, x = copy.deepcopy(model), torch.randn(2, size, size, 16).to(DEVICES[backend])
    swinaccel.accelerate(model, backend=backend)
    with torch.no_grad():
        helpers.assert_close(model(x), twin(x))
    for one in (model, twin):
        CHANGES[change][1](one)
    expected, found = outcome(twin, x), outcome(model, x)
    assert isinstance(found, Exception) == isinstance(expected, Exception), (expected, found)
    if not isinstance(expected, Exception):
        helpers.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_windows(backend):
    """Detectors' heads get no image at times."""
    model = helpers.randomize(microsoft_models.WindowAttention(16, (4, 4), 2)).eval().to(DEVICES[backend])
    swinaccel.accelerate(model, backend=backend)
    with torch.no_grad():
        assert model(torch.zeros(0, 16, 16, device=DEVICES[backend])).shape == (0, 16, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_input_whose_numbers_lie_in_memory_with_the_other_sign(backend):
    """As the imaginary part of a conjugate does."""
    x = torch._neg_view(torch.randn(2, 8, 8, 16, device=DEVICES[backend]))
    helpers.check(MODELS["timm"](), x, backend=backend)
    helpers.check_fallback(MODELS["torchvision"](), x, reason="with the other sign", backend=backend)


def turned(one):
    return torch._neg_view(-one)


@pytest.mark.parametrize("turn", [turned, lambda one: torch.complex(one, -one).conj().imag])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_and_masks_whose_numbers_lie_in_memory_with_the_other_sign(backend, turn):
    model = helpers.randomize(microsoft_models.WindowAttention(16, (4, 4), 2)).eval().to(DEVICES[backend])
    x, mask = (torch.randn(shape, device=DEVICES[backend]) for shape in ((4, 16, 16), (2, 16, 16)))
    twin = swinaccel.accelerate(copy.deepcopy(model), backend=backend)
    with torch.no_grad():
        expected = model(x, mask)
        for given in (mask, turn(mask)):
            helpers.assert_close(twin(x, given), expected)
        for name, one in list(twin.named_parameters()):
            part, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(part), leaf, nn.Parameter(turn(one.detach())))
            helpers.assert_close(twin(x, mask), expected)
            setattr(twin.get_submodule(part), leaf, one)
            helpers.assert_close(twin(x, mask), expected)
    (entry,) = swinaccel.report(twin)
    assert (entry.fallbacks, "with the other sign" in entry.reason) == (6, True)


@torch.no_grad()
def test_a_norm_whose_numbers_lie_in_memory_with_the_other_sign():
    model, x = MODELS["timm"]().eval().to(DEVICES["triton"]), torch.randn(2, 8, 8, 16, device=DEVICES["triton"])
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    twin.norm2.bias = nn.Parameter(turned(twin.norm2.bias.detach()))
    helpers.assert_close(twin(x), model(x))
    helpers.assert_accelerated(twin)
