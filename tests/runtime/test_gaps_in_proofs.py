"""What deliberate faults in proofs, fingerprints and families once went unnoticed in; see mutants.py."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
import types

import helpers
import microsoft_models
import pytest
import test_timm_cr
import torch
import torch.nn.functional as F
from helpers import TRITON_DEVICE
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn
from verdicts import X, assert_like_the_original, block_of, statuses

import swinaccel
from swinaccel import patching
from swinaccel.backends.torch.softmax import clamp_finite
from swinaccel.families.shared.blocks import strange_mask, undivided
from swinaccel.families.shared.common import position_bias
from swinaccel.families.shared.official import attention_projections, attention_section, flash_reason
from swinaccel.families.timm import Timm
from swinaccel.spec.window import Geometry
from swinaccel.trust import names
from swinaccel.trust.fingerprint import Untraceable, fingerprint
from swinaccel.trust.registry import registry

GAIN, LOCAL = 1.0, threading.local()
LOCAL.gain = 1.0


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


class Gated(microsoft_models.WindowAttention):
    """By a tensor that is neither parameter nor buffer."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gate = torch.ones(())

    def forward(self, x, mask=None):
        return super().forward(x, mask) * self.gate


@pytest.mark.parametrize("kind", [InHalf, InAutocast, InSingle, Frozen, Gated], ids=lambda kind: kind.__name__)
def test_what_is_not_the_official_attention_is_refused(kind):
    (entry,) = swinaccel.plan(helpers.randomize(kind(16, (4, 4), 2)))
    assert entry.status == "original"


class Computed(microsoft_models.WindowAttention):
    """Has its table from another parameter."""

    def __init__(self, *args):
        super().__init__(*args)
        self.half_table = nn.Parameter(torch.zeros_like(self.relative_position_bias_table))
        del self.relative_position_bias_table

    @property
    def relative_position_bias_table(self):
        return 2 * self.half_table


def test_a_table_that_is_computed_is_followed():
    model = block_of(Computed)
    assert "computed anew at each call" in swinaccel.plan(model).entries[0].reason
    swinaccel.accelerate(model, backend="torch")
    for _ in range(2):
        assert_like_the_original(model, X)
        with torch.no_grad():
            model.attn.half_table.add_(1.0)


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


def adapted_block(size):
    block = helpers.timm_block((size, size), shift=2)
    block.attn.qkv = Adapted(16, 48)
    return helpers.randomize(block)


def test_images_that_are_all_padded_prove_nothing_of_wrapped_projections():
    """The attention by itself, of windows that are padded by then, is another matter."""
    (entry,) = swinaccel.plan(adapted_block(7))
    assert (entry.name, entry.family) == ("attn", "window_attention")


def test_padded_images_of_wrapped_projections_are_the_originals():
    model = swinaccel.accelerate(adapted_block(8).to(TRITON_DEVICE), backend="triton")
    for size in (8, 7):
        assert_like_the_original(model, torch.randn(1, size, size, 16).to(TRITON_DEVICE))
    assert "padded" in swinaccel.report(model).entries[0].reason


class Flagged(SwinTransformerBlock):
    flag = False

    def _attn(self, x):
        out = super()._attn(x)
        return 2 * out if self.flag else out


def test_a_block_that_changes_around_its_attention():
    model, x = helpers.timm_block((8, 8), shift=2), X.view(2, 8, 8, 16)
    model.__class__ = Flagged
    swinaccel.accelerate(model, backend="torch")
    for _ in range(2):
        assert_like_the_original(model, x)
    helpers.assert_accelerated(model)
    model.flag = True
    for _ in range(2):
        assert_like_the_original(model, x)


def test_gradients_are_compared_whatever_surrounds_a_proof():
    with torch.inference_mode():
        (entry,) = swinaccel.plan(helpers.randomize(Frozen(16, (4, 4), 2)))
    assert "gradient" in entry.reason


def test_memory_that_runs_out_in_a_probe_is_no_verdict(monkeypatch):
    model = block_of(microsoft_models.WindowAttention)

    def full(*args):
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr("swinaccel.trust.copies.random_copy", full)
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


def doubled(function):
    @functools.wraps(function)
    def wrapped(*args):
        return 2 * function(*args)

    return wrapped


class Module(nn.Module):
    by_string = by_class = by_wrapped = by_cached = 1.0

    def __init__(self):
        super().__init__()
        self.function = functools.partial(F.gelu, approximate="none")

    def forward(self, x):
        gains = [GAIN * one for one in (1.0,)]
        x = scaled(self.function(x)) * gains[0] * getattr(self, "by_string")  # noqa: B009
        return x * self.of_all() * self.of_class() * self.wrapped() * self.once * self.level

    @staticmethod
    def of_all():
        return 1.0

    @classmethod
    def of_class(cls):
        return cls.by_class

    @doubled
    def wrapped(self):
        return self.by_wrapped

    @property
    def level(self):
        return 1.0

    @functools.cached_property
    def once(self):
        return self.by_cached


CHANGES = {
    "what an inner function reads": lambda module, patch: patch.setitem(globals(), "GAIN", 3.0),
    "what a string names": lambda module, patch: patch.setattr(Module, "by_string", 3.0),
    "what a class method names": lambda module, patch: patch.setattr(Module, "by_class", 3.0),
    "what a wrapped method names": lambda module, patch: patch.setattr(Module, "by_wrapped", 3.0),
    "a default": lambda module, patch: patch.setattr(scaled, "__defaults__", (3.0,)),
    "an argument of a partial": lambda module, patch: setattr(
        module, "function", functools.partial(F.gelu, approximate="tanh")
    ),
    "a static method": lambda module, patch: patch.setattr(Module, "of_all", staticmethod(lambda: 3.0)),
    "a property": lambda module, patch: patch.setattr(Module, "level", property(lambda self: 3.0)),
    "a cached property": lambda module, patch: patch.setattr(
        Module, "once", functools.cached_property(lambda self: 3.0)
    ),
    "what a cached property names": lambda module, patch: patch.setattr(Module, "by_cached", 3.0),
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


class Local(nn.Module):
    def forward(self, x):
        return x * LOCAL.gain


def test_what_every_thread_has_of_its_own_cannot_be_followed():
    with pytest.raises(Untraceable, match="in every thread"):
        fingerprint([("", Local())])


def test_a_function_that_a_decorator_wrapped_again_is_the_one_it_wrapped_first():
    """As transformers does with a forward that a subclass inherits."""
    once = doubled(scaled)
    assert names.unwrapped(doubled(once)) is once
    assert names.unwrapped(once) is once


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


def test_coordinates_of_a_larger_window():
    block = test_timm_cr.block((8, 8), shift=2)
    attn = swinaccel.accelerate(block, backend="torch").attn
    attn.relative_coordinates_log = torch.cat([attn.relative_coordinates_log] * 2)
    with torch.no_grad(), pytest.raises(RuntimeError):
        block(torch.randn(2, 8, 8, 16))


def test_timm_drops_in_the_mode_of_its_attention():
    model = helpers.timm_block((8, 8), shift=2)
    model.attn.fused_attn, model.attn.attn_drop.p = True, 0.5
    for inner, outer in ((True, False), (False, True)):
        model.attn.train(outer)
        model.attn.attn_drop.train(inner)
        assert Timm().section(model, X.view(2, 8, 8, 16)).dropout == 0.5 * outer


def test_facts_that_families_share():
    mlp, coords = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)), torch.randn(1, 3, 3, 2)
    assert position_bias(mlp, coords, 2)["position"] is not None
    mlp[1] = nn.GELU()
    assert position_bias(mlp, coords, 2)["position"] is None
    drop = nn.Dropout(0.5)
    assert flash_reason(types.SimpleNamespace(use_flash_attention=True, attn_drop=drop)) is not None
    assert flash_reason(types.SimpleNamespace(use_flash_attention=False, attn_drop=drop)) is None
    assert undivided(Geometry((7, 8), (4, 4))) is not None
    assert undivided(Geometry((8, 8), (4, 4))) is None
    x = torch.randn(4, 16, 8)
    assert strange_mask(torch.randn(2, 16, 16), x) is None
    assert strange_mask(torch.randn(1, 2, 16, 16), x) is not None
    numbers = clamp_finite(torch.tensor([-1e300, 1e300, float("-inf")], dtype=torch.float64), torch.float32)
    assert (2 * numbers[:2]).isfinite().all()
    assert numbers[2] == float("-inf")


def test_biases_of_timms_second_version():
    attn = helpers.timm_block((8, 8), v2=True, qkv_bias=False).attn
    assert attention_projections(attn) == (attn.qkv, attn.proj)
    attn = helpers.timm_block((8, 8), v2=True).attn
    assert attention_projections(attn) == (attn.proj,)
    attn.qkv_bias_separate, attn.qkv.bias = True, nn.Parameter(torch.randn(48))
    padding = attention_section(attn, Geometry((7, 8), (4, 4))).padding()
    torch.testing.assert_close(padding, attn.qkv.bias + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)))
    attn = helpers.timm_block((8, 8)).attn
    attn.scale = torch.tensor(0.5)
    assert attention_section(attn, Geometry((8, 8), (4, 4))) == "its scale is no number"
