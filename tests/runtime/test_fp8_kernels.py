"""Products of 8 bits: their kernels against fp64, and scales that are known before what they scale."""

from __future__ import annotations

import helpers
import pytest
import torch
import torch.nn.functional as F
from blocks import random
from eight_bits import EIGHT, hidden_scale, quantised, relative
from helpers import TRITON_DEVICE
from swinaccel.kernels.quantise import UNIT

from swinaccel.backends.triton import linear8, quantise

DTYPES = [torch.float16, torch.float32, torch.bfloat16]
DEVICE = torch.ones(1, device=TRITON_DEVICE).device
NAN, INF = float("nan"), float("inf")


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


def wide(operand):
    """Return what numbers of 8 bits and their rows' scales stand for, in fp64."""
    numbers, scale = operand
    return numbers.double() * scale.double()[:, None]


def row_of(mode, x, branch, weight, bias):
    """Return what a kernel writes in 8 bits, before that, and the sum, in fp64."""
    x, branch, weight, bias = (one.double() for one in (x, branch, weight, bias))

    def norm(y):
        return F.layer_norm(y, y.shape[-1:], weight, bias, 1e-5)

    if mode == quantise.ADD_NORM:
        return norm(x + branch), x + branch
    if mode == quantise.NORM_ADD:
        return x + norm(branch), x + norm(branch)
    return {quantise.PLAIN: x, quantise.NORM: norm(x)}[mode], None


@pytest.mark.parametrize("mode", range(4))
@pytest.mark.parametrize(("rows", "channels"), [(37, 48), (5, 192), (3, 1024)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(mode, rows, channels, dtype, poisoned):
    x, branch = (0.1 + random(rows, channels, dtype=dtype, scale=3, seed=seed) for seed in (0, 1))
    weight, bias = 1 + random(channels, dtype=dtype, scale=0.3), random(channels, dtype=dtype, seed=2)
    expected, total = row_of(mode, x, branch, weight, bias)
    out, scale, hidden = empty(rows, channels, dtype=EIGHT), empty(rows), empty(rows)
    limits = torch.tensor([2.5, 0.75], device=DEVICE)
    summed = torch.empty_like(x) if total is not None else None
    affine = (weight, bias) if mode >= quantise.NORM else (None, None)
    launch = quantise.rows_launch(mode, DEVICE, rows, channels, 64, 1e-5)
    launch(out, scale, x, branch if total is not None else None, summed, *affine, limits, None, None, hidden)
    largest = expected.abs().amax(-1)
    assert torch.allclose(scale.double(), largest / 448, rtol=1e-5)
    # Half a unit of e4m3: of numbers a sixteenth of them, and of the smallest, half the distance between them.
    allowed = torch.maximum(expected.abs() / 16, scale.double()[:, None] * 2**-10) * (1 + 1e-4) + 1e-6
    assert ((wide((out, scale)) - expected).abs() <= allowed).all()
    if total is not None:
        helpers.assert_close(summed.double(), total, torch.finfo(dtype).eps)
    bound = wide((out, scale)).norm(dim=-1) * 2.5 * UNIT.value + 0.75
    assert torch.allclose(hidden.double(), bound * (1 + 2**-6) / 448, rtol=1e-5)


def test_rows_of_zeros_and_of_numbers_that_are_not_finite():
    x = random(6, 48)
    x[0], x[1], x[2] = 0, x[1] * 1e-36, x[2] * 1e35
    x[3, 5], x[4, 6] = NAN, INF
    out, scale = empty(6, 48, dtype=EIGHT), empty(6)
    quantise.rows_launch(quantise.PLAIN, DEVICE, 6, 48, 64)(out, scale, x, *[None] * 8)
    found = out.float() * scale[:, None]
    assert torch.equal(found[0], x[0])
    assert found[1].abs().max() <= 1e-30
    assert relative(found[2], x[2]) < 0.05
    assert torch.equal(found[3].isnan(), x[3].isnan())
    assert found[4].isnan().any()
    assert relative(found[5], x[5]) < 0.05


@pytest.mark.parametrize(("channels", "width", "hidden"), [(48, 48, 192), (64, 32, 80)])
def test_weights(channels, width, hidden, poisoned):
    shapes = (3 * width, channels), (hidden, channels), (channels, hidden)
    weights = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    out, norm = empty(sum(one.numel() for one in weights), dtype=EIGHT), empty(hidden)
    scale = empty(sum(map(len, weights)))
    quantise.weights_launch(DEVICE, channels, 3 * width, hidden)(out, scale, norm, *weights)
    parts = zip(out.split([one.numel() for one in weights]), scale.split(list(map(len, weights))), strict=True)
    found = [wide((part.view(weight.shape), own)) for (part, own), weight in zip(parts, weights, strict=True)]
    for one, weight in zip(found, weights, strict=True):
        assert relative(one, quantised(weight)) < 2e-3  # a division in fp32 may fall on the other side of a tie
    assert torch.allclose(norm.double() * UNIT.value, found[1].norm(dim=-1), rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 42, 43])
@pytest.mark.parametrize("has_bias", [True, False])
def test_limits_are_taken_beside_the_rows(rows, has_bias, poisoned):
    """By a program of its own, whether or not the rows fill the others."""
    x, norm, bias = random(rows, 48), random(80).abs(), random(80, scale=3, seed=1)
    bias[7] = -11
    out, scale, limits = empty(rows + 1, 48, dtype=EIGHT), empty(rows + 1), empty(2)
    out.fill_(3)
    scale.fill_(5)
    launch = quantise.rows_launch(quantise.PLAIN, DEVICE, rows, 48, 80, limits=True)
    launch(out, scale, x, *[None] * 4, limits, norm, bias if has_bias else None, None)
    assert limits.tolist() == [norm.max().item(), 11 if has_bias else 0]
    assert relative(wide((out, scale))[:rows], quantised(x)) < 2e-3
    assert (out[rows].float() == 3).all()
    assert scale[rows] == 5


# Products.


def operand(x):
    scale = x.float().abs().amax(-1).clamp_min(1e-30) / 448
    return (x.float() / scale[:, None]).to(EIGHT), scale


@pytest.mark.parametrize(("rows", "channels", "outputs"), [(131, 48, 144), (1, 272, 80), (300, 128, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products(rows, channels, outputs, dtype, adds, has_bias, poisoned):
    x, weight = operand(random(rows, channels)), operand(random(outputs, channels, seed=1) * channels**-0.5)
    bias = random(outputs, dtype=dtype, seed=2) if has_bias else None
    total = random(rows, outputs, dtype=dtype, scale=2, seed=3) if adds else None
    expected = F.linear(wide(x), wide(weight), None if bias is None else bias.double())
    expected = expected + total.double() if adds else expected
    out = total if adds else empty(rows, outputs, dtype=dtype)
    launch = linear8.linear8_launch(DEVICE, rows, channels, outputs, adds=adds)
    launch(out, None, *x, *weight, bias, total)
    helpers.assert_close(out.double(), expected, max(torch.finfo(dtype).eps, 1e-3 if TRITON_DEVICE == "cuda" else 1e-6))


@pytest.mark.parametrize(("rows", "channels", "outputs"), [(131, 48, 144), (1, 272, 80), (300, 128, 256)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gelu_in_8_bits(rows, channels, outputs, has_bias, poisoned):
    x, weight = operand(random(rows, channels)), operand(random(outputs, channels, seed=1) * channels**-0.5)
    bias = random(outputs, dtype=torch.float16, seed=2) if has_bias else None
    scale, out = empty(rows).uniform_(0.02, 0.05), empty(rows, outputs, dtype=EIGHT)
    linear8.linear8_launch(DEVICE, rows, channels, outputs, gelu=True)(out, scale, *x, *weight, bias, None)
    expected = F.gelu(F.linear(wide(x), wide(weight), None if bias is None else bias.double()))
    assert_eight(out, scale, expected)


def assert_eight(out, scale, expected):
    """Numbers of 8 bits are as near as they can be, but for what GELU is off by, and the sum behind it."""
    scale = scale.double()[:, None]
    allowed = torch.maximum(expected.abs() / 16, scale * 2**-10) * (1 + 1e-2) + torch.clamp(expected.abs(), max=2e-4)
    assert ((out.double() * scale - expected).abs() <= allowed).all()


# Scales that are known before.


def up(x, weight, bias):
    """Return the first product of an MLP and its GELU in 8 bits, their scales, and both operands."""
    (rows, channels), hidden = x.shape, len(weight)
    y, numbers, limits = (empty(rows, channels, dtype=EIGHT), empty(rows)), empty(rows, hidden, dtype=EIGHT), empty(2)
    scale = empty(rows)
    own, norm = (empty(channels * (2 * hidden + 16), dtype=EIGHT), empty(16 + hidden + channels)), empty(hidden)
    other = torch.zeros(16, channels, device=DEVICE), torch.zeros(channels, hidden, device=DEVICE)
    quantise.weights_launch(DEVICE, channels, 16, hidden)(*own, norm, other[0], weight, other[1])
    first = quantise.rows_launch(quantise.PLAIN, DEVICE, rows, channels, hidden, limits=True)
    first(*y, x, *[None] * 4, limits, norm, bias, None)
    second = quantise.rows_launch(quantise.PLAIN, DEVICE, rows, channels, hidden)
    second(*y, x, *[None] * 4, limits, None, None, scale)
    middle = own[0][16 * channels : (16 + hidden) * channels].view(hidden, channels), own[1][16 : 16 + hidden]
    linear8.linear8_launch(DEVICE, rows, channels, hidden, gelu=True)(numbers, scale, *y, *middle, bias, None)
    return numbers, scale, wide(y), wide(middle)


def parallel(x, weight, bias):
    x[:] = weight[torch.arange(len(x)) % len(weight)] * 2.0 ** torch.arange(len(x))[:, None].to(x.device).fmod(9)
    bias.zero_()


def largest_row_last(x, weight, bias):
    """Every row and the last hidden channel are parallel, whose weight is the largest."""
    weight[-1] *= 4
    x[:] = weight[-1]
    bias.zero_()


def one_bias(x, weight, bias):
    bias[3] = 1000


def one_negative_bias(x, weight, bias):
    bias[3] = -1000


def outlier(x, weight, bias):
    x[:, 5] = 900


def tiny(x, weight, bias):
    x *= 1e-25
    bias.zero_()


def zeros(x, weight, bias):
    x.zero_()
    bias.zero_()


def zero_weights(x, weight, bias):
    x *= 1e30
    weight.zero_()


def huge(x, weight, bias):
    """The bound is more than fp32 has, but no hidden number is."""
    x[:] = 1e31
    weight[:], weight[0] = 0.01, 0
    weight[0, 3], x[:, 3] = 1e8, 0


CASES = [parallel, largest_row_last, one_bias, one_negative_bias, outlier, tiny, zeros, zero_weights, huge]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_no_hidden_number_exceeds_its_bound(case, has_bias, poisoned):
    x, weight, bias = random(21, 64), random(80, 64, seed=1) * 0.125, random(80, seed=2)
    case(x, weight, bias)
    bias = bias if has_bias else None
    out, scale, y, w = up(x, weight, bias)
    hidden = F.linear(y, w, None if bias is None else bias.double())
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert (hidden.abs().amax(-1) <= 448 * scale.double() / (1 + (0 if case is huge else 2**-7))).all()
    assert not out.float().isnan().any()
    assert_eight(out, scale, F.gelu(hidden))
    if case not in (huge, zeros, tiny, zero_weights):
        assert torch.allclose(scale.double(), hidden_scale(y, w, bias)[:, 0], rtol=1e-5)
    if case in (parallel, largest_row_last):  # and the bound is reached
        assert (hidden.abs().amax(-1).max() >= 448 * scale.double().min() / (1 + 2**-5)).all()


def in_row(x, weight, bias, value):
    x[4, 7] = value


def in_weight(x, weight, bias, value):
    weight[4, 7] = value


def in_bias(x, weight, bias, value):
    bias[4] = value


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [in_row, in_weight, in_bias])
def test_numbers_that_are_not_finite_reach_their_rows_and_no_others(place, value):
    x, weight, bias = random(21, 64), random(80, 64, seed=1) * 0.125, random(80, seed=2)
    place(x, weight, bias, value)
    out, scale, _, _ = up(x, weight, bias)
    found = (out.double() * scale.double()[:, None]).isfinite().all(-1)
    expected = torch.ones(21, dtype=torch.bool, device=found.device)
    expected[4 if place is in_row else slice(None)] = False
    assert torch.equal(found, expected)
    if place is in_bias:  # each row has one such number
        assert not (out.double()[:, 4] * scale.double()).isfinite().any()


def test_numbers_beyond_fp32_make_their_row_nan():
    x, weight, bias = random(21, 64), random(80, 64, seed=1).abs(), random(80, seed=2)
    x[4] = 3e38
    out = up(x, weight, bias)[0]
    assert out[4].float().isnan().all()
    assert not out[[3, 5]].float().isnan().any()
