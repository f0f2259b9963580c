"""Products of 8 bits: the bound of their error, what leaves a block without, and what is done to such models."""

from __future__ import annotations

import copy
import gc
import weakref

import helpers
import pytest
import timm
import torch
from blocks import HALF, random
from eight_bits import MODELS, TINY, X, accelerated, assert_runs, call, first, knows, made, relative, replaced
from helpers import TRITON_DEVICE
from torch import nn

import swinaccel
from swinaccel.backends.triton import linear8
from swinaccel.runtime import precision

KEEPS_VERDICTS = True
pytestmark = pytest.mark.usefixtures("anywhere")


def assert_without(model, reason):
    report = swinaccel.report(model)
    assert {entry.precision for entry in report} == {"model"}
    assert all(f"without fp8, because {reason}" in entry.reason for entry in report), str(report)
    assert reason in " ".join(str(report).split()) or len(reason) > 20  # the column folds


def test_a_block_that_errs_by_more_runs_without():
    model = made()
    fast, plain = accelerated(model, max_error=1e-4), swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    for _ in range(2):
        assert torch.equal(call(fast, X), call(plain, X))
        assert_without(fast, "products of 8 bits err by")
    errors = [known.error for known in knows(fast)]
    assert min(errors) > 1e-4
    swinaccel.accelerate(fast, backend="triton", precision="fp8", max_error=0.2)
    assert relative(call(fast, X), call(plain, X)) > 1e-3
    assert errors[0] == knows(fast)[0].error
    assert_runs(fast)
    swinaccel.accelerate(fast, backend="triton")
    assert torch.equal(call(fast, X), call(plain, X))
    assert swinaccel.report(fast).entries[0].precision is None


def test_some_blocks_may_be_kept_out():
    model = made()
    call(measured := accelerated(model), X)
    errors = sorted(known.error for known in knows(measured))
    fast = accelerated(model, max_error=(errors[1] + errors[2]) / 2)
    call(fast, X)
    kinds = [entry.precision[:3] for entry in swinaccel.report(fast)]
    assert sorted(kinds) == ["fp8", "fp8", "mod", "mod"]


def test_an_input_that_is_not_finite_measures_nothing():
    model, x = accelerated(made().layers[1].blocks[1]), random(1, 4, 4, 64, dtype=HALF)
    broken = x.clone()
    broken[0, 0, 0, 0] = float("nan")
    assert call(model, broken).isnan().any()
    (known,) = knows(model)
    assert known.error is None
    assert_without(model, "its error could not be measured")
    call(model, x)
    assert known.error < 0.1
    assert call(model, broken).isnan().any()


def with_grad(model):
    model(X)


def hooked(model):
    for part in model.modules():
        if hasattr(part, "norm2"):
            part.norm2.register_forward_hook(lambda *_: None)
    call(model, X)


REFUSALS = {
    "gradients": (HALF, {}, with_grad, "gradients are recorded, and products of 8 bits have none"),
    "fp32": (torch.float32, {}, lambda model: call(model, X.float()), "the model is not in half precision"),
    "hooks": (HALF, {}, hooked, "LayerNorm has hooks"),
    "attention": (HALF, {"fuse": "attention"}, lambda model: call(model, X), "only whole blocks multiply in 8 bits"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_leaves_blocks_without(name):
    dtype, options, run, reason = REFUSALS[name]
    model = made(dtype=dtype)
    fast = accelerated(model, **options)
    if name != "hooks":
        call(fast, X.to(dtype))
    run(fast)
    assert_without(fast, reason)
    if name == "gradients":  # and back
        call(fast, X)
        assert_runs(fast)
        fast(X)
        assert_without(fast, reason)


def test_drop_paths_leave_blocks_without():
    model = timm.create_model("swin_tiny_patch4_window7_224", **TINY, drop_path_rate=0.5)
    fast = accelerated(helpers.randomize(model).to(TRITON_DEVICE, HALF).train())
    with torch.no_grad():
        fast(X)
    reasons = {known.reason for known in knows(fast)}
    assert "it drops numbers at random in training; call eval()" in reasons


def test_a_hook_that_comes_later_shows(monkeypatch):
    fast = accelerated(made())
    call(fast, X)
    assert_runs(fast)
    hooked(fast)
    assert_without(fast, "LayerNorm has hooks")


def test_sizes_that_products_do_not_take():
    model = timm.create_model("swin_tiny_patch4_window7_224", **{**TINY, "embed_dim": 24, "num_heads": (2, 2)})
    fast = accelerated(helpers.randomize(model).to(TRITON_DEVICE, HALF))
    call(fast, X)
    assert {known.reason for known in knows(fast)} == {
        "its channels are no multiples of 16, which products of 8 bits ask for", None
    }  # fmt: skip


def test_few_channels(monkeypatch):
    monkeypatch.setattr(precision, "fewest_channels", 40)
    fast = accelerated(made())
    call(fast, X)
    assert [entry.precision[:3] for entry in swinaccel.report(fast)] == ["mod", "mod", "fp8", "fp8"]


def test_other_devices(monkeypatch):
    monkeypatch.undo()
    assert precision.device_reason(torch.device("cpu")) is not None
    model = helpers.randomize(MODELS["timm"]()).half()
    fast = swinaccel.accelerate(copy.deepcopy(model), backend="torch", precision="fp8")
    plain = swinaccel.accelerate(model, backend="torch")
    x = torch.randn(1, 3, 32, 32).half()
    assert torch.equal(call(fast, x), call(plain, x))
    assert_without(fast, "products of 8 bits run by Triton kernels, on NVIDIA GPUs")


def test_adapters_leave_blocks_without():
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = made()
    for part in model.modules():
        if hasattr(part, "qkv"):
            part.qkv.__class__ = Adapted
    fast = accelerated(model)
    call(fast, X)
    assert all("fp8" not in (entry.precision or "") for entry in swinaccel.report(fast))


def test_products_that_fail_leave_the_block_without(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("no such product\nhere")

    monkeypatch.setattr(linear8, "linear8_launch", broken)
    model = made()
    fast, plain = accelerated(model), swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    for _ in range(2):
        assert torch.equal(call(fast, X), call(plain, X))
        assert_without(fast, "products of 8 bits failed: RuntimeError: no such product")
    assert len([record for record in caplog.records if "products of 8 bits failed" in record.message]) == 4


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    model = made()
    fast, plain = accelerated(model), swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    monkeypatch.setattr(precision, "is_captured", lambda x: True)
    assert torch.equal(call(fast, X), call(plain, X))
    assert_without(fast, "its error was not measured before a CUDA graph is captured")
    monkeypatch.setattr(precision, "is_captured", lambda x: False)
    found = call(fast, X)
    assert_runs(fast)
    monkeypatch.setattr(precision, "is_captured", lambda x: True)
    assert torch.equal(call(fast, X), found)
    assert_runs(fast)


# Lives.


def test_copies_and_restored_models():
    model = made()
    fast = accelerated(model)
    found = call(fast, X)
    twin = copy.deepcopy(fast)
    assert knows(twin) == []
    assert torch.equal(call(twin, X), found)
    assert_runs(twin)
    original = call(model, X)
    assert torch.equal(call(swinaccel.restore(twin), X), original)
    with swinaccel.accelerated(model, backend="triton", precision="fp8"):
        assert torch.equal(call(model, X), found)
    assert torch.equal(call(model, X), original)


def test_nothing_is_kept_alive():
    fast = accelerated(made().layers[1].blocks[1])
    x = random(1, 4, 4, 64, dtype=HALF)
    call(fast, x)
    weight = weakref.ref(fast.mlp.fc1.weight)
    replaced(fast.mlp.fc1)
    call(fast, x)
    gc.collect()
    assert weight() is None
    module = weakref.ref(fast)
    del fast
    gc.collect()
    assert module() is None


def test_verify_shows_the_error_of_fp8_beside_the_rest():
    model = made()
    result = swinaccel.verify(model, X, backend="triton", precision="fp8")
    assert result.passed, str(result)
    assert result.fp8_max_error > 10 * result.max_error
    assert 0 < result.fp8_mean_error < 0.1
    assert f"with fp8 max {result.fp8_max_error:.2e}" in str(result)
    assert all(entry.precision.startswith("fp8") for entry in result.report)
    assert result.to_dict()["fp8_max_error"] == result.fp8_max_error
    without = swinaccel.verify(model, X, backend="triton")
    assert without.fp8_max_error is None
    assert "fp8" not in str(without)
    assert without.max_error == result.max_error
    assert not hasattr(model, "_swinaccel")


def test_autocast():
    model = made(dtype=torch.float32)
    fast = accelerated(model)
    exact = call(copy.deepcopy(model).double(), X.double())
    with torch.no_grad(), torch.autocast(TRITON_DEVICE, dtype=HALF):
        expected = first(model(X.float()))
        found = first(fast(X.float()))
        assert torch.equal(first(fast(X.float())), found)
    assert_runs(fast)
    assert found.dtype == expected.dtype
    assert 1e-3 < relative(found, exact) < 0.1
