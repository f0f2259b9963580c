"""What one call remembers for the next is forgotten with every change of the module, whatever the means."""

from __future__ import annotations

import collections
import copy
import gc
import pickle
import weakref

import helpers
import numpy
import pytest
import torch
from helpers import TRITON_DEVICE
from torch import nn

import swinaccel
from swinaccel.ops.failures import failures
from swinaccel.runtime.plan import state_of

X = torch.randn(1, 8, 8, 16).to(TRITON_DEVICE)
TOKENS = X.view(1, 64, 16)


def timm(v2=False, **options):
    return helpers.timm_block((8, 8), shift=2, v2=v2, **options).to(TRITON_DEVICE), (X,)


MODELS = {
    "timm": timm,
    "timm-v2": lambda: timm(v2=True),
    "torchvision": lambda: (helpers.torchvision_attention(shift=(2, 2)).to(TRITON_DEVICE), (X,)),
    "torchvision-v2": lambda: (helpers.torchvision_attention(shift=(2, 2), v2=True).to(TRITON_DEVICE), (X,)),
    "hf": lambda: (helpers.huggingface_layer("Swin", shift=2).to(TRITON_DEVICE), (TOKENS, (8, 8))),
    "microsoft": lambda: (helpers.microsoft_block((8, 8), shift=2).to(TRITON_DEVICE), (TOKENS,)),
}


def accelerated(model, *inputs, **options):
    """A model that remembers a call."""
    swinaccel.accelerate(model, backend="triton", **{"fuse": "attention", **options})
    with torch.no_grad():
        model(*inputs)
    return model


def assert_live(model, *inputs):
    """The model gives what its originals give."""
    with torch.no_grad():
        found = model(*inputs)
        with swinaccel.disabled():
            expected = model(*inputs)
    helpers.assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_second_call_reads_nothing(name, read):
    model, inputs = MODELS[name]()
    accelerated(model, *inputs)
    assert len(read) == 1
    assert_live(model, *inputs)
    assert len(read) == 1
    (entry,) = swinaccel.report(model)
    assert (entry.calls, entry.fallbacks, entry.bias) == (2, 0, "table")


@pytest.mark.parametrize("name", ["timm", "timm-v2", "torchvision", "torchvision-v2"])
def test_window_and_shift(name):
    """Lists of torchvision's are changed in place, and shared between blocks."""
    model, inputs = MODELS[name]()
    accelerated(model, *inputs)
    if name.startswith("timm"):
        model.shift_size, model.attn_mask = (0, 0), None
    else:
        model.shift_size[0] = 0
    assert_live(model, *inputs)
    helpers.assert_accelerated(model)


def test_layers_that_change_their_own_shift():
    model, inputs = MODELS["hf"]()
    accelerated(model, *inputs)
    model.shift_size = 1
    assert_live(model, *inputs)
    small = torch.randn(1, 16, 16, device=TRITON_DEVICE)
    assert_live(model, small, (4, 4))
    assert model.shift_size == 0
    assert_live(model, *inputs)


def test_configuration():
    """An object that a module names is looked into."""
    model, inputs = MODELS["hf"]()
    if not hasattr(model.attention, "config"):
        pytest.skip("layers of transformers 4 ask no configuration")
    accelerated(model, *inputs)
    model.attention.config._attn_implementation = "eager"
    with torch.no_grad():
        model(*inputs)
    (entry,) = swinaccel.report(model)
    assert entry.fallbacks == 1
    assert "attn_implementation" in entry.reason


@pytest.mark.parametrize("part", ["attn", "attn.qkv", "attn.proj", "attn.proj_drop", "attn.softmax"])
def test_hooks_in_a_fresh_dictionary(part):
    model, inputs = timm()
    accelerated(model, *inputs)
    module, seen = model.get_submodule(part), []
    module._forward_hooks = collections.OrderedDict()
    assert_live(model, *inputs)
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(*inputs)
    (entry,) = swinaccel.report(model)
    assert seen or part == "attn.softmax"  # which fused attention leaves out
    assert entry.fallbacks == 1
    assert "hooks" in entry.reason
    handle.remove()
    assert_live(model, *inputs)
    assert swinaccel.report(model).accelerated[0].fallbacks == 1


def test_call_of_all_modules(monkeypatch):
    """As tracers and profilers replace it."""
    model, inputs = timm()
    accelerated(model, *inputs)
    plain, seen = nn.Module.__call__, []
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *a, **k: (seen.append(self), plain(self, *a, **k))[1])
    run_quietly(model)
    assert {model.attn.qkv, model.attn.proj} <= set(seen)


def test_hooks_of_all_modules():
    model, inputs = timm()
    accelerated(model, *inputs)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    run_quietly(model)
    handle.remove()
    assert {model.attn.qkv, model.attn.proj} <= set(seen)


def test_compiled_projection():
    """By its own method: then that is what a call of it runs."""
    model, inputs = timm()
    accelerated(model, *inputs)
    calls, plain = [], model.attn.proj._call_impl
    model.attn.proj._compiled_call_impl = lambda x: (calls.append(1), plain(x))[1]
    for _ in range(2):
        assert_live(model, *inputs)
    assert len(calls) == 4


def test_attributes_by_hand():
    """Another `__dict__` than the one that was looked at."""
    model, inputs = timm()
    accelerated(model, *inputs)
    other = timm()[0]
    helpers.randomize(other, seed=5)
    swinaccel.accelerate(other, backend="triton", fuse="attention")
    model.__dict__ = other.__dict__
    assert_live(model, *inputs)


def test_dropout():
    model, inputs = timm(proj_drop=0.5, attn_drop=0.5)
    accelerated(model.eval(), *inputs)
    model.train()
    for generate in (lambda: model._attn(X), lambda: model.attn.proj_drop(X)):
        first, second = generate(), generate()
        assert not torch.equal(first, second)
    model.eval()
    assert_live(model, *inputs)


def test_probability_of_dropout():
    model, inputs = timm()
    accelerated(model, *inputs)
    model.attn.proj_drop.train().p = 1.0
    with torch.no_grad():
        assert not model._attn(X).any()


def test_gradients():
    model, inputs = timm(v2=True)
    accelerated(model, *inputs)
    leaf = X.clone().requires_grad_()
    model(leaf).square().sum().backward()
    with swinaccel.disabled():
        other = X.clone().requires_grad_()
        expected = torch.autograd.grad(model(other).square().sum(), (other, *model.attn.cpb_mlp.parameters()))
    for found, one in zip((leaf.grad, *(p.grad for p in model.attn.cpb_mlp.parameters())), expected, strict=True):
        helpers.assert_close(found, one, 1e-3)
    assert not run_quietly(model).requires_grad
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert not model(X).requires_grad


def run_quietly(model):
    with torch.no_grad():
        return model(X)


def test_mask_that_gets_a_gradient():
    model, inputs = timm()
    accelerated(model, *inputs)
    model.attn_mask.requires_grad_()
    model(X)
    (entry,) = swinaccel.report(model)
    assert "the mask records gradients" in entry.reason


def test_autocast():
    if TRITON_DEVICE == "cpu":
        pytest.skip("Triton's interpreter cannot multiply bfloat16")
    model, inputs = timm()
    accelerated(model, *inputs)
    with torch.autocast(TRITON_DEVICE, torch.bfloat16), torch.no_grad():
        assert model._attn(X).dtype == torch.bfloat16
    assert model._attn(X).dtype == torch.float32


def test_autocast_is_judged_again(read):
    """The kernels need not serve the dtype that a cast gives."""
    model, inputs = timm()
    accelerated(model, *inputs)
    with torch.autocast(TRITON_DEVICE, torch.bfloat16), torch.no_grad():
        model(*inputs)
    assert len(read) == 2


def test_dtypes():
    model, inputs = timm()
    accelerated(model, *inputs)
    with torch.no_grad():
        found = model.double()(X.double())
    assert "float64" in swinaccel.report(model).accelerated[0].reason
    assert found.dtype == torch.float64
    model.half()
    with torch.no_grad():
        assert model._attn(X.half()).dtype == torch.float16
    assert_live(model.float(), *inputs)


def test_sizes_and_strides(read):
    model, _ = helpers.torchvision_attention(shift=(2, 2)).to(TRITON_DEVICE), None
    accelerated(model, X)
    wide = torch.randn(1, 8, 12, 16, device=TRITON_DEVICE)
    for x in (wide, wide.transpose(1, 2), X.permute(0, 2, 1, 3), torch.randn(3, 8, 8, 16, device=TRITON_DEVICE), X):
        assert_live(model, x)
    helpers.assert_accelerated(model)


def test_context():
    """What is said about a call, rather than about a module."""
    model, inputs = timm()
    accelerated(model, *inputs)

    class Marked(torch.Tensor):
        pass

    with torch.no_grad():
        assert type(model(X.as_subclass(Marked))) is Marked
        torch.func.vmap(model)(X[None])
    (entry,) = swinaccel.report(model)
    assert entry.fallbacks == 2
    with swinaccel.disabled():
        model(X)
    assert swinaccel.report(model).accelerated[0].calls == 3


def test_environment(monkeypatch):
    model, inputs = timm()
    accelerated(model, *inputs)
    monkeypatch.setenv("SWINACCEL_DISABLE", "1")
    model(X)
    assert swinaccel.report(model).accelerated[0].calls == 1


def test_options(read):
    """The marker carries them."""
    model, inputs = timm()
    accelerated(model, *inputs)
    swinaccel.accelerate(model, backend="torch", fuse="attention")
    assert_live(model, *inputs)
    assert len(read) == 2


def test_failed_kernels(monkeypatch):
    """A kernel that fails for another model may be the same."""
    model, inputs = timm()
    accelerated(model, *inputs)
    (plan,) = state_of(model).attention.plans.values()
    failures.record(plan.problem, "out of registers")
    model(X)
    assert swinaccel.report(model).accelerated[0].fallbacks == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "copy"])
@pytest.mark.parametrize("name", ["timm", "torchvision-v2"])
def test_copies(name, how):
    model, inputs = MODELS[name]()
    accelerated(model, *inputs)
    made = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda one: pickle.loads(pickle.dumps(one))}[how]
    other = made(model)
    assert not state_of(other).attention.plans
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert_live(other, *inputs)
    assert_live(model, *inputs)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_keeps_a_model_alive(name):
    model, inputs = MODELS[name]()
    accelerated(model, *inputs, fuse="auto")
    assert state_of(model).attention.plans or state_of(model).block.plans
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_restore_forgets():
    model, inputs = timm()
    before = dict(model.__dict__)
    accelerated(model, *inputs)
    swinaccel.restore(model)
    assert model.__dict__ == before
    assert not state_of(model).attention.plans


def test_modules_that_keep_changing_are_left_in_peace(read):
    """Remembering would cost more than reading."""
    model, inputs = timm()
    accelerated(model, *inputs)
    for number in range(12):
        model.note = number
        run_quietly(model)
    assert state_of(model).attention.guard is None
    assert len(read) == 13
    assert_live(model, *inputs)


def test_what_cannot_be_compared_is_read_each_time(read):
    model, inputs = timm()
    model.note = {"of": numpy.zeros(3)}
    accelerated(model, *inputs)
    for _ in range(2):
        assert_live(model, *inputs)
    assert len(read) == 3
