"""Windows of three axes: torchvision's swin3d, Video Swin and MONAI's SwinUNETR, whose windows shrink at run time.

The numbers are those of the survey that runtime/traps.py tells of.
"""

from __future__ import annotations

import copy
import importlib

import helpers
import pytest
import torch
import video_models as models
from helpers import BACKENDS, both_backends, check, check_fallback, randomize

import swinaccel

KEEPS_VERDICTS = True

SIZES = [(5, 9, 6), (4, 8, 8), (2, 3, 9), (1, 4, 5), (2, 4, 4)]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def volume(*size, batch=2, dim=16):
    return torch.randn(batch, *size, dim)


def torchvision(window=(2, 4, 4), shift=(1, 2, 2), **options):
    library = importlib.import_module("torchvision.models.video.swin_transformer")
    return randomize(library.ShiftedWindowAttention3d(16, list(window), list(shift), 2, **options))


def monai():
    pytest.importorskip("einops")
    return pytest.importorskip("monai.networks.nets.swin_unetr")


def monai_stage(window=(2, 4, 4), **options):
    return randomize(monai().BasicLayer(16, 2, 2, window, [0.0, 0.0], **{"qkv_bias": True, **options}))


def stage(window=(2, 4, 4), **options):
    return randomize(models.BasicLayer(16, 2, window, **options))


def family(model):
    return {entry.family for entry in swinaccel.plan(model) if entry.status == "accelerated"}


stages = pytest.mark.parametrize("make", [stage, monai_stage], ids=["video", "monai"])


# Equal, on every size.


@both_backends
@sizes
def test_torchvision(size, backend):
    model = torchvision()
    assert family(model) == {"torchvision3d"}
    check(model, volume(*size), backend=backend, count=1)


@pytest.mark.parametrize("options", [{"qkv_bias": False}, {"proj_bias": False}], ids=str)
def test_torchvision_projections_without_bias(options):
    check(torchvision(**options), volume(5, 9, 6))


@both_backends
def test_torchvision_model(backend):
    library = importlib.import_module("torchvision.models.video.swin_transformer")
    model = library.SwinTransformer3d(
        [2, 4, 4], 16, [2, 2], [2, 4], [2, 4, 4], num_classes=5, stochastic_depth_prob=0.0
    )
    check(randomize(model), torch.randn(1, 3, 6, 44, 36), backend=backend, count=4)


@both_backends
@stages
@sizes
def test_stage(size, make, backend):
    model = make()
    assert family(model) == {"video"}
    check(model, volume(*size).movedim(-1, 1), backend=backend, count=2)


@both_backends
@pytest.mark.parametrize("size", [(9, 6), (3, 9), (4, 8)], ids=str)
def test_monai_in_two_dimensions(size, backend):
    """There, too, windows shrink, and the bias of a smaller one is the first of the larger one's."""
    model = monai_stage((4, 4))
    assert family(model) == {"video"}
    check(model, volume(*size).movedim(-1, 1), backend=backend, count=2)


@stages
def test_projections_without_bias(make):
    check(make(qkv_bias=False), volume(3, 6, 5).movedim(-1, 1), count=2)


def test_stand_in_is_torchvisions():
    """The same numbers, so that the stand-in for Video Swin stands for it."""
    attn, block = torchvision(), randomize(models.SwinTransformerBlock3D(16, 2, (2, 4, 4), (1, 2, 2)))
    attn.load_state_dict(block.attn.state_dict())
    block.norm1 = torch.nn.Identity()
    for size in SIZES:
        x = volume(*size)
        mask = models.stage_mask(size, (2, 4, 4), (1, 2, 2))
        helpers.assert_close(block.forward_part1(x, mask), attn(x), 1e-5)


@both_backends
def test_gradients(backend):
    """Of tokens, table, projection and its bias, through windows that have shrunk and are padded."""
    helpers.check_gradients(torchvision(), volume(5, 3, 6), backend=backend, count=1)


# Traps.


@both_backends
@pytest.mark.parametrize("size", [(2, 4, 4), (4, 2, 4), (4, 4, 2), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("kind", ["torchvision", "video"])
def test_trap_10_index_of_a_smaller_window_is_a_prefix(kind, size, backend):
    """Right where the depth alone shrinks, else the biases of other pairs, which models were trained with."""
    window = (4, 4, 4)
    block = models.SwinTransformerBlock3D(16, 2, window)
    model = torchvision(window, (0, 0, 0)) if kind == "torchvision" else randomize(block)
    arguments = () if kind == "torchvision" else (None,)
    found = check(model, volume(*size), *arguments, backend=backend)
    attn = model if kind == "torchvision" else model.attn
    tokens = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"), -1).view(-1, 3)
    offsets = tokens[:, None] - tokens[None] + 3
    index = attn.relative_position_index
    n = len(tokens)
    is_proper = torch.equal(index[:n, :n], (offsets[..., 0] * 7 + offsets[..., 1]) * 7 + offsets[..., 2])
    assert is_proper == (size[1:] == window[1:])
    assert torch.isfinite(found).all()


@both_backends
def test_trap_10_at_the_last_stage_of_swin_unetr(backend):
    """7 x 7 x 7 windows on 6 x 6 x 6, as every SwinUNETR for 96 voxels has it."""
    check(stage((7, 7, 7)), volume(6, 6, 6, batch=1).movedim(-1, 1), backend=backend, count=2)


@both_backends
def test_trap_11_shifts_differ_by_axis(backend):
    for shift in [(1, 0, 0), (0, 2, 0), (0, 0, 2), (1, 0, 3)]:
        check(torchvision(shift=shift), volume(4, 8, 8, batch=1), backend=backend)


@both_backends
def test_trap_17_mask_is_an_argument(backend):
    """A shifted block honours what it is given, or nothing; an unshifted one leaves it alone."""
    size, window, shift = (4, 8, 4), (2, 4, 4), (1, 2, 2)
    x, mask = volume(*size), models.stage_mask(size, window, shift)
    for given in (mask, mask * torch.rand(mask.shape), torch.randn(mask.shape), None):
        for block_shift in (shift, (0, 0, 0)):
            block = randomize(models.SwinTransformerBlock3D(16, 2, window, block_shift))
            if given is not None:
                given = given.to(helpers.DEVICES[backend])
            check(block, x, given, backend=backend)


def test_mask_of_another_image_runs_the_original():
    block = randomize(models.SwinTransformerBlock3D(16, 2, (2, 4, 4), (1, 2, 2)))
    mask = models.stage_mask((4, 4, 8), (2, 4, 4), (1, 2, 2))[:2]
    check_fallback(block, volume(4, 8, 8), mask, reason="belongs to another image size")


def test_trap_09_edited_index():
    for make in (torchvision, stage):
        model = make()
        for module in model.modules():
            if hasattr(module, "relative_position_index"):
                module.relative_position_index.copy_(module.relative_position_index.flip(0))
        x = volume(5, 3, 6)
        check(model, x if make is torchvision else x.movedim(-1, 1))


def test_trap_38_flash_path():
    """MONAI's computes the same without gradients, but for dropout, which it leaves out."""
    check(monai_stage(use_flash_attention=True), volume(5, 9, 6).movedim(-1, 1), count=2)
    model = monai_stage(use_flash_attention=True, attn_drop=0.5).train()
    check_fallback(model, volume(5, 9, 6).movedim(-1, 1), reason="flash path")


def test_trap_39_dropout_on_the_torch_backend_runs_the_original():
    model = torchvision(attention_dropout=1.0).train()
    check_fallback(model, volume(5, 9, 6), reason="dropout")


def test_trap_44_shared_lists_stay_as_they_are():
    window, shift = [4, 4, 4], [2, 2, 2]
    model = torchvision(window, shift)
    model.window_size, model.shift_size = window, shift
    twin = swinaccel.accelerate(model, backend="torch")
    with torch.no_grad():
        twin(volume(2, 9, 3))
    assert (window, shift) == ([4, 4, 4], [2, 2, 2])


@stages
def test_trap_46_checkpointing(make):
    """It is around what is replaced, and goes on."""
    model = make(use_checkpoint=True)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    x = volume(5, 9, 6).movedim(-1, 1)
    grads = []
    for one in (model, twin):
        leaf = x.clone().requires_grad_()
        one(leaf).square().sum().backward()
        grads.append([leaf.grad, *(parameter.grad for parameter in one.parameters())])
    helpers.assert_accelerated(twin, 2)
    for found, expected in zip(*reversed(grads), strict=True):
        helpers.assert_close(found, expected, 1e-4)


def test_trap_47_images_of_any_strides():
    x = volume(16, 9, 6, dim=5).movedim(1, -1)
    assert not x.is_contiguous()
    for backend in BACKENDS:
        check(torchvision(), x.transpose(1, 3), backend=backend)


class Other(models.SwinTransformerBlock3D):
    """Recognised by its parts, but it takes the last rows of the index."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.attn.__class__ = Last


class Last(models.WindowAttention3D):
    def bias(self, tokens):
        index = self.relative_position_index[-tokens:, -tokens:].flip(0)
        return self.relative_position_bias_table[index].permute(2, 0, 1)


def test_trap_41_another_index_is_found_out():
    model = randomize(Other(16, 2, (2, 4, 4), (1, 2, 2)))
    assert "video" not in family(model)
    x, mask = volume(2, 3, 4), models.stage_mask((2, 3, 4), (2, 4, 4), (1, 2, 2))
    with torch.no_grad():
        expected = model(x, mask)
        helpers.assert_close(swinaccel.accelerate(copy.deepcopy(model), backend="torch")(x, mask), expected)


@both_backends
def test_attention_of_an_unknown_block(backend):
    """Windows of three axes, by themselves, with any mask; of fewer tokens they are the original's."""
    attn = randomize(models.WindowAttention3D(16, (2, 3, 3), 2))
    assert family(attn) == {"window_attention"}
    mask = torch.randn(3, 18, 18).to(helpers.DEVICES[backend])
    check(attn, torch.randn(6, 18, 16), mask, backend=backend)
    check(attn, torch.randn(6, 18, 16), backend=backend)
    check_fallback(attn, torch.randn(6, 12, 16), reason="is not of windows", backend=backend)


def test_report_has_three_numbers():
    model = swinaccel.accelerate(torchvision(), backend="torch")
    (entry,) = swinaccel.report(model)
    assert (entry.window, entry.shift) == ((2, 4, 4), (1, 2, 2))
    assert "2x4x4" in str(swinaccel.report(model))
