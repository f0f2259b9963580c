"""SVD factors of the bias: when they are used, how right they are, and that they are never stale."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch
from bias_tables import (
    EXACT,
    HEADS,
    IMAGE,
    TOKENS,
    WINDOW,
    accelerate,
    form,
    model_with,
    originals,
    random_table,
    smooth_table,
)
from helpers import TRITON_DEVICE, position_index, table_rows

import swinaccel
from swinaccel import ops
from swinaccel.bias import table as bias
from swinaccel.ops import window as window_ops
from swinaccel.spec import reference
from swinaccel.spec.window import Geometry


def dense(table, window=WINDOW):
    return reference.bias_from_table(table.float(), position_index(window))


def factor_options(table, rank=16):
    q, k = bias.factorize(dense(table), rank)
    index = position_index(WINDOW)
    return [part.to(TRITON_DEVICE).contiguous() for part in (q, k, table.float(), index)]


# Factorising.


@pytest.mark.parametrize("rank", [5, 16, 64], ids=lambda rank: f"rank{rank}")
def test_factors_of_enough_rank_are_exact(rank):
    wanted = dense(smooth_table())
    q, k = bias.factorize(wanted, rank)
    assert q.shape == k.shape == (HEADS, TOKENS, rank)
    assert (q @ k.mT - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("rank", [4, 8, 16, 32])
def test_factors_have_the_least_error(rank):
    """Eckart and Young: no matrix of that rank is nearer; a subspace iteration must come close to it."""
    torch.manual_seed(1)
    wanted = dense(smooth_table((16, 16)) + 0.05 * torch.randn(31 * 31, HEADS), (16, 16))
    q, k = bias.factorize(wanted, rank)
    best = torch.linalg.svdvals(wanted.double())[:, rank:].square().sum(-1).sqrt()
    found = (wanted.double() - q.double() @ k.double().mT).square().sum((-2, -1)).sqrt()
    assert bool((found <= 1.1 * best + 1e-4).all())


def test_factorising_leaves_random_numbers_alone():
    before = torch.random.get_rng_state()
    bias.factorize(dense(random_table()), 4)
    assert torch.equal(torch.random.get_rng_state(), before)


# The rule.


def test_factors_are_used_where_forced_and_good_enough():
    model = accelerate(model_with(smooth_table()), bias="factors", bias_energy=EXACT)
    model(IMAGE)
    assert form(model).startswith("factors, rank 16, error ")


def test_reported_error_bounds_the_difference():
    """Of scores, and so of outputs, up to the softmax's own slope."""
    torch.manual_seed(2)
    model = model_with(smooth_table() + 0.02 * torch.randn(table_rows(WINDOW), HEADS))
    exact = originals(model)
    accelerate(model, bias="factors", bias_energy=0.99)
    found = model(IMAGE)
    text = form(model)
    assert text.startswith("factors")
    error = float(text.rpartition(" ")[2])
    assert 0 < error < 0.5
    # A softmax whose scores move by at most e moves each weight by at most a factor exp(2e).
    values = model.proj.weight.abs().sum(1).max() * (IMAGE @ model.qkv.weight.T + model.qkv.bias)[..., -16:].abs().max()
    assert (found - exact).abs().max() <= (torch.tensor(2 * error).exp() - 1) * values + 1e-4
    assert (found - exact).abs().max() > 0


def test_a_full_rank_table_stays_a_table():
    model = model_with(random_table())
    exact = originals(model)
    accelerate(model, bias="factors", bias_energy=EXACT)
    helpers.assert_close(model(IMAGE), exact)
    assert form(model) == "table"


def test_energy_decides():
    """The looser the rule, the smaller the rank that meets it."""
    table = smooth_table() + 0.3 * random_table()
    ranks = []
    for energy in (0.5, 0.995, EXACT):
        model = accelerate(model_with(table), bias_energy=energy)
        model(IMAGE)
        ranks.append(int(form(model).split()[2].rstrip(",")) if form(model) != "table" else TOKENS)
    assert ranks == sorted(ranks)
    assert ranks[0] == 16
    assert ranks[-1] == TOKENS


@pytest.mark.parametrize("energy", [0.9, 0.995])
def test_factors_hold_the_energy_they_promise(energy):
    table = smooth_table() + 0.2 * random_table()
    wanted = dense(table)
    q, k = bias._make(wanted, torch.float32, energy)
    assert q.shape[-1]
    missed = (wanted - q.float() @ k.float().mT).square().sum((-2, -1))
    assert bool((missed <= (1 - energy) * 1.001 * wanted.square().sum((-2, -1))).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_factors_err_no_more_than_rounding_the_bias(dtype):
    """The rule without an energy: indistinguishable from the bias in the compute dtype, or no factors."""
    wanted = dense(smooth_table())
    q, k = bias._make(wanted, dtype, None)
    if q.shape[-1]:
        error = (wanted - q.float() @ k.float().mT).abs().max()
        assert error <= wanted.abs().max() * torch.finfo(dtype).eps / 2
    if dtype == torch.bfloat16:  # coarse enough for what the factors' own fp16 rounds
        assert q.shape[-1] == 16
    assert bias._make(dense(random_table()), dtype, None)[0].shape[-1] == 0


def test_table_is_never_factors():
    model = accelerate(model_with(smooth_table()), bias="table", bias_energy=None)
    model(IMAGE)
    assert form(model) == "table"


def test_small_windows_keep_the_table():
    model = helpers.torchvision_attention(window=(8, 8), heads=HEADS).to(TRITON_DEVICE).requires_grad_(False)
    accelerate(model, bias="factors", bias_energy=0.5)
    model(torch.randn(1, 8, 8, 16, device=TRITON_DEVICE))
    assert form(model) == "table"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_factors_are_used_on_request_only(dtype):
    model = accelerate(model_with(smooth_table()).to(dtype))
    model(IMAGE.to(dtype))
    assert form(model) == "table"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tables_that_are_not_finite_are_not_factorised(value):
    table = smooth_table()
    table[0, 0] = value
    model = accelerate(model_with(table), bias="factors", bias_energy=0.9)
    model(IMAGE)
    assert form(model) == "table"


def test_training_does_not_use_factors():
    model = accelerate(model_with(smooth_table()).requires_grad_(True), bias="factors", bias_energy=EXACT)
    out = model(IMAGE)
    out.sum().backward()
    assert model.relative_position_bias_table.grad is not None
    (entry,) = swinaccel.report(model)
    assert not (entry.bias or "").startswith("factors")


# In the kernel.


@pytest.mark.parametrize("shift", [(0, 0), (4, 4)], ids=["plain", "shifted"])
@pytest.mark.parametrize("rank", [16, 32])
def test_factors_in_the_kernel(rank, shift, poisoned):
    table = smooth_table()
    qkv = torch.randn(1, 10, 16, 48).to(TRITON_DEVICE)
    options = {
        "num_heads": HEADS,
        "table": table.to(TRITON_DEVICE),
        "index": position_index(WINDOW).to(TRITON_DEVICE),
        "scale": 0.25,
    }
    geometry = Geometry((10, 16), WINDOW, shift)
    found = window_ops.shifted_window_attention(qkv, geometry, **options, factors=factor_options(table, rank))
    assert not ops.has_failures()
    helpers.assert_close(found.cpu().double(), helpers.oracle(qkv, geometry, **options))


@pytest.mark.parametrize("what", ["table", "one-entry", "index", "nan", "shape"])
def test_stale_factors_in_the_kernel_are_not_used(what, poisoned):
    known = smooth_table()
    table, index = known.clone(), position_index(WINDOW)
    if what == "table":
        table = random_table()
    elif what == "one-entry":
        table[-1, -1] += 3.0
    elif what == "index":
        index = index.flip(0)
    qkv = torch.randn(1, 9, 16, 48).to(TRITON_DEVICE)
    geometry = Geometry((9, 16), WINDOW, (4, 4))
    options = {"num_heads": HEADS, "table": table.to(TRITON_DEVICE), "index": index.to(TRITON_DEVICE), "scale": 0.25}
    factors = factor_options(known)
    if what == "nan":
        factors[2][0, 0] = float("nan")
    elif what == "shape":
        factors[2] = factors[2][:-1].contiguous()
    found = window_ops.shifted_window_attention(qkv, geometry, **options, factors=factors)
    assert not ops.has_failures()
    helpers.assert_close(found.cpu().double(), helpers.oracle(qkv, geometry, **options))


# Edits, by whatever means.


def in_place(table):
    table.copy_(random_table(1))


def through_data(table):
    table.data.copy_(random_table(1))


def through_data_one_entry(table):
    table.data[len(table) // 2] += 4.0  # that of a token with itself


def through_numpy(table):
    table.detach().cpu().numpy()[...] = random_table(1).numpy()


def foreach(table):
    torch._foreach_lerp_([table.data], [random_table(1).to(table.device)], 0.9)


def optimizer(kind, **options):
    def edit(table):
        table.requires_grad_(True)
        table.grad = random_table(1).to(table.device)
        getattr(torch.optim, kind)([table], lr=0.5, **options).step()
        table.grad = None
        table.requires_grad_(False)

    return edit


EDITS = {
    "in-place": in_place,
    "data": through_data,
    "data-one-entry": through_data_one_entry,
    "foreach-data": foreach,
    "sgd": optimizer("SGD"),
    "sgd-fused": optimizer("SGD", fused=True),
    "adam-fused": optimizer("Adam", fused=True),
    "adamw-fused": optimizer("AdamW", fused=True),
}

if TRITON_DEVICE == "cpu":
    EDITS["numpy"] = through_numpy


@pytest.mark.parametrize("edit", EDITS)
def test_output_follows_the_live_table(edit):
    model = accelerate(model_with(smooth_table()), bias="factors", bias_energy=EXACT)
    before = model(IMAGE)
    assert form(model).startswith("factors")
    EDITS[edit](model.relative_position_bias_table)
    expected = originals(model)
    assert helpers.difference(before, expected) > 1e-4
    for _ in range(2):
        helpers.assert_close(model(IMAGE), expected)


def test_output_follows_the_live_index():
    model = accelerate(model_with(smooth_table()), bias="factors", bias_energy=EXACT)
    before = model(IMAGE)
    model.relative_position_index.data.copy_(model.relative_position_index.flip(0))
    expected = originals(model)
    assert helpers.difference(before, expected) > 1e-3
    helpers.assert_close(model(IMAGE), expected)


def test_output_follows_a_new_parameter():
    model = accelerate(model_with(smooth_table()), bias="factors", bias_energy=EXACT)
    model(IMAGE)
    model.relative_position_bias_table = torch.nn.Parameter(random_table(3).to(TRITON_DEVICE), False)
    helpers.assert_close(model(IMAGE), originals(model))


def test_output_follows_load_state_dict():
    model = accelerate(model_with(smooth_table()), bias="factors", bias_energy=EXACT)
    model(IMAGE)
    model.load_state_dict(model_with(smooth_table(seed=4)).state_dict())
    helpers.assert_close(model(IMAGE), originals(model))
    assert form(model).startswith("factors")


def test_cosine_position_mlp_is_followed():
    """V2's table comes from an MLP, and all of it is watched."""
    model = helpers.torchvision_attention(window=WINDOW, heads=HEADS, v2=True).to(TRITON_DEVICE).requires_grad_(False)
    accelerate(model, bias="factors", bias_energy=0.99)
    model(IMAGE)
    for parameter in model.cpb_mlp.parameters():
        parameter.data.mul_(-1.5)
        expected, found = originals(model), model(IMAGE)
        exact = form(model) == "table"
        helpers.assert_close(found, expected, 2e-5 if exact else 0.1)


def test_copies_do_not_share_factors():
    model = accelerate(model_with(smooth_table()), bias="factors", bias_energy=EXACT)
    model(IMAGE)
    twin = copy.deepcopy(model)
    twin.relative_position_bias_table.data.copy_(random_table(6))
    helpers.assert_close(twin(IMAGE), originals(twin))
    helpers.assert_close(model(IMAGE), originals(model))


def test_factors_do_not_keep_a_model_alive():
    import gc
    import weakref

    model = accelerate(model_with(smooth_table()), bias="factors", bias_energy=EXACT)
    model(IMAGE)
    table = weakref.ref(model.relative_position_bias_table)
    del model
    gc.collect()
    assert table() is None
