"""How much is tried at accelerate(): each kind once, on few tokens."""

from __future__ import annotations

import copy
import functools

import helpers
import microsoft_models
import pytest
import timm
import torch
from torch import nn

import swinaccel
from swinaccel.families.embedding import PatchEmbed
from swinaccel.trust import probe
from swinaccel.trust.registry import registry


def _counted(monkeypatch) -> list[str]:
    tried: list[str] = []
    real = probe._run

    def run(subject, *args, **options):
        tried.append(type(subject.module).__name__)
        return real(subject, *args, **options)

    monkeypatch.setattr(probe, "_run", run)
    registry.clear()
    return tried


def test_what_stands_around_a_librarys_attention_is_no_other_kind(monkeypatch):
    """The first block drops no path; its attention is that of the third, which does."""
    model = timm.models.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), drop_path_rate=0.2
    )
    tried = _counted(monkeypatch)
    swinaccel.accelerate(model.eval())
    # Attention without and with a shift, and what stands around it without and with drop-path.
    assert tried.count("SwinTransformerBlock") == 4, tried
    assert all(entry.status == "accelerated" for entry in swinaccel.report(model).entries)


class Counting(timm.layers.PatchEmbed):
    """Asks for as many patches as it holds a number of its own for."""

    def forward(self, x):
        out = super().forward(x)
        return out if self.counted == out.shape[1] else out + 1


@pytest.mark.parametrize("strict", [True, False])
def test_patch_embeddings_are_tried_on_few_patches(strict):
    own = timm.layers.PatchEmbed(img_size=224, patch_size=4, embed_dim=8, strict_img_size=strict)
    PatchEmbed().shrink(own)
    sizes = [tuple(shape) for (shape,) in PatchEmbed().example(own)]
    assert sizes[0] == (2, 3, 12, 8)
    assert (own.img_size, own.grid_size, own.num_patches) == ((12, 8), (3, 2), 6)
    assert own(torch.randn(sizes[0])).shape == (2, 6, 8)


def test_patch_embeddings_that_hold_more_are_tried_as_they_are():
    own = Counting(img_size=16, patch_size=2, embed_dim=8)
    own.counted = 64
    PatchEmbed().shrink(own)
    assert [tuple(shape) for (shape,) in PatchEmbed().example(own)] == [(2, 3, 16, 16)]
    assert own.img_size == (16, 16)


@pytest.mark.parametrize("odd", [False, True])
def test_embeddings_stay_as_they_were(odd):
    """What a trial changes is a copy."""

    class Own(timm.layers.PatchEmbed):
        def forward(self, x):
            return super().forward(x) + odd

    model = timm.models.SwinTransformer(img_size=32, window_size=4, embed_dim=16, depths=(1,), num_heads=(2,))
    model.patch_embed = Own(img_size=32, patch_size=4, embed_dim=16, norm_layer=nn.LayerNorm)
    model.patch_embed.flatten, model.patch_embed.output_fmt = False, timm.layers.Format.NHWC
    x = torch.randn(1, 3, 32, 32)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        swinaccel.accelerate(model)
        assert model.patch_embed.img_size == (32, 32)
        assert torch.allclose(model(x), expected, atol=1e-5)


class Sized(microsoft_models.SwinTransformerBlock):
    """Does more with its size or its shift than to cut windows."""

    def forward(self, x):
        out = super().forward(x)
        return 3 * out if self.input_resolution[0] > 8 or self.shift_size == 1 else out


@pytest.mark.parametrize(("size", "shift"), [(8, 1), (16, 2)])
def test_code_that_was_proven_is_tried_at_each_size_and_shift(size, shift):
    swinaccel.accelerate(helpers.randomize(Sized(16, (8, 8), 2, 4, 2)), backend="torch")
    model = helpers.randomize(Sized(16, (size, size), 2, 4, shift))
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    x = torch.randn(2, size * size, 16)
    with torch.no_grad():
        helpers.assert_close(twin(x), model(x))


def test_the_same_code_at_another_size_is_tried_once(monkeypatch):
    tried = _counted(monkeypatch)
    seen, real = [], probe.compare_attention
    monkeypatch.setattr(probe, "compare_attention", lambda *call, **how: (seen.append(call), real(*call, **how))[1])
    for size in (8, 16, 16):
        seen.clear()
        swinaccel.accelerate(helpers.microsoft_block((size, size)), backend="torch")
        tried.append(str(len(seen)))
    assert [one for one in tried if one.isdigit()][1:] == ["1", "0"]


@pytest.mark.parametrize("shift", [0, 2])
def test_large_images_are_tried_small(shift, monkeypatch):
    """A block that holds a large image's size passes two trials there, and all others with two by two windows."""
    seen = {"compare_attention": [], "compare_block": []}

    def noting(real, tokens, *call, **how):
        tokens.append(call[2][0].shape[1])
        return real(*call, **how)

    for name, tokens in seen.items():
        monkeypatch.setattr(probe, name, functools.partial(noting, getattr(probe, name), tokens))
    model = helpers.randomize(microsoft_models.SwinTransformerBlock(16, (24, 16), 2, 4, shift))
    twin = copy.deepcopy(model)
    swinaccel.accelerate(model, backend="triton")
    assert len(swinaccel.report(model).accelerated) == 1
    assert (model.input_resolution, twin.input_resolution) == ((24, 16), (24, 16))
    for tokens in seen.values():
        assert set(tokens) == {64, 384}
        assert tokens.count(384) == 3  # one in evaluation, two in training: with and without drop-paths
        assert len(tokens) > 12


class Trained(microsoft_models.SwinTransformerBlock):
    """Does otherwise where it says that images are large, in training."""

    def forward(self, x):
        return super().forward(x) * (3 if self.training and self.input_resolution[0] > 8 else 1)


class Asserting(microsoft_models.SwinTransformerBlock):
    """Lets nobody change its size."""

    def forward(self, x):
        assert self.input_resolution[0] == 16
        return super().forward(x)


def test_large_images_are_tried_in_training_too():
    """Where a small image is refused, all trials are of the large one; of a block that differs, attention is left."""
    for kind, expected in ((Trained, "window_attention"), (Asserting, "microsoft")):
        model = swinaccel.accelerate(kind(16, (16, 16), 2, 4, 2), backend="triton")
        assert [entry.family for entry in swinaccel.report(model).accelerated] == [expected]


class Switched(microsoft_models.PatchEmbed):
    """Does otherwise where it says that images are large."""

    def forward(self, x):
        return super().forward(x) * (3 if self.img_size[0] >= 64 else 1)


def test_unknown_code_is_tried_as_it_is_set():
    own = Switched(64, norm_layer=nn.LayerNorm)
    block = microsoft_models.SwinTransformerBlock(16, (16, 16), 2, 4)
    model = helpers.randomize(nn.Sequential(own, block))
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        helpers.assert_close(twin.to(helpers.TRITON_DEVICE)(x.to(helpers.TRITON_DEVICE)).cpu(), model(x))
