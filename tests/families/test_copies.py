"""Copies of the official attention that projects have written in another way: BiRefNet, CLAP and others.

Each is found, gives what the original gives, gradients too, and is left alone where its arithmetic is another.
"""

from __future__ import annotations

import copy

import bias_models
import changed_models as models
import descendant_models
import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import both_backends, check, check_fallback, randomize
from torch import nn

import swinaccel
from swinaccel.families import mutual
from swinaccel.trust.registry import registry

KEEPS_VERDICTS = True


@pytest.fixture(autouse=True)
def _sdpa(monkeypatch):
    monkeypatch.setattr(models.CONFIG, "SDPA_enabled", True)


# By scaled_dot_product_attention.


def stage(kind="SdpaAttention", **options):
    return randomize(models.SdpaStage(16, 2, 4, kind=getattr(models, kind), **options))


@both_backends
@pytest.mark.parametrize("enabled", [True, False], ids=["sdpa", "manual"])
def test_birefnet(enabled, backend, monkeypatch):
    """A mask of -inf for every window of the batch, a scale that is not read; and the branch where it is."""
    monkeypatch.setattr(models.CONFIG, "SDPA_enabled", enabled)
    model, x = stage(qk_scale=0.9), torch.randn(2, 90, 16)
    check(model, x, 9, 10, backend=backend, count=2)
    helpers.check_gradients(model, x, 9, 10, backend=backend, count=2)


def test_a_branch_that_is_chosen_later_runs_the_original(monkeypatch):
    registry.clear()
    model, x = stage(qk_scale=0.9), torch.randn(2, 90, 16)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    for enabled, fallbacks in ((True, 0), (False, 1), (True, 1)):
        monkeypatch.setattr(models.CONFIG, "SDPA_enabled", enabled)
        with torch.no_grad():
            helpers.assert_close(twin(x, 9, 10), model(x, 9, 10))
        assert [entry.fallbacks for entry in swinaccel.report(twin)] == [fallbacks] * 2
    monkeypatch.setattr(models.CONFIG, "SDPA_enabled", False)
    swinaccel.accelerate(twin, backend="torch")
    with torch.no_grad():
        helpers.assert_close(twin(x, 9, 10), model(x, 9, 10))
    assert [entry.fallbacks for entry in swinaccel.report(twin)] == [fallbacks] * 2


@pytest.mark.parametrize("first", [0, 1], ids=["unshifted first", "shifted first"])
def test_a_call_that_the_original_refuses_is_left_to_it(first):
    """A shifted block without a mask; the unshifted one, of the same code, takes none."""
    model = stage()
    for block in (model.blocks[first], model.blocks[1 - first]):
        swinaccel.accelerate(block, backend="torch")
        block.H = block.W = 8
    with torch.no_grad():
        model.blocks[0](torch.randn(2, 64, 16), None)
    assert [entry.fallbacks for entry in swinaccel.report(model)] == [0, 0]
    with pytest.raises(AttributeError), torch.no_grad():
        model.blocks[1](torch.randn(2, 64, 16), None)
    assert "raised an error for shifted windows without a mask" in swinaccel.report(model).entries[1].reason


def test_a_compiled_call_that_the_original_refuses_raises():
    block, x = stage().blocks[1], torch.randn(2, 64, 16).to(helpers.TRITON_DEVICE)
    block.H = block.W = 8
    compiled = torch.compile(swinaccel.accelerate(block.to(x.device), backend="triton"), backend="eager")
    mask = descendant_models.shift_mask(8, 8, 4, 2).to(x.device)
    with torch.no_grad():
        helpers.assert_close(compiled(x, mask), block(x, mask))
        with pytest.raises(
            Exception, match=r"NoneType|NotImplementedType"
        ):  # of torch 2.11 the latter, while it traces
            compiled(x, None)


def test_a_branch_without_bias_and_mask_is_refused_with_that_reason(monkeypatch):
    model, x = stage("BareAttention"), torch.randn(2, 90, 16)
    check_fallback(model, x, 9, 10, reason="leaves out the position bias and the mask")
    monkeypatch.setattr(models.CONFIG, "SDPA_enabled", False)
    check(model, x, 9, 10, count=2)


@both_backends
@pytest.mark.parametrize("kind", ["SdpaAttention", "OwnScaleAttention"])
def test_attention_that_takes_a_mask_of_all_windows(kind, backend):
    """By itself. One that images share is an error of its own."""
    model = randomize(getattr(models, kind)(16, (4, 4), 2, qk_scale=0.9))
    x, mask = torch.randn(6, 16, 16), -100.0 * (torch.rand(6, 16, 16) < 0.3)
    check(model, x, mask, backend=backend, count=1)
    check(model, x, backend=backend, count=1)
    twin = swinaccel.accelerate(model.to(helpers.DEVICES[backend]), backend=backend)
    with pytest.raises(RuntimeError), torch.no_grad():
        twin(x.to(helpers.DEVICES[backend]), mask[:3].to(helpers.DEVICES[backend]))
    assert "raised an error for a mask of one image for several" in swinaccel.report(twin).entries[0].reason


@pytest.mark.parametrize("kind", ["SdpaAttention", "OwnScaleAttention"])
def test_a_rate_that_is_a_number(kind):
    """It drops in training and not in evaluation, and the dropout that the code does not call does nothing."""
    model, x = stage(kind), torch.randn(2, 90, 16)
    twin, x = swinaccel.accelerate(model.to(helpers.TRITON_DEVICE), backend="triton"), x.to(helpers.TRITON_DEVICE)
    with torch.no_grad():
        plain = twin(x, 9, 10)
        for is_number in (True, False) if kind == "SdpaAttention" else (False,):
            counts = is_number is (kind == "SdpaAttention")
            for block in twin.blocks:
                block.attn.attn_drop_prob, block.attn.attn_drop.p = (0.4, 0.0) if is_number else (0.0, 0.4)
            twin.train()
            first, second = twin(x, 9, 10), twin(x, 9, 10)
            assert (helpers.difference(first, second) > 1e-2) is counts
            twin.eval()
            for block in twin.blocks:
                block.attn.attn_drop.train()
            helpers.assert_close(twin(x, 9, 10), plain)
    helpers.assert_accelerated(twin, 2)


@both_backends
def test_gradients_of_timms_fused_path(backend):
    model = helpers.timm_block((8, 8), shift=2)
    model.attn.fused_attn, model.attn.scale = True, 0.9
    helpers.check_gradients(model, torch.randn(2, 8, 8, 16), backend=backend, count=1)


class Squared(models.SdpaAttention):
    def rate(self):
        return super().rate() ** 2


class Elsewhere(models.SdpaAttention):
    """It drops what the weights make of the values."""

    def mixed(self, q, k, v, mask):
        return F.dropout(F.scaled_dot_product_attention(q, k, v, self.start(mask)), self.rate())


@pytest.mark.parametrize("kind", [Squared, Elsewhere])
def test_a_rate_that_is_taken_otherwise_stays_with_the_original(kind):
    model = randomize(kind(16, (4, 4), 2))
    swinaccel.accelerate(model, backend="torch")
    model.attn_drop_prob = 0.4
    with torch.no_grad():
        model(torch.randn(6, 16, 16))
    assert f"attn_drop_prob of its {kind.__name__} is not zero" in swinaccel.report(model).entries[0].reason


def test_a_number_that_is_a_rate_is_seen_while_a_compiler_traces():
    (model, _), x = stage().blocks, torch.randn(2, 64, 16).to(helpers.TRITON_DEVICE)
    model.H = model.W = 8
    swinaccel.accelerate(model.to(x.device).train(), backend="triton")
    model.attn.attn_drop_prob = 0.4
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert helpers.difference(compiled(x, None), compiled(x, None)) > 1e-2


# Known attentions in blocks that are nobody's.


@both_backends
@pytest.mark.parametrize("shift", [0, 2])
def test_unimer_is_accelerated_at_its_attention(shift, backend):
    model, x = randomize(models.UnimerLayer(16, 2, 4, shift)), torch.randn(2, 90, 16)
    assert [(entry.name, entry.family) for entry in swinaccel.plan(model)] == [("attention", "hf_attention")]
    check(model, x, (9, 10), backend=backend, count=1)
    helpers.check_gradients(model, x, (9, 10), backend=backend, count=1)
    check_fallback(model, x, (9, 10), torch.rand(2, 1, 1), backend=backend, reason="it is given head_mask")


NAMED = {
    "Uformer": ("UformerAttention", {}, "renamed_attention"),
    "VRT": ("VrtAttention", {}, "renamed_attention"),
    "VRT, volumes": ("VrtAttention", {"window_size": (2, 3, 4)}, "renamed_attention"),
    "VRT, mutual": ("MutualAttention", {"window_size": (2, 3, 4)}, "mutual_attention"),
    "VRT, mutual, large": ("MutualAttention", {"window_size": (2, 6, 6)}, "mutual_attention"),
    "cosine": ("FirstV2Attention", {}, "window_attention"),
    "cosine, plain biases": ("FirstV2Attention", {"squashed": False}, "window_attention"),
    "plain scores": ("FirstV2Attention", {"cosine": False, "squashed": False}, "window_attention"),
}


@both_backends
@pytest.mark.parametrize("name", NAMED)
def test_attention_by_another_name(name, backend):
    kind, options, family = NAMED[name]
    model = randomize(getattr(models, kind)(16, num_heads=2, **{"window_size": (4, 4), **options}))
    tokens = len(model.relative_position_index)
    assert [entry.family for entry in swinaccel.plan(model)] == [family]
    x, masks = torch.randn(6, tokens, 16), -100.0 * (torch.rand(3, tokens, tokens) < 0.3)
    check(model, x, backend=backend, count=1)
    check(model, backend=backend, count=1, arguments=on(backend, x=x, mask=masks))
    helpers.check_gradients(model, x, backend=backend, count=1)
    if name.startswith("VRT"):
        helpers.check_gradients(model, x, masks.to(helpers.DEVICES[backend]), backend=backend, count=1)


@both_backends
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mutual_attention_in_half_precision(dtype, masked, backend):
    helpers.skip_interpreted_bfloat16(backend, dtype)
    model, x = randomize(models.MutualAttention(16, (2, 6, 6), 2)), torch.randn(4, 72, 16)
    mask = -100.0 * (torch.rand(2, 72, 72) < 0.3) if masked else None
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double(), None if mask is None else mask.double())
        model.to(helpers.DEVICES[backend], dtype)
        given = [None if one is None else one.to(helpers.DEVICES[backend], dtype) for one in (x, mask)]
        expected, found = model(*given), swinaccel.accelerate(model, backend=backend)(*given)
    helpers.assert_no_worse(found, expected, exact, dtype)
    helpers.assert_accelerated(model, 1)


@torch.no_grad()
def test_frames_meet_in_the_kernels_alone(monkeypatch):
    """Where those run both, and no window meets the mask of a call before."""
    model, x = randomize(models.MutualAttention(16, (2, 3, 4), 2)), torch.randn(6, 24, 16).to(helpers.TRITON_DEVICE)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton").to(x.device)
    model.to(x.device)
    monkeypatch.setattr(mutual, "scaled_dot_product_attention", None)
    for rows in (1, 2, None, 2, 3, None):
        mask = None if rows is None else -100.0 * (torch.rand(rows, 24, 24, device=x.device) < 0.3)
        helpers.assert_close(twin(x, mask), model(x, mask))
    helpers.assert_accelerated(twin, 1)
    assert swinaccel.report(twin).entries[0].bias == "table"


@torch.no_grad()
@both_backends
def test_frames_of_no_windows_and_queries_that_see_no_key(backend):
    """The original's are NaN, where `scaled_dot_product_attention` has zeros."""
    model, x = randomize(models.MutualAttention(16, (2, 3, 4), 2)), torch.randn(6, 24, 16)
    model, x = model.to(helpers.DEVICES[backend]), x.to(helpers.DEVICES[backend])
    twin, mask = swinaccel.accelerate(copy.deepcopy(model), backend=backend), x.new_zeros(3, 24, 24)
    assert twin(x[:0]).shape == twin(x[:0], mask).shape == (0, 24, 16)
    mask[1, 2, :12] = float("-inf")
    found, expected = twin(x, mask), model(x, mask)
    assert torch.equal(found.isnan(), expected.isnan())
    helpers.assert_close(found.nan_to_num(), expected.nan_to_num())
    helpers.assert_accelerated(twin, 1)


def test_masks_between_frames_that_are_refused():
    model, x = randomize(models.MutualAttention(16, (2, 3, 4), 2)), torch.randn(6, 24, 16)
    check_fallback(model, x, torch.randint(-9, 1, (3, 24, 24)), reason="the mask is no floating-point tensor")
    twin = swinaccel.accelerate(model, backend="torch")
    with torch.no_grad(), pytest.raises(RuntimeError):  # the original's own
        twin(x, torch.randn(3, 12, 12))


def on(backend, **tensors):
    return {name: one.to(helpers.DEVICES[backend]) for name, one in tensors.items()}


def test_keys_of_another_input_are_left_to_the_original():
    model, x = randomize(models.UformerAttention(16, (4, 4), 2)), torch.randn(6, 16, 16)
    check_fallback(model, x, torch.randn(16, 16), reason="it is given attn_kv")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_inside(dtype):
    model = randomize(models.FirstV2Attention(16, (4, 4), 2))
    x = torch.randn(6, 16, 16)
    exact = copy.deepcopy(model).double()(x.double()).detach()
    model.to(dtype)
    with torch.no_grad():
        expected, found = model(x.to(dtype)), swinaccel.accelerate(model, backend="torch")(x.to(dtype))
    assert found.dtype is dtype
    helpers.assert_no_worse(found, expected, exact, dtype)
    helpers.assert_accelerated(model, 1)


@both_backends
@pytest.mark.parametrize("size", [(8, 8), (8, 12)], ids=str)
@pytest.mark.parametrize("shift", [0, 2])
def test_attention_that_rolls_for_itself(shift, size, backend):
    """GRL's; at its own size it has the mask that it keeps."""
    model, x = randomize(models.RollingAttention(16, (8, 8), 2, 4, shift)), torch.randn(2, size[0] * size[1], 16)
    if shift:
        model.attn_mask[0, 1, 2] = -3.0
    assert [entry.family for entry in swinaccel.plan(model)] == ["rolling_attention"]
    check(model, x, size, backend=backend, count=1)
    helpers.check_gradients(model, x, size, backend=backend, count=1)


@both_backends
@pytest.mark.parametrize("shift", [0, 2])
def test_cr_without_its_bias(shift, backend):
    model, x = randomize(bias_models.cr_without_bias(16, 2, (8, 12), 4, shift)), torch.randn(2, 8, 12, 16)
    assert [entry.family for entry in swinaccel.plan(model)] == ["timm_cr"]
    check(model, x, backend=backend, count=1)
    helpers.check_gradients(model, x, backend=backend, count=1)


@both_backends
@pytest.mark.parametrize("shifted", [False, True])
def test_two_halves_in_windows_that_stand_and_lie(shifted, backend):
    model, x = randomize(bias_models.HalvesAttention(16, 4, (2, 4), shifted)), torch.randn(2, 63, 16)
    assert [entry.window for entry in swinaccel.plan(model)] == [(2, 4), (4, 2)]
    check(model, x, 7, 9, backend=backend, count=2)
    helpers.check_gradients(model, x, 7, 9, backend=backend, count=2)


def test_biases_of_halves_that_are_drawn_are_the_originals():
    model = bias_models.SpatialAttention(8, (2, 4), 2)
    model.pos.pos3.append(nn.Dropout(0.5))
    assert not swinaccel.plan(model).accelerated


def test_dropout_and_sizes_of_halves():
    model, qkv = randomize(bias_models.SpatialAttention(8, (2, 4), 2)), torch.randn(3, 2, 64, 8)
    check_fallback(model, qkv, torch.tensor(8), torch.tensor(8), reason="not there as numbers")
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton").to(helpers.TRITON_DEVICE)
    twin.attn_drop.p = 0.999
    twin.attn_drop.train()
    with torch.no_grad():
        assert (twin(qkv.to(helpers.TRITON_DEVICE), 8, 8) == 0).float().mean() > 0.9
    helpers.assert_accelerated(twin, 1)
