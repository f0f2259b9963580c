"""What a call leaves behind: reports, one warning a reason, errors where strict, what verify says; later changes."""

from __future__ import annotations

import contextlib
import copy
import json
import types
import warnings

import helpers
import pytest
import torch
from blocks import X, block, run
from helpers import BACKENDS, TRITON_DEVICE
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import swinaccel
from swinaccel.backends.torch import window as torch_backend
from swinaccel.backends.triton import window as window_launches
from swinaccel.runtime import attention
from swinaccel.spec.window import Geometry


def test_strict_raises_where_an_original_would_run():
    model = swinaccel.accelerate(block(), backend="torch", strict=True)
    run(model)
    model.attn.register_forward_hook(lambda *_: None)
    with pytest.raises(swinaccel.FallbackError, match=r"SwinTransformerBlock would run its original: .*hooks"):
        run(model)


def test_strict_by_environment(monkeypatch):
    model = swinaccel.accelerate(block(), backend="torch")
    model.attn.register_forward_hook(lambda *_: None)
    run(model)
    monkeypatch.setenv("SWINACCEL_STRICT", "on")
    with pytest.raises(swinaccel.FallbackError):
        run(model)


def test_strict_does_not_hinder_disabled():
    model = swinaccel.accelerate(block(), backend="torch", strict=True)
    model.attn.register_forward_hook(lambda *_: None)
    with swinaccel.disabled():
        run(model)


def test_errors_of_the_original_come_through():
    """An error in what the user gave is no reason of ours, and no kernel failure."""
    model = swinaccel.accelerate(block(), backend="torch")
    with pytest.raises(RuntimeError):
        run(model, torch.randn(2, 8, 8, 17))


def test_one_warning_for_each_reason():
    models = [swinaccel.accelerate(block(), backend="torch") for _ in range(2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in models:
            model.attn.register_forward_hook(lambda *_: None)
            for _ in range(3):
                run(model)
        models[0].attn._forward_hooks.clear()
        models[0].attn_mask = torch.zeros(1, 16, 16)
        for _ in range(3):
            with contextlib.suppress(RuntimeError):
                run(models[0])
    texts = [str(warning.message) for warning in caught if "swinaccel" in str(warning.message)]
    assert len(texts) == 2
    assert all(text.startswith("swinaccel: the original runs, and its results are right: ") for text in texts)


def test_no_warning_without_a_reason():
    model = swinaccel.accelerate(block(), backend="torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts(backend):
    device = helpers.DEVICES[backend]
    model = swinaccel.accelerate(block().to(device), backend=backend)
    (entry,) = swinaccel.report(model)
    assert (entry.status, entry.reason, entry.bias, entry.calls, entry.fallbacks) == ("accelerated", None, None, 0, 0)
    for _ in range(3):
        run(model, X.to(device))
    (entry,) = swinaccel.report(model)
    assert (entry.calls, entry.fallbacks, entry.bias) == (3, 0, "table" if backend == "triton" else entry.bias)
    twin = copy.deepcopy(model)
    (entry,) = swinaccel.report(twin)
    assert entry.calls == 0
    swinaccel.restore(model)
    (entry,) = swinaccel.report(model)
    assert (entry.status, entry.calls) == ("original", 0)


def test_report_of_a_model_never_accelerated():
    (entry,) = swinaccel.report(block())
    assert entry.status == "original"
    assert "accelerate() was not called" in entry.reason


def test_report_is_ready_for_json_and_for_reading():
    model = nn.Sequential(block(), helpers.microsoft_block((8, 8)))
    swinaccel.accelerate(model[0], backend="torch")
    report = swinaccel.report(model)
    content = json.loads(json.dumps(report.to_dict()))
    assert (content["accelerated"], content["original"]) == (1, 1)
    fields = {
        "name", "family", "status", "reason", "window", "shift", "num_heads", "head_dim", "bias", "precision", "calls",
        "fallbacks",
    }  # fmt: skip
    assert [set(entry) for entry in content["entries"]] == [fields, fields]
    assert [entry.name for entry in report.accelerated] == ["0"]
    assert [entry.name for entry in report.original] == ["1"]
    assert "1 of 2 window attentions accelerated" in str(report)
    assert "microsoft" in str(report)
    assert "1 of 2" in repr(report)
    assert "no window attention" in str(swinaccel.report(nn.Linear(1, 1)))


# verify.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accelerated", [True, False], ids=["accelerated", "not-yet"])
def test_verify(backend, accelerated):
    device = helpers.DEVICES[backend]
    model = block().to(device)
    if accelerated:
        swinaccel.accelerate(model, backend=backend)
    result = swinaccel.verify(model, X.to(device), backend=backend)
    assert result.passed, str(result)
    assert result.reference == "float64"
    assert json.loads(json.dumps(result.to_dict()))["passed"] is True
    assert str(result).startswith("passed")
    (entry,) = swinaccel.report(model)
    assert entry.status == ("accelerated" if accelerated else "original")


def test_verify_fails_on_a_wrong_kernel(monkeypatch):
    real = window_launches.shifted_window_attention
    monkeypatch.setattr(
        window_launches, "shifted_window_attention", lambda *args, **kwargs: 1.001 * real(*args, **kwargs)
    )
    model = block().to(TRITON_DEVICE)
    result = swinaccel.verify(model, X.to(TRITON_DEVICE), backend="triton")
    assert not result.passed
    assert str(result).startswith("FAILED")


def test_verify_fails_where_nothing_was_accelerated():
    assert not swinaccel.verify(nn.Linear(4, 4), torch.randn(2, 4)).passed
    model = block()
    model.attn.register_forward_hook(lambda *_: None)
    assert not swinaccel.verify(model, X, backend="torch").passed


def test_verify_restores_the_mode_and_keeps_gradients_away():
    model = block().train()
    model.norm1.eval()
    modes = [module.training for module in model.modules()]
    swinaccel.verify(model, X, backend="torch")
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_verify_needs_inputs():
    with pytest.raises(ValueError, match="verify needs the inputs"):
        swinaccel.verify(block())


# What came after accelerate(), and is seen at the next call.


@pytest.mark.parametrize("way", ["parameter", "data"])
def test_table_that_became_too_small_for_its_index(way, monkeypatch):
    """After a call of the same kind, whose index was found to fit."""

    def change(model):
        attn = model.attn
        small = attn.relative_position_bias_table.detach()[:20].clone()
        if way == "parameter":
            attn.relative_position_bias_table = nn.Parameter(small)
        else:
            attn.relative_position_bias_table.data = small

    model = swinaccel.accelerate(helpers.timm_block((8, 8), shift=2).to(TRITON_DEVICE), backend="triton")
    x = torch.randn(2, 8, 8, 16).to(TRITON_DEVICE)
    with torch.no_grad():
        model(x)
        model(x)
        change(model)
        monkeypatch.setenv("SWINACCEL_STRICT", "1")  # the original's error would take a GPU's process down
        with pytest.raises(swinaccel.FallbackError, match="from 0 to 48, and its table has 20 rows"):
            model(x)


def test_index_that_nobody_looked_through_before_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    section = types.SimpleNamespace(index=types.SimpleNamespace(is_cuda=True), table=lambda: None, table_shape=(4, 2))
    assert "run the model once before" in attention.index_reason(section)


def test_tracing_into_a_graph():
    model = swinaccel.accelerate(helpers.microsoft_block((8, 8), shift=2), backend="torch")
    x = torch.randn(2, 64, 16)
    with torch.no_grad():
        graph = make_fx(model, tracing_mode="real")(x)
    helpers.assert_close(graph(x), run(model, x))


def test_orders_kept_by_the_torch_backend():
    """Those of one model's stages, and no more: images of many sizes would fill the memory with them."""
    cache = torch_backend._order
    cache.cache_clear()
    for side in range(8, 88, 2):
        order = cache(Geometry((side, side), (4, 4), (2, 2)), 2, True, torch.device("cpu"))
        assert order.gather.dtype == order.scatter.dtype == torch.int32
    assert cache.cache_info().currsize <= 16
    for shift in (0, 2):
        for side in (8, 16, 32, 64):
            for batch in (2, 1):  # the last part of a batch may be a smaller one
                for _ in range(2):
                    cache(Geometry((side, side), (4, 4), (shift, shift)), batch, True, torch.device("cpu"))
    before = cache.cache_info().misses
    cache(Geometry((8, 8), (4, 4), (0, 0)), 2, True, torch.device("cpu"))
    assert cache.cache_info().misses == before


def test_blocks_that_are_compiled_one_by_one_share_code():
    blocks = nn.ModuleList(helpers.timm_block((8, 8)) for _ in range(4)).to(TRITON_DEVICE)
    swinaccel.accelerate(blocks, backend="triton")
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    x = torch.randn(1, 8, 8, 16, device=TRITON_DEVICE)
    for one in blocks:
        one.compile(backend="eager")
        with torch.no_grad():
            one(x)
    assert counters["stats"]["unique_graphs"] == 1
