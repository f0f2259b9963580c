"""What is done to an accelerated model in its life: copies, files, conversions, training, another class."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import subprocess
import sys

import helpers
import pytest
import torch
from helpers import randomize
from patched import MODELS, X, accelerate, every_model, is_accelerated, output

import swinaccel
from swinaccel import patching
from swinaccel.runtime import call, traced
from swinaccel.trust.registry import registry


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


def test_copies_of_a_subclass_keep_the_dispatcher():
    model = accelerate(MODELS["timm"]())
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__class__ = type(type(module).__name__, (type(module),), {})
    swinaccel.restore(model)
    assert is_accelerated(twin)


class Kept:
    """The collector, whose answers somebody holds for a while."""

    def __init__(self):
        self.answers = []

    def __getattr__(self, name):
        def ask(*given):
            self.answers.append(getattr(gc, name)(*given))
            return self.answers[-1]

        return ask


def test_looking_for_copies_leaves_other_threads_tuples_alone(monkeypatch):
    """Python cannot finish a tuple that somebody else has a hold of."""
    model = accelerate(MODELS["timm"]())
    monkeypatch.setattr(patching, "gc", kept := Kept())

    def entries():
        yield from range(20)
        assert patching._keys_of_copies(set(patching._installed))
        yield from range(20)

    assert len(tuple(entries())) == 40
    assert kept.answers
    assert is_accelerated(model)


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
    call._warned.clear()
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
