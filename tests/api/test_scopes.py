"""Scopes that accelerate or disable, by block, thread and environment."""

from __future__ import annotations

import contextlib
import contextvars
import threading

import helpers
import pytest
import torch
from patched import MODELS, accelerate, is_accelerated, output, snapshot
from torch import nn

import swinaccel
from swinaccel import patching


def test_scope_accelerates_and_undoes():
    model = MODELS["timm"]()
    before = snapshot(model)
    with swinaccel.accelerated(model, backend="torch") as inner:
        assert inner is model
        assert is_accelerated(model)
    assert snapshot(model) == before


def test_scope_undoes_when_the_body_raises():
    model = MODELS["timm"]()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), swinaccel.accelerated(model, backend="torch"):
        raise ZeroDivisionError(output(model))
    assert snapshot(model) == before


def test_scopes_nest():
    model = MODELS["timm"]()
    with swinaccel.accelerated(model, backend="torch"):
        with swinaccel.accelerated(model, backend="torch", strict=True):
            assert is_accelerated(model)
        assert is_accelerated(model)
        model.layers[0].blocks[0].attn.register_forward_hook(lambda *_: None)
        output(model)  # the outer scope is not strict
    assert not is_accelerated(model)


def test_scope_keeps_an_accelerated_model_accelerated():
    model = accelerate(MODELS["timm"]())
    with swinaccel.accelerated(model, backend="torch", strict=True):
        pass
    assert is_accelerated(model)
    assert swinaccel.report(model).accelerated


def test_scope_with_restore_inside():
    model = accelerate(MODELS["timm"]())
    with swinaccel.accelerated(model, backend="torch"):
        swinaccel.restore(model)
        assert not is_accelerated(model)
    assert is_accelerated(model)


def test_scope_that_fails_at_its_entry():
    model = MODELS["timm"]()
    before = snapshot(model)
    model.layers[1].blocks[0]._attn = lambda x: x
    with pytest.raises(swinaccel.FallbackError), swinaccel.accelerated(model, strict=True):
        raise AssertionError("the body must not run")
    del model.layers[1].blocks[0]._attn
    assert snapshot(model) == before


def test_scope_undoes_a_filtered_entry():
    model = accelerate(MODELS["timm"](), filter=lambda name, _: "layers.1" in name)
    with swinaccel.accelerated(model, backend="torch"):
        assert len(swinaccel.report(model).accelerated) == 3
    assert [entry.name for entry in swinaccel.report(model).accelerated] == ["layers.1.blocks.0"]


def test_modules_added_inside_a_scope_do_not_break_its_exit():
    model = nn.ModuleList([helpers.timm_block((8, 8))])
    with swinaccel.accelerated(model, backend="torch"):
        model.append(helpers.timm_block((8, 8)))
        del model[0]
    assert swinaccel.report(model).accelerated == []


def test_disabled_runs_the_originals():
    model = MODELS["timm"]()
    expected = output(model)
    accelerate(model)
    with swinaccel.disabled():
        assert torch.equal(output(model), expected)
        with swinaccel.disabled():
            assert not is_accelerated(model)
        assert not is_accelerated(model)
    assert is_accelerated(model)


def test_disabled_ends_when_the_body_raises():
    model = accelerate(MODELS["timm"]())
    with contextlib.suppress(ZeroDivisionError), swinaccel.disabled():
        raise ZeroDivisionError
    assert is_accelerated(model)


def test_disabled_concerns_its_own_thread():
    model = accelerate(MODELS["timm"]())
    inside, done, found = threading.Event(), threading.Event(), []

    def other():
        inside.wait(30)
        found.append(is_accelerated(model))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with swinaccel.disabled():
        inside.set()
        done.wait(30)
        assert not is_accelerated(model)
    thread.join()
    assert found == [True]


def test_disabled_reaches_checkpointing_in_a_thread_of_autograd():
    """Backwards on GPUs run in threads of their own, where a context variable has its default."""
    model = accelerate(MODELS["microsoft"]())
    called = []

    class Recomputing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            thread = threading.Thread(target=lambda: called.append(patching._is_off(False)))
            thread.start()
            thread.join()
            called.append(contextvars.Context().run(patching._is_off, False))
            return gradient

    with swinaccel.disabled():
        Recomputing.apply(torch.ones(1, requires_grad=True)).sum().backward()
    Recomputing.apply(torch.ones(1, requires_grad=True)).sum().backward()
    assert called == [False, True, False, False]  # in another thread that is none of autograd's, and in the backward
    assert is_accelerated(model)


def test_environment_disables_accelerate_and_what_is_installed(monkeypatch):
    model, late = accelerate(MODELS["timm"]()), MODELS["timm"]()
    for value in ("1", "true", "YES", "on"):
        monkeypatch.setenv("SWINACCEL_DISABLE", value)
        assert not is_accelerated(model)
        assert swinaccel.report(accelerate(late)).accelerated == []
    monkeypatch.setenv("SWINACCEL_DISABLE", "0")
    assert is_accelerated(model)


def test_threads_do_not_disturb_each_other():
    """Eight threads accelerate, run and restore models of one class."""
    expected = output(MODELS["timm"]())
    errors = []

    def work():
        try:
            for _ in range(3):
                model = accelerate(MODELS["timm"]())
                helpers.assert_close(output(model), expected)
                swinaccel.restore(model)
                assert torch.equal(output(model), expected)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
