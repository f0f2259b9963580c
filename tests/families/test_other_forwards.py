"""A signature is no proof: modules whose forward, methods or parts are others than their family's."""

from __future__ import annotations

import copy

import helpers
import microsoft_models
import pytest
import torch
from helpers import BACKENDS, check, randomize
from torch import nn
from whole_models import IMAGES

import swinaccel

KEEPS_VERDICTS = True


class Doubled(microsoft_models.SwinTransformerBlock):
    def forward(self, x):
        return 2 * super().forward(x)


class WithoutProjection(microsoft_models.WindowAttention):
    """As in a published accelerator: it has a projection and forgets to call it."""

    def forward(self, x, mask=None):
        q, k, v = self.packed(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return (self.scores(q, k).softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_subclass_with_another_forward_is_refused():
    """The block, that is: its attention is the official one, and is accelerated by itself."""
    model = randomize(Doubled(16, (8, 8), 2, 4, 0))
    (entry,) = swinaccel.plan(model)
    assert (entry.name, entry.family, entry.status) == ("attn", "window_attention", "accelerated")
    check(model, torch.randn(2, 64, 16), count=1)


def test_subclass_with_another_forward_and_attention_is_refused():
    model = randomize(Doubled(16, (8, 8), 2, 4, 2))
    model.attn.__class__ = WithoutProjection
    x = torch.randn(2, 64, 16)
    expected = model(x)
    (entry,) = swinaccel.report(swinaccel.accelerate(model))
    assert (entry.name, entry.status) == ("", "original")
    assert "its forward is not that of microsoft" in entry.reason
    assert torch.equal(model(x), expected)


def test_attention_with_another_forward_is_refused():
    model = helpers.microsoft_block((8, 8), shift=2)
    attention = WithoutProjection(16, (4, 4), 2)
    attention.load_state_dict(model.attn.state_dict())
    model.attn = attention
    (entry,) = swinaccel.plan(model)
    assert entry.status == "original"
    assert "its forward is not that of microsoft" in entry.reason


def test_subclass_of_a_library_attention_is_refused():
    from timm.models.swin_transformer import WindowAttention

    class Twice(WindowAttention):
        def forward(self, x, mask=None):
            return 2 * super().forward(x, mask)

    model = helpers.timm_block((8, 8), shift=2)
    model.attn.__class__ = Twice
    (entry,) = swinaccel.plan(model)
    assert entry.status == "original"
    assert "its forward is not that of timm" in entry.reason


def test_verdict_on_one_class_does_not_cover_another():
    """The refusal of a subclass leaves its parent accelerated, and the other way round."""
    good, bad = helpers.microsoft_block((8, 8), shift=2), randomize(Doubled(16, (8, 8), 2, 4, 2))
    bad.attn.__class__ = WithoutProjection
    statuses = [entry.status for entry in swinaccel.plan(nn.Sequential(good, bad, copy.deepcopy(good)))]
    assert statuses == ["accelerated", "original", "accelerated"]


def test_verdict_on_a_broken_instance_does_not_cover_others():
    """A layer that its own forward left broken (transformers' does, on a small image) is refused alone."""
    broken, healthy = helpers.huggingface_layer("Swin"), helpers.huggingface_layer("Swin")
    with pytest.raises(RuntimeError):
        broken(torch.randn(1, 9, 16), (3, 3))
    swinaccel.plan(broken)
    (entry,) = swinaccel.plan(healthy)
    assert (entry.status, entry.reason) == ("accelerated", None)


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_verdict_on_windows_of_one_token_does_not_cover_others(v2):
    """Windows of one token give NaN in torchvision's V2, in any reading of it."""
    swinaccel.plan(helpers.torchvision_attention(window=(1, 1), v2=v2))
    (entry,) = swinaccel.plan(helpers.torchvision_attention(v2=v2))
    assert (entry.status, entry.reason) == ("accelerated", None)


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (lambda: helpers.microsoft_block((8, 8), shift=2), "forward"),
        (lambda: helpers.torchvision_attention(shift=(2, 2)), "forward"),
        (lambda: helpers.timm_block((8, 8), shift=2), "_attn"),
    ],
    ids=["microsoft", "torchvision", "timm"],
)
def test_method_replaced_on_the_instance_is_refused(make, method):
    model = make()
    setattr(model, method, lambda x: x + 1)
    (entry,) = swinaccel.report(swinaccel.accelerate(model))
    assert entry.status == "original"
    assert f"{method} was replaced on this instance" in entry.reason


def test_timm_forward_replaced_on_the_instance_runs():
    """Where less than forward is replaced, a user's own forward stays in charge."""
    model = helpers.timm_block((8, 8), shift=2)
    plain = type(model).forward
    model.forward = lambda x: 3 * plain(model, x)
    x = torch.randn(1, 8, 8, 16)
    with torch.no_grad():
        expected = model(x)
        swinaccel.accelerate(model, backend="torch")
        helpers.assert_close(model(x), expected)


def test_inner_forward_replaced_on_the_instance_is_honoured():
    """attn.forward set by hand: a probe of the copy may or may not see it; the output must be the original's."""
    model = helpers.microsoft_block((8, 8), shift=2)
    plain = type(model.attn).forward
    model.attn.forward = lambda x, mask=None: 3 * plain(model.attn, x, mask)
    x = torch.randn(1, 64, 16)
    with torch.no_grad():
        expected = model(x)
        swinaccel.accelerate(model, backend="torch")
        helpers.assert_close(model(x), expected)


def test_two_families_in_one_model():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = helpers.timm_v1(), helpers.torchvision_model()

        def forward(self, x):
            return self.first(x[:, :, :56, :56]), self.second(x)

    check(Both().eval(), IMAGES, count=7)


def test_foreign_modules_do_not_break_recognition():
    """Modules may answer any attribute read with anything, or raise."""

    class Strange(nn.Module):
        def __getattr__(self, name):
            return super().__getattr__(name) if name.startswith("_") else 7

    class Angry(nn.Module):
        @property
        def attn(self):
            raise RuntimeError("not now")

        attention = window_size = attn

    for module in (Strange(), Angry(), nn.Module()):
        assert swinaccel.plan(nn.Sequential(module)).accelerated == []


class Tempered(nn.Module):
    def __init__(self, temperature):
        super().__init__()
        self.temperature = (temperature,)

    def forward(self, scores):
        return (scores / self.temperature[0]).softmax(-1)


@pytest.mark.parametrize(
    ("good", "bad"), [(nn.Softmax(-1), nn.Softmax(-2)), (Tempered(1.0), Tempered(2.0))], ids=["dim", "temperature"]
)
def test_verdict_on_one_softmax_does_not_cover_another(good, bad):
    model, other = (helpers.timm_block((8, 8), shift=2) for _ in range(2))
    for one, softmax in ((model, good), (other, bad)):
        one.attn.softmax, one.attn.fused_attn = softmax, False
    assert [entry.status for entry in swinaccel.plan(nn.Sequential(model, other))] == ["accelerated", "original"]


@pytest.mark.parametrize("name", ["forward", "bias"])
def test_verdict_does_not_outlive_a_patch_of_the_class(name, monkeypatch):
    """Of the attention's class, which the replaced method of the block calls."""
    model = helpers.microsoft_block((8, 8), shift=2)
    assert swinaccel.plan(model).accelerated
    plain = vars(microsoft_models.WindowAttention)[name]
    with monkeypatch.context() as patch:
        patch.setattr(
            microsoft_models.WindowAttention, name, lambda self, *args, **kwargs: 2 * plain(self, *args, **kwargs)
        )
        assert not swinaccel.plan(model).accelerated
    assert swinaccel.plan(model).accelerated


def test_verdict_does_not_outlive_a_patch_of_a_function(monkeypatch):
    from torchvision.models import swin_transformer as library

    model, plain = helpers.torchvision_attention(shift=(2, 2)), library.shifted_window_attention
    assert swinaccel.plan(model).accelerated
    monkeypatch.setattr(library, "shifted_window_attention", lambda *args, **kwargs: 2 * plain(*args, **kwargs))
    assert not swinaccel.plan(model).accelerated


def test_helper_replaced_on_the_instance_is_refused():
    model, other = (helpers.torchvision_attention(shift=(2, 2)) for _ in range(2))
    plain = other.get_relative_position_bias
    other.get_relative_position_bias = lambda: 2 * plain()
    assert [entry.status for entry in swinaccel.plan(nn.Sequential(model, other))] == ["accelerated", "original"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_parametrized_table_is_read_at_each_call(backend):
    class Doubled(nn.Module):
        def forward(self, table):
            return 2 * table

    device = helpers.DEVICES[backend]
    model = helpers.microsoft_block((8, 8), shift=2).to(device)
    nn.utils.parametrize.register_parametrization(model.attn, "relative_position_bias_table", Doubled())
    twin = swinaccel.accelerate(copy.deepcopy(model), backend=backend)
    x = torch.randn(1, 64, 16, device=device)
    for sign in (1, 1, 1, -1):
        with torch.no_grad():
            for one in (model, twin):
                one.attn.parametrizations.relative_position_bias_table.original.mul_(sign)
            helpers.assert_close(twin(x), model(x))


def test_a_scale_that_becomes_a_tensor():
    model = helpers.microsoft_block((8, 8), shift=2)
    swinaccel.accelerate(model, backend="torch")
    model.attn.scale = torch.tensor(model.attn.scale)
    model(torch.randn(1, 64, 16))
    assert "changed after accelerate()" in helpers.reasons(model)[0]
    swinaccel.accelerate(model, backend="torch")
    assert [entry.reason for entry in swinaccel.report(model)] == ["its scale is no number"]
