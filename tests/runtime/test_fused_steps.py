"""Whole blocks in training and under autocast: gradients against fp64, dropped samples against the original's own."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch
from block_gradients import X, assert_alike, autocast, drop_paths, gradients, pair
from blocks import HALF, HALVES, block, random
from helpers import TRITON_DEVICE
from torch import nn
from torch.utils.checkpoint import checkpoint
from whole_models import MODELS

import swinaccel
from swinaccel import ops
from swinaccel.backends.triton import block as kernels
from swinaccel.backends.triton import block_bwd as triton_block_bwd
from swinaccel.ops import block_autograd as recorded

KEEPS_VERDICTS = True


pytestmark = pytest.mark.usefixtures("kernels_that_run")


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
    for seed in range(6):  # features are many numbers; the mean error of a few logits is chance
        x = random(*example().shape, seed=seed)
        with torch.no_grad():
            exact = copy.deepcopy(model).eval().double().forward_features(x.double())
            with autocast(HALF):
                outputs.append((*(one.eval().forward_features(x) for one in (twin, model)), exact))
    assert ran == WHOLE[name] * 6
    found, own, exact = (torch.cat(column) for column in zip(*outputs, strict=True))
    assert found.dtype == own.dtype
    helpers.assert_no_worse(found, own, exact, HALF)


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

    monkeypatch.setattr(triton_block_bwd, "run", fail)
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
