"""Traps of windows: padding, shifts, sizes and masks that are buffers; see traps.py for the numbers."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch
from helpers import both_backends, check, check_fallback, randomize, versions
from traps import hf_check, layers

import swinaccel


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
    "kind", ["timm", "timm-v2", "microsoft", "microsoft-v2", "torchvision", "torchvision-v2", "hf-swin", "hf-swinv2"]
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
