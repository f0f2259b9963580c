"""Whole models of every kind, accelerated in place, and what looks like them and must be left alone."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch
import zoo

import swinaccel


def made(entry):
    """The entry's model, small and with random parameters, and the arguments of its call."""
    torch.manual_seed(0)
    try:
        model, args, kwargs = entry.make(False, 1)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    return helpers.randomize(model), args, kwargs


def finite(output):
    """Tensors of an output, what detection masks out with infinities or drops left out."""
    return [torch.nan_to_num(t, 0.0, 0.0, 0.0) for t in helpers.tensors(output) if t.is_floating_point()]


@pytest.mark.parametrize("entry", zoo.ENTRIES, ids=lambda entry: entry.name)
def test_model_is_accelerated_in_place(entry):
    model, args, kwargs = made(entry)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    with torch.no_grad():
        expected, found = finite(model(*args, **kwargs)), finite(twin(*args, **kwargs))
    report = swinaccel.report(twin)
    assert report.accelerated, str(report)
    assert not report.original, str(report)
    assert all(line.calls for line in report), str(report)
    assert not any(line.fallbacks for line in report), str(report)
    helpers.assert_close(found, expected, entry.tolerance)
    swinaccel.restore(twin)
    assert not swinaccel.report(twin).accelerated


@pytest.mark.parametrize("entry", zoo.NEAR_MISSES, ids=lambda entry: entry.name)
def test_near_miss_is_left_alone(entry):
    model, args, kwargs = made(entry)
    with torch.no_grad():
        expected = helpers.tensors(model(*args, **kwargs))
        swinaccel.accelerate(model)
        found = helpers.tensors(model(*args, **kwargs))
    assert not swinaccel.report(model).accelerated
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
