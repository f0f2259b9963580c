"""Every family: whole models and single modules against the untouched original, and what must stay original."""

from __future__ import annotations

import copy
import importlib

import helpers
import microsoft_models
import pytest
import torch
from helpers import check, randomize
from whole_models import IMAGES, MODELS, images

import swinaccel
from swinaccel.families.shared.common import fan_in

KEEPS_VERDICTS = True


@pytest.mark.parametrize("name", MODELS)
def test_model_equals_its_original(name):
    make, example, count = MODELS[name]
    check(make(), example(), count=count)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["timm-v1-masked", "timm-v2-masked", "torchvision-v1", "microsoft-v1"])
def test_batches(name, batch):
    make, example, _ = MODELS[name]
    x = example()
    check(make(), torch.randn(batch, *x.shape[1:]))


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_empty_batch(v2, backend):
    """torchvision's takes one; timm's and the official code raise on it by themselves, whatever the attention does."""
    check(helpers.torchvision_attention(shift=(2, 2), v2=v2), torch.zeros(0, 9, 8, 16), backend=backend)


@pytest.mark.parametrize(
    "name",
    ["timm-v1-masked", "timm-v2-masked", "torchvision-v1", "torchvision-v2", "hf-swin", "hf-swinv2", "microsoft-v1"],
)
def test_training_gradients(name):
    """The torch backend records gradients: those of input and parameters are the original's."""
    make, example, count = MODELS[name]
    model = make().double()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    x = example().double()
    gradients = []
    for one in (model, twin):
        one.train()
        leaf = x.clone().requires_grad_()
        outputs = [out for out in helpers.tensors(one(leaf)) if out.is_floating_point()]
        sum(out.square().sum() for out in outputs).backward()
        gradients.append([leaf.grad, *(p.grad for p in one.parameters())])
    helpers.assert_accelerated(twin, count)
    for (label, _), expected, found in zip(
        [("input", None), *model.named_parameters()], gradients[0], gradients[1], strict=True
    ):
        if expected is None:
            assert found is None or not found.any(), label
            continue
        assert found is not None, label
        # Compared with the whole gradient's size: some entries are zero in exact arithmetic, such as k's bias.
        scale = max(
            expected.abs().max().item(), 1e-3 * max(g.abs().max().item() for g in gradients[0] if g is not None)
        )
        assert (found - expected).abs().max().item() <= 1e-9 * scale, label


# name: (module, input shape, further arguments); many outputs, so that mean errors mean something.
BLOCKS = {
    "timm-v1": (lambda: helpers.timm_block((10, 12), window=(4, 6), shift=(2, 3)), (2, 10, 12, 16), ()),
    "timm-v2": (lambda: helpers.timm_block((8, 8), shift=2, v2=True), (3, 8, 8, 16), ()),
    "torchvision-v1": (lambda: helpers.torchvision_attention(shift=(2, 2)), (2, 9, 10, 16), ()),
    "torchvision-v2": (lambda: helpers.torchvision_attention(shift=(2, 2), v2=True), (3, 8, 8, 16), ()),
    "hf-swin": (lambda: helpers.huggingface_layer("Swin", shift=2), (2, 90, 16), ((9, 10),)),
    "hf-swinv2": (lambda: helpers.huggingface_layer("Swinv2", shift=2), (3, 64, 16), ((8, 8),)),
    "microsoft-v1": (lambda: helpers.microsoft_block((8, 8), shift=2), (3, 64, 16), ()),
    "microsoft-v2": (lambda: helpers.microsoft_block((8, 8), shift=2, v2=True), (3, 64, 16), ()),
}


@pytest.mark.parametrize("mode", ["half", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_low_precision_errs_no_more_than_the_original(name, backend, dtype, mode):
    """Judged against fp64, for in low precision the original is no measure: it rounds as well."""
    helpers.skip_interpreted_bfloat16(backend, dtype)
    make, shape, further = BLOCKS[name]
    model, device = make(), helpers.DEVICES[backend]
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        exact = first(copy.deepcopy(model).double()(x, *further))
        model, x = (
            (model.to(device, dtype), x.to(device, dtype))
            if mode == "half"
            else (model.to(device), x.float().to(device))
        )
        twin = swinaccel.accelerate(copy.deepcopy(model), backend=backend)
        with torch.autocast(device, dtype, enabled=mode == "autocast"):
            expected, found = first(model(x, *further)), first(twin(x, *further))
    helpers.assert_accelerated(twin, 1)
    assert found.dtype == expected.dtype
    helpers.assert_no_worse(found, expected, exact, dtype)


def first(output):
    return helpers.tensors(output)[0]


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_copies_under_other_names_are_recognised(v2):
    """Copies of the official code live in hundreds of repositories: neither names nor modules count."""

    class HatBlock(microsoft_models.SwinTransformerBlock):
        __module__ = "somewhere.models.net"

    HatBlock.__name__ = HatBlock.__qualname__ = "Blk"
    model = randomize(HatBlock(16, (8, 8), 2, 4, 2, v2=v2))
    (entry,) = swinaccel.plan(model)
    assert (entry.family, entry.status, entry.reason) == ("microsoft", "accelerated", None)
    check(model, torch.randn(2, 64, 16), count=1)


def test_entry_states_the_facts():
    (entry,) = swinaccel.plan(helpers.timm_block((8, 12), window=(4, 6), shift=(2, 3), head_dim=10))
    assert (entry.name, entry.window, entry.shift, entry.num_heads, entry.head_dim) == ("", (4, 6), (2, 3), 2, 10)


def test_names_in_the_report_are_paths():
    model = helpers.timm_v1()
    assert [entry.name for entry in swinaccel.plan(model)] == [
        "layers.0.blocks.0",
        "layers.0.blocks.1",
        "layers.1.blocks.0",
    ]


def near_misses():
    """Models whose modules look like Swin's, or live next to them, and are something else."""
    timm = importlib.import_module("timm")
    small = {"num_classes": 3, "img_size": 64}
    models = {
        "timm-beit": lambda: timm.create_model("beit_base_patch16_224", depth=2, embed_dim=32, num_heads=2, **small),
        "timm-maxvit": lambda: timm.create_model(
            "maxvit_rmlp_pico_rw_256", depths=(1,), embed_dim=(32,), stem_width=8, **small
        ),
        "timm-davit": lambda: timm.create_model(
            "davit_tiny", depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(2, 2, 2, 2), num_classes=3
        ),
        "timm-gcvit": lambda: timm.create_model("gcvit_xxtiny", num_classes=3),
        "timm-sam": lambda: timm.create_model(
            "samvit_base_patch16", depth=2, embed_dim=32, num_heads=2, window_size=4, global_attn_indexes=(1,), **small
        ),
        "torchvision-maxvit": lambda: torchvision_maxvit(),
        "torchvision-vit": lambda: importlib.import_module("torchvision").models.VisionTransformer(
            64, 16, 1, 2, 32, 64
        ),
        "hf-beit": lambda: huggingface_beit(),
    }
    return models


def torchvision_maxvit():
    library = importlib.import_module("torchvision").models.maxvit
    return library.MaxVit(
        input_size=(64, 64), stem_channels=8, partition_size=4, block_channels=[16], block_layers=[1], head_dim=8,
        stochastic_depth_prob=0.0, num_classes=3,
    )  # fmt: skip


def huggingface_beit():
    library = importlib.import_module("transformers")
    return library.BeitModel(
        library.BeitConfig(
            image_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            use_relative_position_bias=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", near_misses())
def test_near_miss_stays_original(name):
    model = randomize(near_misses()[name]())
    x = torch.randn(1, 3, 224, 224) if name == "timm-gcvit" else IMAGES[:1]
    with torch.no_grad():
        expected = model(x)
        swinaccel.accelerate(model)
        found = model(x)
    assert not swinaccel.report(model).accelerated
    for one, other in zip(helpers.tensors(found), helpers.tensors(expected), strict=True):
        assert torch.equal(one, other)


def test_graph_module_of_torchvision_stays_original():
    """torch.fx leaves empty modules where attention was and calls the function: there is nothing to replace."""
    from torchvision.models.feature_extraction import create_feature_extractor

    model = create_feature_extractor(helpers.torchvision_model(), {"head": "out"})
    x = images(32)
    with torch.no_grad():
        expected = model(x)["out"]
        swinaccel.accelerate(model)
        found = model(x)["out"]
    assert not swinaccel.report(model).accelerated
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["Swin", "Swinv2"])
def test_models_traced_by_fx_beforehand_are_harmless(kind):
    """A module with the attributes of one kind of Swin and the wrong shapes is not taken for it."""
    layer = helpers.huggingface_layer(kind)
    for name, buffer in list(layer.named_buffers()):
        if name.endswith("relative_position_index"):
            owner = layer.get_submodule(name.rpartition(".")[0])
            owner.register_buffer("relative_position_index", buffer.reshape(-1)[:-1], persistent=False)
    assert not swinaccel.plan(layer).accelerated


def test_layers_whose_parameters_are_empty_between_calls_are_as_wide_as_they_say():
    """As FSDP leaves them; else the weight tells, which may have been pruned."""
    layer = torch.nn.Linear(8, 4)
    layer.weight = torch.nn.Parameter(layer.weight.detach()[:, :6])
    assert fan_in(layer) == 6
    layer.weight = torch.nn.Parameter(torch.empty(0))
    assert fan_in(layer) == 8
