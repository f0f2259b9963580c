"""The torch backend on CPUs: images walked a few at a time, and MLPs in parts that stay in cache."""

from __future__ import annotations

import copy

import helpers
import pytest
import timm
import torch
from helpers import check
from torch import nn
from torch.nn.utils import prune

import swinaccel
from swinaccel.backends.torch import block as torch_block
from swinaccel.backends.torch import products
from swinaccel.backends.torch import window as torch_backend
from swinaccel.runtime import block as fused

KEEPS_VERDICTS = True


@pytest.fixture
def small(monkeypatch):
    """Parts of few rows, so that tiny models have several; counts MLPs in parts."""
    calls = []
    rest = torch_block.rest
    monkeypatch.setattr(torch_block, "fewest_rows", 10)
    monkeypatch.setattr(torch_block, "hidden_numbers", 10)
    monkeypatch.setattr(torch_backend, "part_rows", 90)
    monkeypatch.setattr(torch_block, "rest", lambda *arguments: calls.append(None) or rest(*arguments))
    return calls


def image(size, batch=3):
    return torch.randn(batch, 3, *size)


def features(model):
    """The model without its head: of a few logits, errors have no statistics."""
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(0, "")
        return model
    return nn.Sequential(model.features, model.norm)


MODELS = {
    "hf-swin": (lambda: helpers.huggingface("Swin"), (44, 36), 4),
    "hf-swinv2": (lambda: helpers.huggingface("Swinv2"), (44, 36), 4),
    "hf-donut": (lambda: helpers.huggingface("DonutSwin"), (32, 32), 4),
    "timm-v1": (lambda: features(helpers.timm_v1(window=4, img_size=64)), (64, 64), 3),
    "timm-v2": (lambda: features(helpers.timm_v2(window=4)), (64, 64), 3),
    "torchvision-v1": (lambda: features(helpers.torchvision_model()), (44, 36), 4),
    "torchvision-v2": (lambda: features(helpers.torchvision_model(v2=True)), (44, 36), 4),
}


@pytest.mark.parametrize("scores", [0, 1 << 30], ids=["a call a group", "masks written out"])
@pytest.mark.parametrize("name", MODELS)
def test_parts_are_the_whole(name, scores, small, monkeypatch):
    monkeypatch.setattr(torch_backend, "few_scores", scores)
    make, size, count = MODELS[name]
    outputs = []
    for seed in range(3):  # sums in another order: the size of their errors is luck of the draw
        model, x = helpers.randomize(make(), seed), image(size)
        twin, found, expected = helpers.both(model, x)
        helpers.assert_accelerated(twin, count)
        assert len(small) == count * (seed + 1)
        helpers.assert_close(found, expected)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
        outputs.append([helpers.tensors(output)[0].flatten() for output in (found, expected, exact)])
    helpers.assert_no_worse(*(torch.cat(parts) for parts in zip(*outputs, strict=True)), torch.float32)


@pytest.mark.parametrize("kind", ["Swin", "Swinv2"])
@pytest.mark.parametrize("bias", ["fc1", "fc2"])
def test_mlps_without_bias(kind, bias, small):
    model = helpers.huggingface_layer(kind, shift=2)
    block = swinaccel.families.match(model)[0].block(model)
    getattr(block, bias).bias = None
    check(model, torch.randn(3, 64, 16), (8, 8), count=1)
    assert small


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("Swin", torch.float16),  # Swinv2's own gives NaN
        ("Swin", torch.bfloat16),
        ("Swinv2", torch.bfloat16),
        ("Swin", torch.float64),
        ("Swinv2", torch.float64),
    ],
    ids=str,
)
def test_other_dtypes_walk_images_alone(kind, dtype, small):
    """Sums in place round more in half precision."""
    model, x = helpers.huggingface_layer(kind, shift=2), torch.randn(3, 90, 16, dtype=torch.float64)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x, (9, 10))[0]
    twin, found, expected = helpers.both(model.to(dtype), x.to(dtype), (9, 10))
    helpers.assert_accelerated(twin, 1)
    assert not small
    if dtype == torch.float64:
        helpers.assert_close(found, expected, 1e-12)
    else:
        helpers.assert_no_worse(found[0], expected[0], exact, dtype)


def test_attention_alone(small):
    check(helpers.huggingface("Swin"), image((44, 36)), count=4, fuse="attention")
    assert not small


@pytest.mark.parametrize("where", ["mlp", "layernorm_after"])
def test_a_watched_module_is_called_once_and_whole(where, small):
    model = swinaccel.accelerate(helpers.huggingface_layer("Swin", shift=2), backend="torch")
    seen = []
    where = where if hasattr(model, where) else "intermediate"  # in transformers 4
    getattr(model, where).register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    with torch.no_grad():
        model(torch.randn(3, 64, 16), (8, 8))
    assert [shape[:2] for shape in seen] == [(3, 64)]
    assert not small


class Other(nn.Linear):
    """As a quantised layer, what it does to a token may depend on all of them."""


def test_a_projection_that_may_see_all_tokens_gets_all_of_them(small, monkeypatch):
    model = helpers.huggingface_layer("Swin", shift=2)
    assert torch_backend.is_plain(model.attention)
    linears = [(name, one) for name, one in model.attention.named_modules() if isinstance(one, nn.Linear)]
    name, linear = linears[-1]
    other = Other(16, 16)
    other.load_state_dict(linear.state_dict())
    model.attention.set_submodule(name, other)
    assert not torch_backend.is_plain(model.attention)
    images, windows = [], torch_backend._windows
    monkeypatch.setattr(torch_backend, "_windows", lambda _, x, *rest: images.append(len(x)) or windows(_, x, *rest))
    check(model, torch.randn(3, 64, 16), (8, 8), count=1)
    assert images == [3]


def test_masks_of_one_call_are_not_kept(small, monkeypatch):
    """Bias and masks are put together for the parts of a call, and anew for the next."""
    monkeypatch.setattr(torch_backend, "few_scores", 1 << 30)
    model = helpers.huggingface_layer("Swin", shift=2)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    x = torch.randn(3, 64, 16)
    with torch.no_grad():
        for _ in range(2):
            helpers.assert_close(twin(x, (8, 8)), model(x, (8, 8)))
            drawn = torch.randn(49, 2)
            for one in (model, twin):
                (table,) = (p for name, p in one.named_parameters() if name.endswith("relative_position_bias_table"))
                table.data.copy_(drawn)


def test_gradients_are_recorded_for_the_whole_batch(small):
    model = helpers.huggingface_layer("Swin", shift=2).double()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    x, leaves = torch.randn(3, 90, 16, dtype=torch.float64), []
    for one in (model, twin):
        leaves.append(x.clone().requires_grad_())
        one(leaves[-1], (9, 10))[0].square().sum().backward()
    helpers.assert_accelerated(twin, 1)
    helpers.assert_close(leaves[1].grad, leaves[0].grad, 1e-9)


@pytest.mark.parametrize("has_onednn", [False, True])
def test_worth(monkeypatch, has_onednn):
    """Without GELU in an epilogue, one part is no gain: its rows are those of the module, and so are its products."""
    monkeypatch.setattr(torch_block, "USES_ONEDNN", has_onednn)
    assert torch_block.is_worth(torch.empty(1, 3136, 96), True)
    assert torch_block.is_worth(torch.empty(1, 784, 192), True) == has_onednn
    assert torch_block.is_worth(torch.empty(8, 784, 192), True)
    assert torch_block.is_worth(torch.empty(8, 784, 192), False) == has_onednn
    assert not torch_block.is_worth(torch.empty(1, 3136, 96, dtype=torch.bfloat16), True)
    assert not torch_block.is_worth(torch.empty(0, 3136, 96), True)


class Minimum(nn.Module):
    def forward(self, x):
        return torch.minimum(x, torch.full_like(x, 60.0))


class WithoutNan(nn.Module):
    def forward(self, x):
        return torch.nan_to_num(x, 0.0, torch.inf, -torch.inf)


IDLE = {
    "hardtanh": (lambda: nn.Hardtanh(-60.0, 60.0), False),
    "far": (lambda: nn.Hardtanh(-3e4, 3e4), False),
    "shrink": (lambda: nn.Hardshrink(1e-6), False),
    "threshold": (lambda: nn.Threshold(-1e30, -1e30), False),
    "minimum": (Minimum, False),
    "nan": (WithoutNan, False),
    "identity": (nn.Identity, True),
    "dropout": (lambda: nn.Dropout(0.5), True),
    "droppath": (lambda: timm.layers.DropPath(0.5), True),
}


@pytest.mark.parametrize("kind", IDLE)
def test_what_passes_ordinary_numbers_on_may_still_limit_others(kind):
    make, is_idle = IDLE[kind]
    assert fused.does_nothing(make().eval()) == is_idle


def test_limits_within_an_mlp(small):
    """A dropout's place is taken by what limits activations, which here are large."""
    block = helpers.microsoft_block((8, 8), shift=2).eval()
    block.mlp.drop = nn.Hardtanh(-60.0, 60.0)
    with torch.no_grad():
        for parameter in block.mlp.parameters():
            parameter.mul_(60)
        x = torch.randn(2, 64, 16)
        expected = block(x)
        swinaccel.accelerate(block)
        assert (block(x) - expected).abs().max() < 0.1  # it was thousands
        assert not small


@pytest.fixture
def multiplied(monkeypatch):
    """Weights that oneDNN's products were asked for, on any CPU."""
    asked = []
    linear = products.linear
    monkeypatch.setattr(torch_block, "USES_ONEDNN", True)
    monkeypatch.setattr(products, "linear", lambda x, weight, bias: asked.append(weight) or linear(x, weight, bias))
    return asked


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for name in MODELS for size in ((64, 64), (56, 40)) if size == (64, 64) or "timm" not in name],
)
def test_mergings(name, size, multiplied):
    model = MODELS[name][0]().eval()
    shapes = {one.reduction.weight.shape for one in model.modules() if hasattr(one, "reduction")}
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    x = image(size)
    with torch.no_grad():
        for _ in range(2):
            multiplied.clear()
            found, expected = (one(x) if isinstance(one(x), torch.Tensor) else one(x)[0] for one in (twin, model))
            helpers.assert_close(found, expected)
            assert shapes <= {weight.shape for weight in multiplied}
    multiplied.clear()
    twin(x)  # with gradients, by its own layers
    assert not shapes & {weight.shape for weight in multiplied}


@pytest.mark.parametrize("name", ["hf-swin", "hf-swinv2", "hf-donut"])
def test_products_of_three_layers(name, multiplied):
    make, size, _ = MODELS[name]
    model = make().eval()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    x = image(size)
    with torch.no_grad():
        twin(x)
        multiplied.clear()
        helpers.assert_close(twin(x)[0], model(x)[0])
        asked = {id(weight) for weight in multiplied}
        words = "query", "key", "value", "q_proj", "k_proj", "v_proj"
        layers = [one for part, one in twin.named_modules() if part.rpartition(".")[2] in words]
        assert len(layers) >= 3
        assert all(id(layer.weight) in asked for layer in layers)
        layers[0].weight.data.mul_(2)
        dict(model.named_modules())[next(part for part, one in twin.named_modules() if one is layers[0])].weight.mul_(2)
        helpers.assert_close(twin(x)[0], model(x)[0])
        handle = layers[2].register_forward_hook(lambda module, given, out: out + 1)
        assert (twin(x)[0] - model(x)[0]).abs().max() > 1e-3
        handle.remove()
        helpers.assert_close(twin(x)[0], model(x)[0])


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.2)


def compressed(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [pruned, compressed])
@pytest.mark.parametrize("place", ["downsample.reduction", "query", "attn.qkv", "q_proj"])
def test_unusual_weights(place, change, when, multiplied):
    """Weights that are made anew at each call, in inference mode too, and such as have no strides."""
    model = MODELS["timm-v1" if place == "attn.qkv" else "hf-swin"][0]().eval()
    twin = copy.deepcopy(model)
    layers = [next((part for name, part in one.named_modules() if name.endswith(place)), None) for one in (model, twin)]
    if None in layers:
        pytest.skip(f"another version of the library has no {place}")
    x = image((64, 64))
    for turn in range(6):
        if turn == (0 if when == "before" else 2):
            [change(layer) for layer in layers]
        if turn == 0:
            swinaccel.accelerate(twin, backend="torch")
        # Sparse weights have no inference mode in PyTorch.
        with torch.inference_mode() if turn in (3, 4) and change is pruned else torch.no_grad():
            found, expected = twin(x), model(x)
        both = [one if isinstance(one, torch.Tensor) else one[0] for one in (found, expected)]
        helpers.assert_close(*both)
