"""Copies of the official attention that projects have written in another way: BiRefNet, CLAP and others.

Each is found, gives what the original gives, gradients too, and is left alone where its arithmetic is another.
"""

from __future__ import annotations

import copy

import changed_models as models
import helpers
import pytest
import torch
from helpers import BACKENDS, check, check_fallback, randomize

import swinaccel
from swinaccel.trust.registry import registry

KEEPS_VERDICTS = True

both_backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _sdpa(monkeypatch):
    monkeypatch.setattr(models.CONFIG, "SDPA_enabled", True)


def gradients(model, *inputs):
    """What a model gives, and the gradients of its input and parameters."""
    x = inputs[0].clone().requires_grad_()
    out = helpers.tensors(model(x, *inputs[1:]))[0]
    (out * torch.linspace(-1, 1, out.numel()).to(out).cos().view(out.shape)).sum().backward()
    return [out.detach(), x.grad, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def check_training(model, *inputs, backend, count=None):
    """Forward and gradients of an accelerated copy in fp32, each against the original's in fp64."""
    device = helpers.DEVICES[backend]
    exact = gradients(copy.deepcopy(model).double(), inputs[0].double(), *inputs[1:])
    twin = swinaccel.accelerate(copy.deepcopy(model).to(device), backend=backend)
    found = gradients(twin, inputs[0].to(device), *inputs[1:])
    helpers.assert_accelerated(twin, count)
    assert len(found) == len(exact)
    largest = max(one.abs().max() for one in exact[2:])
    for one, other in zip(found, exact, strict=True):
        error = (one.cpu().double() - other).abs().max()  # of some, such as k's bias, all is rounding
        assert error <= 5e-5 * (other.abs().max() + 1e-2 * largest), error


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
    check_training(model, x, 9, 10, backend=backend, count=2)


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


def test_a_branch_without_bias_and_mask_is_refused_with_that_reason(monkeypatch):
    model, x = stage("BareAttention"), torch.randn(2, 90, 16)
    check_fallback(model, x, 9, 10, reason="adds neither the position bias nor the mask")
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
    check_training(model, torch.randn(2, 8, 8, 16), backend=backend, count=1)


class Squared(models.SdpaAttention):
    def rate(self):
        return super().rate() ** 2


def test_a_rate_that_is_not_taken_as_it_is_stays_with_the_original():
    model = randomize(Squared(16, (4, 4), 2))
    swinaccel.accelerate(model, backend="torch")
    model.attn_drop_prob = 0.4
    with torch.no_grad():
        model(torch.randn(6, 16, 16))
    assert "attn_drop_prob of its Squared is not zero" in swinaccel.report(model).entries[0].reason


def test_a_number_that_is_a_rate_is_seen_while_a_compiler_traces():
    (model, _), x = stage().blocks, torch.randn(2, 64, 16).to(helpers.TRITON_DEVICE)
    model.H = model.W = 8
    swinaccel.accelerate(model.to(x.device).train(), backend="triton")
    model.attn.attn_drop_prob = 0.4
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert helpers.difference(compiled(x, None), compiled(x, None)) > 1e-2
