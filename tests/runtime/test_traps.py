"""What implementations of Swin do differently from each other, one named test for each, against the real libraries.

The numbers are those of the survey that these tests were written from; numbers that are missing concern
implementations that no family claims, or stand in test_families.py (40, 41, 42).
"""

from __future__ import annotations

import copy
import importlib
import math

import helpers
import microsoft_models
import pytest
import torch
from helpers import BACKENDS, check, check_fallback, randomize
from torch import nn

import swinaccel

TRANSFORMERS_5 = importlib.import_module("transformers").__version__ >= "5"

both_backends = pytest.mark.parametrize("backend", BACKENDS)
versions = pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])


def hf_check(layer, size, backend="torch", batch=2, **arguments):
    """A Hugging Face layer, called as its stage calls it."""
    x = torch.randn(batch, size[0] * size[1], 16)
    return check(layer, x, size, backend=backend, arguments=arguments)


# Geometry.


@both_backends
@versions
@pytest.mark.parametrize("size", [(9, 9), (9, 10), (11, 8), (10, 10)], ids=str)
def test_trap_01_roll_before_pad(size, v2, backend):
    """timm rolls and then pads, and still cuts its mask on the padded grid. At 10 = 12 - shift both orders agree."""
    check(helpers.timm_block(size, shift=2, v2=v2), torch.randn(2, *size, 16), backend=backend)


@both_backends
@pytest.mark.parametrize("size", [(9, 9), (9, 11)], ids=str)
@pytest.mark.parametrize("kind", ["torchvision", "torchvision-v2", "hf-swin", "hf-swinv2"])
def test_trap_01_pad_before_roll(kind, size, backend):
    if kind.startswith("torchvision"):
        model = helpers.torchvision_attention(shift=(2, 2), v2=kind.endswith("v2"))
        check(model, torch.randn(2, *size, 16), backend=backend)
    else:
        hf_check(helpers.huggingface_layer("Swinv2" if kind.endswith("v2") else "Swin", shift=2), size, backend)


def with_large_biases(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(3 * torch.randn_like(parameter))
    return model


@both_backends
@pytest.mark.parametrize("kind", ["timm", "timm-v2", "torchvision", "torchvision-v2", "hf-swin", "hf-swinv2"])
def test_trap_02_padding_tokens_are_live(kind, backend):
    """Their k and v are the projection's bias, and they take their share of the softmax."""
    v2 = kind.endswith("v2")
    if kind.startswith("timm"):
        model = with_large_biases(helpers.timm_block((9, 9), shift=2, v2=v2))
        check(model, torch.randn(2, 9, 9, 16), backend=backend)
    elif kind.startswith("torchvision"):
        model = with_large_biases(helpers.torchvision_attention(shift=(2, 2), v2=v2))
        check(model, torch.randn(2, 9, 9, 16), backend=backend)
    else:
        hf_check(with_large_biases(helpers.huggingface_layer("Swinv2" if v2 else "Swin", shift=2)), (9, 9), backend)


@pytest.mark.parametrize("size", [(4, 8), (8, 4)], ids=str)
@pytest.mark.parametrize(
    "kind",
    ["timm", "timm-v2", "microsoft", "microsoft-v2", "torchvision", "torchvision-v2", "hf-swin", "hf-swinv2"],
)
def test_trap_03_clamp_rules(kind, size):
    """At a side of one window: per axis, for the whole block, by the first axis, or only for the shift."""
    v2 = kind.endswith("v2")
    x = torch.randn(2, *size, 16)
    if kind.startswith("timm"):
        model = helpers.timm_block(size, shift=2, v2=v2)
        assert model.shift_size == tuple(0 if axis <= 4 else 2 for axis in size)
        check(model, x)
    elif kind.startswith("microsoft"):
        model = helpers.microsoft_block(size, shift=2, v2=v2)
        assert model.shift_size == 0
        check(model, x.flatten(1, 2))
    elif kind.startswith("torchvision"):
        check(helpers.torchvision_attention(shift=(2, 2), v2=v2), x)
    else:
        hf_check(helpers.huggingface_layer("Swinv2" if v2 else "Swin", size, shift=2), size)


@pytest.mark.parametrize("size", [(3, 8), (8, 3), (3, 3)], ids=str)
@pytest.mark.parametrize("kind", ["timm", "timm-v2", "torchvision", "torchvision-v2"])
def test_trap_03_clamp_rules_below_one_window(kind, size):
    """timm shrinks the window of that axis, torchvision pads up to the whole window."""
    v2 = kind.endswith("v2")
    if kind.startswith("timm"):
        model = helpers.timm_block(size, shift=2, v2=v2)
        assert model.window_size == tuple(min(axis, 4) for axis in size)
    else:
        model = helpers.torchvision_attention(shift=(2, 2), v2=v2)
    check(model, torch.randn(2, *size, 16))


@pytest.mark.parametrize(("grid", "window", "shift"), [((2, 8), 2, 0), ((8, 2), 4, 2)], ids=["2x8", "8x2"])
def test_trap_03_first_axis_decides_in_swinv2(grid, window, shift):
    layer = helpers.huggingface_layer("Swinv2", grid, shift=2)
    assert (layer.window_size, layer.shift_size) == (window, shift)
    hf_check(layer, grid)


@both_backends
@pytest.mark.parametrize("kind", ["Swin", "DonutSwin"])
def test_trap_04_layers_change_their_own_shift(kind, backend):
    """One small image, and the layer never shifts again: so it must be here, in output and in attributes."""
    device = helpers.DEVICES[backend]
    model = helpers.huggingface_layer(kind, shift=2).to(device)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend=backend)
    large, small = torch.randn(1, 64, 16, device=device), torch.randn(1, 16, 16, device=device)
    outputs = []
    with torch.no_grad():
        for x, size in ((large, (8, 8)), (small, (4, 4)), (large, (8, 8))):
            expected, found = model(x, size), twin(x, size)
            helpers.assert_close(found, expected)
            assert (twin.shift_size, twin.window_size) == (model.shift_size, model.window_size)
            outputs.append(found[0])
    assert twin.shift_size == 0
    assert helpers.difference(outputs[2], outputs[0]) > 1e-2
    helpers.assert_accelerated(twin, 1)


def test_trap_04_shift_is_read_at_each_call():
    """The shift that was there at accelerate() is nothing to rely on."""
    model = helpers.huggingface_layer("Swin", shift=2)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    x = torch.randn(1, 64, 16)
    for shift in (2, 0, 1):
        model.shift_size = twin.shift_size = shift
        with torch.no_grad():
            helpers.assert_close(twin(x, (8, 8)), model(x, (8, 8)))


@both_backends
@pytest.mark.parametrize("kind", ["Swin", "DonutSwin"])
def test_trap_05_smaller_than_the_window_raises(kind, backend):
    """The table does not fit then. After the error the original keeps the smaller window, and raises ever after."""
    device = helpers.DEVICES[backend]
    model = helpers.huggingface_layer(kind, shift=2).to(device)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend=backend)
    for one in (model, twin):
        with pytest.raises(RuntimeError), torch.no_grad():
            one(torch.randn(1, 9, 16, device=device), (3, 3))
    assert (twin.window_size, twin.shift_size) == (model.window_size, model.shift_size) == (3, 0)


@both_backends
def test_trap_06_always_partition(backend):
    """SwinBackbone keeps the shift of a layer whose image is one window, SwinModel drops it: one class, two results."""
    layer = helpers.huggingface_layer("Swin", shift=2)
    dropped = hf_check(copy.deepcopy(layer), (4, 4), backend)
    kept = hf_check(copy.deepcopy(layer), (4, 4), backend, always_partition=True)
    assert helpers.difference(kept, dropped) > 1e-2


def test_trap_06_backbone_and_model():
    model = helpers.huggingface("Swin")
    backbone = helpers.huggingface("Swin", "Backbone")
    x = torch.randn(1, 3, 32, 32)  # 8x8 tokens, then 4x4: one window
    for one, shifts in ((model, [0, 2, 0, 0]), (backbone, [0, 2, 0, 2])):
        check(one, x, count=4)
        twin, _, _ = helpers.both(one, x)
        assert [layer.shift_size for layer in layers(twin)] == shifts


def layers(model):
    return [module for module in model.modules() if hasattr(module, "shift_size")]


@both_backends
def test_trap_07_swinv2_ignores_the_runtime_size(backend):
    """Its shift is decided by the configuration's image size, also where the image is one window."""
    x = torch.randn(2, 16, 16)
    found = check(helpers.huggingface_layer("Swinv2", (8, 8), shift=2), x, (4, 4), backend=backend)
    unshifted = check(helpers.huggingface_layer("Swinv2", (8, 8), shift=0), x, (4, 4), backend=backend)
    assert helpers.difference(unshifted, found) > 1e-2
    check(helpers.huggingface("Swinv2", image_size=64), torch.randn(1, 3, 16, 16), count=4)


@both_backends
@versions
def test_trap_08_timm_static_mask_at_another_size(v2, backend):
    """The mask buffer of 8x8 is laid over 16x16 without an error: four windows' masks repeat over sixteen."""
    x = torch.randn(1, 16, 16, 16)
    model = helpers.timm_block((8, 8), shift=2, v2=v2)
    found = check_fallback(model, x, reason="another image size", backend=backend, fuse="attention")
    recomputed = helpers.timm_block((8, 8), shift=2, v2=v2, dynamic_mask=True)
    with torch.no_grad():
        assert helpers.difference(found.cpu(), recomputed(x)) > 1e-3


@both_backends
@versions
@pytest.mark.parametrize("size", [(16, 16), (9, 7), (8, 8)], ids=str)
def test_trap_08_timm_dynamic_mask(size, v2, backend):
    model = helpers.timm_block((8, 8), shift=2, v2=v2, dynamic_mask=True)
    check(model, torch.randn(1, *size, 16), backend=backend)


def test_trap_08_timm_static_mask_raises_where_it_does_not_divide():
    model = helpers.timm_block((8, 8), shift=2)
    x = torch.randn(1, 12, 12, 16)
    for one in (model, swinaccel.accelerate(copy.deepcopy(model), backend="torch")):
        with pytest.raises(RuntimeError), torch.no_grad():
            one(x)


@both_backends
@pytest.mark.parametrize("kind", ["microsoft", "timm"])
def test_trap_09_edited_mask_buffer(kind, backend):
    """A mask is a buffer, loaded with checkpoints or changed by hand."""
    model = helpers.microsoft_block((8, 8), shift=2) if kind == "microsoft" else helpers.timm_block((8, 8), shift=2)
    x = torch.randn(2, 64, 16) if kind == "microsoft" else torch.randn(2, 8, 8, 16)
    with torch.no_grad():
        before = model(x)
        model.attn_mask[3] = 0
        assert helpers.difference(model(x), before) > 1e-3
    twin, found, expected = helpers.both(model, x, backend=backend)
    helpers.assert_close(found, expected)
    twin.attn_mask[3, 0, 1] = 50.0  # and after accelerate()
    model.attn_mask[3, 0, 1] = 50.0
    with torch.no_grad():
        helpers.assert_close(twin(x.to(helpers.DEVICES[backend])).cpu(), model(x))


@both_backends
@pytest.mark.parametrize(
    "kind", ["microsoft", "microsoft-v2", "timm", "timm-v2", "torchvision", "torchvision-v2", "hf-swinv2"]
)
def test_trap_09_permuted_index(kind, backend):
    v2 = kind.endswith("v2")
    if kind.startswith("microsoft"):
        model, inputs = helpers.microsoft_block((8, 8), shift=2, v2=v2), (torch.randn(2, 64, 16),)
    elif kind.startswith("timm"):
        model, inputs = helpers.timm_block((8, 8), shift=2, v2=v2), (torch.randn(2, 8, 8, 16),)
    elif kind.startswith("torchvision"):
        model, inputs = helpers.torchvision_attention(shift=(2, 2), v2=v2), (torch.randn(2, 8, 8, 16),)
    else:
        model, inputs = helpers.huggingface_layer("Swinv2", shift=2), (torch.randn(2, 64, 16), (8, 8))
    with torch.no_grad():
        before = model(*inputs)
        for name, buffer in model.named_buffers():
            if name.endswith("relative_position_index"):
                buffer.copy_(buffer.flatten()[torch.randperm(buffer.numel())].view_as(buffer))
        assert helpers.difference(model(*inputs), before) > 1e-3
    check(model, *inputs, backend=backend)


def test_trap_10_windows_of_volumes_shrink_with_the_volume():
    """Their bias is then a prefix of the index, not that of the smaller window: more in test_families_3d."""
    from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

    model = randomize(ShiftedWindowAttention3d(16, [2, 4, 4], [1, 2, 2], 2))
    check(model, torch.randn(1, 4, 2, 8, 16))


@both_backends
@versions
def test_trap_11_shift_of_one_axis(v2, backend):
    """A stock timm model of 224x256 has it: the last stage is (7, 8), the shift (0, 3)."""
    model = helpers.timm_block((7, 8), window=7, shift=3, v2=v2)
    assert model.shift_size == (0, 3)
    check(model, torch.randn(2, 7, 8, 16), backend=backend)


@both_backends
@versions
@pytest.mark.parametrize("shift", [(0, 2), (1, 0), (3, 1)], ids=str)
def test_trap_11_different_shifts(shift, v2, backend):
    check(helpers.torchvision_attention(shift=shift, v2=v2), torch.randn(2, 9, 8, 16), backend=backend)


@both_backends
@pytest.mark.parametrize("kind", ["timm", "timm-v2", "hf-swin", "hf-maskformer"])
def test_trap_12_shift_within_a_single_window(kind, backend):
    if kind.startswith("timm"):
        v2 = kind.endswith("v2")
        model = helpers.timm_block((4, 4), shift=2, v2=v2, always_partition=True)
        assert model.shift_size == (2, 2)
        check(model, torch.randn(2, 4, 4, 16), backend=backend)
    elif kind == "hf-swin":
        hf_check(helpers.huggingface_layer("Swin", (4, 4), shift=2), (4, 4), backend, always_partition=True)
    else:
        hf_check(helpers.huggingface_layer("MaskFormerSwin", (4, 4), shift=2), (4, 4), backend)


@both_backends
@pytest.mark.parametrize("size", [(4, 16), (8, 8), (16, 4)], ids=str)
@pytest.mark.parametrize("kind", ["microsoft", "hf-swin", "hf-swinv2"])
def test_trap_14_height_and_width_are_not_guessed(kind, size, backend):
    """64 tokens are 4x16 or 8x8: input_resolution or the argument decides."""
    if kind == "microsoft":
        check(helpers.microsoft_block(size, window=2, shift=1), torch.randn(2, 64, 16), backend=backend)
    else:
        layer = helpers.huggingface_layer("Swinv2" if kind.endswith("v2") else "Swin", (8, 8), window=2, shift=1)
        hf_check(layer, size, backend)


def test_trap_14_input_resolution_is_read_at_each_call():
    """Users set it to run other sizes."""
    model = helpers.microsoft_block((8, 8), shift=0)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    for size in ((8, 8), (4, 8), (16, 4)):
        model.input_resolution = twin.input_resolution = size
        x = torch.randn(1, size[0] * size[1], 16)
        with torch.no_grad():
            helpers.assert_close(twin(x), model(x))
    helpers.assert_accelerated(twin, 1)


def test_trap_14_wrong_number_of_tokens_raises():
    model = swinaccel.accelerate(helpers.microsoft_block((8, 8)), backend="torch")
    with pytest.raises(AssertionError, match="wrong size"):
        model(torch.randn(1, 60, 16))


def test_trap_14_official_code_does_not_pad():
    model = helpers.microsoft_block((9, 9))
    for one in (model, swinaccel.accelerate(copy.deepcopy(model), backend="torch")):
        with pytest.raises(Exception, match="9"):
            one(torch.randn(1, 81, 16))


# Mask and softmax.


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
        check(
            model.to(dtype),
            torch.randn(shape, dtype=dtype),
            backend=backend,
            tolerance=4 * torch.finfo(dtype).eps,
        )


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
        layer,
        torch.randn(2, 64, 16),
        (8, 8),
        reason="attention weights",
        arguments={"output_attentions": True},
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


# Scale and bias.


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
        "swinv2_cr_tiny_224",
        img_size=64,
        window_size=4,
        depths=(2, 1),
        num_heads=(2, 4),
        embed_dim=32,
        num_classes=5,
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


# Projections and calls.

HOOKABLE = {
    "timm": (lambda: helpers.timm_block((8, 8), shift=2), "attn", (torch.randn(2, 8, 8, 16),)),
    "timm-v2": (lambda: helpers.timm_block((8, 8), shift=2, v2=True), "attn", (torch.randn(2, 8, 8, 16),)),
    "microsoft": (lambda: helpers.microsoft_block((8, 8), shift=2), "attn", (torch.randn(2, 64, 16),)),
    "microsoft-v2": (
        lambda: helpers.microsoft_block((8, 8), shift=2, v2=True),
        "attn",
        (torch.randn(2, 64, 16),),
    ),
    "torchvision": (lambda: helpers.torchvision_attention(shift=(2, 2)), "", (torch.randn(2, 8, 8, 16),)),
    "torchvision-v2": (
        lambda: helpers.torchvision_attention(shift=(2, 2), v2=True),
        "",
        (torch.randn(2, 8, 8, 16),),
    ),
    "hf-swin": (
        lambda: helpers.huggingface_layer("Swin", shift=2),
        "attention",
        (torch.randn(2, 64, 16), (8, 8)),
    ),
    "hf-swinv2": (
        lambda: helpers.huggingface_layer("Swinv2", shift=2),
        "attention",
        (torch.randn(2, 64, 16), (8, 8)),
    ),
}


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
        self.down, self.up = (
            nn.Linear(base.in_features, 2, bias=False),
            nn.Linear(2, base.out_features, bias=False),
        )

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


def test_trap_48_no_parameter_is_left_at_zero():
    """A test on itself: fresh tables and norms hide differences."""
    model = randomize(
        importlib.import_module("timm").create_model(
            "swinv2_cr_tiny_224", img_size=64, window_size=4, depths=(1, 1), num_heads=(2, 4), embed_dim=32
        )
    )
    assert [name for name, parameter in model.named_parameters() if not bool(parameter.any())] == []


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
