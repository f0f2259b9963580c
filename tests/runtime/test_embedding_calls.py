"""Calls of patch embeddings: layouts, dtypes, errors, training, compilers and graphs."""

from __future__ import annotations

import copy
from contextlib import suppress

import helpers
import pytest
import torch
from blocks import HALVES, random
from embeddings import DTYPE, EMBEDDINGS, accelerated, given, huggingface, microsoft, same_as_the_original, timm
from helpers import TRITON_DEVICE

import swinaccel
from swinaccel import ops
from swinaccel.backends.triton import block as kernels
from swinaccel.runtime import neighbours, traced

KEEPS_VERDICTS = True


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
