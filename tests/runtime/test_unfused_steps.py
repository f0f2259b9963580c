"""What changes between steps, and everything that must leave a block in training to itself."""

from __future__ import annotations

import copy
import types

import helpers
import pytest
import torch
import torch.nn.functional as F
from block_gradients import PerToken, X, assert_alike, autocast, drop_paths, pair
from blocks import HALF, block
from helpers import TRITON_DEVICE
from torch import nn

import swinaccel
from swinaccel import ops
from swinaccel.backends.triton import block as kernels

KEEPS_VERDICTS = True


pytestmark = pytest.mark.usefixtures("kernels_that_run")


STEPS = {
    "written": lambda parameter: parameter.detach().mul_(3),
    "replaced": lambda parameter: setattr(parameter, "data", parameter.data * 3),
}


@pytest.mark.parametrize("change", STEPS)
@pytest.mark.parametrize("kind", [None, "autocast", "half"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "create_graph"])
def test_parameters_that_change_before_the_backward(change, kind, twice):
    """Gradients are those of the forward's numbers, or refused, as the original's are."""

    def input_gradient(one, name):
        def forward():
            x = X[:2].to(TRITON_DEVICE, HALF if kind == "half" else None).clone().requires_grad_()
            with autocast(HALF if kind == "autocast" else None):
                return x, one(x).float().square().mean()

        forward()  # the next is of what is remembered
        x, loss = forward()
        STEPS[change](one.get_parameter(name))
        try:
            return torch.autograd.grad(loss, x, create_graph=twice)[0].detach()
        except RuntimeError as error:
            return str(error)[:40]

    model = block()
    for name in ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight", "mlp.fc1.bias"):
        plain, twin = pair(copy.deepcopy(model).to(HALF if kind == "half" else torch.float32))
        found, expected = (input_gradient(one, name) for one in (twin, plain))
        if isinstance(expected, str):
            assert found == expected, name
        else:
            helpers.assert_close(found, expected, 1e-4 if kind is None else 20 * torch.finfo(HALF).eps)


def test_weights_that_the_backward_does_not_need():
    """Frozen ones may be written to after the forward, in 16-bit models too; nothing is kept for them."""
    _, twin = pair(block().to(HALF))
    twin.requires_grad_(False).attn.proj.bias.requires_grad_()
    for _ in range(2):
        out = twin(X.to(TRITON_DEVICE, HALF))
        with torch.no_grad():
            twin.attn.proj.weight.mul_(1.1)
        out.float().sum().backward()


def test_functions_that_are_replaced(monkeypatch):
    """As profilers and quantisers do."""
    model, twin = pair(block())
    assert_alike(twin, model, dtype=HALF)
    for name in ("linear", "gelu", "layer_norm"):
        plain = getattr(F, name)
        with monkeypatch.context() as patch:
            patch.setattr(F, name, lambda *args, plain=plain, **options: plain(*args, **options) * 1.5)
            assert_alike(twin, model, dtype=HALF)
            assert_alike(twin, model)


@pytest.mark.parametrize("trained", ["biases", "all"])
def test_steps_between_forward_and_backward(trained):
    """The original keeps casts of the MLP's weights, and none of its biases."""
    model, twin = pair(block())
    for one in (model, twin):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(trained == "all" or name in ("mlp.fc1.bias", "mlp.fc2.bias"))
        with autocast(HALF if trained == "all" else None):
            out = one(X.to(TRITON_DEVICE))
        with torch.no_grad():
            one.mlp.fc1.bias.add_(1)
            if trained == "all":
                one.mlp.fc1.weight.mul_(2)
        out.square().sum().backward()
    helpers.assert_close(twin.mlp.fc1.bias.grad, model.mlp.fc1.bias.grad, 1e-4 if trained != "all" else 2e-2)


def test_rates_that_change_are_followed(ran):
    model, twin = pair(drop_paths(block(), 0.2))
    for rate in (0.2, 0.7, 0.0, 0.4):
        for one in (model, twin):
            one.drop_path1.drop_prob = one.drop_path2.drop_prob = rate
        assert_alike(twin, model)
    for mode in (False, True):
        model.train(mode), twin.train(mode)
        assert_alike(twin, model)
    assert len(ran) == 18


def test_samples_are_dropped_without_gradients(ran):
    model, twin = pair(drop_paths(block()))
    with torch.no_grad():
        found = []
        for one in (twin, model):
            torch.manual_seed(4)
            found.append(one(X.to(TRITON_DEVICE)))
    helpers.assert_close(*found)
    assert len(ran) == 3


def branches(self, x, drop1, drop2):
    x = x + drop1(self._attn(self.norm1(x)))
    return x, lambda y: x + drop2(y)


def plain(self, x):
    x, end = branches(self, x, self.drop_path1, self.drop_path2)
    return end(self.ffn(x) * (0.5 if self.flag else 1))


def detached(self, x):
    x = x + self.drop_path1(self._attn(self.norm1(x.detach())))
    return x + self.drop_path2(self.ffn(x))


def other_drop(self, x):
    x, end = branches(self, x, nn.Identity() if self.training else self.drop_path1, self.drop_path2)
    return end(self.ffn(x))


def noise(self, x):
    x, end = branches(self, x, self.drop_path1, self.drop_path2)
    return end(self.ffn(x) * (1.5 if self.training else 1))


def swapped(self, x):
    x, end = branches(self, x, self.drop_path2, self.drop_path1)
    return end(self.ffn(x))


def autocast_off(self, x):
    x, end = branches(self, x, self.drop_path1, self.drop_path2)
    with torch.autocast(x.device.type, enabled=False):
        return end(self.ffn(x))


def dropout(self, x):
    x, end = branches(self, x, self.drop_path1, self.drop_path2)
    return end(F.dropout(self.ffn(x), self.dropout, self.training))


def half(self, x):
    x, end = branches(self, x, self.drop_path1, self.drop_path2)
    y = self.ffn(x)
    return end(y.clamp(-1, 1) if x.dtype == torch.float16 else y)


def odd(forward):
    """A block that looks like timm's, with another forward."""
    from timm.models.swin_transformer import SwinTransformerBlock

    def ffn(self, x):
        return self.mlp(self.norm2(x))

    cls = type("Odd", (SwinTransformerBlock,), {"forward": forward, "ffn": ffn, "__module__": __name__})
    made = cls(16, (8, 8), 2, window_size=4, shift_size=2, drop_path=0.3)
    made.dropout, made.flag, made.drop_path2.drop_prob = 0.3, False, 0.6
    return helpers.randomize(made)


ODD = [detached, other_drop, noise, swapped, autocast_off, dropout, half]


@pytest.mark.parametrize("forward", ODD, ids=lambda forward: forward.__name__)
def test_blocks_that_differ_in_training_are_no_known_ones(forward, ran):
    model, twin = pair(odd(forward))
    assert_alike(twin, model)
    assert_alike(twin, model, dtype=HALF)
    assert ran == []
    helpers.assert_accelerated(twin, 1)


def ffn(model):
    model.ffn = types.MethodType(lambda self, x: 2 * self.mlp(self.norm2(x)), model)


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("change", [ffn, lambda model: setattr(model, "flag", True)], ids=["method", "flag"])
def test_what_a_block_of_unknown_code_is_set_to(change, before, ran):
    model = odd(plain).to(TRITON_DEVICE).train()
    assert_alike(swinaccel.accelerate(copy.deepcopy(model), backend="triton"), model)
    assert len(ran) == 3
    ran.clear()
    if before:
        change(model)
        twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    else:
        twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton")
        change(model), change(twin)
    assert_alike(twin, model)
    assert ran == []


def test_a_drop_path_that_comes_later(ran):
    """Where nothing dropped, it was not seen what a drop-path does."""
    model, twin = pair(odd(plain))
    for one in (model, twin):
        one.drop_path1 = nn.Identity()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    assert_alike(twin, model)
    assert ran
    ran.clear()
    for one in (model, twin):
        one.drop_path1 = PerToken()
    assert_alike(twin, model)
    assert ran == []


def test_products_that_want_their_own_dtype(ran):
    class Wide(nn.Linear):
        def forward(self, x):
            with torch.autocast(x.device.type, enabled=False):
                return F.linear(x, self.weight, self.bias)

    model = block()
    qkv = Wide(16, 48)
    qkv.load_state_dict(model.attn.qkv.state_dict())
    model.attn.qkv = qkv
    model, twin = pair(model)
    assert_alike(twin, model, dtype=HALF)
    assert ran


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_kernel_that_fails(fails_at, v2, monkeypatch, caplog):
    """At any of a block's three, what is left is done by its own modules."""
    model, twin = pair(block(v2=v2))
    calls, run_norm = [], kernels.run_norm

    def fail(*args, **options):
        calls.append(args)
        if len(calls) > fails_at:
            raise kernels.LaunchError("no")
        run_norm(*args, **options)

    monkeypatch.setattr(kernels, "run_norm", fail)
    assert_alike(twin, model)
    assert ops.has_failures() == (fails_at < (2 if v2 else 3))
    ops.forget_failures()


def test_the_cpu_trains_by_itself(ran):
    model = block().train()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    assert_alike(twin.cpu(), model.cpu()) if TRITON_DEVICE == "cpu" else twin(X).sum().backward()
    assert ran == []
