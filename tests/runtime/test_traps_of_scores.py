"""Traps of scores: masks, softmax, scales and biases; see traps.py for the numbers."""

from __future__ import annotations

import copy
import importlib

import helpers
import microsoft_models
import pytest
import torch
from helpers import both_backends, check, check_fallback, randomize, versions
from torch import nn
from traps import TRANSFORMERS_5

import swinaccel


def opposed(model, names=("qkv",), dim=16):
    """q = x and k = -x, so that tokens which look away from each other score highest."""
    with torch.no_grad():
        identity = torch.eye(dim)
        if len(names) == 1:
            model.get_submodule(names[0]).weight[: 2 * dim] = torch.cat((identity, -identity))
        else:
            model.get_submodule(names[0]).weight.copy_(identity)
            model.get_submodule(names[1]).weight.copy_(-identity)
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                parameter.fill_(10.0)
            elif name.endswith(("q_bias", "qkv.bias", "query.bias", "key.bias")):
                parameter.zero_()
    return model


def opposed_image(size=(8, 8), dim=16):
    """All tokens point one way, but for the rows that a shift of 2 wraps around, which point the other way."""
    image = torch.ones(1, *size, dim) + 0.1 * torch.randn(1, *size, dim)
    image[:, :2] *= -1
    return image


@both_backends
@pytest.mark.parametrize("kind", ["timm-v2", "torchvision-v2", "microsoft-v2"])
def test_trap_15_mask_of_100_leaks(kind, backend):
    """Cosine scores reach ±100 and the bias 16, so that -100 does not keep regions apart, as -inf would."""
    x = opposed_image()
    if kind == "timm-v2":
        model = opposed(helpers.timm_block((8, 8), shift=2, v2=True), ("attn.qkv",))
        unmasked = copy.deepcopy(model)
        unmasked.attn_mask.masked_fill_(unmasked.attn_mask != 0, float("-inf"))
    elif kind == "torchvision-v2":
        model, unmasked = opposed(helpers.torchvision_attention(shift=(2, 2), v2=True)), None
    else:
        model = opposed(helpers.microsoft_block((8, 8), shift=2, v2=True), ("attn.qkv",))
        unmasked, x = copy.deepcopy(model), x.flatten(1, 2)
        unmasked.attn_mask.masked_fill_(unmasked.attn_mask != 0, float("-inf"))
    found = check(model, x, backend=backend, tolerance=1e-4)
    if unmasked is not None:
        with torch.no_grad():
            assert helpers.difference(unmasked(x), found.cpu()) > 1e-2


@both_backends
def test_trap_15_mask_of_100_leaks_in_v1(backend):
    model = helpers.torchvision_attention(shift=(2, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 2)
    check(model, torch.randn(2, 8, 8, 16), backend=backend, tolerance=1e-4)


@both_backends
def test_trap_16_swinv2_of_hugging_face_adds_its_mask_twice(backend):
    layer = opposed(helpers.huggingface_layer("Swinv2", shift=2), ("attention.self.query", "attention.self.key"))
    x = opposed_image().flatten(1, 2)
    check(layer, x, (8, 8), backend=backend, tolerance=1e-4)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_trap_18_mask_buffers_follow_the_models_dtype(dtype, backend):
    helpers.skip_interpreted_bfloat16(backend, dtype)
    for model, shape in (
        (helpers.microsoft_block((8, 8), shift=2), (2, 64, 16)),
        (helpers.timm_block((8, 8), shift=2), (2, 8, 8, 16)),
    ):
        check(model.to(dtype), torch.randn(shape, dtype=dtype), backend=backend, tolerance=4 * torch.finfo(dtype).eps)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="only transformers 5 chooses among attention implementations")
def test_trap_19_eager_of_transformers_5_returns_weights():
    layer = helpers.huggingface_layer("Swin", shift=2)
    layer.attention.config._attn_implementation = "eager"
    out = check_fallback(layer, torch.randn(2, 64, 16), (8, 8), reason="attention weights")
    assert out[1].shape == (8, 2, 16, 16)


@pytest.mark.parametrize(
    "kind",
    [
        "Swinv2",
        "DonutSwin",
        "MaskFormerSwin",
        pytest.param("Swin", marks=pytest.mark.skipif(TRANSFORMERS_5, reason="asks in another way")),
    ],
)
def test_trap_20_attention_weights_run_the_original(kind):
    layer = helpers.huggingface_layer(kind, shift=2)
    out = check_fallback(
        layer, torch.randn(2, 64, 16), (8, 8), reason="attention weights", arguments={"output_attentions": True}
    )
    assert out[1].shape == (8, 2, 16, 16)


def test_trap_20_attention_weights_of_a_whole_model():
    model = helpers.huggingface("Swinv2")
    x = torch.randn(1, 3, 32, 32)
    out = check_fallback(model, x, reason="attention weights", arguments={"output_attentions": True})
    assert len(out.attentions) == 2


@pytest.mark.skipif(TRANSFORMERS_5, reason="transformers 5 has no head_mask")
def test_trap_21_head_mask():
    layer = helpers.huggingface_layer("Swin", shift=2)
    x = torch.randn(2, 64, 16)
    head_mask = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    found = check_fallback(layer, x, (8, 8), head_mask, reason="head_mask")
    assert helpers.difference(check(layer, x, (8, 8)), found) > 1e-2


@pytest.mark.skipif(TRANSFORMERS_5, reason="transformers 5 does not prune heads")
def test_trap_21_pruned_heads():
    """The original cannot run then either: its bias table keeps all heads."""
    layer = helpers.huggingface_layer("Swin", shift=2, heads=4)
    layer.attention.prune_heads([0])
    swinaccel.accelerate(layer, backend="torch")
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 64, 16), (8, 8))


@both_backends
def test_trap_21_heads_pruned_in_the_weights_alone(backend):
    """What the layers say of their sizes is out of date."""
    block = helpers.timm_block((8, 8), shift=2)
    attn, rows = block.attn, torch.arange(48).view(3, 16)[:, :8].flatten()
    attn.num_heads = 1
    for one, name in ((attn.qkv, "weight"), (attn.qkv, "bias")):
        setattr(one, name, torch.nn.Parameter(getattr(one, name).detach()[rows].clone()))
    attn.proj.weight = torch.nn.Parameter(attn.proj.weight.detach()[:, :8].clone())
    attn.relative_position_bias_table = torch.nn.Parameter(attn.relative_position_bias_table.detach()[:, :1].clone())
    helpers.check(block, torch.randn(2, 8, 8, 16), backend=backend, count=1)


@both_backends
def test_trap_21_a_projection_of_more_than_its_heads(backend):
    model = helpers.timm_block((8, 8), shift=2)
    model = swinaccel.accelerate(model.to(helpers.DEVICES[backend]), backend=backend)
    model.attn.qkv = torch.nn.Linear(16, 60, device=helpers.DEVICES[backend])
    x = torch.randn(2, 8, 8, 16, device=helpers.DEVICES[backend])
    with torch.no_grad(), pytest.raises(RuntimeError) as found:
        model(x)
    with swinaccel.disabled(), torch.no_grad(), pytest.raises(RuntimeError) as expected:
        model(x)
    assert str(found.value) == str(expected.value)


@both_backends
@pytest.mark.parametrize("kind", ["timm-v2", "torchvision-v2", "hf-swinv2"])
def test_trap_22_zero_keys_in_half(kind, backend):
    """Padding keys are exact zeros and 1e-12 is 0 in fp16: the original gives NaN, we need not."""
    device = helpers.DEVICES[backend]
    x = torch.randn(1, 9, 9, 16, device=device, dtype=torch.float16)
    arguments = ()
    if kind == "timm-v2":
        model = helpers.timm_block((9, 9), shift=2, v2=True)
    elif kind == "torchvision-v2":
        model = helpers.torchvision_attention(shift=(2, 2), v2=True)
    else:
        model, x, arguments = helpers.huggingface_layer("Swinv2", shift=2), x.flatten(1, 2), ((9, 9),)
    swinaccel.accelerate(model.half().to(device), backend=backend)
    with torch.no_grad():
        assert all(bool(out.isfinite().all()) for out in helpers.tensors(model(x, *arguments)))
    helpers.assert_accelerated(model)


@both_backends
@pytest.mark.parametrize("value", [10.0, -5.0])
@pytest.mark.parametrize("kind", ["timm-v2", "torchvision-v2", "microsoft-v2", "hf-swinv2"])
def test_trap_23_logit_scale_is_clamped_from_above_only(kind, value, backend):
    inputs = (torch.randn(2, 8, 8, 16),)
    if kind == "timm-v2":
        model = helpers.timm_block((8, 8), shift=2, v2=True)
    elif kind == "torchvision-v2":
        model = helpers.torchvision_attention(shift=(2, 2), v2=True)
    elif kind == "microsoft-v2":
        model, inputs = helpers.microsoft_block((8, 8), shift=2, v2=True), (inputs[0].flatten(1, 2),)
    else:
        model, inputs = helpers.huggingface_layer("Swinv2", shift=2), (inputs[0].flatten(1, 2), (8, 8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                parameter.fill_(value)
    check(model, *inputs, backend=backend, tolerance=1e-4)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_trap_24_full_scale_in_low_precision(dtype, backend):
    """At scale 100 rounding shows in the first digits, of the original's too: fp64 judges."""
    helpers.skip_interpreted_bfloat16(backend, dtype)
    model = helpers.timm_block((8, 8), shift=2, v2=True)
    x = torch.randn(4, 8, 8, 16)
    with torch.no_grad():
        model.attn.logit_scale.fill_(10.0)
        model, x = model.to(dtype), x.to(dtype)
        exact = copy.deepcopy(model).double()(x.double())
    _, found, expected = helpers.both(model, x, backend=backend)
    helpers.assert_no_worse(found, expected, exact, dtype)


@both_backends
@versions
def test_trap_25_parameters_are_read_at_each_call(v2, backend):
    device = helpers.DEVICES[backend]
    model = helpers.timm_block((8, 8), shift=2, v2=v2).to(device)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend=backend)
    x = torch.randn(1, 8, 8, 16, device=device)
    for seed in range(1, 4):
        for one in (model, twin):
            randomize(one, seed)
        if seed == 3:  # past every version counter
            for one in (model, twin):
                for parameter in one.attn.parameters():
                    parameter.data.mul_(0.5)
        with torch.no_grad():
            helpers.assert_close(twin(x), model(x))
    helpers.assert_accelerated(twin, 1)


@versions
def test_trap_25_set_input_size_replaces_parameters(v2):
    model = helpers.timm_v2(window=4) if v2 else helpers.timm_v1(img_size=64, window=4)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        twin(x)
        for one in (model, twin):
            one.set_input_size(img_size=(96, 80), window_size=(8, 5))
        x = torch.randn(1, 3, 96, 80)
        helpers.assert_close(twin(x), model(x), 1e-4)
    helpers.assert_accelerated(twin, 3)


def test_trap_26_continuous_bias_with_dropout_inside():
    """swinv2_cr drops out inside its bias MLP while training: whatever runs must draw the same."""
    timm = importlib.import_module("timm")
    model = timm.create_model(
        "swinv2_cr_tiny_224", img_size=64, window_size=4, depths=(2, 1), num_heads=(2, 4), embed_dim=32, num_classes=5
    )
    twin = swinaccel.accelerate(copy.deepcopy(randomize(model)), backend="torch")
    x = torch.randn(1, 3, 64, 64)
    outs = []
    for one in (model.train(), twin.train()):
        torch.manual_seed(0)
        outs.append(one(x))
    helpers.assert_close(outs[1], outs[0])


class MoeAttention(microsoft_models.WindowAttentionV2):
    """Of Swin-MoE: a position MLP as in V2, but without the sigmoid, and scores without the cosine."""

    def __init__(self, dim, window_size, num_heads):
        super().__init__(dim, window_size, num_heads, qkv_bias=False)
        del self.logit_scale
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)

    def packed(self, x):
        return self.qkv(x)

    def scores(self, q, k):
        bias = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return (q * self.scale) @ k.mT + bias[self.relative_position_index].permute(2, 0, 1)


def test_trap_27_position_mlp_without_cosine():
    model = helpers.microsoft_block((8, 8), shift=2)
    model.attn = MoeAttention(16, (4, 4), 2)
    _, found, expected = helpers.both(randomize(model), torch.randn(2, 64, 16))
    helpers.assert_close(found, expected)


@both_backends
@pytest.mark.parametrize("kind", ["timm", "microsoft", "hf"])
def test_trap_28_pretrained_window_size(kind, backend):
    """It changes the coordinates that the bias is computed from."""
    if kind == "timm":
        model = helpers.timm_block((8, 8), shift=2, v2=True, pretrained_window_size=(12, 12))
        other, inputs = helpers.timm_block((8, 8), shift=2, v2=True), (torch.randn(2, 8, 8, 16),)
    elif kind == "microsoft":
        model = helpers.microsoft_block((8, 8), shift=2, v2=True, pretrained_window_size=(12, 12))
        other, inputs = helpers.microsoft_block((8, 8), shift=2, v2=True), (torch.randn(2, 64, 16),)
    else:
        library = importlib.import_module("transformers.models.swinv2.modeling_swinv2")
        layer = helpers.huggingface_layer("Swinv2", shift=2)
        model = randomize(
            library.Swinv2Layer(
                importlib.import_module("transformers").Swinv2Config(window_size=4), 16, (8, 8), 2, 0.0, 2, 12
            )
        )
        other, inputs = layer, (torch.randn(2, 64, 16), (8, 8))
    found = check(model, *inputs, backend=backend)
    assert helpers.difference(check(other, *inputs, backend=backend), found) > 1e-3


@both_backends
@versions
def test_trap_29_window_of_one_token(v2, backend):
    """torchvision's V2 computes 0/0 there; what the original gives, NaN included, is what comes out."""
    model = helpers.torchvision_attention(window=(1, 1), v2=v2)
    _, found, expected = helpers.both(model, torch.randn(1, 3, 3, 16), backend=backend)
    assert torch.allclose(found, expected, atol=1e-6, equal_nan=True)


@both_backends
def test_trap_30_qk_scale(backend):
    model = helpers.microsoft_block((8, 8), shift=2, qk_scale=0.5)
    check(model, torch.randn(2, 64, 16), backend=backend)


def test_trap_30_scale_is_read_at_each_call():
    model = helpers.timm_block((8, 8), shift=2)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    model.attn.scale = twin.attn.scale = 1.25
    x = torch.randn(1, 8, 8, 16)
    with torch.no_grad():
        helpers.assert_close(twin(x), model(x))


@both_backends
@versions
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_trap_49_autocast_keeps_scores_in_fp32(dtype, v2, backend):
    """Tables are fp32 parameters and lift the scores to fp32, so that the original rounds little there."""
    helpers.skip_interpreted_bfloat16(backend, dtype)
    device = helpers.DEVICES[backend]
    model = helpers.timm_block((8, 8), shift=2, v2=v2)
    with torch.no_grad():
        model.attn.qkv.weight.mul_(2)
    x = torch.randn(4, 8, 8, 16)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast(device, dtype):
        _, found, expected = helpers.both(model, x, backend=backend)
    assert found.dtype == expected.dtype
    helpers.assert_no_worse(found, expected, exact, dtype)
