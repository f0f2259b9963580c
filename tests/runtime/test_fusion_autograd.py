"""Functions around attention, where gradients are recorded: every output and gradient against fp64."""

from __future__ import annotations

import helpers
import pytest
import torch
import torch.nn.functional as F
from block_gradients import DTYPES, check, drop_paths, layer_norm, leaves, narrowed, pair, scaled
from blocks import HALF, HALVES, random
from helpers import TRITON_DEVICE

from swinaccel.backends.triton import block as kernels
from swinaccel.backends.triton import block_bwd as triton_block_bwd
from swinaccel.ops import block_autograd as recorded

KEEPS_VERDICTS = True


pytestmark = pytest.mark.usefixtures("kernels_that_run")


SHAPES = [(3, 37, 24), (2, 5, 180)]
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_dtype = pytest.mark.parametrize(("wide", "dtype"), DTYPES)


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
