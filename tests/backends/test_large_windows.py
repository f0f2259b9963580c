"""Large windows: dense biases that hold the mask, and weights below a bound of cosine scores."""

from __future__ import annotations

import dataclasses
import math

import gradients
import pytest
import torch
from helpers import TRITON_DEVICE
from kernel_problems import DTYPES, VOLUMES, Case, attend, compare, run
from swinaccel.kernels import launch

from swinaccel.backends.triton import launches
from swinaccel.spec import reference

pytestmark = pytest.mark.usefixtures("strict_kernels")

SHIFTED = [
    Case((9, 8), (18, 16), (4, 4), heads=1),
    Case((9, 8), (18, 16), (0, 3), heads=2, batch=2),
    Case((5, 13), (11, 13), (2, 6), batch=2),
    Case((12, 12), (13, 24), (6, 6), heads=1, roll_first=True),
    Case((9, 8), (18, 16), (4, 4), heads=1, mask_value=-2.0),
    Case((9, 8), (9, 16), (4, 4), heads=1, mask_value=-1e9),
    Case((2, 17, 2), (3, 17, 4), (1, 0, 1), heads=1),
    VOLUMES[-1],
]


@pytest.fixture
def kinds(monkeypatch):
    """Every dense bias of a shifted problem holds the mask, as where many windows read it."""
    asked = []

    def every(*, axes, **sizes):
        asked.append(sizes)
        return 2**axes

    launches.launches.clear()
    monkeypatch.setattr(launch, "mask_kinds", every)
    yield
    launches.launches.clear()
    assert asked


@pytest.fixture(params=[1, 2], ids=["alone", "pairs"])
def images(request, monkeypatch):
    """So many images in each program."""
    large = launch.large
    launches.launches.clear()
    monkeypatch.setattr(launch, "large", lambda **problem: dataclasses.replace(large(**problem), images=request.param))
    yield
    launches.launches.clear()


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("case", SHIFTED, ids=str)
def test_masks_in_the_bias(case, cosine, kinds):
    gradients.run(dataclasses.replace(case, cosine=cosine))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", [*SHIFTED[:3], SHIFTED[4], SHIFTED[-1]], ids=str)
def test_masks_in_the_bias_in_low_precision(case, dtype, kinds, images):
    run(dataclasses.replace(case, cosine=True, batch=3), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_of_masks_in_the_bias(dtype, kinds, images):
    gradients.run(Case((9, 8), (18, 16), (4, 4), batch=2, cosine=True, dim=32), dtype)


@pytest.mark.parametrize("mask_value", [3.0, 30.0])
def test_masks_that_raise_scores_are_added_to_them(mask_value, monkeypatch, images):
    monkeypatch.setattr(launch, "mask_kinds", lambda **sizes: pytest.fail("rounded with the bias"))
    for cosine in (False, True):
        run(Case((9, 8), (18, 16), (4, 4), heads=1, cosine=cosine, mask_value=mask_value), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_value_that_is_infinite(dtype, kinds, images):
    """It is NaN for the queries whose mask leaves nothing of its weight, and infinite for the others."""
    case = Case((9, 8), (9, 16), (0, 4), heads=1, dim=8, batch=2, cosine=True)
    qkv, options = case.make(dtype)
    qkv[0, 0, 0, -5] = math.inf
    options["logit_scale"] = torch.full((1,), math.log(8.0), device=TRITON_DEVICE)
    found = attend(qkv, case.geometry, **options)
    expected = reference.shifted_window_attention(*qkv.chunk(3, -1), case.geometry, **options)
    assert found.isnan().any()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


def test_an_infinite_value_of_little_weight(images):
    """Below the bound that weight would be lost, and the value NaN."""
    case = Case((9, 8), (9, 8), heads=1, batch=2, cosine=True)
    qkv, options = opposite(case, torch.float16, 8.0)
    options["table"] = torch.zeros_like(options["table"])
    options["table"][options["index"][3, 40]] = -12.0
    qkv[:, 5, 0, -3] = math.inf  # the window's 40th token
    expected = reference.shifted_window_attention(*qkv.chunk(3, -1), case.geometry, **options)
    assert expected[..., -3].isinf().all()
    assert torch.equal(attend(qkv, case.geometry, **options).isinf(), expected.isinf())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_values_near_the_largest_numbers(dtype, images):
    case = Case((9, 8), (9, 8), heads=2, batch=3, cosine=True)
    qkv, options = case.make(dtype)
    qkv[..., 64:] *= 2e35 if dtype == torch.bfloat16 else 1e4
    options["logit_scale"] = torch.full((2,), math.log(10.0), device=TRITON_DEVICE)
    found = attend(qkv, case.geometry, **options)
    assert found.isfinite().all()


def test_a_bias_that_is_rounded_up(images):
    case = Case((9, 8), (9, 8), heads=1, batch=2, cosine=True)
    qkv, options = case.make(torch.float16)
    qkv[..., 16:32] = qkv[..., :16]
    options["table"] = options["table"].float()
    options["table"][:] = 2051.0
    options["logit_scale"] = torch.full((1,), math.log(8.0), device=TRITON_DEVICE)
    assert attend(qkv, case.geometry, **options).isfinite().all()


def test_which_problems_have_masks_in_the_bias():
    sizes = {"tokens": 144, "axes": 2, "num_heads": 8}
    assert launch.mask_kinds(**sizes, windows=64, cosine=True) == 4
    assert launch.mask_kinds(**sizes, windows=63, cosine=True) == 1
    assert launch.mask_kinds(**sizes, windows=511, cosine=False) == 1
    assert launch.mask_kinds(**sizes, windows=512, cosine=False) == 4
    assert launch.mask_kinds(tokens=392, axes=3, num_heads=64, windows=10**4, cosine=True) == 1  # of too much memory


def opposite(case: Case, dtype: torch.dtype, scale: float) -> tuple[torch.Tensor, dict]:
    """Return a problem whose cosines are all near -1, so that no score comes near its bound."""
    qkv, options = case.make(dtype)
    q, k, _ = qkv.float().chunk(3, dim=-1)
    common = torch.randn(case.dim, generator=torch.Generator().manual_seed(1)).to(q).repeat(case.heads)
    q.mul_(0.05).add_(common)
    k.mul_(0.05).sub_(common)
    qkv = torch.cat((q, k, qkv.float().chunk(3, dim=-1)[2]), -1).to(dtype)
    return qkv, {**options, "logit_scale": torch.full((case.heads,), math.log(scale), device=TRITON_DEVICE)}


@pytest.mark.parametrize("scale", [6.0, 10.0, 11.1, 15.9])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_scores_far_below_their_bound(dtype, scale, images):
    case = Case((9, 8), (9, 8), heads=2, batch=3, cosine=True)
    qkv, options = opposite(case, dtype, scale)
    compare(qkv, case.geometry, **options)
    gradients.compare(qkv, case.geometry, **options)


@pytest.mark.parametrize("image", [0, 1])
def test_one_image_of_two_far_below_its_bound(image, images):
    case = Case((9, 8), (9, 8), heads=2, batch=2, cosine=True)
    low, options = opposite(case, torch.float16, 15.0)
    qkv, _ = case.make(torch.float16)
    qkv[image] = low[image]
    compare(qkv, case.geometry, **options)


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 15.9, 16.1, 30.0, 49.0, 51.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_scales(dtype, scale, images):
    case = Case((9, 8), (9, 16), (0, 0), heads=2, batch=3, cosine=True, dim=32)
    run(case, dtype, logit_scale=torch.full((2,), math.log(scale), device=TRITON_DEVICE))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_one_bias_far_above_all_others(dtype, images):
    """The largest bias is that of a key whose cosine is -1, in one row only."""
    case = Case((9, 8), (9, 8), heads=2, batch=3, cosine=True)
    qkv, options = opposite(case, dtype, 8.0)
    options["table"] = options["table"].clone()
    options["table"][7] += 30.0
    compare(qkv, case.geometry, **options)
