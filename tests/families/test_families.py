"""Every family: whole models and single modules against the untouched original, and what must stay original."""

from __future__ import annotations

import copy
import importlib

import helpers
import microsoft_models
import pytest
import torch
from helpers import BACKENDS, check, randomize
from torch import nn

import swinaccel

KEEPS_VERDICTS = True

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def images(height, width=None):
    return IMAGES[:, :, :height, : width or height]


# name: (model, input, window attentions in it)
MODELS = {
    "timm-v1": (lambda: helpers.timm_v1(), lambda: images(56), 3),
    "timm-v1-masked": (lambda: helpers.timm_v1(window=4, img_size=64), lambda: images(64), 3),
    "timm-v1-padded": (lambda: helpers.timm_v1(window=5, img_size=52, patch_size=4), lambda: images(52), 3),
    "timm-v1-resizable": (
        lambda: helpers.timm_v1(window=4, always_partition=True, strict_img_size=False),
        lambda: images(52, 60),
        3,
    ),
    "timm-v1-head-dim": (lambda: helpers.timm_v1(head_dim=10), lambda: images(56), 3),
    "timm-v1-no-bias": (lambda: helpers.timm_v1(qkv_bias=False), lambda: images(56), 3),
    "timm-v2": (lambda: helpers.timm_v2(), lambda: images(64), 3),
    "timm-v2-masked": (lambda: helpers.timm_v2(window=4), lambda: images(64), 3),
    "timm-v2-rectangular": (lambda: helpers.timm_v2(window=(4, 8)), lambda: images(64), 3),
    "timm-v2-no-bias": (lambda: helpers.timm_v2(qkv_bias=False), lambda: images(64), 3),
    "torchvision-v1": (lambda: helpers.torchvision_model(), lambda: images(32), 4),
    "torchvision-v1-padded": (lambda: helpers.torchvision_model(), lambda: images(44, 36), 4),
    "torchvision-v1-rectangular": (lambda: helpers.torchvision_model(window=(4, 6)), lambda: images(64), 4),
    "torchvision-v2": (lambda: helpers.torchvision_model(v2=True), lambda: images(32), 4),
    "torchvision-v2-padded": (lambda: helpers.torchvision_model(v2=True), lambda: images(44, 36), 4),
    "hf-swin": (lambda: helpers.huggingface("Swin"), lambda: images(32), 4),
    "hf-swin-padded": (lambda: helpers.huggingface("Swin"), lambda: images(44, 36), 4),
    "hf-swin-backbone": (lambda: helpers.huggingface("Swin", "Backbone"), lambda: images(32), 4),
    "hf-swin-no-bias": (lambda: helpers.huggingface("Swin", qkv_bias=False), lambda: images(32), 4),
    "hf-swinv2": (lambda: helpers.huggingface("Swinv2"), lambda: images(32), 4),
    "hf-swinv2-padded": (lambda: helpers.huggingface("Swinv2"), lambda: images(44, 36), 4),
    "hf-swinv2-backbone": (lambda: helpers.huggingface("Swinv2", "Backbone"), lambda: images(32), 4),
    "hf-donut": (lambda: helpers.huggingface("DonutSwin"), lambda: images(32), 4),
    "hf-classifier": (lambda: helpers.huggingface("Swin", "ForImageClassification"), lambda: images(32), 4),
    "microsoft-v1": (lambda: microsoft(), lambda: torch.randn(2, 64, 16), 2),
    "microsoft-v1-no-bias": (lambda: microsoft(qkv_bias=False), lambda: torch.randn(2, 64, 16), 2),
    "microsoft-v2": (lambda: microsoft(v2=True), lambda: torch.randn(2, 64, 16), 2),
    "microsoft-v2-no-bias": (lambda: microsoft(v2=True, qkv_bias=False), lambda: torch.randn(2, 64, 16), 2),
}


def microsoft(**options):
    return nn.Sequential(
        helpers.microsoft_block((8, 8), shift=0, **options),
        helpers.microsoft_block((8, 8), shift=2, **options),
    )


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
    [
        "timm-v1-masked",
        "timm-v2-masked",
        "torchvision-v1",
        "torchvision-v2",
        "hf-swin",
        "hf-swinv2",
        "microsoft-v1",
    ],
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
            expected.abs().max().item(),
            1e-3 * max(g.abs().max().item() for g in gradients[0] if g is not None),
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


# Recognition is by structure.


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
    assert (entry.name, entry.window, entry.shift, entry.num_heads, entry.head_dim) == (
        "",
        (4, 6),
        (2, 3),
        2,
        10,
    )


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
            "davit_tiny",
            depths=(1, 1, 1, 1),
            embed_dims=(16, 16, 32, 32),
            num_heads=(2, 2, 2, 2),
            num_classes=3,
        ),
        "timm-gcvit": lambda: timm.create_model("gcvit_xxtiny", num_classes=3),
        "timm-sam": lambda: timm.create_model(
            "samvit_base_patch16",
            depth=2,
            embed_dim=32,
            num_heads=2,
            window_size=4,
            global_attn_indexes=(1,),
            **small,
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


# A signature is no proof.


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


# What a probe of one forward in eval mode would not see.


class DropKey(microsoft_models.WindowAttention):
    def scores(self, q, k):
        scores = super().scores(q, k)
        return scores - 1e4 * torch.bernoulli(torch.full_like(scores, 0.3)) if self.training else scores


class Detached(microsoft_models.WindowAttention):
    def bias(self):
        return super().bias().detach()


class WithoutGradient(microsoft_models.WindowAttention):
    @torch.no_grad()
    def forward(self, x, mask=None):
        return super().forward(x, mask)


class Remembering(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        self.last = super().forward(x, mask)
        return self.last


class Prior(microsoft_models.WindowAttention):
    """A buffer that is zero until it is loaded."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("prior", torch.zeros(16, 16))

    def bias(self):
        return super().bias() + self.prior


class Annealed(microsoft_models.WindowAttention):
    temperature = None

    def __init__(self, *args):
        super().__init__(*args)
        self.temperature = 1.0

    def scores(self, q, k):
        return super().scores(q, k) / self.temperature


class LearnedScale(microsoft_models.WindowAttention):
    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Parameter(torch.full((self.num_heads, 1, 1), self.scale))


class OtherClamp(microsoft_models.WindowAttentionV2):
    def scores(self, q, k):
        cosine = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).mT
        return cosine * self.logit_scale.clamp(max=3.0).exp() + self.bias()


@pytest.mark.parametrize(
    "kind", [DropKey, Detached, WithoutGradient, Remembering, Prior, Annealed, LearnedScale, OtherClamp]
)
def test_differences_that_do_not_show_in_one_forward(kind):
    model = helpers.microsoft_block((8, 8), shift=2, v2=kind is OtherClamp)
    model.attn = kind(16, (4, 4), 2)
    randomize(model)
    if kind is OtherClamp:
        nn.init.constant_(model.attn.logit_scale, 1.0)
    (entry,) = swinaccel.plan(model)
    assert (entry.status, entry.name) == ("original", ""), entry


def limited(name, limit):
    """An attention whose method limits what it gives, as copies do that are to run in fp16."""

    def method(self, *args, **kwargs):
        return limit(getattr(microsoft_models.WindowAttention, name)(self, *args, **kwargs))

    return type("Limited", (microsoft_models.WindowAttention,), {name: method, "__module__": __name__})


LIMITS = {
    "clamp": lambda x: x.clamp(-20.0, 20.0),
    "far": lambda x: x.clamp(-60000.0, 60000.0),
    "minimum": lambda x: torch.minimum(x, torch.full_like(x, 50.0)),
    "gate": lambda x: torch.where(x > 100.0, 0.0, x),
    "dead-zone": lambda x: torch.where(x.abs() < 1e-4, 0.0, x),
    "hardtanh": nn.Hardtanh(-30.0, 30.0),
}
HIDDEN = ("scores", "dead-zone")  # which no softmax shows


@pytest.mark.parametrize(
    ("name", "limit"),
    [(name, limit) for name in ("packed", "scores", "forward") for limit in LIMITS if (name, limit) != HIDDEN],
)
def test_limits_of_numbers_are_seen_wherever_they_lie(name, limit):
    model = helpers.microsoft_block((8, 8), shift=2)
    model.attn = limited(name, LIMITS[limit])(16, (4, 4), 2)
    (entry,) = swinaccel.plan(randomize(model))
    assert entry.status == "original"
    assert "outputs differ by" in entry.reason


def finite(self, x, mask=None):
    out = microsoft_models.WindowAttention.forward(self, x, mask)
    return out if out.isfinite().all() else torch.nan_to_num(out)


def in_half(self, x, mask=None):
    out = microsoft_models.WindowAttention.forward(self, x, mask)
    return out.clamp(-1.0, 1.0) if x.dtype is torch.float16 else out


@pytest.mark.parametrize(("forward", "words"), [(finite, "infinities and NaN"), (in_half, "in float16")])
def test_attention_that_decides_by_dtypes_and_what_is_finite(forward, words):
    model = helpers.microsoft_block((8, 8), shift=2)
    model.attn = type("Odd", (microsoft_models.WindowAttention,), {"forward": forward, "__module__": __name__})(
        16, (4, 4), 2
    )
    (entry,) = swinaccel.plan(randomize(model))
    assert entry.status == "original"
    assert words in entry.reason


def test_block_without_gradient_is_accelerated_at_its_attention():
    class WithoutGradient(microsoft_models.SwinTransformerBlock):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    model = randomize(WithoutGradient(16, (8, 8), 2, 4, 2))
    assert [entry.name for entry in swinaccel.plan(model).accelerated] == ["attn"]
    swinaccel.accelerate(model, backend="torch")
    assert not model(torch.randn(1, 64, 16)).requires_grad


class MinusInfinity(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, None if mask is None else torch.where(mask < -50, -1e9, mask))


def test_trap_15_mask_of_minus_infinity_is_another_one():
    """Between ordinary scores it cannot be told from -100."""
    model = helpers.microsoft_block((8, 8), shift=2)
    model.attn = MinusInfinity(16, (4, 4), 2)
    (entry,) = swinaccel.plan(randomize(model))
    assert entry.status == "original"


class DropHead(nn.Module):
    drop_prob = 0.5

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], x.shape[1], 1, 1) > self.drop_prob) / (1 - self.drop_prob)


def test_dropout_of_unknown_code_is_refused():
    model = helpers.timm_block((8, 8), shift=2)
    model.attn.attn_drop = DropHead()
    model.attn.fused_attn = False
    (entry,) = swinaccel.plan(model)
    assert entry.status == "original"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [nn.Dropout2d(0.5), nn.AlphaDropout(0.5)], ids=lambda d: str(type(d)))
def test_other_dropouts_drop_by_themselves(dropout, backend):
    """While they drop nothing they are none; else the original runs."""
    model = helpers.timm_block((8, 8), shift=2).to(helpers.DEVICES[backend])
    model.attn.attn_drop = dropout
    model.attn.fused_attn = False
    model.train()
    twin, x = copy.deepcopy(model), torch.randn(2, 8, 8, 16).to(helpers.DEVICES[backend])
    swinaccel.accelerate(model, backend=backend)
    for mode in (True, False):
        with torch.no_grad():
            outs = []
            for one in (model.train(mode), twin.train(mode)):
                torch.manual_seed(0)
                outs.append(one(x))
        helpers.assert_close(*outs)
    (entry,) = swinaccel.report(model)
    assert (entry.calls, entry.fallbacks) in ((0, 0), (2, 1))


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
