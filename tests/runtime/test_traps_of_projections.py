"""Traps of projections, norms and dropout; see traps.py for the numbers."""

from __future__ import annotations

import copy
import importlib

import helpers
import pytest
import torch
from helpers import both_backends, check, randomize, versions
from torch import nn
from traps import HOOKABLE, TRANSFORMERS_5, hf_check

import swinaccel


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", HOOKABLE)
def test_trap_31_hooks_on_inner_layers_fire_as_often(name, when):
    """Some read the weight past the module, and no hook fires; others call it. Either way as in the original."""
    make, attention, inputs = HOOKABLE[name]
    counts = []
    for accelerated in (False, True):
        model, fired = make(), []
        if accelerated and when == "after":
            swinaccel.accelerate(model, backend="torch")
        for label, layer in model.get_submodule(attention).named_modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda *_, label=label, fired=fired: fired.append(label))
        if accelerated and when == "before":
            swinaccel.accelerate(model, backend="torch")
        with torch.no_grad():
            model(*inputs)
        counts.append(fired)
    assert counts[1] == counts[0]


class LoRA(nn.Module):
    """A wrapper as fine-tuning libraries make them: weight and bias look through to what it wraps."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = (nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False))

    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@both_backends
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["timm", "torchvision", "torchvision-v2", "microsoft", "hf-swin", "hf-swinv2"])
def test_trap_31_wrapped_projections(name, when, padded, backend):
    """LoRA acts where the module is called, and does not where its weight is read."""
    if padded and name == "microsoft":
        pytest.skip("does not pad")
    make, attention, inputs = HOOKABLE[name]
    if padded and name == "timm":
        make = lambda: helpers.timm_block((9, 9), shift=2)  # noqa: E731
    if padded:
        inputs = (torch.randn(1, 9, 9, 16),) if len(inputs) == 1 else (torch.randn(1, 81, 16), (9, 9))
    device = helpers.DEVICES[backend]
    torch.manual_seed(0)
    inputs = tuple(value.to(device) if isinstance(value, torch.Tensor) else value for value in inputs)
    model = make().to(device)
    twin = copy.deepcopy(model)
    if when == "after":
        swinaccel.accelerate(twin, backend=backend)
    for one in (model, twin):
        parent = one.get_submodule(attention)
        for label, layer in list(parent.named_modules()):
            if isinstance(layer, nn.Linear) and label.rpartition(".")[2] in (
                "qkv",
                "proj",
                "q_proj",
                "v_proj",
                "query",
                "value",
            ):
                owner = parent.get_submodule(label.rpartition(".")[0])
                setattr(owner, label.rpartition(".")[2], randomize(LoRA(layer), 1).to(device))
    if when == "before":
        swinaccel.accelerate(twin, backend=backend)
    with torch.no_grad():
        helpers.assert_close(twin(*inputs), model(*inputs))
    (entry,) = swinaccel.report(twin).accelerated
    if when == "after":  # what comes in later is proven by the next accelerate()
        assert "after accelerate()" in entry.reason
    else:
        assert padded or not entry.fallbacks  # of padding tokens, the module tells nothing


@both_backends
def test_trap_31_separate_bias_of_timm_v2(backend):
    """qkv_bias_separate calls qkv and adds the bias afterwards."""
    timm = importlib.import_module("timm.models.swin_transformer_v2")
    for size in ((8, 8), (9, 9)):
        model = helpers.timm_block(size, shift=2, v2=True)
        attention = timm.WindowAttention(16, (4, 4), 2, qkv_bias_separate=True)
        model.attn = randomize(attention, 1)
        check(model, torch.randn(2, *size, 16), backend=backend)


@both_backends
def test_trap_32_bias_of_k_is_ignored_by_torchvision_v2(backend):
    model = helpers.torchvision_attention(shift=(2, 2), v2=True)
    x = torch.randn(2, 9, 9, 16)
    before = check(model, x, backend=backend)
    with torch.no_grad():
        model.qkv.bias[16:32] = 99.0
    helpers.assert_close(check(model, x, backend=backend), before, 1e-6)


@both_backends
@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("kind", ["timm-v2", "microsoft-v2", "hf-swinv2", "torchvision-v2"])
def test_trap_33_no_bias_of_k(kind, qkv_bias, backend):
    x = torch.randn(2, 9, 9, 16)
    if kind == "timm-v2":
        check(helpers.timm_block((9, 9), shift=2, v2=True, qkv_bias=qkv_bias), x, backend=backend)
    elif kind == "microsoft-v2":
        model = helpers.microsoft_block((9, 9), window=3, shift=1, v2=True, qkv_bias=qkv_bias)
        check(model, x.flatten(1, 2), backend=backend)
    elif kind == "hf-swinv2":
        hf_check(helpers.huggingface_layer("Swinv2", shift=2, qkv_bias=qkv_bias), (9, 9), backend)
    else:
        check(helpers.torchvision_attention(shift=(2, 2), v2=True, qkv_bias=qkv_bias), x, backend=backend)


def test_trap_33_k_bias_buffer_of_timm_v2():
    """It is zero by default and a buffer all the same: loaded or edited, it counts."""
    model = helpers.timm_block((9, 9), shift=2, v2=True)
    model.attn.k_bias.copy_(torch.randn(16))
    check(model, torch.randn(2, 9, 9, 16))


@both_backends
@pytest.mark.parametrize("head_dim", [8, 10, 24, 30, 44])
def test_trap_34_head_dims(head_dim, backend):
    """timm's may differ from C / heads, and others are no powers of two."""
    check(helpers.timm_block((9, 9), shift=2, head_dim=head_dim), torch.randn(1, 9, 9, 16), backend=backend)


@pytest.mark.parametrize(("window", "size"), [(18, (18, 20)), (24, (24, 24))], ids=["324", "576"])
@versions
def test_trap_34_many_tokens(window, size, v2):
    model = helpers.torchvision_attention(window=(window, window), shift=(window // 2,) * 2, v2=v2)
    check(model, torch.randn(1, *size, 16))


@both_backends
def test_trap_37_layernorm_before_comes_after(backend):
    """In Swinv2 it normalises what the attention gave."""
    layer = helpers.huggingface_layer("Swinv2", shift=2)
    with torch.no_grad():
        layer.layernorm_before.weight.copy_(torch.linspace(-3, 3, 16))
        layer.layernorm_after.bias.fill_(2.0)
    hf_check(layer, (8, 8), backend)


@pytest.mark.parametrize("probability", ["hidden_dropout_prob", "drop_path_rate"])
@pytest.mark.parametrize("kind", ["Swin", "Swinv2", "DonutSwin"])
def test_trap_38_places_of_dropout(kind, probability):
    """With p = 1 dropout and drop-path are no chance but a structure."""
    layer = helpers.huggingface_layer(kind, shift=2, **({probability: 1.0} if probability.startswith("hidden") else {}))
    if probability == "drop_path_rate":
        library = importlib.import_module(type(layer).__module__)
        path = next(kind for name, kind in vars(library).items() if name.endswith("DropPath"))
        layer.drop_path = path(1.0 - 1e-7)
    train_check(layer, torch.randn(2, 64, 16), (8, 8))


@pytest.mark.parametrize("kind", ["Swinv2", "DonutSwin"])
def test_trap_38_dropout_after_the_output_projection(kind):
    layer = helpers.huggingface_layer(kind, shift=2)
    layer.attention.output.dropout.p = 1.0
    train_check(layer, torch.randn(2, 64, 16), (8, 8))


@pytest.mark.parametrize("kind", ["proj_drop", "drop_path"])
@versions
def test_trap_38_places_of_dropout_in_timm(kind, v2):
    train_check(helpers.timm_block((8, 8), shift=2, v2=v2, **{kind: 0.5}), torch.randn(8, 8, 8, 16))


@versions
def test_trap_38_places_of_dropout_in_torchvision(v2):
    train_check(helpers.torchvision_attention(shift=(2, 2), v2=v2, dropout=1.0), torch.randn(2, 8, 8, 16))


@versions
def test_trap_38_places_of_dropout_in_official_code(v2):
    train_check(helpers.microsoft_block((8, 8), shift=2, v2=v2, drop=1.0), torch.randn(2, 64, 16))


def train_check(model, *inputs):
    """In train mode, with equal random numbers, whose order is the same for whole images."""
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    model.train()
    twin.train()
    for one in (model, twin):
        for module in one.modules():
            if isinstance(module, nn.Dropout) and module.p:
                module.p = 1.0  # drawn by element, in window order there and in image order here
    outs = []
    for one in (model, twin):
        torch.manual_seed(0)
        outs.append(one(*inputs))
    helpers.assert_close(outs[1], outs[0])
    helpers.assert_accelerated(twin)


@pytest.mark.parametrize(
    "name", ["timm", "timm-v2", "torchvision", "torchvision-v2", "microsoft", "hf-swin", "hf-swinv2"]
)
def test_trap_39_attention_dropout_runs_the_original_without_kernels(name):
    """Which weights are dropped depends on the order they are laid out in: only the original draws its own."""
    make, attention, inputs = HOOKABLE[name]
    model = make()
    attn = model.get_submodule(attention)
    if name.startswith("torchvision") or (name == "hf-swin" and TRANSFORMERS_5):
        attn.attention_dropout = 0.5
    elif name.startswith("hf"):
        attn.self.dropout.p = 0.5
    else:
        attn.attn_drop.p = 0.5
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    outs = []
    for one in (model.train(), twin.train()):
        torch.manual_seed(0)
        outs.append(helpers.tensors(one(*inputs))[0])
    assert torch.equal(outs[0], outs[1])
    assert helpers.reasons(twin) == [
        "attention dropout is active, and the torch backend has none; call eval(), or set its rate to 0"
    ]
    model.eval()
    twin.eval()
    with torch.no_grad():
        helpers.assert_close(twin(*inputs), model(*inputs))
    (entry,) = swinaccel.report(twin)
    assert (entry.calls, entry.fallbacks) == (2, 1)


def test_trap_48_no_parameter_is_left_at_zero():
    """A test on itself: fresh tables and norms hide differences."""
    model = randomize(
        importlib.import_module("timm").create_model(
            "swinv2_cr_tiny_224", img_size=64, window_size=4, depths=(1, 1), num_heads=(2, 4), embed_dim=32
        )
    )
    assert [name for name, parameter in model.named_parameters() if not bool(parameter.any())] == []
