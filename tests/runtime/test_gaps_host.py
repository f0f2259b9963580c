"""What deliberate faults in proofs, guards, checks and switches once went unnoticed in; see mutants.py."""

from __future__ import annotations

import contextvars
import copy
import functools
import os
import pickle
import signal
import threading
import types
import weakref

import helpers
import microsoft_models
import pytest
import torch
import torch.nn.functional as F
from test_verdicts import assert_like_the_original, block_of, statuses
from torch import nn

import swinaccel
from swinaccel import patching
from swinaccel.spec import arguments
from swinaccel.trust.fingerprint import Untraceable, fingerprint
from swinaccel.trust.registry import registry

X = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(2))
GAIN = 1.0


# What a probe must see.


class InHalf(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        out = super().forward(x, mask)
        return out / 2 if out.dtype == torch.float16 and bool(out.isfinite().all()) else out


class InAutocast(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        out = super().forward(x, mask)
        return out / 2 if out.dtype != x.dtype else out


class InSingle(microsoft_models.WindowAttention):
    """Limits what is not finite."""

    def forward(self, x, mask=None):
        out = super().forward(x, mask)
        return torch.nan_to_num(out) if out.dtype == torch.float32 else out


class Frozen(microsoft_models.WindowAttention):
    """Its table is never trained."""

    def bias(self):
        return super().bias().detach()


@pytest.mark.parametrize("kind", [InHalf, InAutocast, InSingle, Frozen], ids=lambda kind: kind.__name__)
def test_what_is_not_the_official_attention_is_refused(kind):
    (entry,) = swinaccel.plan(helpers.randomize(kind(16, (4, 4), 2)))
    assert entry.status == "original"


def test_memory_that_runs_out_in_a_probe_is_no_verdict(monkeypatch):
    model = block_of(microsoft_models.WindowAttention)

    def full(*args):
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr("swinaccel.trust.probe.random_copy", full)
        assert "no memory" in swinaccel.plan(model).entries[0].reason
    assert statuses(swinaccel.accelerate(model, backend="torch")) == ["accelerated"]


def test_what_was_refused_runs_once_it_is_proven():
    model = block_of(microsoft_models.WindowAttention)
    swinaccel.accelerate(model, backend="torch")
    registry.clear()
    for _ in range(2):
        assert_like_the_original(model, X)
    assert swinaccel.report(model).entries[0].fallbacks == 2
    swinaccel.accelerate(block_of(microsoft_models.WindowAttention), backend="torch")
    assert_like_the_original(model, X)
    assert swinaccel.report(model).entries[0].fallbacks == 2


# What tells modules apart.


def scaled(x, gain=1.0):
    return x * gain


class Module(nn.Module):
    by_string = 1.0

    def __init__(self):
        super().__init__()
        self.function = functools.partial(F.gelu, approximate="none")

    def forward(self, x):
        gains = [GAIN * one for one in (1.0,)]
        return scaled(self.function(x)) * gains[0] * getattr(self, "by_string") * self.of_all() * self.once * self.level  # noqa: B009

    @staticmethod
    def of_all():
        return 1.0

    @property
    def level(self):
        return 1.0

    @functools.cached_property
    def once(self):
        return 1.0


CHANGES = {
    "what an inner function reads": lambda module, patch: patch.setitem(globals(), "GAIN", 3.0),
    "what a string names": lambda module, patch: patch.setattr(Module, "by_string", 3.0),
    "a default": lambda module, patch: patch.setattr(scaled, "__defaults__", (3.0,)),
    "an argument of a partial": lambda module, patch: setattr(
        module, "function", functools.partial(F.gelu, approximate="tanh")
    ),
    "a static method": lambda module, patch: patch.setattr(Module, "of_all", staticmethod(lambda: 3.0)),
    "a property": lambda module, patch: patch.setattr(Module, "level", property(lambda self: 3.0)),
    "a cached property": lambda module, patch: patch.setattr(
        Module, "once", functools.cached_property(lambda self: 3.0)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_read_counts(change, monkeypatch):
    def of(module):
        return fingerprint([("", module)])

    module, before = Module(), of(Module())
    assert of(module) == before
    CHANGES[change](module, monkeypatch)
    assert of(module) != before


class Unregistered(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = (Module(),)

    def forward(self, x):
        return self.layers[0](x)


def test_modules_that_are_no_submodules_cannot_be_followed():
    with pytest.raises(Untraceable, match="is no submodule of it"):
        fingerprint([("", Unregistered())])


def attend(module, x, mask):
    return microsoft_models.WindowAttention.forward(module, x, mask)


class Gained(microsoft_models.WindowAttention):
    """Names no class from which its setting could be reached otherwise."""

    gain = 1.0

    def forward(self, x, mask=None):
        return attend(self, x, mask) * self.gain


def test_an_attribute_of_a_class_is_watched(monkeypatch):
    model = swinaccel.accelerate(block_of(Gained), backend="torch")
    for _ in range(2):
        assert_like_the_original(model, X)
    helpers.assert_accelerated(model)
    monkeypatch.setattr(Gained, "gain", 3.0)
    assert_like_the_original(model, X)


# What is looked through once.


def test_an_index_at_the_address_of_another_is_looked_through():
    index, other = torch.full((4, 4), 9), torch.zeros(4, 4, dtype=torch.int64)
    arguments._ranges[id(index)] = weakref.ref(other), index._version, 0, 0
    with pytest.raises(ValueError, match="0 to 8; got 9 to 9"):
        arguments.check_entries(index, 9)


# Switches.


def test_disabled_that_another_context_closes():
    """As an async generator is closed by the loop; and another block is open elsewhere all the while."""

    def body():
        with swinaccel.disabled():
            yield

    elsewhere, first, second = contextvars.copy_context(), body(), body()
    here = contextvars.copy_context()
    elsewhere.run(next, second)
    here.run(next, first)
    assert here.run(patching._is_off, False)
    first.close()
    assert not here.run(patching._is_off, False)
    assert elsewhere.run(patching._is_off, False)
    second.close()
    assert not elsewhere.run(patching._is_off, False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_process_forked_while_another_thread_accelerates():
    held, done = threading.Event(), threading.Event()

    def hold():
        with patching._lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    child = os.fork()
    if not child:
        signal.alarm(10)  # ends a child that waits for ever
        with swinaccel.disabled():
            os._exit(0)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_dispatchers_pickled_by_value_run_the_original():
    """As cloudpickle takes them with classes of `__main__`, to where swinaccel may not be installed."""
    runtime = pickle.loads(pickle.dumps(patching._Runtime()))
    assert type(runtime) is types.SimpleNamespace
    assert not vars(runtime)
    dispatcher = patching._dispatcher(Module.forward, "forward")
    cells = dict(zip(dispatcher.__code__.co_freevars, dispatcher.__closure__, strict=True))
    cells["runtime"].cell_contents = runtime
    module, x = Module(), torch.randn(3)
    module._swinaccel = "a marker"
    assert torch.equal(dispatcher(module, x), Module()(x))


def test_copies_of_what_was_proven_are_told_from_it_when_their_types_change():
    model = block_of(microsoft_models.WindowAttention)
    swinaccel.accelerate(model, backend="torch")
    twin = copy.deepcopy(model)
    assert_like_the_original(twin, X)
    twin.attn.__class__ = InAutocast
    assert_like_the_original(twin, X)
