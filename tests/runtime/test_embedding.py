"""Patch embeddings in inference: the kernel against plain PyTorch, modules against their originals, and changes."""

from __future__ import annotations

import copy

import helpers
import microsoft_models
import pytest
import torch
import torch.nn.functional as F
from blocks import random
from embeddings import DTYPE, DTYPES, EMBEDDINGS, accelerated, given, huggingface, same_as_the_original, timm
from helpers import TRITON_DEVICE
from torch import nn

import swinaccel
from swinaccel import patching
from swinaccel.backends.triton import block as kernels
from swinaccel.trust.registry import registry

KEEPS_VERDICTS = True
TOLERANCE = {torch.float32: 1e-6}.get(DTYPE, 2**-7)


# The kernel.


def convolved(x, weight, bias, norm):
    y = F.conv2d(x, weight, bias, stride=weight.shape[2:]).permute(0, 2, 3, 1)
    return y if norm is None else F.layer_norm(y, y.shape[-1:], norm[0], norm[1], 1e-5)


@pytest.mark.parametrize("norm", ["norm", "plain norm", None])
@pytest.mark.parametrize(
    ("image", "channels", "patch"),
    [
        ((2, 3, 20, 44), 24, (4, 4)),
        ((3, 3, 12, 16), 96, (4, 4)),
        ((1, 1, 6, 10), 16, (2, 2)),
        ((2, 2, 15, 14), 40, (5, 7)),
        ((1, 5, 9, 11), 192, (1, 1)),
        ((2, 4, 24, 8), 512, (8, 8)),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel(dtype, image, channels, patch, norm, poisoned):
    x, weight = 1 + random(*image, dtype=dtype), random(channels, image[1], *patch, dtype=dtype, scale=0.2)
    bias = random(channels, dtype=dtype) if norm is None or norm == "norm" else None
    scale = 1 + random(channels, dtype=dtype, scale=0.3), random(channels, dtype=dtype, seed=1)
    given = {"norm": scale, "plain norm": (None, None), None: None}[norm]
    affine = None if given is None else (*given, 1e-5)
    exact = [None if one is None else one.double().cpu() for one in (x, weight, bias, *(given or ()))]
    expected = convolved(*exact[:3], None if given is None else exact[3:])
    found = kernels.embed(x, weight, bias, affine)
    assert found.is_contiguous()
    if dtype == torch.float32:
        helpers.assert_close(found.double().cpu(), expected, 1e-6)
    else:
        helpers.assert_no_worse(found, convolved(x, weight, bias, given), expected, dtype)


def test_only_so_many_channels_and_numbers():
    assert kernels.embed_launch(512, 256) is not None
    assert kernels.embed_launch(528, 48) is None
    assert kernels.embed_launch(96, 257) is None


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers():
    """Of the image, and of what becomes of it."""
    weight, bias = random(48, 3, 2, 2, dtype=torch.float16), random(48, dtype=torch.float16)
    x = torch.zeros(720, 3, 1024, 1024, dtype=torch.float16, device=TRITON_DEVICE)
    x[-1] = random(3, 1024, 1024, dtype=torch.float16)
    found = kernels.embed(x, weight, bias, None)
    assert min(x.numel(), found.numel()) > 2**31
    for place in (0, -1):
        expected = convolved(x[place][None], weight, bias, None)[0]
        helpers.assert_close(found[place], expected, 2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embedding_equals_its_original(name, dtype, embedded, poisoned):
    make, shape = EMBEDDINGS[name]
    model, x = accelerated(make(), dtype), random(*shape, dtype=dtype)
    found = given(model, x)
    assert embedded == [shape]
    with swinaccel.disabled():
        expected = given(model, x)
        exact = given(copy.deepcopy(model).double().cpu(), x.double().cpu())
    if isinstance(expected, tuple):  # Hugging Face's: with the sides
        assert found[1:] == expected[1:] == exact[1:]
        found, expected, exact = found[0], expected[0], exact[0]
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    helpers.assert_no_worse(found, expected, exact.to(found.device), dtype)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: helpers.timm_v1(), 56),
        (lambda: helpers.timm_v2(), 64),
        (lambda: helpers.huggingface("Swin"), 32),
        (lambda: helpers.huggingface("Swinv2", "Backbone"), 32),
    ],
    ids=["timm-v1", "timm-v2", "hf-swin", "hf-swinv2-backbone"],
)
def test_models(make, size, embedded):
    """The report is about attention alone, and undoing leaves nothing behind."""
    model, x = make().to(TRITON_DEVICE, torch.float16), random(4, 3, size, size, dtype=torch.float16)
    expected = given(copy.deepcopy(model).double(), x.double())
    own = given(model, x)
    before = {part: dict(vars(part)) for part in model.modules()}
    classes = {type(part): dict(vars(type(part))) for part in model.modules()}
    entries = len(swinaccel.plan(model, backend="triton"))
    swinaccel.accelerate(model, backend="triton")
    found = given(model, x)
    assert embedded == [(4, 3, size, size)]
    helpers.assert_accelerated(model, entries)
    one, two, three = (helpers.tensors(output)[0].double() for output in (found, own, expected))
    assert (one - three).abs().mean() <= 1.5 * (two - three).abs().mean()  # of a handful of numbers
    swinaccel.restore(model)
    assert all(dict(vars(part)) == attributes for part, attributes in before.items())
    assert all(dict(vars(cls)) == attributes for cls, attributes in classes.items())


@pytest.mark.parametrize(
    "options",
    [{"fuse": "attention"}, {"filter": lambda name, module: True}, {"backend": "torch"}],
    ids=["attention", "filter", "torch"],
)
def test_options_that_leave_it_alone(options, embedded):
    model = helpers.timm_v1().to(TRITON_DEVICE)
    swinaccel.accelerate(model, **{"backend": "triton", **options})
    assert same_as_the_original(model.patch_embed, random(1, 3, 56, 56))
    assert embedded == []


def test_no_attention_no_embedding():
    embedding = swinaccel.accelerate(timm())
    assert patching.marker(embedding) is None
    assert not patching._installed


# What its family does not read out of it is found by the probe.


def timm_kind(forward):
    from timm.layers import PatchEmbed

    return type("Kind", (PatchEmbed,), {"forward": forward(PatchEmbed.forward)})


CHANGED = {
    "scaled": lambda plain: lambda self, x: 1.5 * plain(self, x),
    "position": lambda plain: lambda self, x: plain(self, x) + torch.linspace(0, 1, 48).to(x),
    "before": lambda plain: lambda self, x: plain(self, x.clamp(min=0)),
    "mirrored": lambda plain: lambda self, x: plain(self, x.flip(-1)),
    "transposed": lambda plain: lambda self, x: plain(self, x.mT),
    "no-norm": lambda plain: lambda self, x: self.proj(x).permute(0, 2, 3, 1),
    "columns": lambda plain: lambda self, x: plain(self, x).mT.mT.transpose(1, 2),
    "tuple": lambda plain: lambda self, x: (plain(self, x), (6, 6)),
    "counting": lambda plain: lambda self, x: (setattr(self, "seen", x.mean()), plain(self, x))[1],
}


@pytest.mark.parametrize("change", CHANGED)
def test_subclasses_that_do_more_stay_original(change, embedded):
    model = accelerated(timm(timm_kind(CHANGED[change])))
    assert patching.marker(model.embedding) is None
    assert same_as_the_original(model, random(2, 3, 24, 24, dtype=DTYPE))
    assert embedded == []


class Scaled(microsoft_models.PatchEmbed):
    """Does more where it is told to."""

    doubled = False
    factor = 1.0

    def forward(self, x):
        y = super().forward(x)
        return 2 * y if self.doubled else y * self.factor


def test_positions_are_no_part_of_an_embedding(embedded):
    class Positions(microsoft_models.PatchEmbed):
        def __init__(self):
            super().__init__(24, embed_dim=48)
            self.position = nn.Parameter(torch.zeros(36, 48))

        def forward(self, x):
            return super().forward(x) + self.position

    model = accelerated(Positions())
    assert patching.marker(model.embedding) is None
    assert same_as_the_original(model, random(2, 3, 24, 24, dtype=DTYPE))
    assert embedded == []


def test_a_switch_that_is_thrown_later(embedded):
    embedding = Scaled(24, embed_dim=48)
    embedding.doubled = False
    model, x = accelerated(embedding), random(2, 3, 24, 24, dtype=DTYPE)
    given(model, x)
    assert len(embedded) == 1
    model.embedding.doubled = True
    assert same_as_the_original(model, x)
    assert len(embedded) == 1
    model.embedding.doubled = False
    given(model, x)
    assert len(embedded) == 2


def test_a_number_that_may_change_is_found(embedded):
    embedding = Scaled(24, embed_dim=48)
    embedding.factor = 1.0
    model = accelerated(embedding)
    assert patching.marker(model.embedding) is None


CONVOLUTIONS = {
    "stride": lambda: nn.Conv2d(3, 48, 4, stride=2),
    "padding": lambda: nn.Conv2d(3, 48, 4, stride=4, padding=2),
    "dilation": lambda: nn.Conv2d(3, 48, 4, stride=4, dilation=2),
    "groups": lambda: nn.Conv2d(3, 48, 4, stride=4, groups=3),
    "patch": lambda: nn.Conv2d(3, 48, 2, stride=2),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(3, 48, 4, stride=4)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_other_convolutions(kind, embedded):
    embedding = timm()
    embedding.proj = CONVOLUTIONS[kind]()
    assert same_as_the_original(accelerated(embedding), random(2, 3, 24, 24, dtype=DTYPE))
    assert embedded == []


@pytest.mark.parametrize("options", [{"embed_dim": 520}, {"patch_size": 12}, {"output_fmt": "NCHW"}], ids=str)
def test_embeddings_that_are_not_worth_it_or_of_another_form(options, embedded):
    model = accelerated(timm(**{"norm_layer": None, **options}))
    assert same_as_the_original(model, random(1, 3, 24, 24, dtype=DTYPE))
    assert embedded == []


# What changes after accelerate(), also after calls that were fused.


def test_tokens_that_are_masked():
    embedding = huggingface("Swin", "Embeddings")
    model, x = accelerated(embedding), random(2, 3, 24, 24, dtype=DTYPE)
    given(model, x)
    embedding.mask_token = random(1, 1, 48, dtype=DTYPE)
    mask = torch.arange(72, device=TRITON_DEVICE).view(2, 36) % 3 == 0
    with torch.no_grad():
        found = embedding(x, bool_masked_pos=mask)[0]
    assert (found[mask] == embedding.mask_token).all()
    assert (found[~mask] != 0).any()


def test_edits_are_followed(embedded):
    registry.clear()
    model, x = accelerated(timm()), random(2, 3, 24, 24, dtype=DTYPE)
    given(model, x)
    embedding = model.embedding
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.data = parameter.data + 0.1
        embedding.proj.bias.mul_(2)
    embedding.norm.eps = 0.1
    embedding.proj.weight = nn.Parameter(embedding.proj.weight.detach() * 1.5)
    found = given(model, x)
    with swinaccel.disabled():
        helpers.assert_close(found, given(model, x), TOLERANCE)
    embedding.norm = nn.Identity()  # which was not proven, and is by the next accelerate()
    embedding.proj.bias = None
    given(model, x)
    assert len(embedded) == 2
    swinaccel.accelerate(model, backend="triton")
    found = given(model, x)
    assert len(embedded) == 3
    with swinaccel.disabled():
        helpers.assert_close(found, given(model, x), TOLERANCE)


def test_another_size_is_followed(embedded):
    model = helpers.timm_v1(img_size=56).to(TRITON_DEVICE, DTYPE)
    swinaccel.accelerate(model, backend="triton")
    given(model.patch_embed, random(1, 3, 56, 56, dtype=DTYPE))
    model.patch_embed.set_input_size((28, 84))
    given(model.patch_embed, random(1, 3, 28, 84, dtype=DTYPE))
    assert embedded == [(1, 3, 56, 56), (1, 3, 28, 84)]
    with pytest.raises(AssertionError):
        given(model.patch_embed, random(1, 3, 56, 56, dtype=DTYPE))
