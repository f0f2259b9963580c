"""Dispatchers and markers: accelerate, restore, filters and plans, and patches of others beside ours."""

from __future__ import annotations

import contextlib
import copy
import gc

import helpers
import pytest
import torch
from patched import MODELS, accelerate, classes_of, every_model, is_accelerated, output, snapshot
from torch import nn

import swinaccel
from swinaccel import patching


@every_model
def test_accelerate_returns_the_same_object(name):
    model = MODELS[name]()
    expected = output(model)
    assert accelerate(model) is model
    assert is_accelerated(model)
    helpers.assert_close(output(model), expected)


@every_model
def test_restore_leaves_nothing(name):
    model = MODELS[name]()
    before = snapshot(model)
    expected = output(model)
    accelerate(model)
    output(model)
    assert snapshot(model) != before
    assert swinaccel.restore(model) is model
    gc.collect()
    assert snapshot(model) == before
    assert not patching._installed
    assert torch.equal(output(model), expected)


def test_restore_of_a_model_never_accelerated_is_harmless():
    model = MODELS["timm"]()
    before = snapshot(model)
    swinaccel.restore(model)
    assert snapshot(model) == before


def test_restore_twice():
    model = accelerate(MODELS["timm"]())
    swinaccel.restore(swinaccel.restore(model))
    assert not is_accelerated(model)


def test_restore_of_a_part():
    model = accelerate(MODELS["timm"]())
    swinaccel.restore(model.layers[0])
    statuses = [entry.status for entry in swinaccel.report(model)]
    assert statuses == ["original", "original", "accelerated"]


def test_restoring_one_of_two_models_looks_for_no_copies(monkeypatch):
    """That takes a walk over all objects of the process."""
    model, other = accelerate(MODELS["timm"]()), accelerate(MODELS["timm"]())
    searched = []
    monkeypatch.setattr(patching, "_keys_of_copies", lambda keys: searched.append(keys) or set())
    swinaccel.restore(model)
    assert searched == [set()]
    assert is_accelerated(other)


def test_repeated_cycles_leave_nothing():
    model = MODELS["torchvision"]()
    before = snapshot(model)
    for _ in range(20):
        swinaccel.restore(accelerate(model))
    assert snapshot(model) == before


def test_accelerate_twice_is_once():
    model = accelerate(MODELS["timm"]())
    once = {kind: dict(vars(kind)) for kind in classes_of(model)}
    accelerate(model)
    assert {kind: dict(vars(kind)) for kind in classes_of(model)} == once
    assert is_accelerated(model)


def test_accelerate_again_takes_new_options_over():
    model = swinaccel.accelerate(MODELS["timm"](), backend="torch", strict=True)
    model.layers[0].blocks[0].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(swinaccel.FallbackError):
        output(model)
    accelerate(model, strict=False)
    output(model)


def test_other_models_of_the_class_are_untouched():
    model, other = MODELS["timm"](), MODELS["timm"]()
    accelerate(model)
    assert is_accelerated(model)
    assert swinaccel.report(other).accelerated == []
    assert torch.equal(output(other), output(MODELS["timm"]()))
    accelerate(other)
    swinaccel.restore(model)
    assert is_accelerated(other)
    assert not is_accelerated(model)
    swinaccel.restore(other)
    gc.collect()
    patching.unmark(())
    assert not patching._installed


def test_filter_chooses_modules():
    model = accelerate(MODELS["timm"](), filter=lambda name, module: name.startswith("layers.1"))
    report = swinaccel.report(model)
    assert [entry.name for entry in report.accelerated] == ["layers.1.blocks.0"]
    assert all("filter" in entry.reason for entry in report.original)
    planned = swinaccel.plan(model, filter=lambda name, module: False)
    assert [entry.reason for entry in planned] == ["the filter left it out"] * 3


@every_model
def test_a_new_filter_takes_back_what_it_leaves_out(name):
    model = MODELS[name]()
    before = snapshot(model)
    accelerate(model)
    count = len(swinaccel.report(model))
    first = swinaccel.report(model).entries[0].name
    accelerate(model, filter=lambda path, _: path == first)
    assert [entry.name for entry in swinaccel.report(model).accelerated] == [first]
    accelerate(model, filter=lambda *_: False)
    assert not swinaccel.report(model).accelerated
    gc.collect()
    patching.unmark(())
    assert snapshot(model) == before
    accelerate(model)
    assert len(swinaccel.report(model).accelerated) == count
    assert is_accelerated(model)


class Doubled(type(helpers.microsoft_block((8, 8)))):
    """A block that is not what it looks like, around attention that is."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_new_filter_takes_back_attention_in_a_block_that_it_leaves_out():
    """Where a block is refused its attention is accelerated by itself; the filter is asked of the block first."""
    model = MODELS["microsoft"]()
    model.blocks[0].__class__ = Doubled
    accelerate(model)
    chosen = [entry.name for entry in swinaccel.report(model).accelerated]
    assert chosen == ["blocks.0.attn", "blocks.1"]
    accelerate(model, filter=lambda name, _: name != "blocks.0")
    assert [entry.name for entry in swinaccel.report(model).accelerated] == ["blocks.1"]
    assert patching.marker(model.blocks[0].attn) is None


def test_a_block_gives_way_to_its_attention():
    """Accelerated as a whole, it is refused since; of its marker nothing stays."""
    model = accelerate(MODELS["microsoft"]())
    model.blocks[0].__class__ = Doubled
    accelerate(model)
    marked = [name for name, module in model.named_modules() if patching.marker(module) is not None]
    assert marked == ["blocks.0.attn", "blocks.1"]


def test_a_filter_for_a_part_leaves_the_rest_alone():
    model = accelerate(MODELS["timm"]())
    accelerate(model.layers[0], filter=lambda *_: False)
    assert [entry.name for entry in swinaccel.report(model).accelerated] == ["layers.1.blocks.0"]


def test_scope_with_a_filter_leaves_the_rest_original():
    model = accelerate(MODELS["timm"]())
    output(model)
    with swinaccel.accelerated(model, backend="torch", filter=lambda name, _: "layers.1" in name):
        assert [entry.name for entry in swinaccel.report(model).accelerated] == ["layers.1.blocks.0"]
    assert is_accelerated(model)


def test_plan_says_what_accelerate_does_next():
    model = accelerate(MODELS["timm"]())
    for choice in (lambda *_: False, lambda name, _: "layers.1" in name, None):
        planned = swinaccel.plan(model, filter=choice)
        accelerate(model, filter=choice)
        statuses = [(entry.name, entry.status) for entry in swinaccel.report(model)]
        assert [(entry.name, entry.status) for entry in planned] == statuses


def test_plan_where_swinaccel_is_disabled(monkeypatch):
    model = MODELS["timm"]()
    monkeypatch.setenv("SWINACCEL_DISABLE", "1")
    planned = swinaccel.plan(model, filter=lambda name, _: "layers.1" in name)
    assert not planned.accelerated
    assert [entry.reason for entry in planned][:2] == ["the filter left it out"] * 2
    assert planned.entries[2].reason == "SWINACCEL_DISABLE is set"
    assert not swinaccel.report(accelerate(model)).accelerated


def test_filter_is_given_module_and_name():
    model = MODELS["timm"]()
    seen = []
    accelerate(model, filter=lambda name, module: seen.append((name, module)) or True)
    assert seen == [(name, model.get_submodule(name)) for name, _ in seen]
    assert len(seen) == 3


def test_plan_changes_nothing():
    model = MODELS["timm"]()
    before = snapshot(model)
    parameters = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    assert len(swinaccel.plan(model).accelerated) == 3
    assert snapshot(model) == before
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, parameters[name]) for name, value in model.state_dict().items())


def test_accelerate_leaves_random_numbers_alone(monkeypatch):
    model, seeded = MODELS["timm"](), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    random = torch.random.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not seeded


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: torch.device("meta"),
        lambda: default_dtype(torch.bfloat16),
        lambda: torch.inference_mode(),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["device", "dtype", "inference", "autocast"],
)
@every_model
def test_accelerate_in_any_surroundings(name, surroundings):
    """A default device is that of the user's next tensors, not of the probe's."""
    model = MODELS[name]()
    with surroundings():
        accelerate(model)
    assert not swinaccel.report(model).original
    assert is_accelerated(model)


@pytest.mark.parametrize("wrong", [None, 3, "model", [nn.Linear(1, 1)], nn.Linear])
@pytest.mark.parametrize("name", ["accelerate", "restore", "plan", "report"])
def test_no_module_is_a_type_error(name, wrong):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got"):
        getattr(swinaccel, name)(wrong)


def test_strict_raises_where_there_is_nothing():
    with pytest.raises(swinaccel.FallbackError, match="holds no Swin-style window attention"):
        swinaccel.accelerate(nn.Linear(2, 2), strict=True)
    assert len(swinaccel.report(swinaccel.accelerate(nn.Linear(2, 2)))) == 0


def test_strict_raises_and_changes_nothing_where_one_module_is_refused():
    model = MODELS["timm"]()
    model.layers[1].blocks[0]._attn = lambda x: x
    before = snapshot(model)
    with pytest.raises(swinaccel.FallbackError, match=r"layers\.1\.blocks\.0"):
        accelerate(model, strict=True)
    assert snapshot(model) == before
    accelerate(model, strict=True, filter=lambda name, _: "layers.0" in name)


def test_strict_by_environment(monkeypatch):
    monkeypatch.setenv("SWINACCEL_STRICT", "1")
    with pytest.raises(swinaccel.FallbackError):
        swinaccel.accelerate(nn.Linear(2, 2))


def test_accelerate_again_takes_back_what_has_changed():
    model = accelerate(MODELS["microsoft"]())
    model.blocks[1].attn.scores = lambda q, k: q @ k.mT
    accelerate(model)
    assert [entry.name for entry in swinaccel.report(model).accelerated] == ["blocks.0"]
    assert patching.marker(model.blocks[1]) is None


# Foreign patches.


def test_patch_over_ours():
    """Someone patches an accelerated class: theirs keeps running, and once it is gone the undo is exact."""
    model = MODELS["microsoft"]()
    kind = type(model.blocks[0])
    pristine, expected = dict(vars(kind)), output(model)
    accelerate(model)
    ours, calls = kind.forward, []

    def theirs(self, x):
        calls.append(1)
        return ours(self, x)

    kind.forward = theirs
    try:
        helpers.assert_close(output(model), expected)
        with contextlib.suppress(Exception):  # whether it complains or waits is left open
            swinaccel.restore(model)
        assert torch.equal(output(model), expected)
        assert len(calls) == 4
        kind.forward = ours
        swinaccel.restore(model)
        gc.collect()
        swinaccel.restore(model)
        assert dict(vars(kind)) == pristine
    finally:
        patching._installed.clear()
        kind.forward = pristine["forward"]
        if patching.MARKER in vars(kind):
            delattr(kind, patching.MARKER)


def test_patch_below_ours_is_probed():
    """A class that someone changed is not the class that was surveyed; only the attention in it is."""
    model = MODELS["microsoft"]()
    kind = type(model.blocks[0])
    plain = kind.forward
    kind.forward = lambda self, x: plain(self, x) + 1
    try:
        assert [entry.name for entry in swinaccel.plan(model)] == ["blocks.0.attn", "blocks.1.attn"]
        expected = output(model)
        with swinaccel.accelerated(model, backend="torch"):
            helpers.assert_close(output(model), expected)
    finally:
        kind.forward = plain
    assert len(swinaccel.plan(model).accelerated) == 2


def test_wrapped_method_is_left_alone():
    import wrapt

    model = MODELS["microsoft"]()
    kind = type(model.blocks[0])
    handle = wrapt.wrap_function_wrapper(kind, "forward", lambda wrapped, self, args, kwargs: wrapped(*args, **kwargs))
    try:
        report = swinaccel.plan(model)
        assert report.accelerated == []
        assert all("wrapped by someone else" in entry.reason for entry in report)
    finally:
        wrapt.unwrap_object(kind, "forward", handle)
