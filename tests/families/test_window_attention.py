"""The official attention by itself, where its block is nobody's; one attention, one entry."""

from __future__ import annotations

import copy

import descendant_models as models
import helpers
import microsoft_models
import pytest
import torch
from descendants import KINDS, attention, family, tokens
from helpers import both_backends, check, randomize
from torch import nn

import swinaccel
from swinaccel import families

KEEPS_VERDICTS = True
kinds = pytest.mark.parametrize("kind", KINDS)


@both_backends
@kinds
@pytest.mark.parametrize("window", [(4, 4), (3, 5)], ids=str)
def test_attention_without_a_mask(window, kind, backend):
    model, n = attention(kind, window), window[0] * window[1]
    assert family(model) == ["window_attention"]
    check(model, torch.randn(6, n, 16), backend=backend, count=1)


@both_backends
@kinds
def test_attention_with_any_mask(kind, backend):
    """Window i of a batch has row i mod M of the mask."""
    model, mask = attention(kind), torch.randn(3, 16, 16)
    x = torch.randn(2, 1, 16, 16).expand(2, 3, 16, 16).flatten(0, 1).clone()
    found = check(model, x, mask, backend=backend)
    assert helpers.difference(found[1], found[0]) > 1e-3
    assert not torch.equal(found[3], found[0])
    check(model, x, backend=backend, arguments={"mask": mask.to(helpers.DEVICES[backend])})
    check(model, x, torch.zeros(3, 16, 16), backend=backend)


def test_attention_takes_keywords():
    model, x = attention(), torch.randn(6, 16, 16)
    check(model, arguments={"x": x, "mask": None})


@pytest.mark.parametrize("shape", [(6, 9, 16), (6, 16, 16, 1)], ids=str)
def test_attention_over_other_than_whole_windows_runs_the_original(shape):
    twin = swinaccel.accelerate(attention(), backend="torch")
    with pytest.raises((RuntimeError, ValueError, IndexError)), torch.no_grad():
        twin(torch.randn(shape))
    assert "is not of windows" in swinaccel.report(twin).accelerated[0].reason


def test_attention_with_a_mask_that_does_not_divide_raises_as_before():
    twin = swinaccel.accelerate(attention(), backend="torch")
    with pytest.raises(RuntimeError), torch.no_grad():
        twin(torch.randn(5, 16, 16), torch.zeros(3, 16, 16))
    assert "do not divide" in swinaccel.report(twin).accelerated[0].reason


def test_attention_wrong_arguments_are_the_originals_error():
    twin = swinaccel.accelerate(attention(), backend="torch")
    with pytest.raises(TypeError):
        twin(torch.randn(6, 16, 16), None, 3)


@both_backends
@kinds
@pytest.mark.parametrize("shift", [0, 2])
def test_unknown_block_is_accelerated_at_its_attention(shift, kind, backend):
    model = randomize(models.UnknownBlock(16, 2, 4, shift, kind=KINDS[kind]))
    assert [(entry.name, entry.family) for entry in swinaccel.plan(model)] == [("attn", "window_attention")]
    x = torch.randn(2, 16, 8, 8)
    if shift and backend == "torch":
        _, found, expected = helpers.both(model, x)
        helpers.assert_close(found, expected)
    else:
        check(model, x, backend=backend, count=1)


class Unmasked(microsoft_models.WindowAttention):
    """The official one in all but a mask, which it counts twice."""

    def forward(self, x, mask=None):
        return super().forward(x, None if mask is None else 2 * mask)


class Elsewhere(microsoft_models.WindowAttention):
    """The official one with a mask, and something else without."""

    def forward(self, x, mask=None):
        return super().forward(x, mask) if mask is not None else 2 * super().forward(x)


class Told(microsoft_models.WindowAttention):
    """A third argument, which is always given, and of which the probe would know nothing."""

    def forward(self, x, mask, gain):
        return gain * super().forward(x, mask)


@pytest.mark.parametrize("kind", [Unmasked, Elsewhere])
def test_trap_41_attention_with_another_branch_is_refused(kind):
    """Every branch that a call may take is probed."""
    (entry,) = swinaccel.plan(randomize(kind(16, (4, 4), 2)))
    assert entry.status == "original"
    assert "its forward is not that of window_attention" in entry.reason


def test_trap_41_attention_with_further_arguments_is_not_recognised():
    (entry,) = swinaccel.plan(randomize(Told(16, (4, 4), 2)))
    assert (entry.family, entry.status) == ("unknown", "original")


class Placed(microsoft_models.WindowAttention):
    """A third argument that need not be given."""

    def forward(self, x, mask=None, pos_embed=None):
        out = super().forward(x, mask)
        return out if pos_embed is None else out + pos_embed


@both_backends
def test_arguments_that_need_not_be_given(backend):
    """The section where they are not; where they are, by whatever way, the original."""
    model = randomize(Placed(16, (4, 4), 2))
    twin = swinaccel.accelerate(copy.deepcopy(model), backend=backend)
    x, mask, place = torch.randn(6, 16, 16), -100.0 * (torch.rand(3, 16, 16) < 0.3), torch.randn(16)
    calls = (
        lambda one: one(x, mask),
        lambda one: one(x, mask=mask, pos_embed=None),
        lambda one: one(x, None, None),
        lambda one: one(x, mask, place),
        lambda one: one(x, pos_embed=place),
    )
    for count, call in enumerate(calls):
        with torch.no_grad():
            helpers.assert_close(call(twin), call(model))
        (entry,) = swinaccel.report(twin)
        assert entry.fallbacks == max(0, count - 2), count
    assert "pos_embed" in entry.reason


class Insistent(microsoft_models.WindowAttention):
    """MONAI's wants its mask named, if only as None."""

    def forward(self, x, mask):
        return super().forward(x, mask)


def test_attention_whose_mask_has_no_default():
    model = randomize(Insistent(16, (4, 4), 2))
    assert family(model) == ["window_attention"]
    check(model, torch.randn(6, 16, 16), None)


def test_trap_38_monais_flash_path_leaves_dropout_out():
    """It is taken where no gradients are recorded, in training too: whether it drops is for the original to know."""
    model = attention(attn_drop=0.5).train()
    model.use_flash_attention = True
    with torch.no_grad():
        reason = families.match(model)[0].section(model, torch.randn(6, 16, 16))
    assert "flash path" in reason


class Doubled(models.SwinIRBlock):
    """SwinIR's but at other sizes."""

    def forward(self, x, x_size):
        x = super().forward(x, x_size)
        return x if x_size == self.input_resolution else 2 * x


def test_trap_41_block_with_another_branch_is_accelerated_at_its_attention():
    model = randomize(Doubled(16, (8, 8), 2, 4, 0, 2))
    (entry,) = swinaccel.plan(model)
    assert (entry.name, entry.family) == ("attn", "window_attention")
    for size in ((8, 8), (8, 12)):
        check(model, tokens(*size), size, count=1)


# One attention, one entry: a block's, or its own.


def test_filter_leaves_a_block_alone_and_all_that_is_in_it():
    model = nn.Sequential(helpers.microsoft_block((8, 8)), randomize(Doubled(16, (8, 8), 2, 4, 0, 2)))
    report = swinaccel.plan(model, filter=lambda name, module: name not in ("0", "1"))
    assert [(entry.name, entry.status) for entry in report] == [("0", "original"), ("1", "original")]
    report = swinaccel.plan(model, filter=lambda name, module: name != "1.attn")
    assert [(entry.name, entry.status) for entry in report] == [("0", "accelerated"), ("1", "original")]


def test_restore_takes_an_inner_attention_back():
    model = randomize(Doubled(16, (8, 8), 2, 4, 0, 2))
    before = vars(type(model.attn)).copy()
    swinaccel.restore(swinaccel.accelerate(model))
    assert vars(type(model.attn)).keys() == before.keys()
    assert [entry.status for entry in swinaccel.report(model)] == ["original"]


def test_strict_is_content_with_the_attention_of_an_unknown_block():
    swinaccel.accelerate(randomize(Doubled(16, (8, 8), 2, 4, 0, 2)), strict=True)
