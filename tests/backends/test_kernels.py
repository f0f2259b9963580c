"""The kernels against the oracle: in Triton's interpreter where there is no GPU, else compiled."""

from __future__ import annotations

import itertools
import math

import helpers
import pytest
import torch
from helpers import TRITON_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_problems import (
    DTYPES,
    GPU_CASES,
    HEAD_DIMS,
    SMALL_AND_LARGE,
    VOLUMES,
    Case,
    attend,
    compare,
    draw_case,
    rounded_cases,
    run,
)
from torch import Tensor

from swinaccel.spec import reference

pytestmark = pytest.mark.usefixtures("strict_kernels")

# The kernel changes above 64 tokens.
SMALL = [
    Case((2, 2), (6, 4)),
    Case((2, 2), (5, 3), (1, 1), heads=1),
    Case((1, 9), (3, 20), (0, 4)),
    Case((3, 2), (7, 5), (1, 1), heads=3),
    Case((2, 5), (5, 7), (1, 0)),
    Case((7, 7), (14, 14), (3, 3), dim=32),
    Case((7, 7), (9, 16), (3, 0), dim=32),
    Case((8, 8), (8, 16), (0, 4), dim=32),
    Case((6, 6), (13, 12), (3, 3), dim=30),
    Case((4, 4), (9, 9), (2, 2), roll_first=True),
    Case((4, 4), (9, 11), (1, 3), roll_first=True, batch=3),
    Case((4, 4), (3, 5), (2, 2), roll_first=True),
    Case((7, 7), (7, 8), (0, 3), roll_first=True),
    Case((4, 4), (4, 4), (2, 2)),
    Case((4, 4), (3, 3), (2, 2)),
]

LARGE = [
    Case((9, 8), (18, 16), (4, 4), heads=1),
    Case((12, 12), (12, 20), (0, 6), heads=1, dim=32),
    Case((12, 12), (13, 24), (6, 6), heads=1, roll_first=True),
    Case((16, 16), (16, 24), (8, 8), heads=1),
    Case((5, 13), (11, 13), (2, 6), batch=2),
    Case((24, 24), (24, 25), (12, 12), heads=1),
    Case((32, 32), (32, 32), heads=1),
]


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("case", [*SMALL, *LARGE, *VOLUMES], ids=str)
def test_geometry(case, cosine):
    run(Case(**{**vars(case), "cosine": cosine}))


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("window", [(7, 7), (9, 8)], ids=["small", "large"])
def test_head_dims(window, dim):
    run(Case(window, (10, 12), (3, 3), dim=dim))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 17])
@pytest.mark.parametrize("window", [(2, 2), (9, 8)], ids=["small", "large"])
def test_batches(window, batch):
    run(Case(window, window, heads=1, batch=batch))


@pytest.mark.parametrize("window", [(2, 2), (9, 8)], ids=["small", "large"])
def test_empty_batch(window):
    case = Case(window, (10, 12), (1, 1), batch=0)
    qkv, options = case.make(torch.float32)
    assert attend(qkv, case.geometry, **options).shape == (0, 10, 12, 32)


def test_images_of_one_program_do_not_mix(monkeypatch):
    """With enough programs a small-window program runs over several images: each must come out as if alone."""
    from swinaccel.kernels import launch

    monkeypatch.setattr(launch, "_PROGRAMS_WANTED", 1)
    case = Case((4, 4), (5, 4), (2, 2), batch=7, heads=1)
    run(case)
    qkv, options = case.make(torch.float32)
    together = attend(qkv, case.geometry, **options)
    for image, one in enumerate(together):
        alone = attend(qkv[image : image + 1], case.geometry, **options)
        helpers.assert_close(alone[0], one, 1e-6)


@pytest.mark.parametrize(
    ("positions", "batch", "images"), [(24, 32, 2), (24, 21, 1), (48, 32, 3), (64, 8, 1), (4, 4, 1)]
)
def test_how_many_images_a_program_takes(positions, batch, images):
    """As many as leave about 512 programs: of 768, two each were measured to be faster than one."""
    from swinaccel.kernels import launch

    shape = {"tokens": 49, "head_dim": 32, "element_size": 2, "shared_memory": 1 << 17}
    assert launch.small(**shape, positions=positions, batch=batch).images == images


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", rounded_cases((12, 12), (13, 24), (6, 6)), ids=str)
def test_low_precision(case, dtype):
    run(case, dtype)


# Padding tokens.


@pytest.mark.parametrize("roll_first", [False, True], ids=["pad-roll", "roll-pad"])
@SMALL_AND_LARGE
def test_padding_vector_matters(window, roll_first):
    """Padding tokens are keys like any other, with the projection's bias for k and v."""
    case = Case(window, (9, 9), (2, 2), roll_first)
    with_bias = run(case)
    without = run(case, padding=None)
    assert helpers.difference(without, with_bias) > 1e-2


def test_padding_vector_is_ignored_without_padding():
    case = Case((4, 4), (8, 8), (2, 2))
    qkv, options = case.make(torch.float32)
    options["padding"] = torch.full((96,), float("nan"), device=TRITON_DEVICE)
    assert bool(torch.isfinite(attend(qkv, case.geometry, **options)).all())


def test_padding_as_half_with_fp32_tokens():
    case = Case((4, 4), (9, 9))
    _, options = case.make(torch.float32)
    run(case, padding=options["padding"].half())


@pytest.mark.parametrize("roll_first", [False, True], ids=["pad-roll", "roll-pad"])
def test_cosine_with_zero_padding_is_finite(roll_first):
    """A zero key has no direction: max(norm, 1e-12) makes its cosine 0, and 1e-12 must not underflow in fp16."""
    case = Case((4, 4), (9, 9), (2, 2), roll_first, cosine=True)
    for dtype in DTYPES:
        qkv, options = case.make(dtype)
        options["padding"] = None
        assert bool(torch.isfinite(attend(qkv, case.geometry, **options)).all()), dtype


# Masks.


def implied(case: Case) -> Tensor:
    return reference.shift_mask(case.geometry, case.mask_value).to(TRITON_DEVICE)


MASKED = [
    Case((4, 4), (8, 12), (2, 1)),
    Case((9, 8), (18, 16), (4, 4), heads=1),
    Case((4, 4), (9, 9), (2, 2), True),
    Case((2, 3, 3), (4, 5, 6), (1, 0, 2)),
    Case((5, 4, 4), (10, 4, 6), (2, 1, 0), heads=1),
]


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_mask_tensor_equal_to_the_implied_one(case):
    computed = run(case)
    helpers.assert_close(run(case, mask=implied(case)), computed, 1e-6)


@pytest.mark.parametrize("kind", ["zeros", "one-entry", "random", "half", "other-value", "some-inf"])
@pytest.mark.parametrize("case", MASKED, ids=str)
def test_mask_tensor_is_honoured(case, kind):
    """Masks are buffers: loaded with a checkpoint or edited, they may be anything, in one window or in all."""
    mask = implied(case)
    if kind == "zeros":
        mask = torch.zeros_like(mask)
    elif kind == "one-entry":
        mask[-1, 1, 2] += 7.0
    elif kind == "random":
        mask = 3 * torch.randn(mask.shape).to(mask.device)
    elif kind == "half":
        mask = mask.half()
    elif kind == "other-value":
        mask = mask / 20
    else:
        mask[0, :, ::3] = float("-inf")
    found = run(case, mask=mask)
    if kind in ("zeros", "random", "some-inf"):
        assert helpers.difference(found, run(case)) > 1e-3


@SMALL_AND_LARGE
def test_mask_tensor_without_shift(window):
    case = Case(window, (2 * window[0], window[1]))
    mask = torch.randn((2, case.geometry.tokens, case.geometry.tokens)).to(TRITON_DEVICE)
    run(case, mask=mask)


@SMALL_AND_LARGE
def test_mask_tensor_that_rules_out_the_first_keys(window):
    """-inf over a whole tile of keys must not turn the running maximum into NaN."""
    case = Case(window, window)
    tokens = case.geometry.tokens
    mask = torch.zeros(1, tokens, tokens, device=TRITON_DEVICE)
    mask[:, :, : tokens - 2] = float("-inf")
    run(case, mask=mask)
    mask[:, :, tokens - 2 :] = -120.0  # all that is left lies below what exp2 can tell from zero
    run(case, mask=mask)


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@SMALL_AND_LARGE
def test_mask_value_leaks_where_logits_are_large(window, cosine):
    """-100 is a number: where it is not enough, the attention looks across regions, and -200 looks less far."""
    size = (2 * window[0], 2 * window[1])
    outs = []
    for value in (-100.0, -200.0, 0.0):
        case = Case(window, size, (window[0] // 2, window[1] // 2), mask_value=value, cosine=cosine, heads=1)
        qkv, options = case.make(torch.float32)
        # Queries and keys point the same way, but for the wrapped part of the image, which points the other way.
        sign = torch.ones(size, device=TRITON_DEVICE)
        sign[: window[0] // 2] = -1
        direction = torch.full((16,), 0.25, device=TRITON_DEVICE)
        qkv[..., :16] = -direction * sign[None, :, :, None]
        qkv[..., 16:32] = direction * sign[None, :, :, None]
        options["scale"] = 50.0  # so that scores across regions are 100 higher than those within
        if cosine:
            options["logit_scale"] = torch.full((1,), math.log(50.0), device=TRITON_DEVICE)
        outs.append(compare(qkv, case.geometry, **options))
    assert helpers.difference(outs[1], outs[0]) > 1e-2
    assert helpers.difference(outs[2], outs[0]) > 1e-2


# Numbers.


@SMALL_AND_LARGE
def test_large_scores_do_not_overflow(window):
    for dtype in DTYPES:
        case = Case(window, window, heads=1)
        qkv, options = case.make(dtype)
        options["scale"] = 60.0  # scores of some thousands: the softmax is one-hot
        found = attend(qkv, case.geometry, **options)
        assert bool(torch.isfinite(found).all()), dtype


@pytest.mark.parametrize("value", [10.0, -5.0, 4.6])
@SMALL_AND_LARGE
def test_logit_scale_is_clamped_from_above_only(window, value):
    case = Case(window, (9, 9), (2, 2), cosine=True)
    run(case, logit_scale=torch.full((2,), value, device=TRITON_DEVICE))


@SMALL_AND_LARGE
def test_per_head_logit_scales(window):
    case = Case(window, (9, 9), cosine=True, heads=3)
    run(case, logit_scale=torch.tensor([0.0, 2.0, 4.0], device=TRITON_DEVICE))


@SMALL_AND_LARGE
def test_nan_stays_in_its_window(window):
    """NaN comes out where the original gives NaN, and nowhere else."""
    case = Case(window, (window[0], 2 * window[1]), heads=1)
    qkv, options = case.make(torch.float32)
    qkv[0, 0, 0, 3] = float("nan")
    found = attend(qkv, case.geometry, **options).cpu()
    expected = helpers.oracle(qkv, case.geometry, **options)
    assert torch.equal(torch.isnan(found), torch.isnan(expected))
    assert bool(torch.isfinite(found[:, :, window[1] :]).all())


@SMALL_AND_LARGE
def test_runs_are_bitwise_equal(window):
    case = Case(window, (9, 9), (2, 2))
    qkv, options = case.make(torch.float32)
    first = attend(qkv, case.geometry, **options)
    assert torch.equal(attend(qkv, case.geometry, **options), first)


@given(data=st.data())
@settings(max_examples=25)
def test_any_problem(data):
    case = draw_case(data, 48)
    qkv, options = case.make(torch.float32, seed=data.draw(st.integers(0, 9), "seed"))
    if data.draw(st.booleans(), "explicit mask"):
        options["mask"] = reference.shift_mask(case.geometry, -5.0).to(TRITON_DEVICE)
    if data.draw(st.booleans(), "separate"):
        qkv = qkv.chunk(3, dim=-1)
    compare(qkv, case.geometry, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_full_sizes(case, dtype):
    run(case, dtype)


@pytest.mark.gpu
def test_tf32_is_used_where_pytorch_uses_it():
    case = Case((7, 7), (28, 28), (3, 3), dim=32)
    qkv, options = case.make(torch.float32)
    exact = helpers.oracle(qkv, case.geometry, **options)
    before = torch.get_float32_matmul_precision()
    try:
        errors = []
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            errors.append(helpers.difference(attend(qkv, case.geometry, **options).cpu().double(), exact))
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors[0] <= 1e-5
    assert errors[0] < errors[1] <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offsets_beyond_32_bits(dtype):
    """An image batch of more than 2^31 elements: the last image must equal what it is alone."""
    heads, dim, size = 4, 32, (224, 224)
    batch = 2**31 // (size[0] * size[1] * 3 * heads * dim) + 2
    if torch.cuda.mem_get_info()[0] < 5 * batch * size[0] * size[1] * heads * dim * dtype.itemsize:
        pytest.skip("needs more free GPU memory")
    qkv = torch.zeros(batch, *size, 3 * heads * dim, device="cuda", dtype=dtype)
    qkv[-1] = torch.randn(qkv.shape[1:], device="cuda", dtype=dtype)
    case = Case((7, 7), size, (3, 3), heads=heads, dim=dim)
    _, options = case.make(dtype)
    found = attend(qkv, case.geometry, **options)[-1:]
    helpers.assert_close(found, attend(qkv[-1:], case.geometry, **options), 1e-6)


@pytest.mark.gpu
def test_small_shared_memory(with_shared_memory):
    """Launches adapt to GPUs with less shared memory than the one at hand."""
    with_shared_memory(64 * 1024)
    for window, dim in itertools.product([(7, 7), (12, 12), (16, 16)], [32, 128]):
        run(Case(window, (32, 32), (3, 3), dim=dim), torch.float16)
