"""Dispatchers and markers through everything that is done to a model in its life."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import gc
import io
import json
import pickle
import subprocess
import sys
import threading

import helpers
import pytest
import torch
from helpers import randomize
from torch import nn

import swinaccel
from swinaccel import patching
from swinaccel.runtime import call, traced
from swinaccel.trust.registry import registry

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))

# name: (model, input); all of one input, small enough to compile.
MODELS = {
    "timm": lambda: helpers.timm_v1(img_size=32, window=4),
    "timm-v2": lambda: helpers.timm_v2(img_size=32, window=4),
    "torchvision": lambda: helpers.torchvision_model(),
    "hf-swin": lambda: helpers.huggingface("Swin", "ForImageClassification"),
    "hf-swinv2": lambda: helpers.huggingface("Swinv2", "ForImageClassification"),
    "microsoft": lambda: Microsoft(),
}


class Microsoft(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(*(helpers.microsoft_block((8, 8), shift=shift) for shift in (0, 2)))
        randomize(self)

    def forward(self, x):
        return self.blocks(self.embed(x).flatten(2).transpose(1, 2))


every_model = pytest.mark.parametrize("name", MODELS)


def output(model, x=X):
    with torch.no_grad():
        return helpers.tensors(model(x))[0]


def accelerate(model, **options):
    return swinaccel.accelerate(model, backend="torch", **options)


def classes_of(model):
    return {kind for module in model.modules() for kind in type(module).__mro__}


def snapshot(model):
    """Everything that is not to change: dictionaries of classes and instances."""
    return {kind: dict(vars(kind)) for kind in classes_of(model)}, {
        name: set(vars(module)) for name, module in model.named_modules()
    }


def is_accelerated(model, x=X):
    """Whether a call runs the section; counted calls are proof, the marker alone is none."""
    before = sum(entry.calls - entry.fallbacks for entry in swinaccel.report(model))
    output(model, x)
    entries = list(swinaccel.report(model))
    return sum(entry.calls - entry.fallbacks for entry in entries) == before + len(entries) > before


# accelerate and restore.


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


# Scopes.


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


# Copies and files.


@every_model
def test_deepcopy_is_accelerated_with_its_own_weights(name):
    model = accelerate(MODELS[name]())
    twin = copy.deepcopy(model)
    randomize(twin, seed=5)
    fresh = randomize(MODELS[name](), seed=5)
    assert is_accelerated(twin)
    helpers.assert_close(output(twin), output(fresh))
    swinaccel.restore(twin)
    assert not is_accelerated(twin)
    assert is_accelerated(model)


def test_copies_keep_the_dispatcher_when_the_first_is_restored():
    model = accelerate(MODELS["timm"]())
    twin = copy.deepcopy(model)
    swinaccel.restore(model)
    assert is_accelerated(twin)


def test_shallow_copy():
    model = accelerate(MODELS["microsoft"]())
    block = copy.copy(model.blocks[1])
    block.attn = randomize(copy.deepcopy(block.attn), 7)
    x = torch.randn(1, 64, 16)
    with torch.no_grad():
        found = block(x)
        with swinaccel.disabled():
            helpers.assert_close(found, block(x))


def test_moving_average():
    model = accelerate(MODELS["timm"]())
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    output(average)
    average.update_parameters(model)
    randomize(model, 3)
    average.update_parameters(model)
    assert is_accelerated(average)
    found = output(average)
    with swinaccel.disabled():
        helpers.assert_close(found, output(average))


@every_model
def test_state_dict_is_the_originals(name):
    model = MODELS[name]()
    before = model.state_dict()
    after = accelerate(model).state_dict()
    assert list(after) == list(before)
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in MODELS[name]().named_parameters()]
    assert [key for key, _ in model.named_buffers()] == [key for key, _ in MODELS[name]().named_buffers()]


@every_model
def test_load_state_dict(name):
    model, other = accelerate(MODELS[name]()), randomize(MODELS[name](), 9)
    output(model)
    model.load_state_dict(other.state_dict())
    helpers.assert_close(output(model), output(other))
    assert is_accelerated(model)


@pytest.mark.parametrize("name", ["timm", "hf-swinv2", "microsoft"])
def test_pickle(name):
    model = accelerate(MODELS[name]())
    twin = pickle.loads(pickle.dumps(model))
    assert is_accelerated(twin)
    assert torch.equal(output(twin), output(model))


@every_model
def test_save_and_load(name):
    model = accelerate(MODELS[name]())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert is_accelerated(twin)
    assert torch.equal(output(twin), output(model))


def test_marker_of_another_process_with_options_not_seen_here():
    model, other = accelerate(MODELS["timm"]()), MODELS["timm"]()
    for module, copied in zip(model.modules(), other.modules(), strict=True):
        if (text := patching.marker(module)) is not None:
            content = json.loads(text)
            content["options"]["bias_energy"] = 0.123
            copied.__dict__[patching.MARKER] = json.dumps(content, sort_keys=True)
    output(other)  # before anything else looks at it
    assert [entry.calls - entry.fallbacks for entry in swinaccel.report(other)] == [1, 1, 1]


def test_loading_where_nothing_was_proven(monkeypatch):
    """As in a spawned process: a loaded model runs its originals and says so, until accelerate() is called."""
    model = MODELS["microsoft"]()
    expected = output(model)
    data = pickle.dumps(accelerate(model))
    swinaccel.restore(model)
    gc.collect()
    patching.unmark(())
    registry.clear()
    call.forget_warnings()
    twin = pickle.loads(data)
    assert getattr(type(twin.blocks[0]), traced.PROVEN) == frozenset()  # compilers are told of no proof
    with pytest.warns(UserWarning, match=r"call swinaccel\.accelerate\(model\)") as warned:
        assert torch.equal(output(twin), expected)
    assert len(warned) == 1
    assert [(entry.calls, entry.fallbacks) for entry in swinaccel.report(twin)] == [(1, 1), (1, 1)]
    monkeypatch.setenv("SWINACCEL_STRICT", "1")
    with pytest.raises(swinaccel.FallbackError, match="another process"):
        output(twin)
    accelerate(twin)
    assert is_accelerated(twin)
    assert swinaccel.restore(twin) is twin
    assert all(patching.MARKER not in vars(module) for module in twin.modules())
    gc.collect()
    assert not patching._installed


def test_loading_without_swinaccel(tmp_path):
    """In a process that cannot import it."""
    model = MODELS["timm"]()
    expected = output(model)
    torch.save({"model": accelerate(model), "x": X, "expected": expected}, tmp_path / "model.pt")
    code = """
import sys, torch
sys.modules["swinaccel"] = None
content = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert torch.allclose(content["model"](content["x"]), content["expected"], atol=1e-5)
assert not [name for name, module in sys.modules.items() if name.startswith("swinaccel") and module is not None]
"""
    path = str(tmp_path / "model.pt")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_marker_of_another_version():
    """What cannot be read means nothing."""
    for text in (
        "nonsense",
        "{}",
        '{"family": "of the future", "options": {}}',
        '{"family": "timm", "options": {"speed": 9}}',
    ):
        model = accelerate(MODELS["timm"]())
        expected = output(MODELS["timm"]())
        for module in model.modules():
            if patching.marker(module) is not None:
                module.__dict__[patching.MARKER] = text
        assert torch.equal(output(model), expected)
        swinaccel.report(model)
        swinaccel.restore(model)
        assert all(patching.MARKER not in vars(module) for module in model.modules())


def test_replicas_of_data_parallel():
    """DataParallel copies `__dict__` by hand and sets plain tensors where parameters were."""
    model = accelerate(MODELS["microsoft"]())
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            replica._parameters.pop(name, None)
            setattr(replica, name, None if parameter is None else parameter.detach() * 0.5)
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    replica = replicas[model]
    found = output(replica)
    with swinaccel.disabled():
        expected = output(replica)
    helpers.assert_close(found, expected)
    assert helpers.difference(found, output(model)) > 1e-2


def test_functional_call_uses_the_given_parameters():
    model = accelerate(MODELS["timm"]())
    other = randomize(MODELS["timm"](), 4)
    with torch.no_grad():
        found = torch.func.functional_call(model, dict(other.named_parameters()), (X,))
    helpers.assert_close(found, output(other))
    assert all(entry.fallbacks == 0 for entry in swinaccel.report(model))


def test_conversions():
    model = accelerate(MODELS["timm"]())
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        found = output(model, X.to(dtype))
        with swinaccel.disabled():
            helpers.assert_close(found, output(model, X.to(dtype)), 8 * torch.finfo(dtype).eps + 2e-5)


def test_meta_model():
    """It has nothing to probe yet; filled, it is accelerated as any other, and the look before has spoilt nothing."""
    from timm.models.swin_transformer import SwinTransformerBlock

    filled = helpers.timm_block((8, 8), shift=2)
    with torch.device("meta"):
        model = SwinTransformerBlock(16, (8, 8), 2, window_size=4, shift_size=2).eval()
    x = torch.randn(1, 8, 8, 16)
    with torch.no_grad():
        try:
            model(x.to("meta"))
        except RuntimeError:
            pytest.skip("PyTorch 2.15's own layer_norm of meta tensors fails, once something was compiled before")
        assert accelerate(model)(x.to("meta")).is_meta
    model.to_empty(device="cpu")
    for target, source in zip(
        (*model.parameters(), *model.buffers()), (*filled.parameters(), *filled.buffers()), strict=True
    ):
        target.data.copy_(source)
    with torch.no_grad():
        helpers.assert_close(accelerate(model)(x), filled(x))
    assert len(swinaccel.report(model).accelerated) == 1
    assert len(swinaccel.plan(filled).accelerated) == 1


def test_fake_tensors():
    model = accelerate(MODELS["timm"]())
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert output(model, torch.empty(2, 3, 32, 32)).shape == (2, 5)
    assert is_accelerated(model)


def test_training_step_equals_the_originals():
    models = MODELS["timm"](), accelerate(MODELS["timm"]())
    for model in models:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
        model.eval()
    helpers.assert_close(output(models[1]), output(models[0]), 1e-3)


@every_model
def test_class_swapped_after_accelerate(name):
    """As FSDP2 does: the instance's class becomes a subclass of its own."""
    model = MODELS[name]()
    expected = output(model)
    accelerate(model)
    swapped = [module for module in model.modules() if patching.marking_of(module) and name != "torchvision"]
    for module in swapped:
        module.__class__ = type("FSDP" + type(module).__name__, (type(module),), {})
    helpers.assert_close(output(model), expected)
    assert is_accelerated(model)
    for module in swapped:
        module.__class__ = type(module).__bases__[0]
    swinaccel.restore(model)
    assert not patching._installed


def test_verify_judges_its_own_calls():
    model = accelerate(MODELS["timm"]())
    hook = model.layers[0].blocks[0].attn.register_forward_hook(lambda *_: None)
    output(model)
    hook.remove()
    assert swinaccel.verify(model, X, backend="torch").passed


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


# Compilers.


class Graphs:
    """A dynamo backend that keeps the graphs and runs them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward

    def count(self, text):
        return sum(text in str(node.target) for graph in self.graphs for node in graph.graph.nodes)


@every_model
def test_compile_is_one_graph(name):
    model = accelerate(MODELS[name]())
    expected = output(model)
    graphs = Graphs()
    helpers.assert_close(output(torch.compile(model, backend=graphs, fullgraph=True)), expected)
    assert len(graphs.graphs) == 1


@pytest.mark.parametrize("name", MODELS)
def test_compile_contains_the_operator_of_the_kernels(name):
    """Under fullgraph each section is one opaque operator: a silent return to the original would show here."""
    model = swinaccel.accelerate(MODELS[name]().to(helpers.TRITON_DEVICE), backend="triton").requires_grad_(False)
    x = X.to(helpers.TRITON_DEVICE)[:1]
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    found = output(compiled, x)
    with swinaccel.disabled():
        helpers.assert_close(found, output(model, x), 1e-4)
    assert len(graphs.graphs) == 1
    assert graphs.count(OPERATOR) == len(swinaccel.report(model))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["timm", "torchvision", "microsoft"])
def test_compile_with_gradients(name, backend):
    model = accelerate(MODELS[name]()).double()
    x = X.double()
    gradients = []
    for one in (model, torch.compile(model, backend=backend, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        helpers.tensors(one(leaf))[0].square().sum().backward()
        gradients.append(leaf.grad)
    helpers.assert_close(gradients[1], gradients[0], 1e-9)


OPERATOR = "swinaccel.shifted_window_attention"


def on_triton(model):
    return swinaccel.accelerate(model, backend="triton")


def test_compiled_models_follow_accelerate_and_restore():
    """Where the class had its dispatcher when it was compiled, markers are guarded and code is never stale."""
    keeper, model = on_triton(tiny()), tiny()
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs)
    found = []
    for change in (lambda model: model, on_triton, swinaccel.restore):
        change(model)
        before = len(graphs.graphs), graphs.count(OPERATOR)
        output(compiled, IMAGE)
        found.append((len(graphs.graphs) - before[0], graphs.count(OPERATOR) - before[1]))
    assert found == [(1, 0), (1, 1), (1, 0)]
    assert is_accelerated(keeper, IMAGE)


def test_compiled_models_follow_disabled():
    graphs = Graphs()
    compiled = torch.compile(on_triton(tiny()), backend=graphs)
    output(compiled, IMAGE)
    assert graphs.count(OPERATOR) == 1
    with swinaccel.disabled():
        output(compiled, IMAGE)
    assert len(graphs.graphs) == 2
    assert graphs.count(OPERATOR) == 1


def test_compiled_models_keep_to_the_live_parameters():
    model = on_triton(tiny())
    compiled = torch.compile(model, backend=Graphs())
    output(compiled, IMAGE)
    randomize(model, 8)
    with swinaccel.disabled():
        expected = output(model, IMAGE)
    helpers.assert_close(output(compiled, IMAGE), expected)


IMAGE = torch.randn(1, 8, 8, 16).to(helpers.TRITON_DEVICE)


def tiny():
    return helpers.timm_block((8, 8), shift=2).to(helpers.TRITON_DEVICE).requires_grad_(False)


def test_batch_sizes_share_graphs():
    model = on_triton(tiny())
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs)
    for batch in (2, 3, 4, 5):
        x = torch.randn(batch, 8, 8, 16).to(helpers.TRITON_DEVICE)
        helpers.assert_close(output(compiled, x), output(model, x))
    assert len(graphs.graphs) <= 2
    assert graphs.count(OPERATOR) == len(graphs.graphs)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("name", ["timm", "timm-v2", "torchvision", "microsoft"])
def test_export(name, strict):
    model = accelerate(MODELS[name]())
    with torch.no_grad():
        program = torch.export.export(model, (X,), strict=strict)
    helpers.assert_close(helpers.tensors(program.module()(X))[0], output(model))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export_contains_the_operator_of_the_kernels(strict):
    model = on_triton(tiny())
    with torch.no_grad():
        program = torch.export.export(model, (IMAGE,), strict=strict)
    assert sum(OPERATOR in str(node.target) for node in program.graph.nodes) == 1
    helpers.assert_close(program.module()(IMAGE), output(model, IMAGE))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["timm", "torchvision", "microsoft"])
def test_jit_trace_takes_the_original(name):
    model = accelerate(MODELS[name]())
    with torch.no_grad():
        traced = torch.jit.trace(model, (X,), check_trace=False)
    swinaccel.restore(model)
    helpers.assert_close(output(traced), output(model))
    assert "roll" in str(traced.inlined_graph)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_takes_the_original():
    model = helpers.torchvision_model()
    expected = output(model)
    try:
        torch.jit.script(model)
    except Exception as error:
        pytest.skip(f"the original cannot be scripted either: {type(error).__name__}")
    scripted = torch.jit.script(accelerate(model))
    helpers.assert_close(output(scripted), expected)


def test_symbolic_trace_takes_the_original():
    model = helpers.torchvision_model()
    from torchvision.models.feature_extraction import create_feature_extractor

    expected = output(model)
    traced = create_feature_extractor(accelerate(model), {"head": "out"})
    with torch.no_grad():
        helpers.assert_close(traced(X)["out"], expected)


def test_a_model_that_was_compiled_before():
    """What was compiled runs no longer once it is of other forwards; and goes on where nothing changes."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model, x = helpers.timm_block((8, 8), shift=2).to(helpers.TRITON_DEVICE), torch.randn(2, 8, 8, 16)
    x = x.to(helpers.TRITON_DEVICE)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend=backend)
        for change, made in (
            (lambda: None, 1),
            (lambda: swinaccel.accelerate(compiled, backend="triton"), 2),
            (lambda: swinaccel.accelerate(compiled, backend="triton"), 2),
            (lambda: swinaccel.restore(compiled), 3),
        ):
            change()
            helpers.assert_close(compiled(x), expected)
            assert len(graphs) == made
    assert ["swinaccel" in graph.code for graph in graphs] == [False, True, False]
