"""Products of 8 bits: blocks against the same arithmetic in fp64, and rows that are not finite, or not like others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from blocks import HALF, random
from eight_bits import accelerated, call, hidden_scale, knows, made, quantised, relative

import swinaccel
from swinaccel.ops import fp8

KEEPS_VERDICTS = True
pytestmark = pytest.mark.usefixtures("anywhere")
CHANNELS, WIDTH, HIDDEN = 64, 32, 144
SHAPES = (3 * WIDTH, CHANNELS), (CHANNELS, WIDTH), (HIDDEN, CHANNELS), (CHANNELS, HIDDEN)


def parts(dtype=HALF, has_bias=True):
    """Return layers and norms of a block."""
    layers = [
        (
            random(*shape, dtype=dtype, scale=1.5 * shape[1] ** -0.5, seed=seed),
            random(shape[0], dtype=dtype, scale=0.5, seed=seed) if has_bias else None,
        )
        for seed, shape in enumerate(SHAPES)
    ]
    own = [(random(CHANNELS, dtype=dtype, scale=0.3, seed=s), random(CHANNELS, dtype=dtype)) for s in (0, 1)]
    return layers, [(1 + weight, bias, 1e-5) for weight, bias in own]


def attend(qkv):
    q, k, v = qkv.chunk(3, -1)
    return q * k.tanh() + v


def run(x, layers, norms, post_norm, product=HALF, total=HALF):
    sizes = 3 * WIDTH, HIDDEN
    block = fp8.BoundBlock(x.shape, x.device, product, total, sizes, (1e-5, 1e-5), post_norm)
    out = block.run(x, attend, norms, layers)
    assert torch.equal(block.run(x, attend, norms, layers), out) or not out.isfinite().all()
    return out


def exact(x, layers, norms, post_norm, is_eight):
    """Return what a block gives, in fp64, with operands in 8 bits or not."""
    wide = [(w.double(), None if b is None else b.double()) for w, b in layers]
    (before, after), y = [(w.double(), b.double(), e) for w, b, e in norms], x.double()
    step = quantised if is_eight else (lambda y: y)

    def mlp(y):
        (fc1, bias1), (fc2, bias2) = wide[2:]
        y, fc1 = step(y), step(fc1)
        active = F.gelu(F.linear(y, fc1, bias1))
        if is_eight:
            scale = hidden_scale(y, fc1, bias1)
            active = (active / scale).float().to(fp8.EIGHT).double() * scale
        return F.linear(active, step(fc2), bias2)

    def attention(y):
        return F.linear(attend(F.linear(step(y), step(wide[0][0]), wide[0][1])), *wide[1])

    if post_norm:
        y = y + F.layer_norm(attention(y), (CHANNELS,), *before)
        return y + F.layer_norm(mlp(y), (CHANNELS,), *after)
    y = y + attention(F.layer_norm(y, (CHANNELS,), *before))
    return y + mlp(F.layer_norm(y, (CHANNELS,), *after))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize(
    ("dtype", "product", "shape"),
    [
        (HALF, HALF, (2, 5, 7)),
        (torch.float32, HALF, (1, 1, 1)),  # under autocast
        (torch.float32, HALF, (3, 7, 9)),
        (torch.bfloat16, torch.bfloat16, (1, 3, 43)),
    ],
)
def test_a_block_against_quantised_arithmetic_in_fp64(post_norm, has_bias, dtype, product, shape, poisoned):
    layers, norms = parts(dtype, has_bias)
    x = random(*shape, CHANNELS, dtype=dtype)
    found = run(x, layers, norms, post_norm, product, dtype)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    wanted, full = (exact(x, layers, norms, post_norm, is_eight) for is_eight in (True, False))
    # What is left is rounding in 16 bits, and numbers that fall to the other side of a tie for it.
    assert relative(found, wanted) < 0.5 * relative(wanted, full)
    assert relative(found, full) < 1.2 * relative(wanted, full)


def in_row(x, layers, value):
    x[1, 2, 3, 5] = value


def in_weight(x, layers, value):
    layers[2][0][4, 7] = value


def in_bias(x, layers, value):
    layers[2][1][4] = value


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [in_row, in_weight, in_bias])
def test_what_is_not_finite_stays_so(place, value, post_norm):
    (layers, norms), x = parts(), random(2, 5, 7, CHANNELS, dtype=HALF)
    place(x, layers, value)
    found, expected = run(x, layers, norms, post_norm), exact(x, layers, norms, post_norm, False)
    assert torch.equal(found.isfinite().all(-1), expected.isfinite().all(-1))
    assert found.isfinite().any() == (place is in_row)


@pytest.mark.parametrize("post_norm", [False, True])
def test_rows_of_zeros(post_norm):
    (layers, norms), x = parts(has_bias=False), random(2, 5, 7, CHANNELS, dtype=HALF)
    norms = [(weight, torch.zeros_like(bias), eps) for weight, bias, eps in norms]
    x[1, 2] = 0
    found = run(x, layers, norms, post_norm)
    assert (found[1, 2] == 0).all()
    assert relative(found, exact(x, layers, norms, post_norm, False)) < 0.1


def spread(factor):
    """Return a block, one of whose hidden channels has a weight so much larger, for what is always zero."""
    model = made(dtype=torch.float32).layers[1].blocks[1]
    with torch.no_grad():
        model.norm2.weight[3] = model.norm2.bias[3] = 0
        model.mlp.fc1.weight[5, 3] = factor * model.mlp.fc1.weight.norm(dim=-1).max()
    return model.to(HALF)


def test_a_loose_bound_costs_little():
    x, errors = random(2, 4, 4, 64, dtype=HALF), []
    for factor in (1, 100):
        fast = accelerated(spread(factor))
        call(fast, x)
        (known,) = knows(fast)
        assert known.reason is None
        errors.append(known.error)
    assert errors[1] < 1.1 * errors[0]


def test_a_bound_that_is_too_loose_leaves_the_block_without():
    model, x = spread(3e4), random(2, 4, 4, 64, dtype=HALF)
    fast, plain = accelerated(model, max_error=0.05), swinaccel.accelerate(spread(3e4), backend="triton")
    for _ in range(2):
        assert torch.equal(call(fast, x), call(plain, x))
    (known,) = knows(fast)
    assert known.error > 0.05
    assert "products of 8 bits err by" in known.reason


@pytest.mark.parametrize("post_norm", [False, True])
def test_weights_and_norms_of_now(post_norm):
    """Also where `data` was written to: the scales of the hidden rows are taken anew."""
    (layers, norms), x = parts(), random(2, 5, 7, CHANNELS, dtype=HALF)
    sizes = 3 * WIDTH, HIDDEN
    block = fp8.BoundBlock(x.shape, x.device, HALF, HALF, sizes, (1e-5, 1e-5), post_norm)
    block.run(x, attend, norms, layers)
    for weight, bias in layers[2:]:
        weight.data.mul_(8)
        bias.data.mul_(5)
    norms[0][0].data.mul_(2)
    found, again = block.run(x, attend, norms, layers), run(x, layers, norms, post_norm)
    assert torch.equal(found, again)
    assert relative(found, exact(x, layers, norms, post_norm, False)) < 0.1
