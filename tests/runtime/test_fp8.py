"""Products of 8 bits: blocks and models against fp64, and weights that are never stale."""

from __future__ import annotations

import copy

import helpers
import pytest
import timm
import torch
from blocks import HALF, random
from eight_bits import MODELS, X, accelerated, assert_runs, call, first, knows, made, relative, replaced
from torch import nn

import swinaccel
from swinaccel.runtime.graphs import rehearsal

KEEPS_VERDICTS = True
pytestmark = pytest.mark.usefixtures("anywhere")


# Blocks.


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model = made(name)
    fast, plain = accelerated(model), swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    found = [call(fast, X) for _ in range(3)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert_runs(fast)
    exact = call(copy.deepcopy(model).double(), X.double())
    assert 1e-3 < relative(call(plain, X), found[0]) < 0.1  # else it ran without
    assert relative(found[0], exact) < 0.1
    for known in knows(fast):
        assert 1e-3 < known.error < 0.1
    assert "fp8, error" in str(swinaccel.report(fast))
    assert swinaccel.report(plain).entries[0].precision is None
    assert "precision" not in str(swinaccel.report(plain))


def test_padded_images_and_other_sizes():
    """Padding tokens are the bias of the projection, with 8 bits as without; an error is measured once."""
    model = made("hf")
    fast, exact, errors = accelerated(model), copy.deepcopy(model).double(), []
    for size in (32, 40, 48):
        x = random(1, 3, size, size, dtype=HALF)
        with torch.no_grad():  # either remembers the shift that an image was too small for
            found, expected = (one(x.to(one.dtype), interpolate_pos_encoding=True) for one in (fast, exact))
        assert relative(first(found), first(expected)) < 0.1
        errors.append([known.error for known in knows(fast)])
    assert errors[0] == errors[1] == errors[2]
    assert_runs(fast)


def test_the_measured_error_is_that_of_the_blocks_output():
    model = made().layers[1].blocks[1]
    x = random(2, 4, 4, 64, dtype=HALF)
    fast, plain = accelerated(model), swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    (found, expected), (known,) = (call(fast, x), call(plain, x)), knows(fast)
    assert known.error == pytest.approx(relative(found, expected), rel=1e-3)
    call(fast, random(2, 4, 4, 64, dtype=HALF, seed=1))
    assert known.error == pytest.approx(relative(found, expected), rel=1e-3)


def moved(layer):
    layer.weight.data = layer.weight.data * 2


def loaded(layer):
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})


@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize(
    "edit",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.data.mul_(2),  # which counts no version
        lambda layer: layer.bias.data.add_(1),
        moved,
        replaced,
        loaded,
    ],
    ids=["in place", "data", "bias", "moved", "replaced", "loaded"],
)
def test_no_weight_is_stale(edit, layer):
    model = made().layers[1].blocks[1]
    x = random(1, 4, 4, 64, dtype=HALF)
    fast = accelerated(model, max_error=0.5)
    before = [call(fast, x) for _ in range(2)][1]
    with torch.no_grad():
        for one in (fast, model):
            edit(one.get_submodule(layer))
    anew = accelerated(model, max_error=0.5)
    assert not torch.equal(call(fast, x), before)
    call(anew, x)
    assert torch.equal(call(fast, x), call(anew, x))
    assert swinaccel.report(fast).entries[0].precision.startswith("fp8")


def test_other_weights_are_measured_anew():
    model = accelerated(made().layers[1].blocks[1])
    x = random(1, 4, 4, 64, dtype=HALF)
    call(model, x)
    (known,) = knows(model)
    error = known.error
    with torch.no_grad():
        model.mlp.fc2.weight.mul_(20)
    call(model, x)
    assert known.error > 1.1 * error


# On the GPUs that this is for.


def hopper():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not hopper(), reason="needs a GPU with products of 8 bits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_real_sizes(name, dtype, monkeypatch):
    monkeypatch.undo()
    model = helpers.randomize(timm.create_model(name, num_classes=10)).cuda()
    x = torch.randn(2, 3, *[model.patch_embed.img_size[0]] * 2, device="cuda")
    exact = call(copy.deepcopy(model).double(), x.double())
    fast = swinaccel.accelerate(copy.deepcopy(model).to(dtype), precision="fp8")
    found = [call(fast, x.to(dtype)) for _ in range(2)]
    assert torch.equal(*found)
    assert relative(found[0], exact) < 0.15
    shown = [(entry.precision, entry.reason) for entry in swinaccel.report(fast)]
    assert not any(kind.startswith("fp8") for kind, _ in shown[:4]), shown  # few channels come first
    assert all(kind.startswith("fp8") or "products of 8 bits err" in reason for kind, reason in shown[4:]), shown


@pytest.mark.gpu
@pytest.mark.skipif(not hopper(), reason="needs a GPU with products of 8 bits")
def test_replays_follow_weights_that_change_in_place():
    model = made()
    fast = accelerated(model)
    for _ in range(2):
        call(fast, X)
    graph, given = torch.cuda.CUDAGraph(), X.clone()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = first(fast(given))
    for edit in (lambda weight: weight.mul_(1.5), lambda weight: weight.data.mul_(1.5)):
        with torch.no_grad():
            for part in fast.modules():
                if isinstance(part, nn.Linear):
                    edit(part.weight)
        graph.replay()
        found = out.clone()
        assert torch.equal(found, call(fast, X))
    assert_runs(fast)


@pytest.mark.gpu
@pytest.mark.skipif(not hopper(), reason="needs a GPU with products of 8 bits")
def test_graphs_of_the_package_are_of_8_bits():
    fast = accelerated(made(), graphs="auto")
    found = [call(fast, X) for _ in range(5)]
    assert swinaccel.report(fast).graphs[0].replays == 3
    assert all(torch.equal(one, found[0]) for one in found)
    assert_runs(fast)


@pytest.mark.gpu
@pytest.mark.skipif(not hopper(), reason="needs a GPU with products of 8 bits")
def test_compiled_calls_run_without():
    model = made()
    fast, plain = accelerated(model), swinaccel.accelerate(copy.deepcopy(model))
    found = call(torch.compile(fast), X)
    assert relative(found, call(plain, X)) < 0.02
    assert "Calls that were compiled" in str(swinaccel.report(fast))


def test_what_is_rehearsed_measures_nothing():
    """Kernels do not run in it, and what stands in their results' place says nothing of an error."""
    model = made()
    fast = accelerated(model)
    with rehearsal.states_kept(fast):
        call(fast, X)
    assert knows(fast)
    for known in knows(fast):
        assert (known.error, known.reason, known.failure, known.versions) == (None, None, None, [])
    call(fast, X)
    errors, calls = [known.error for known in knows(fast)], [entry.calls for entry in swinaccel.report(fast)]
    with rehearsal.states_kept(fast), torch.no_grad():
        for part in fast.modules():
            if isinstance(part, nn.Linear):
                part.weight.mul_(1.5)
        call(fast, X)
        assert errors != [known.error for known in knows(fast)]
    assert errors == [known.error for known in knows(fast)]
    assert calls == [entry.calls for entry in swinaccel.report(fast)]
