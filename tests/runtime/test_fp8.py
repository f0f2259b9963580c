"""Products of 8 bits: kernels and blocks against fp64, and weights that are never stale."""

from __future__ import annotations

import copy

import helpers
import pytest
import timm
import torch
import torch.nn.functional as F
from blocks import HALF, random
from eight_bits import EIGHT, MODELS, X, accelerated, assert_runs, call, first, knows, made, relative, replaced
from helpers import TRITON_DEVICE
from torch import nn

import swinaccel
from swinaccel.backends.triton import quantise
from swinaccel.ops import fp8
from swinaccel.runtime import rehearsal

KEEPS_VERDICTS = True
pytestmark = pytest.mark.usefixtures("anywhere")
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if TRITON_DEVICE == "cuda" else [])]


def quantised(x):
    """Return what rows are in 8 bits, in fp64; `torch` rounds to e4m3 from fp32."""
    scale = x.double().abs().amax(-1, keepdim=True) / 448
    return (x.double() / scale).float().to(EIGHT).double() * scale


# Kernels.


def row_of(mode, x, branch, weight, bias):
    """Return what a kernel writes in 8 bits, before that, and the sum, in fp64."""
    x, branch, weight, bias = (one.double() for one in (x, branch, weight, bias))

    def norm(y):
        return F.layer_norm(y, y.shape[-1:], weight, bias, 1e-5)

    if mode == quantise.ADD_NORM:
        return norm(x + branch), x + branch
    if mode == quantise.NORM_ADD:
        return x + norm(branch), x + norm(branch)
    return {quantise.PLAIN: x, quantise.GELU: F.gelu(x), quantise.NORM: norm(x)}[mode], None


@pytest.mark.parametrize("mode", range(5))
@pytest.mark.parametrize(("rows", "channels"), [(37, 48), (5, 192), (3, 1024)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(mode, rows, channels, dtype, poisoned):
    x, branch = (0.1 + random(rows, channels, dtype=dtype, scale=3, seed=seed) for seed in (0, 1))
    weight, bias = 1 + random(channels, dtype=dtype, scale=0.3), random(channels, dtype=dtype, seed=2)
    expected, total = row_of(mode, x, branch, weight, bias)
    out, scale = torch.empty(rows, channels, device=x.device, dtype=EIGHT), torch.empty(rows, 1, device=x.device)
    summed = torch.empty_like(x) if total is not None else None
    affine = (weight, bias) if mode >= quantise.NORM else (None, None)
    launch = quantise.rows_launch(mode, x.device, rows, channels, 1e-5)
    launch(out, scale, x, branch if total is not None else None, summed, *affine)
    largest = expected.abs().amax(-1, keepdim=True)
    assert torch.allclose(scale.double(), largest / 448, rtol=1e-5)
    # Half a unit of e4m3: of numbers a sixteenth of them, and of the smallest, half the distance between them.
    allowed = torch.maximum(expected.abs() / 16, scale.double() * 2**-10) * (1 + 1e-4) + 1e-6
    assert ((out.double() * scale - expected).abs() <= allowed).all()
    if total is not None:
        helpers.assert_close(summed.double(), total, torch.finfo(dtype).eps)


def test_rows_of_zeros_and_of_numbers_that_are_not_finite():
    x = random(6, 48)
    x[0], x[1], x[2] = 0, x[1] * 1e-36, x[2] * 1e35
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    out, scale = torch.empty(6, 48, device=x.device, dtype=EIGHT), torch.empty(6, 1, device=x.device)
    quantise.rows_launch(quantise.PLAIN, x.device, 6, 48)(out, scale, x, None, None, None, None)
    found = out.float() * scale
    assert torch.equal(found[0], x[0])
    assert found[1].abs().max() <= 1e-30
    assert relative(found[2], x[2]) < 0.05
    assert torch.equal(found[3].isnan(), x[3].isnan())
    assert found[4].isnan().any()
    assert relative(found[5], x[5]) < 0.05


@pytest.mark.parametrize(("channels", "width", "hidden"), [(48, 48, 192), (64, 32, 80)])
def test_weights(channels, width, hidden, poisoned):
    shapes = (3 * width, channels), (channels, width), (hidden, channels), (channels, hidden)
    weights = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    out = torch.empty(sum(one.numel() for one in weights), device=TRITON_DEVICE, dtype=EIGHT)
    scale = torch.empty(sum(map(len, weights)), device=TRITON_DEVICE)
    quantise.weights_launch(out.device, channels, 3 * width, width, hidden)(out, scale, *weights)
    parts = zip(out.split([one.numel() for one in weights]), scale.split(list(map(len, weights))), strict=True)
    for (part, own), weight in zip(parts, weights, strict=True):
        found = part.view(weight.shape).double() * own.double()[:, None]
        assert relative(found, quantised(weight)) < 2e-3  # a division in fp32 may fall on the other side of a tie


# Blocks.


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("post_norm", [False, True])
def test_a_block_against_quantised_arithmetic_in_fp64(post_norm, has_bias):
    channels, width, hidden = 64, 32, 128
    shapes = (3 * width, channels), (channels, width), (hidden, channels), (channels, hidden)
    layers = [
        (
            random(*shape, dtype=HALF, scale=1.5 * shape[1] ** -0.5, seed=seed),
            random(shape[0], dtype=HALF, scale=0.5, seed=seed) if has_bias else None,
        )
        for seed, shape in enumerate(shapes)
    ]
    norms = [(1 + random(channels, dtype=HALF, scale=0.3, seed=s), random(channels, dtype=HALF), 1e-5) for s in (0, 1)]
    x = random(2, 5, 7, channels, dtype=HALF)

    def attend(qkv):
        q, k, v = qkv.chunk(3, -1)
        return q * k.tanh() + v

    def exact(step):
        wide = [(w.double(), None if b is None else b.double()) for w, b in layers]
        (before, after), y = [(w.double(), b.double(), e) for w, b, e in norms], x.double()

        def product(y, layer):
            return F.linear(step(y), step(layer[0]), layer[1])

        def mlp(y):
            return product(F.gelu(product(y, wide[2])), wide[3])

        def attention(y):
            return product(attend(product(y, wide[0])), wide[1])

        if post_norm:
            y = y + F.layer_norm(attention(y), (channels,), *before)
            return y + F.layer_norm(mlp(y), (channels,), *after)
        y = y + attention(F.layer_norm(y, (channels,), *before))
        return y + mlp(F.layer_norm(y, (channels,), *after))

    sizes = 3 * width, width, hidden
    block = fp8.BoundBlock(x.shape, x.device, HALF, HALF, sizes, (1e-5, 1e-5), post_norm)
    found = block.run(x, attend, norms, layers)
    assert (found.dtype, found.shape) == (HALF, x.shape)
    wanted, full = exact(quantised), exact(lambda y: y)
    # What is left is rounding in 16 bits, and numbers that fall to the other side of a tie for it.
    assert relative(found, wanted) < 0.5 * relative(wanted, full)
    assert relative(found, full) < 1.2 * relative(wanted, full)


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
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


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
    assert not any(kind.startswith("fp8") for kind, _ in shown[:10]), shown  # few channels come first
    assert all(kind.startswith("fp8") or "products of 8 bits err" in reason for kind, reason in shown[10:]), shown


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
