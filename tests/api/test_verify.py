"""What `verify` compares where numbers are not finite, and that its verdict is its truth."""

from __future__ import annotations

import helpers
import pytest
import torch
from torch import nn

import swinaccel
from swinaccel.backends.torch import window as torch_backend

X = torch.randn(2, 8, 8, 16, generator=torch.Generator().manual_seed(3))
INF, NAN = float("inf"), float("nan")


class Padded(nn.Module):
    """A block whose output has constants beside it, as the logits of classes that are not asked for."""

    def __init__(self, *constants):
        super().__init__()
        self.block, self.constants = helpers.timm_block((8, 8), shift=2), constants

    def forward(self, x):
        out = self.block(x).flatten(1)
        return torch.cat((out, out.new_tensor(self.constants).expand(len(out), -1)), 1)


class Nothing(nn.Module):
    def forward(self, x):
        return x[:, :0]


def verify(model, x=X):
    return swinaccel.verify(model, x, backend="torch")


def change(monkeypatch, edit):
    """The section's output goes through `edit`; the original's does not."""
    real = torch_backend.shifted_window_attention
    monkeypatch.setattr(torch_backend, "shifted_window_attention", lambda *args, **kwargs: edit(real(*args, **kwargs)))


def put(value):
    def edit(out):
        out = out.clone()
        out.view(-1)[0] = value
        return out

    return edit


@pytest.mark.parametrize("constants", [(0.0,), (-INF,), (INF,), (NAN,), (INF, -INF, NAN)], ids=str)
def test_constants_that_are_not_finite_hide_no_error(monkeypatch, constants):
    right = verify(Padded(*constants))
    assert right.passed, str(right)
    assert 0 < right.max_error < 1e-5
    change(monkeypatch, lambda out: 3 * out + 1)
    wrong = verify(Padded(*constants))
    assert not wrong.passed
    assert wrong.max_error > 1e-2


@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=str)
@pytest.mark.parametrize("constants", [(), (NAN,)], ids=["finite", "not"])
def test_numbers_that_only_the_original_gives(monkeypatch, value, constants):
    change(monkeypatch, put(value))
    result = verify(Padded(*constants))
    assert not result.passed
    assert result.max_error == INF


@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=str)
def test_the_originals_infinities_are_wanted(value):
    """Of the same sign, and NaN where it has NaN."""

    class Original(nn.Module):
        def __init__(self, accelerated):
            super().__init__()
            self.block, self.accelerated = helpers.timm_block((8, 8), shift=2), accelerated

        def forward(self, x):
            before = swinaccel.report(self.block).entries[0].calls
            out = self.block(x)
            ran = swinaccel.report(self.block).entries[0].calls > before
            return put(self.accelerated if ran else value)(out)

    assert verify(Original(value)).passed
    for other in (0.0, INF, -INF, NAN):
        if str(other) != str(value):
            assert not verify(Original(other)).passed, other


def test_nothing_compared_is_no_pass():
    assert not verify(helpers.timm_block((8, 8)), torch.full_like(X, NAN)).passed
    assert not verify(nn.Sequential(helpers.timm_block((8, 8)), nn.Flatten(), Nothing())).passed


def test_truth_is_passed():
    assert bool(verify(Padded())) is True
    assert bool(swinaccel.verify(Padded(), X, filter=lambda *_: False)) is False
