"""Whole blocks where gradients are recorded or autocast is active: every output and gradient against fp64, dropped
samples against the original's own, and everything that must leave a block to itself."""

from __future__ import annotations

import copy
import itertools
import types

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import TRITON_DEVICE
from test_families import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

import swinaccel
from swinaccel import ops
from swinaccel.backends.triton import block as kernels
from swinaccel.backends.triton import block_bwd as triton_block_bwd
from swinaccel.ops import block_autograd as recorded

KEEPS_VERDICTS = True

ON_GPU = TRITON_DEVICE == "cuda"
HALF = torch.bfloat16 if ON_GPU else torch.float16  # Triton's interpreter does not multiply bfloat16
HALVES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]
# Of the residual stream, and of products: as in plain training, and under autocast before and after it was rounded.
DTYPES = [
    (torch.float32, torch.float32),
    *((half, half) for half in HALVES),
    *((torch.float32, half) for half in HALVES),
]


@pytest.fixture(autouse=True)
def kernels_that_run():
    yield
    assert not ops.has_failures()


@pytest.fixture
def ran(monkeypatch):
    """Names of the functions that ran, in order."""
    names = []

    def spy(name):
        plain = getattr(recorded, name)

        def run(*args):
            names.append(name)
            return plain(*args)

        monkeypatch.setattr(recorded, name, run)

    for name in ("norm", "add_norm", "norm_add", "mlp", "merge"):
        spy(name)
    return names


def random(*shape, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(TRITON_DEVICE, dtype)


def leaves(*tensors):
    return [None if one is None else one.detach().clone().requires_grad_(one.is_floating_point()) for one in tensors]


def results(function, tensors, grads):
    """Outputs, and gradients of all that was given."""
    given = leaves(*tensors)
    outputs = [one for one in function(*given) if one is not None]
    torch.autograd.backward(outputs, [grad.to(one) for one, grad in zip(outputs, grads, strict=True)])
    return [*outputs, *(None if one is None else one.grad for one in given)]


def check(function, original, tensors, grads, dtype):
    """Ours and plain PyTorch's, against plain PyTorch in fp64."""
    exact = results(original, [None if one is None else one.double().cpu() for one in tensors], grads)
    found, own = results(function, tensors, grads), results(original, tensors, grads)
    for place, (one, other, expected) in enumerate(zip(found, own, exact, strict=True)):
        if expected is None or other is None:
            continue
        assert one.dtype == other.dtype, place
        if dtype == torch.float32:
            helpers.assert_close(one.double().cpu(), expected.cpu(), 2e-6)
        else:
            helpers.assert_no_worse(one.cpu(), other.cpu(), expected.cpu(), dtype)


def layer_norm(x, weight, bias):
    """As under autocast: in fp32, whatever comes in; fp64 stays."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (None if one is None else one.to(wide) for one in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, 1e-5)


def scaled(branch, scale):
    return branch if scale is None else branch * scale.detach().to(branch.dtype).view(-1, 1, 1)


SHAPES = [(3, 37, 24), (2, 5, 180)]
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_dtype = pytest.mark.parametrize(("wide", "dtype"), DTYPES)


def narrowed(y, dtype):
    return y if y.dtype == torch.float64 else y.to(dtype)


@every_shape
@every_dtype
@pytest.mark.parametrize("affine", [True, False])
def test_norm(shape, wide, dtype, affine, poisoned):
    weight, bias = (1 + random(shape[-1], scale=0.3), random(shape[-1], seed=2)) if affine else (None, None)
    x, grads = 2 + random(*shape, dtype=wide), [random(*shape, seed=seed) for seed in (5, 6)]

    def original(x, weight, bias):
        return x * 1, narrowed(layer_norm(x, weight, bias), dtype)

    check(lambda x, w, b: recorded.norm(x, (w, b, 1e-5), dtype), original, (x, weight, bias), grads, dtype)


@every_shape
@every_dtype
@pytest.mark.parametrize("drops", [False, True])
def test_add_norm(shape, wide, dtype, drops, poisoned):
    weight, bias = 1 + random(shape[-1], scale=0.3), random(shape[-1], seed=2)
    scale = torch.tensor([0, 1.25, 1.25][: shape[0]]).to(TRITON_DEVICE, dtype) if drops else None
    x, branch, grads = (
        random(*shape, dtype=wide),
        2 + random(*shape, dtype=dtype, seed=1),
        [random(*shape), random(*shape, seed=9)],
    )

    def original(x, branch, weight, bias):
        total = x + scaled(branch, scale if scale is None else scale.to(branch.device))
        return total, narrowed(layer_norm(total, weight, bias), dtype)

    def ours(x, branch, weight, bias):
        return recorded.add_norm(x, branch, scale, (weight, bias, 1e-5))

    check(ours, original, (x, branch, weight, bias), grads, dtype)


@every_shape
@every_dtype
@pytest.mark.parametrize("copy_too", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_norm_add(shape, wide, dtype, drops, copy_too, poisoned):
    weight, bias = 1 + random(shape[-1], scale=0.3), random(shape[-1], seed=2)
    scale = torch.tensor([1.25, 0, 1.25][: shape[0]]).to(TRITON_DEVICE, wide) if drops else None
    x, branch = random(*shape, dtype=wide), 2 + random(*shape, dtype=dtype, seed=1)
    twice = copy_too and wide is not dtype
    grads = [random(*shape), random(*shape, seed=9)][: 1 + twice]

    def original(x, branch, weight, bias):
        norm = narrowed(layer_norm(branch, weight, bias), wide)
        total = x + scaled(norm, scale if scale is None else scale.to(branch.device))
        return (total, narrowed(total, dtype)) if twice else (total,)

    def ours(x, branch, weight, bias):
        return recorded.norm_add(x, branch, scale, (weight, bias, 1e-5), wide, copy_too)

    check(ours, original, (x, branch, weight, bias), grads, dtype)


@every_dtype
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_mlp(wide, dtype, adds, biases, poisoned):
    shape, hidden = (3, 21, 24), 136
    x = random(*shape, dtype=wide, seed=3) if adds else None
    scale = torch.tensor([1.25, 0, 1.25]).to(TRITON_DEVICE, dtype) if adds else None
    y = random(*shape, dtype=dtype)
    parameters = (
        random(hidden, 24, scale=0.3),
        random(hidden, seed=1) if biases else None,
        random(24, hidden, scale=0.1),
        random(24, seed=2) if biases else None,
    )

    def original(x, y, weight1, bias1, weight2, bias2):
        weight1, bias1, weight2, bias2 = (
            None if p is None else narrowed(p, dtype) for p in (weight1, bias1, weight2, bias2)
        )
        branch = F.linear(F.gelu(F.linear(y, weight1, bias1)), weight2, bias2)
        return (branch if x is None else x + scaled(branch, scale.to(branch.device)),)

    def ours(x, y, weight1, bias1, weight2, bias2):
        return (recorded.mlp(x, y, scale, (weight1, bias1), (weight2, bias2)),)

    check(ours, original, (x, y, *parameters), [random(*shape, seed=8)], dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_linear(dtype, wide, biases, poisoned):
    """The parameters' gradients are in their dtypes: in fp32 they are rounded once less than PyTorch's."""
    kept = torch.float32 if wide else dtype
    x, weight = random(3, 21, 24, dtype=dtype), random(40, 24, dtype=kept, scale=0.3)
    bias = random(40, dtype=kept, seed=1) if biases else None

    def original(x, *parameters):
        return (F.linear(x, *[None if one is None else narrowed(one, dtype) for one in parameters]),)

    def ours(x, weight, bias):
        return (recorded.linear(x, weight, bias, dtype),)

    check(ours, original, (x, weight, bias), [random(3, 21, 40, seed=8)], dtype)


def test_second_derivatives_of_a_product():
    tensors = random(3, 5, 24, dtype=HALF), random(40, 24, scale=0.3), random(40)
    found = []
    for function in (
        lambda x, w, b: recorded.linear(x, w, b, HALF),
        lambda x, w, b: F.linear(x, w.to(HALF), b.to(HALF)),
    ):
        x, weight, bias = leaves(*tensors)
        first = torch.autograd.grad(
            function(x, weight, bias).float().pow(3).mean(), (x, weight, bias), create_graph=True
        )
        found.append(torch.autograd.grad(sum(one.float().square().sum() for one in first), (x, weight, bias)))
    for ours, expected in zip(*found, strict=True):
        helpers.assert_close(ours.float(), expected.float(), 20 * torch.finfo(HALF).eps)


def test_slope_of_gelu():
    if torch.bfloat16 == HALF:
        x = torch.linspace(-12, 12, 4001, device=TRITON_DEVICE).to(torch.float16)
    else:
        x = torch.linspace(-12, 12, 4001).to(torch.float16)
    rows = x.view(1, -1)
    slope, out, sums = triton_block_bwd.gelu(torch.ones_like(rows), rows)
    leaf = rows.double().requires_grad_()
    F.gelu(leaf).sum().backward()
    assert (slope.double() - leaf.grad).abs().max() <= 6e-4  # half a unit in the last place of 1.13
    assert torch.equal(out, kernels.gelu(rows))
    assert torch.allclose(sums.double(), leaf.grad[0], atol=2e-5)


def test_empty_tensors():
    x = random(0, 5, 24).requires_grad_()
    parameters = [random(*size) for size in ((48, 24), (48,), (24, 48), (24,))]
    total, y = recorded.norm(x, (random(24).requires_grad_(), None, 1e-5), torch.float32)
    recorded.mlp(total, y, None, parameters[:2], parameters[2:]).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_second_derivatives(v2, ran):
    """A gradient penalty."""
    model, twin = pair(drop_paths(helpers.timm_block((4, 4), shift=2, v2=v2)))
    found = []
    for one in (twin, model):
        torch.manual_seed(0)
        x = random(3, 4, 4, 16).requires_grad_()
        first = torch.autograd.grad(one(x).pow(3).mean(), (x, *one.parameters()), create_graph=True)
        found.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), (x, *one.parameters())))
    assert ran
    for ours, expected in zip(*found, strict=True):
        helpers.assert_close(ours, expected, 1e-3)


# Models.


def autocast(dtype):
    return torch.autocast(TRITON_DEVICE, dtype, enabled=dtype is not None)


def gradients(model, x, dtype=None, seed=1):
    """Output, and gradients of input and parameters, by name."""
    leaf = x.to(TRITON_DEVICE).clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(seed)
    with autocast(dtype):
        outputs = [one for one in helpers.tensors(model(leaf)) if one.is_floating_point()]
    generator = torch.Generator().manual_seed(2)
    sum((one * torch.randn(one.shape, generator=generator).to(one)).sum() for one in outputs).backward()
    found = {"output": outputs[0].detach(), "input": leaf.grad}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def pair(model):
    model = model.to(TRITON_DEVICE).train()
    return model, swinaccel.accelerate(copy.deepcopy(model), backend="triton")


WHOLE = {
    "timm-v1": (["norm"] + ["norm", "add_norm", "mlp"] * 2 + ["merge"] + ["norm", "add_norm", "mlp"]),
    "timm-v2": (["norm"] + ["norm_add", "mlp", "norm_add"] * 2 + ["merge", "norm"] + ["norm_add", "mlp", "norm_add"]),
    "torchvision-v1-padded": (["norm", "add_norm", "mlp"] * 2 + ["merge"] + ["norm", "add_norm", "mlp"] * 2),
    "torchvision-v2": (["norm_add", "mlp", "norm_add"] * 2 + ["merge", "norm"] + ["norm_add", "mlp", "norm_add"] * 2),
    "hf-swin-padded": (["norm"] + ["norm", "add_norm", "mlp"] * 2 + ["merge"] + ["norm", "add_norm", "mlp"] * 2),
    "hf-swinv2": (
        ["norm"] + ["norm_add", "mlp", "norm_add"] * 2 + ["merge", "norm"] + ["norm_add", "mlp", "norm_add"] * 2
    ),
    "microsoft-v1": ["norm", "add_norm", "mlp"] * 2,
    "microsoft-v2": ["norm_add", "mlp", "norm_add"] * 2,
}


def drop_paths(model, rate=0.4):
    """Make every drop-path drop, two in a block at rates of their own; timm's replaces an Identity where none was."""
    from timm.layers import DropPath

    rates = itertools.cycle((rate, rate / 2))
    for part in model.modules():
        for name, child in list(part.named_children()):
            if name.startswith(("drop_path", "stochastic_depth")):
                if isinstance(child, nn.Identity):
                    setattr(part, name, DropPath(next(rates)))
                else:
                    setattr(child, "p" if hasattr(child, "p") else "drop_prob", next(rates))
    return model


@pytest.mark.parametrize("name", WHOLE)
def test_training_equals_the_original(name, ran):
    """The very samples are dropped that the original drops."""
    model, x = helpers.small_model(name, batch=4)
    model, twin = pair(drop_paths(model))
    found, expected = (gradients(one, x) for one in (twin, model))
    assert ran == WHOLE[name]
    helpers.assert_accelerated(twin, MODELS[name][2])
    largest = max(one.abs().max() for one in expected.values() if one is not None)
    for key, one in expected.items():
        assert (one is None) == (found[key] is None), key
        if one is not None:
            error = (found[key] - one).abs().max()
            assert error <= 2e-4 * one.abs().max() + 2e-6 * largest, key


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "name", ["timm-v1", "timm-v2", "torchvision-v2", "hf-swin-padded", "hf-swinv2", "microsoft-v1"]
)
def test_autocast_is_no_worse(name, dtype, ran):
    """Outputs and gradients under autocast, against fp64, on the mean of all parameters of a kind."""
    model, x = helpers.small_model(name, batch=2)
    model, twin = pair(model)
    errors = {}
    for seed in range(3):  # of one draw alone, they are too few
        x = random(*x.shape, seed=seed)
        exact = gradients(copy.deepcopy(model).double(), x.double())
        found, own = (gradients(one, x, dtype) for one in (twin, model))
        for key, expected in exact.items():
            if expected is None or not own[key].isfinite().all() or not expected.any():
                continue
            assert found[key].dtype == own[key].dtype, key
            pair_of = [((one[key].double() - expected).norm() / expected.norm()).item() for one in (found, own)]
            errors.setdefault(key, []).append(pair_of)
    assert ran == WHOLE[name] * 3
    helpers.assert_accelerated(twin, MODELS[name][2])
    ours, its = torch.tensor([torch.tensor(both).mean(0).tolist() for both in errors.values()]).T
    keep = its < 0.5  # where the original's own gradient is noise there is nothing to compare
    assert ours[keep].mean() <= 1.1 * its[keep].mean()
    # The scale's gradient is a small sum of large terms, and as uncertain as any of them.
    sums = torch.tensor(["logit_scale" in key for key in errors])
    assert (ours[keep & ~sums] <= 2 * its[keep & ~sums].clamp_min(its[keep].median())).all()
    assert (ours[keep & sums] <= 2 * its[keep].max()).all()


@pytest.mark.parametrize("name", ["timm-v1", "timm-v2"])
def test_autocast_without_gradients(name, ran):
    make, example, _count = MODELS[name]
    model, twin = pair(make())
    outputs = []
    for seed in range(6):  # a few logits of one draw alone say little about a mean
        x = random(*example().shape, seed=seed)
        with torch.no_grad():
            exact = copy.deepcopy(model).eval().double()(x.double())
            with autocast(HALF):
                outputs.append((twin.eval()(x), model.eval()(x), exact))
    assert ran == WHOLE[name] * 6
    found, own, exact = (torch.cat(column) for column in zip(*outputs, strict=True))
    assert found.dtype == own.dtype
    helpers.assert_no_worse(found, own, exact, HALF)


def block(**options):
    return helpers.timm_block((8, 8), shift=2, **options)


X = torch.randn(4, 8, 8, 16, generator=torch.Generator().manual_seed(3))


def assert_alike(twin, model, x=X, dtype=None):
    found, expected = (gradients(one, x, dtype) for one in (twin, model))
    for key, one in expected.items():
        assert (one is None) == (found[key] is None), key
        if one is not None:
            helpers.assert_close(found[key], one, 1e-4 if dtype is None else 20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("trained", ["norm1", "norm2", "mlp.fc1.weight", "mlp.fc2.bias", "attn.proj", "nothing"])
def test_frozen_but_for_a_part(v2, trained, ran):
    model, _ = pair(drop_paths(block(v2=v2)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    assert_alike(swinaccel.accelerate(copy.deepcopy(model), backend="triton"), model)
    assert len(ran) == 3


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("part", ["attn.proj", "mlp.fc1", "norm2"])
def test_an_input_without_gradient(v2, part, ran):
    """As in the first block of a backbone whose stem is frozen."""
    model, _ = pair(block(v2=v2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(part))
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    found = []
    for one in (twin, model):
        one(X.to(TRITON_DEVICE)).square().sum().backward()
        found.append([parameter.grad for parameter in one.parameters()])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            helpers.assert_close(one, other, 1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_checkpointing_drops_the_same_samples(v2, reentrant, ran):
    model, twin = pair(drop_paths(block(v2=v2)))

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = twin

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    found, expected = gradients(Checkpointed(), X), gradients(model, X)
    assert len(ran) == 6
    for key, one in expected.items():
        helpers.assert_close(found[key if key in found else f"inner.{key}"], one, 1e-4)


@pytest.mark.parametrize("dtype", [None, HALF])
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_what_is_kept_for_the_backward(v2, dtype):
    """In numbers of x: V1 keeps x, the first norm, qkv (3), attention, the sum, the second norm, and 4 hidden ones."""
    model, twin = pair(block(v2=v2))
    kept = {}

    def pack(tensor):
        if tensor.numel() and tensor.numel() % X.numel() == 0:  # no parameters, no tables
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    sizes = []
    for one in (twin, model):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(dtype):
            out = one(X.to(TRITON_DEVICE).clone().requires_grad_())
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / X.numel() / 4)
        del out
    expected = {(False, None): 12, (True, None): 12, (False, HALF): 7, (True, HALF): 8}[v2, dtype]
    assert sizes[0] <= expected + 0.3, sizes
    assert sizes[0] < 0.75 * sizes[1], sizes


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_batches_of_gradients(v2, ran):
    """No kernel takes them: PyTorch's own do."""
    model, twin = pair(block(v2=v2))
    found = []
    for one in (twin, model):
        x = X.to(TRITON_DEVICE).clone().requires_grad_()
        out = one(x)
        grads = torch.stack([torch.ones_like(out), out.detach()])
        found.append(torch.autograd.grad(out, (x, *one.parameters()), grads, is_grads_batched=True))
    assert len(ran) == 3
    assert not ops.has_failures()
    for ours, expected in zip(*found, strict=True):
        helpers.assert_close(ours, expected, 1e-4)


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_a_backward_that_fails(v2, monkeypatch):
    model, twin = pair(drop_paths(block(v2=v2)))

    def fail(*_, **__):
        raise kernels.LaunchError("no")

    monkeypatch.setattr(triton_block_bwd, "_launch", fail)
    assert_alike(twin, model)
    for _ in range(2):  # projections, too
        assert_alike(twin, model, dtype=HALF)


@pytest.mark.parametrize("name", ["timm-v1", "timm-v2", "torchvision-v1-padded", "torchvision-v2"])
def test_projections(name, monkeypatch):
    """From the second step on, plain projections of attention have gradients of their own; in fp32 PyTorch's."""
    calls = []
    plain = recorded.linear
    monkeypatch.setattr(recorded, "linear", lambda *args: calls.append(args) or plain(*args))
    model, x = helpers.small_model(name, depths=(1, 1))
    model, twin = pair(model)
    for _ in range(2):
        calls.clear()
        assert_alike(twin, model, x, HALF)
    assert len(calls) == 2 * 2
    calls.clear()
    assert_alike(twin, model, x)
    with torch.no_grad(), autocast(HALF):
        twin(x.to(TRITON_DEVICE))
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    with autocast(HALF):
        twin(x.to(TRITON_DEVICE))
    assert not calls


def test_products_of_dtypes_that_do_not_match():
    """Outside of autocast the original says so."""
    _, twin = pair(block())
    with autocast(HALF):
        for _ in range(2):
            twin(X.to(TRITON_DEVICE))
    twin.attn.proj.to(HALF)
    with pytest.raises(RuntimeError, match="dtype"):
        twin(X.to(TRITON_DEVICE))


@pytest.mark.parametrize("name", ["timm-v1", "timm-v2", "torchvision-v1-padded", "hf-swin-padded", "hf-swinv2"])
@pytest.mark.parametrize("half", [False, True], ids=["autocast", "half"])
def test_checkpoints_of_first_calls(name, half):
    """What a module saves in its first call, or of the first after a change, it saves when that is computed again."""
    model, x = helpers.small_model(name, batch=1, depths=(1, 1))
    twin = swinaccel.accelerate(model.to(TRITON_DEVICE), backend="triton").train()
    twin = twin.to(HALF) if half else twin
    x = x.to(TRITON_DEVICE, HALF if half else torch.float32)

    def step(x):
        with autocast(None if half else HALF):
            out = checkpoint(twin, x.requires_grad_(), use_reentrant=False)
        next(iter(helpers.tensors(out))).float().sum().backward()

    step(x)
    step(x)
    with torch.no_grad(), autocast(None if half else HALF):
        twin.eval()(x.detach())
    twin.train()
    step(x)
    step(torch.cat([x.detach()] * 2))


STEPS = {
    "written": lambda parameter: parameter.detach().mul_(3),
    "replaced": lambda parameter: setattr(parameter, "data", parameter.data * 3),
}


@pytest.mark.parametrize("change", STEPS)
@pytest.mark.parametrize("kind", [None, "autocast", "half"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "create_graph"])
def test_parameters_that_change_before_the_backward(change, kind, twice):
    """Gradients are those of the forward's numbers, or refused, as the original's are."""

    def input_gradient(one, name):
        def forward():
            x = X[:2].to(TRITON_DEVICE, HALF if kind == "half" else None).clone().requires_grad_()
            with autocast(HALF if kind == "autocast" else None):
                return x, one(x).float().square().mean()

        forward()  # the next is of what is remembered
        x, loss = forward()
        STEPS[change](one.get_parameter(name))
        try:
            return torch.autograd.grad(loss, x, create_graph=twice)[0].detach()
        except RuntimeError as error:
            return str(error)[:40]

    model = block()
    for name in ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight", "mlp.fc1.bias"):
        plain, twin = pair(copy.deepcopy(model).to(HALF if kind == "half" else torch.float32))
        found, expected = (input_gradient(one, name) for one in (twin, plain))
        if isinstance(expected, str):
            assert found == expected, name
        else:
            helpers.assert_close(found, expected, 1e-4 if kind is None else 20 * torch.finfo(HALF).eps)


def test_weights_that_the_backward_does_not_need():
    """Frozen ones may be written to after the forward, in 16-bit models too; nothing is kept for them."""
    _, twin = pair(block().to(HALF))
    twin.requires_grad_(False).attn.proj.bias.requires_grad_()
    for _ in range(2):
        out = twin(X.to(TRITON_DEVICE, HALF))
        with torch.no_grad():
            twin.attn.proj.weight.mul_(1.1)
        out.float().sum().backward()


def test_functions_that_are_replaced(monkeypatch):
    """As profilers and quantisers do."""
    model, twin = pair(block())
    assert_alike(twin, model, dtype=HALF)
    for name in ("linear", "gelu", "layer_norm"):
        plain = getattr(F, name)
        with monkeypatch.context() as patch:
            patch.setattr(F, name, lambda *args, plain=plain, **options: plain(*args, **options) * 1.5)
            assert_alike(twin, model, dtype=HALF)
            assert_alike(twin, model)


@pytest.mark.parametrize("trained", ["biases", "all"])
def test_steps_between_forward_and_backward(trained):
    """The original keeps casts of the MLP's weights, and none of its biases."""
    model, twin = pair(block())
    for one in (model, twin):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(trained == "all" or name in ("mlp.fc1.bias", "mlp.fc2.bias"))
        with autocast(HALF if trained == "all" else None):
            out = one(X.to(TRITON_DEVICE))
        with torch.no_grad():
            one.mlp.fc1.bias.add_(1)
            if trained == "all":
                one.mlp.fc1.weight.mul_(2)
        out.square().sum().backward()
    helpers.assert_close(twin.mlp.fc1.bias.grad, model.mlp.fc1.bias.grad, 1e-4 if trained != "all" else 2e-2)


class PerToken(nn.Module):
    """Drops tokens, not samples."""

    def __init__(self):
        super().__init__()
        self.drop_prob = 0.5

    def forward(self, x):
        return x * torch.empty((*x.shape[:-1], 1), device=x.device).bernoulli_(1 - self.drop_prob)


def test_rates_that_change_are_followed(ran):
    model, twin = pair(drop_paths(block(), 0.2))
    for rate in (0.2, 0.7, 0.0, 0.4):
        for one in (model, twin):
            one.drop_path1.drop_prob = one.drop_path2.drop_prob = rate
        assert_alike(twin, model)
    for mode in (False, True):
        model.train(mode), twin.train(mode)
        assert_alike(twin, model)
    assert len(ran) == 18


def test_samples_are_dropped_without_gradients(ran):
    model, twin = pair(drop_paths(block()))
    with torch.no_grad():
        found = []
        for one in (twin, model):
            torch.manual_seed(4)
            found.append(one(X.to(TRITON_DEVICE)))
    helpers.assert_close(*found)
    assert len(ran) == 3


def branches(self, x, drop1, drop2):
    x = x + drop1(self._attn(self.norm1(x)))
    return x, lambda y: x + drop2(y)


def plain(self, x):
    x, end = branches(self, x, self.drop_path1, self.drop_path2)
    return end(self.ffn(x) * (0.5 if self.flag else 1))


def detached(self, x):
    x = x + self.drop_path1(self._attn(self.norm1(x.detach())))
    return x + self.drop_path2(self.ffn(x))


def other_drop(self, x):
    x, end = branches(self, x, nn.Identity() if self.training else self.drop_path1, self.drop_path2)
    return end(self.ffn(x))


def noise(self, x):
    x, end = branches(self, x, self.drop_path1, self.drop_path2)
    return end(self.ffn(x) * (1.5 if self.training else 1))


def swapped(self, x):
    x, end = branches(self, x, self.drop_path2, self.drop_path1)
    return end(self.ffn(x))


def autocast_off(self, x):
    x, end = branches(self, x, self.drop_path1, self.drop_path2)
    with torch.autocast(x.device.type, enabled=False):
        return end(self.ffn(x))


def dropout(self, x):
    x, end = branches(self, x, self.drop_path1, self.drop_path2)
    return end(F.dropout(self.ffn(x), self.dropout, self.training))


def half(self, x):
    x, end = branches(self, x, self.drop_path1, self.drop_path2)
    y = self.ffn(x)
    return end(y.clamp(-1, 1) if x.dtype == torch.float16 else y)


def odd(forward):
    """A block that looks like timm's, with another forward."""
    from timm.models.swin_transformer import SwinTransformerBlock

    def ffn(self, x):
        return self.mlp(self.norm2(x))

    cls = type("Odd", (SwinTransformerBlock,), {"forward": forward, "ffn": ffn, "__module__": __name__})
    made = cls(16, (8, 8), 2, window_size=4, shift_size=2, drop_path=0.3)
    made.dropout, made.flag, made.drop_path2.drop_prob = 0.3, False, 0.6
    return helpers.randomize(made)


ODD = [detached, other_drop, noise, swapped, autocast_off, dropout, half]


@pytest.mark.parametrize("forward", ODD, ids=lambda forward: forward.__name__)
def test_blocks_that_differ_in_training_are_no_known_ones(forward, ran):
    model, twin = pair(odd(forward))
    assert_alike(twin, model)
    assert_alike(twin, model, dtype=HALF)
    assert ran == []
    helpers.assert_accelerated(twin, 1)


def ffn(model):
    model.ffn = types.MethodType(lambda self, x: 2 * self.mlp(self.norm2(x)), model)


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("change", [ffn, lambda model: setattr(model, "flag", True)], ids=["method", "flag"])
def test_what_a_block_of_unknown_code_is_set_to(change, before, ran):
    model = odd(plain).to(TRITON_DEVICE).train()
    assert_alike(swinaccel.accelerate(copy.deepcopy(model), backend="triton"), model)
    assert len(ran) == 3
    ran.clear()
    if before:
        change(model)
        twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    else:
        twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton")
        change(model), change(twin)
    assert_alike(twin, model)
    assert ran == []


def test_a_drop_path_that_comes_later(ran):
    """Where nothing dropped, it was not seen what a drop-path does."""
    model, twin = pair(odd(plain))
    for one in (model, twin):
        one.drop_path1 = nn.Identity()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    assert_alike(twin, model)
    assert ran
    ran.clear()
    for one in (model, twin):
        one.drop_path1 = PerToken()
    assert_alike(twin, model)
    assert ran == []


def test_products_that_want_their_own_dtype(ran):
    class Wide(nn.Linear):
        def forward(self, x):
            with torch.autocast(x.device.type, enabled=False):
                return F.linear(x, self.weight, self.bias)

    model = block()
    qkv = Wide(16, 48)
    qkv.load_state_dict(model.attn.qkv.state_dict())
    model.attn.qkv = qkv
    model, twin = pair(model)
    assert_alike(twin, model, dtype=HALF)
    assert ran


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_kernel_that_fails(fails_at, v2, monkeypatch, caplog):
    """At any of a block's three, what is left is done by its own modules."""
    model, twin = pair(block(v2=v2))
    calls, run_norm = [], kernels.run_norm

    def fail(*args, **options):
        calls.append(args)
        if len(calls) > fails_at:
            raise kernels.LaunchError("no")
        run_norm(*args, **options)

    monkeypatch.setattr(kernels, "run_norm", fail)
    assert_alike(twin, model)
    assert ops.has_failures() == (fails_at < (2 if v2 else 3))
    ops.forget_failures()


def test_the_cpu_trains_by_itself(ran):
    model = block().train()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    assert_alike(twin.cpu(), model.cpu()) if not ON_GPU else twin(X).sum().backward()
    assert ran == []
