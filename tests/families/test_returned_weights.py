"""Attention weights that are returned, and computed where somebody reads them."""

from __future__ import annotations

import copy
import io

import changed_models as models
import edits
import helpers
import pytest
import torch
from helpers import both_backends, check, randomize
from torch import nn

import swinaccel
from swinaccel.runtime import weights
from swinaccel.spec.reference import section_weights

KEEPS_VERDICTS = True


def htsat(**options):
    return randomize(models.WeightsStage(16, (8, 8), 2, 4, **options))


@both_backends
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_trap_20_weights_that_nobody_reads_are_not_computed(inference, backend, monkeypatch):
    """In layers that average them, too; where somebody reads them, they are the original's."""
    calls = []
    monkeypatch.setattr(weights, "section_weights", lambda *args: calls.append(1) or section_weights(*args))
    model, x = htsat().to(helpers.DEVICES[backend]), torch.randn(2, 64, 16).to(helpers.DEVICES[backend])
    twin = swinaccel.accelerate(copy.deepcopy(model), backend=backend)
    with torch.inference_mode(inference), torch.no_grad():
        expected, found = model(x), twin(x)
        helpers.assert_close(found[0], expected[0])
        assert not calls
        assert found[1].shape == expected[1].shape
        assert (found[1].dtype, found[1].device) == (expected[1].dtype, expected[1].device)
        assert found[1].stride() == expected[1].stride()
        helpers.assert_close(found[1] + 0, expected[1] + 0)
        assert len(calls) == 2
        helpers.assert_accelerated(twin, 2)
        for heatmap in (False, True):
            check(models.Unread(model, heatmap), x, backend=backend, count=2)


READERS = {
    "numpy": lambda one: torch.from_numpy(one.numpy().copy()),
    "indexing": lambda one: one[0, 0],
    "list": lambda one: torch.tensor(one.tolist()),
    "copy": copy.deepcopy,
    "file": lambda one: saved(one),
    "operator": lambda one: torch.ops.aten.mul(one, 2),
    "out": lambda one: torch.mul(one, 2, out=torch.empty(one.shape)),
    "in place": lambda one: one.mul_(2) + one,
    "view": lambda one: one.unsqueeze(0).mul_(2)[0] + one,
    "earlier mean": lambda one: (one.mean(0), one.mul_(2))[0] + 0,
    "earlier mean by a view": lambda one: (one.mean(0), one.unsqueeze(0).mul_(2))[0] + 0,
    "mixed": lambda one: torch.cat([one, one * 2]),
    "compiled": lambda one: torch.compile(lambda y: y * 2, backend="eager")(one),
    "sum": lambda one: torch.tensor(float(one.sum())),
    "words": lambda one: torch.tensor([float(len(str(one)) > 20)]),
}


def saved(one):
    file = io.BytesIO()
    torch.save(one, file)
    return torch.load(io.BytesIO(file.getvalue()))


@torch.no_grad()
def weights_of_a_call():
    """Return an accelerated block and its input, the weights that its original gave, and those to be read later."""
    model, x = htsat().blocks[1], torch.randn(2, 64, 16)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    expected, found = model(x)[1], twin(x)[1]
    assert type(found) is weights.LazyTensor
    return twin, x, expected, found


@pytest.mark.parametrize("reader", READERS)
def test_weights_however_they_are_read(reader):
    _, _, expected, found = weights_of_a_call()
    with torch.no_grad():
        helpers.assert_close(READERS[reader](found), READERS[reader](expected))
        helpers.assert_close(found + 0, expected)


CHANGES = {
    "weight": lambda block, x: block.attn.qkv.weight.mul_(2),
    "data": lambda block, x: block.attn.qkv.weight.data.mul_(2),
    "table": lambda block, x: block.attn.relative_position_bias_table.data.add_(1),
    "mask": lambda block, x: block.attn_mask.data.zero_(),
    "parameter": lambda block, x: setattr(block.attn.qkv, "weight", nn.Parameter(2 * block.attn.qkv.weight)),
    "hook": lambda block, x: block.attn.qkv.register_forward_hook(lambda module, args, out: 2 * out),
    "dtype": lambda block, x: block.double(),
    "input": lambda block, x: x.zero_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_are_no_others_than_those_of_their_call(change):
    twin, x, expected, found = weights_of_a_call()
    with torch.no_grad():
        CHANGES[change](twin, x)
        helpers.assert_close(found + 0, expected)


def test_weights_are_collected_by_name_and_read_in_any_mode():
    model, x = htsat().blocks[1], torch.randn(2, 64, 16)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    with torch.no_grad():
        expected, found = model(x)[1], twin(x)[1]
        both = torch.stack(tensors=[found, found], dim=1)
    with torch.inference_mode():
        helpers.assert_close(both + 0, torch.stack([expected] * 2, 1))
    assert not (both * 1).is_inference()


def test_what_was_done_to_weights_is_seen_in_them():
    found = weights_of_a_call()[3]
    found.transpose_(0, 1)
    found.requires_grad_()
    assert found.requires_grad
    assert found.shape == (2, 8, 16, 16)


def test_weights_of_adapted_projections_are_the_originals():
    model, x = htsat().blocks[1], torch.randn(2, 64, 16)
    model.attn.qkv = edits.LowRank(model.attn.qkv)
    swinaccel.accelerate(model, backend="torch")
    with torch.no_grad():
        assert type(model(x)[1]) is torch.Tensor


@both_backends
def test_attention_that_returns_its_weights(backend):
    """By itself, where its input may be written to afterwards."""
    model, x, mask = randomize(models.WeightsToo(16, (4, 4), 2)), torch.randn(6, 16, 16), torch.randn(3, 16, 16)
    check(model, x, mask, backend=backend, count=1)
    twin = swinaccel.accelerate(model, backend="torch")
    with torch.inference_mode():
        x, expected = x + 0, model(x, mask)[1]
        found = twin(x, mask)[1]
        x.zero_()
        helpers.assert_close(found + 0, expected + 0)


@pytest.mark.parametrize("why", ["gradients", "dropout", "autocast", "compiled"])
def test_weights_that_are_left_to_the_original(why):
    model, x = htsat(attn_drop=0.3), torch.randn(2, 64, 16).to(helpers.TRITON_DEVICE)
    backend = "torch" if why == "gradients" else "triton"
    twin = swinaccel.accelerate(copy.deepcopy(model).to(x.device), backend=backend)
    model.to(x.device)
    if why == "compiled":
        with torch.no_grad():
            helpers.assert_close(torch.compile(twin, backend="eager")(x), model(x))
        return
    model.train(why == "dropout")
    twin.train(why == "dropout")
    with torch.set_grad_enabled(why == "gradients"), torch.autocast(x.device.type, enabled=why == "autocast"):
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        for one, other in zip(twin(x), expected, strict=True):
            assert torch.equal(one, other)
            assert one.requires_grad is other.requires_grad
    assert "it returns its attention weights" in swinaccel.report(twin).entries[0].reason
