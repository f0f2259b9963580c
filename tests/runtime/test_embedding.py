"""Patch embeddings in inference: the kernel against plain PyTorch, modules against their originals, and everything
that must leave an embedding to its own forward."""

from __future__ import annotations

import copy
import importlib
from contextlib import suppress

import helpers
import microsoft_models
import pytest
import torch
import torch.nn.functional as F
from helpers import TRITON_DEVICE
from torch import nn

import swinaccel
from swinaccel import ops, patching
from swinaccel.backends.triton import block as kernels
from swinaccel.runtime import neighbours, traced
from swinaccel.trust.registry import registry

KEEPS_VERDICTS = True

# Convolutions of fp32 stay cuDNN's, which may use TF32.
HALVES = [torch.float16, torch.bfloat16] if TRITON_DEVICE == "cuda" else [torch.float16]
DTYPES = HALVES if TRITON_DEVICE == "cuda" else [*HALVES, torch.float32]
DTYPE = DTYPES[-1]
TOLERANCE = {torch.float32: 1e-6}.get(DTYPE, 2**-7)


@pytest.fixture
def embedded(monkeypatch):
    """Shapes of the images that the kernel embedded; a kernel that fails is none."""
    shapes, plain = [], kernels.embed

    def embed(x, *rest):
        shapes.append(tuple(x.shape))
        return plain(x, *rest)

    monkeypatch.setattr(kernels, "embed", embed)
    yield shapes
    assert not ops.has_failures()


def random(*shape, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(TRITON_DEVICE, dtype)


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


# Modules: each in a model with an attention, without which none is touched.


class Model(nn.Module):
    """An embedding, and a block that is not called."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding
        self.block = helpers.timm_block((8, 8))

    def forward(self, x):
        return self.embedding(x)


def timm(kind=None, **options):
    from timm.layers import PatchEmbed

    settings = {"img_size": 24, "patch_size": 4, "embed_dim": 48, "norm_layer": nn.LayerNorm, **options}
    if "flatten" not in settings:
        settings.setdefault("output_fmt", "NHWC")
    return (kind or PatchEmbed)(**settings)


def huggingface(kind="Swin", part="PatchEmbeddings", **options):
    folder = {"Swin": "swin", "Swinv2": "swinv2", "DonutSwin": "donut", "MaskFormerSwin": "maskformer"}[kind]
    stem = {"donut": "donut_swin", "maskformer": "maskformer_swin"}.get(folder, folder)
    library = importlib.import_module(f"transformers.models.{folder}.modeling_{stem}")
    config = importlib.import_module("transformers").SwinConfig(image_size=24, embed_dim=48, **options)
    return getattr(library, f"{kind}{part}")(config)


def microsoft(**options):
    return microsoft_models.PatchEmbed(24, embed_dim=48, **options)


# name: (embedding, shape of an image)
EMBEDDINGS = {
    "timm": (timm, (2, 3, 24, 24)),
    "timm-no-norm": (lambda: timm(norm_layer=None), (2, 3, 24, 24)),
    "timm-no-bias": (lambda: timm(bias=False), (2, 3, 24, 24)),
    "timm-any-size": (lambda: timm(strict_img_size=False), (2, 3, 12, 32)),
    "timm-no-size": (lambda: timm(img_size=None), (3, 3, 12, 32)),
    "timm-padding": (lambda: timm(strict_img_size=False, dynamic_img_pad=True), (2, 3, 12, 32)),
    "timm-tokens": (lambda: timm(output_fmt="NLC"), (2, 3, 24, 24)),
    "timm-flat": (lambda: timm(flatten=True), (2, 3, 24, 24)),
    "timm-rectangular": (lambda: timm(img_size=(24, 30), patch_size=(4, 6), in_chans=2), (2, 2, 24, 30)),
    "microsoft": (microsoft, (2, 3, 24, 24)),
    "microsoft-norm": (lambda: microsoft(norm_layer=nn.LayerNorm), (2, 3, 24, 24)),
    "hf-swin": (huggingface, (2, 3, 20, 36)),
    "hf-swinv2": (lambda: huggingface("Swinv2"), (2, 3, 20, 36)),
    "hf-donut": (lambda: huggingface("DonutSwin"), (2, 3, 20, 36)),
    "hf-maskformer": (lambda: huggingface("MaskFormerSwin"), (2, 3, 20, 36)),
    "hf-swin-norm": (lambda: huggingface("Swin", "Embeddings"), (2, 3, 20, 36)),
    "hf-swinv2-norm": (lambda: huggingface("Swinv2", "Embeddings"), (2, 3, 20, 36)),
    "hf-donut-norm": (lambda: huggingface("DonutSwin", "Embeddings"), (2, 3, 20, 36)),
}


def accelerated(embedding, dtype=DTYPE, **options):
    model = helpers.randomize(Model(embedding)).to(TRITON_DEVICE, dtype)
    return swinaccel.accelerate(model, backend="triton", **options)


def given(model, x):
    with torch.no_grad():
        return model(x)


def same_as_the_original(model, x):
    """Output for output, to the last bit."""
    found = given(model, x)
    with swinaccel.disabled():
        expected = given(model, x)
    assert type(found) is type(expected)
    pairs = zip(helpers.tensors(found), helpers.tensors(expected), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


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


# Calls.


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("change", [channels_last, lambda x: x.mT, lambda x: x[:, :, ::2, ::2]])
def test_other_layouts_of_memory(change, embedded):
    model = accelerated(timm(strict_img_size=False))
    assert same_as_the_original(model, change(random(2, 3, 24, 24, dtype=DTYPE)))
    assert embedded == []


ERRORS = {
    "strict-size": (timm, (2, 3, 24, 28)),
    "cut": (lambda: timm(strict_img_size=False), (2, 3, 24, 26)),
    "microsoft-size": (microsoft, (2, 3, 28, 24)),
    "channels": (timm, (2, 4, 24, 24)),
    "three-axes": (timm, (3, 24, 24)),
    "no-axes": (timm, ()),
    "empty": (lambda: timm(strict_img_size=False), (2, 3, 0, 24)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_the_originals(name, embedded):
    make, shape = ERRORS[name]
    model, x = accelerated(make()), torch.randn(shape).to(TRITON_DEVICE, DTYPE)
    with swinaccel.disabled(), pytest.raises((AssertionError, RuntimeError, ValueError)) as expected:
        given(model, x)
    with pytest.raises(type(expected.value)) as found:
        given(model, x)
    assert str(found.value) == str(expected.value)
    assert embedded == []


@pytest.mark.parametrize(
    "make", [huggingface, lambda: timm(strict_img_size=False, dynamic_img_pad=True), lambda: timm(img_size=None)]
)
def test_images_that_are_padded_or_cut(make, embedded):
    model = accelerated(make())
    assert same_as_the_original(model, random(2, 3, 22, 27, dtype=DTYPE))
    assert embedded == []


def test_an_empty_batch(embedded):
    model = accelerated(timm())
    assert same_as_the_original(model, random(0, 3, 24, 24, dtype=DTYPE))
    assert embedded == [(0, 3, 24, 24)]


def test_other_dtypes(embedded):
    model, x = accelerated(timm(), torch.float16), random(2, 3, 24, 24)
    with pytest.raises(RuntimeError):
        given(model, x)
    model.double()
    assert same_as_the_original(model, x.double())
    assert embedded == []


@pytest.mark.gpu
def test_fp32_on_gpus_is_left_alone(embedded):
    model = accelerated(timm(), torch.float32)
    assert same_as_the_original(model, random(2, 3, 24, 24))
    assert embedded == []


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_training(name, autocast, embedded, monkeypatch):
    """As a product of patches, with every gradient, against fp64; under autocast as little worse as the original."""
    make, shape = EMBEDDINGS[name]
    model, x = accelerated(make(), torch.float32).train(), random(*shape)
    half, products, plain = HALVES[-1], [], neighbours.multiplied
    monkeypatch.setattr(neighbours, "multiplied", lambda *args: products.append(args) or plain(*args))

    def results(model, x, enabled):
        x = x.detach().requires_grad_()
        with torch.autocast(TRITON_DEVICE, half, enabled=enabled):
            out = helpers.tensors(model(x))[0]
        (out.double() * torch.linspace(-3, 3, out.numel(), device=out.device).cos().view(out.shape)).sum().backward()
        found = [out.detach(), x.grad, *(parameter.grad for parameter in model.embedding.parameters())]
        model.zero_grad(set_to_none=True)
        return found

    found = results(model, x, autocast)
    assert len(products) == 1
    with swinaccel.disabled():
        expected = results(model, x, autocast)
        exact = results(copy.deepcopy(model).double(), x.double(), False)
    assert len(products) == 1
    errors = []
    for one, other, third in zip(found, expected, exact, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if not autocast:
            helpers.assert_close(one.double(), third, 1e-4 if TRITON_DEVICE == "cuda" else 1e-5)
        errors.append([(tensor.double() - third).norm() / third.norm() for tensor in (one, other)])
    if autocast:  # parameters are few, and their errors with them
        ours, own = (sum(column) for column in zip(*errors, strict=True))
        assert ours <= 1.1 * own
        assert all(one <= 2 * other + 1e-4 for one, other in errors)
    assert embedded == []


def test_parts_that_record_gradients(embedded):
    model, x = accelerated(timm()), random(2, 3, 24, 24, dtype=DTYPE)
    for part in (x, *model.embedding.parameters()):
        model.requires_grad_(False)
        part.requires_grad_()
        assert model(x).requires_grad
        x.requires_grad_(False)
    assert embedded == []
    model.requires_grad_(False)
    assert not model(x).requires_grad
    assert len(embedded) == 1
    model.requires_grad_()
    with torch.inference_mode():
        model(x)
    assert len(embedded) == 2


@pytest.fixture
def multiplied(monkeypatch):
    """Shapes of the images whose patches a compiler was given to multiply."""
    shapes, plain = [], traced.embedding_of
    monkeypatch.setattr(traced, "embedding_of", lambda facts, x: shapes.append(x.shape) or plain(facts, x))
    return shapes


ANY_SIZE = ("timm-any-size", "timm-no-size", "timm-padding")


@pytest.mark.parametrize("mode", ["inference", "training", "autocast"])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_compilers_multiply(name, mode, multiplied):
    make, shape = EMBEDDINGS[name]
    dtype = torch.float32 if mode == "autocast" else HALVES[0]
    torch.manual_seed(0)
    model, x = accelerated(make(), dtype), random(*shape, dtype=dtype)
    exact = given(copy.deepcopy(model).cpu().double(), x.cpu().double())
    with (
        torch.set_grad_enabled(mode == "training"),
        torch.autocast(TRITON_DEVICE, HALVES[0], enabled=mode == "autocast"),
    ):
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        # What code that is not known reads is not known either, and would not be seen to change; and where any size
        # is taken, a compiler is not to ask about it.
        assert multiplied == ([] if name.startswith("microsoft") or name in ANY_SIZE else [shape])
        with swinaccel.disabled():
            own = model(x)
    for one, two, three in zip(*map(helpers.tensors, (found, own, exact)), strict=True):
        assert one.dtype == two.dtype
        helpers.assert_no_worse(one, two, three, HALVES[0])
    if mode == "training":
        gradients = []
        for output in (found, own):
            model.zero_grad()
            helpers.tensors(output)[0].square().sum().backward()
            gradients.append([one.grad.clone() for one in model.embedding.parameters()])
        for one, two in zip(*gradients, strict=True):
            helpers.assert_close(one.float(), two.float(), 2e-2)


# What is done to an accelerated model before it is compiled. Eager calls see all of that, too.
@pytest.mark.parametrize("kind", ["uint8", "half", "subclass"])
def test_compilers_keep_unusual_images(kind, multiplied):
    """That autocast does not cast, or a compiler cannot look into."""
    model, x = accelerated(timm(), torch.float32), random(2, 3, 24, 24)
    if kind == "uint8":
        x = (50 * x).to(torch.uint8)
    elif kind == "half":
        x = x.half()
    else:
        x = x.as_subclass(type("Image", (torch.Tensor,), {}))
    dtype = torch.bfloat16 if kind == "half" else HALVES[0]
    with torch.no_grad(), torch.autocast(TRITON_DEVICE, dtype), suppress(Exception):
        torch.compile(model, backend="eager")(x)
    assert multiplied == []


def test_exported_sizes_stay_free(multiplied):
    model, x = accelerated(timm(img_size=None), HALVES[0]), random(2, 3, 24, 24, dtype=HALVES[0])
    sides = {axis: torch.export.Dim(name, min=8, max=512) for axis, name in ((2, "h"), (3, "w"))}
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": sides}, strict=True).module()
    other = random(2, 3, 28, 16, dtype=HALVES[0])
    helpers.assert_close(exported(other), given(model, other), 1e-2)
    assert multiplied == []


def test_a_kernel_that_fails(monkeypatch, caplog):
    model, x = accelerated(huggingface()), random(2, 3, 24, 24, dtype=DTYPE)

    def fail(*_):
        raise kernels.LaunchError("no registers")

    monkeypatch.setattr(kernels, "embed", fail)
    for _ in range(2):
        assert same_as_the_original(model, x)
    told = [record for record in caplog.records if "no registers" in record.message]
    assert told
    assert not any(isinstance(one, BaseException) for record in told for one in record.args)  # it holds the model
    ops.forget_failures()


@pytest.mark.parametrize("name", ["timm", "hf-swin"])
def test_a_copy_is_embedded_too(name, embedded):
    make, shape = EMBEDDINGS[name]
    model = copy.deepcopy(accelerated(make()))
    given(model, random(*shape, dtype=DTYPE))
    assert embedded == [shape]


@pytest.mark.gpu
def test_a_graph_replays_it(embedded):
    model, x = accelerated(timm()), random(2, 3, 24, 24, dtype=DTYPE)
    expected = given(model, x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        found = model(x)
    found.zero_()
    graph.replay()
    assert torch.equal(found, expected)
    assert len(embedded) == 2
