"""Traps of calls: arguments, return types, hooks, checkpoints, tracing; see traps.py for the numbers."""

from __future__ import annotations

import copy
import importlib
import math

import helpers
import pytest
import torch
from helpers import both_backends, check, randomize, versions
from traps import HOOKABLE, TRANSFORMERS_5, hf_check, layers

import swinaccel


@pytest.mark.parametrize("kind", ["timm", "torchvision", "microsoft", "hf-swin", "hf-swinv2"])
def test_trap_35_return_types(kind):
    make, _, inputs = HOOKABLE[kind]
    found = check(make(), *inputs)
    if not kind.startswith("hf"):
        assert type(found) is torch.Tensor
    elif kind == "hf-swin" and TRANSFORMERS_5:
        assert type(found) is tuple
        assert len(found) == 2
        assert found[1] is None
    else:
        assert type(found) is tuple
        assert len(found) == 1


@pytest.mark.parametrize("how", ["positional", "keywords"])
@pytest.mark.parametrize("kind", ["Swin", "Swinv2", "DonutSwin", "MaskFormerSwin"])
def test_trap_36_arguments_by_position_and_by_name(kind, how):
    layer = helpers.huggingface_layer(kind, shift=2)
    x = torch.randn(2, 16, 16)
    if how == "keywords":
        check(layer, arguments={"hidden_states": x, "input_dimensions": (4, 4)})
    else:
        head_mask = () if TRANSFORMERS_5 else (None,)
        further = {
            "Swin": (True,) if TRANSFORMERS_5 else (None, False, True),
            "Swinv2": (*head_mask, False),
            "DonutSwin": (*head_mask, False, True),
            "MaskFormerSwin": (*head_mask, False),
        }
        check(layer, x, (4, 4), *further[kind])


def test_trap_36_unknown_arguments_are_the_originals_concern():
    model = swinaccel.accelerate(helpers.timm_block((8, 8)), backend="torch")
    with pytest.raises(TypeError):
        model(torch.randn(1, 8, 8, 16), None)


@pytest.mark.parametrize("kind", ["DonutSwin", "MaskFormerSwin"])
def test_trap_43_siblings_of_hugging_face_swin(kind):
    hf_check(helpers.huggingface_layer(kind, shift=2), (9, 7))


def test_trap_43_maskformer_backbone():
    library = importlib.import_module("transformers")
    config = library.MaskFormerSwinConfig(
        image_size=32, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.0
    )
    check(randomize(library.MaskFormerSwinModel(config)), torch.randn(1, 3, 40, 36), count=4)


def test_trap_43_clap_audio():
    library = importlib.import_module("transformers")
    config = library.ClapAudioConfig(
        spec_size=64, num_mel_bins=16, patch_embeds_hidden_size=24, depths=[2, 2], num_attention_heads=[1, 2],
        hidden_size=48, window_size=4, patch_size=4, patch_stride=[4, 4], num_hidden_layers=2, enable_fusion=False,
        drop_path_rate=0.0,
    )  # fmt: skip
    model = randomize(library.ClapAudioModel(config))
    check(model, torch.randn(2, 1, 60, 16), count=4)


def test_trap_43_swin2sr():
    library = importlib.import_module("transformers")
    config = library.Swin2SRConfig(
        image_size=16, embed_dim=20, depths=[2], num_heads=[2], window_size=4, upscale=2, num_channels=3
    )
    check(randomize(library.Swin2SRModel(config)), torch.rand(1, 3, 16, 16), count=2)


@versions
def test_trap_44_shared_lists_are_not_changed(v2):
    """torchvision hands one window_size list to all its blocks."""
    model = helpers.torchvision_model(v2=v2)
    before = [(module.window_size, list(module.window_size), list(module.shift_size)) for module in layers(model)]
    twin = swinaccel.accelerate(model, backend="torch")
    with torch.no_grad():
        twin(torch.randn(1, 3, 16, 16))
    for module, (shared, window, shift) in zip(layers(twin), before, strict=True):
        assert module.window_size is shared
        assert (module.window_size, module.shift_size) == (window, shift)


@pytest.mark.parametrize("name", HOOKABLE)
def test_trap_45_hooks_on_the_attention_see_its_own_tensors(name):
    """The attention gets windows, and where someone looks at them the original must make them."""
    make, attention, inputs = HOOKABLE[name]
    seen = []
    for accelerated in (False, True):
        model, shapes = make(), []
        if accelerated:
            swinaccel.accelerate(model, backend="torch")

        def look(_, args, out, shapes=shapes):
            shapes.extend(tensor.shape for tensor in helpers.tensors((args, out)))

        model.get_submodule(attention).register_forward_hook(look)
        with torch.no_grad():
            model(*inputs)
        seen.append(shapes)
    assert seen[0] == seen[1] != []


def test_trap_45_hooks_on_the_block_keep_the_kernels():
    """What is called in any case may be watched."""
    model = helpers.microsoft_block((8, 8), shift=2)
    swinaccel.accelerate(model, backend="torch")
    seen = []
    for module in (model, model.norm1, model.mlp):
        module.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(torch.randn(1, 64, 16))
    assert len(seen) == 3
    helpers.assert_accelerated(model, 1)


@pytest.mark.parametrize("name", ["timm", "hf-swin", "hf-swinv2"])
def test_trap_46_gradient_checkpointing(name):
    if name == "timm":
        model, x = helpers.timm_v1(img_size=64, window=4), torch.randn(1, 3, 64, 64)
        enable = lambda one: one.set_grad_checkpointing(True)  # noqa: E731
    else:
        model, x = helpers.huggingface("Swinv2" if name.endswith("v2") else "Swin"), torch.randn(1, 3, 32, 32)
        enable = lambda one: one.gradient_checkpointing_enable({"use_reentrant": False})  # noqa: E731
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    gradients = []
    for one in (model, twin):
        enable(one)
        one.train()
        helpers.tensors(one(x))[0].square().sum().backward()
        gradients.append({label: p.grad for label, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    for label, gradient in gradients[0].items():
        assert (gradients[1][label] - gradient).abs().max() <= 1e-4 * largest, label
    assert all(entry.fallbacks == 0 for entry in swinaccel.report(twin))


@both_backends
@pytest.mark.parametrize("name", ["timm", "timm-v2", "torchvision"])
def test_trap_47_strided_images(name, backend):
    """Stages hand over permuted NCHW views."""
    make, _, _ = HOOKABLE[name]
    image = torch.randn(2, 16, 8, 8).permute(0, 2, 3, 1)
    assert not image.is_contiguous()
    check(make(), image, backend=backend)
    check(make(), torch.randn(2, 8, 9, 17)[:, :, 1:, :16], backend=backend)


@pytest.mark.parametrize("name", ["timm", "torchvision", "microsoft"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_trap_50_tracing_runs_the_original(name):
    make, _, inputs = HOOKABLE[name]
    model = swinaccel.accelerate(make(), backend="torch")
    with torch.no_grad():
        traced = torch.jit.trace(model, inputs, check_trace=False)
        helpers.assert_close(traced(*inputs), model(*inputs))
    assert "swinaccel" not in str(traced.graph)
    assert math.isfinite(float(traced(*inputs).sum()))


@pytest.mark.parametrize("kind", ["Swin", "Swinv2"])
def test_trap_46_checkpoints_are_taken_by_layers_that_have_a_dispatcher(kind):
    """Accelerated or not: what a layer runs comes again in the backward."""

    def count(model):
        seen = []
        handles = [
            part.register_forward_hook(lambda *_: seen.append(1))
            for name, part in model.named_modules()
            if name.endswith("layernorm_before")
        ]
        helpers.tensors(model(torch.randn(1, 3, 32, 32)))[0].square().sum().backward()
        for handle in handles:
            handle.remove()
        return len(seen)

    model = helpers.huggingface(kind).train()
    once = count(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    twice = count(model)
    assert twice > once
    fast = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    assert (count(model), count(fast)) == (twice, twice)
