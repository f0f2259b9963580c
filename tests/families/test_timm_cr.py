"""timm's SwinV2-CR, whose position bias is an MLP over every pair of tokens, with a dropout of its own."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch
from helpers import both_backends, check, check_fallback, randomize

import swinaccel


def block(resolution, window=4, shift=0, heads=2, dim=16, **options):
    from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock

    sides = {"window_size": (window, window), "shift_size": (shift, shift)}
    try:
        return randomize(SwinTransformerV2CrBlock(dim, heads, feat_size=resolution, **sides, **options))
    except RuntimeError:
        if all(side % min(side, window) == 0 for side in resolution):
            raise
        pytest.skip("this timm makes no masks of images that windows do not divide")


def model(**options):
    import timm

    settings = {"img_size": 64, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32, "num_classes": 5, **options}
    return randomize(timm.create_model("swinv2_cr_tiny_ns_224", **settings))


def image(*size, batch=2):
    return torch.randn(batch, *size, 16)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"window_size": 4}, (64, 64)),
        ({"window_size": 4, "img_size": (64, 96), "extra_norm_period": 2}, (64, 96)),
        ({"window_size": 4, "strict_img_size": False}, (56, 72)),
    ],
    ids=["plain", "norms", "resizable"],
)
def test_model_equals_its_original(options, size):
    check(model(**options), torch.randn(2, 3, *size), count=4)


@both_backends
@pytest.mark.parametrize("size", [(8, 8), (9, 9), (4, 8), (8, 4), (3, 8), (7, 8)], ids=str)
@pytest.mark.parametrize("shift", [0, 2])
def test_block(shift, size, backend):
    """Rolled before it is padded (trap 1), clamped for each axis (3, 11)."""
    one = block(size, shift=shift)
    (entry,) = swinaccel.plan(one)
    assert (entry.family, entry.head_dim, entry.window) == ("timm_cr", 8, tuple(min(side, 4) for side in size))
    check(one, image(*size), backend=backend, count=1)


@both_backends
def test_trap_02_padding_tokens_are_live_and_k_has_a_bias(backend):
    one = block((9, 9), shift=2)
    with torch.no_grad():
        one.attn.qkv.bias.mul_(6)
    check(one, image(9, 9), backend=backend)


def test_trap_08_static_mask_at_another_size():
    one = block((8, 8), shift=2)
    check_fallback(one, image(16, 16), reason="another image size")
    one.dynamic_mask = True
    check(one, image(16, 16))


@pytest.mark.parametrize("value", [10.0, -5.0])
def test_trap_23_scale_is_clamped_above_only(value):
    one = block((8, 8))
    with torch.no_grad():
        one.attn.logit_scale.fill_(value)
    check(one, image(8, 8), tolerance=1e-4)


def test_trap_25_bias_and_coordinates_are_read_at_each_call():
    one = block((8, 8), shift=2)
    twin = swinaccel.accelerate(copy.deepcopy(one), backend="torch")
    x = image(8, 8)
    for change in (
        lambda attn: attn.meta_mlp.fc2.weight.mul_(-2),
        lambda attn: attn.relative_coordinates_log.copy_(attn.relative_coordinates_log.flip(0) + 1),
    ):
        with torch.no_grad():
            change(one.attn)
            change(twin.attn)
            helpers.assert_close(twin(x), one(x))
    one.set_input_size((16, 16), (8, 8))
    twin.set_input_size((16, 16), (8, 8))
    with torch.no_grad():
        x = image(16, 16)
        helpers.assert_close(twin(x), one(x))
    helpers.assert_accelerated(twin, 1)


def test_trap_26_the_bias_drops_out_in_training():
    """With every rate at zero, two calls differ; the same random numbers give the same bias."""
    one = block((8, 8), shift=2).train()
    twin = swinaccel.accelerate(copy.deepcopy(one), backend="torch")
    x, outputs = image(8, 8), []
    for each in (one, twin):
        torch.manual_seed(0)
        outputs.append(each(x))
    helpers.assert_close(outputs[1], outputs[0])
    torch.manual_seed(1)
    assert helpers.difference(one(x), outputs[0]) > 1e-3
    helpers.assert_accelerated(twin, 1)


@both_backends
@pytest.mark.parametrize("is_recorded", [False, True], ids=["without-gradients", "with-gradients"])
def test_the_first_training_call_draws_once(is_recorded, backend):
    """A plan is made from a call's own bias: another one would be a second draw."""
    original = block((8, 8), shift=2).train().to(helpers.DEVICES[backend])
    x = image(8, 8).to(helpers.DEVICES[backend])
    fast = swinaccel.accelerate(copy.deepcopy(original), backend=backend)
    with torch.set_grad_enabled(is_recorded):
        for _ in range(2):
            outs = []
            for one in (original, fast):
                torch.manual_seed(1)
                outs.append(one(x).detach())
            helpers.assert_close(*outs)


@pytest.mark.parametrize("dim", [20, 88])
def test_trap_34_head_dims(dim):
    """44 is swinv2_cr_huge_224's."""
    check(block((8, 8), shift=2, dim=dim), torch.randn(2, 8, 8, dim), backend="triton")


@both_backends
def test_trap_47_stages_hand_over_a_permuted_view(backend):
    x = torch.randn(2, 16, 8, 8).permute(0, 2, 3, 1)
    assert not x.is_contiguous()
    check(block((8, 8), shift=2), x, backend=backend)


def test_trap_48_fresh_blocks_show_no_attention():
    """Why every test here draws the parameters anew: timm starts with norms of zero behind the attention."""
    from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock

    fresh = SwinTransformerV2CrBlock(16, 2, feat_size=(8, 8), window_size=(4, 4))
    x = image(8, 8)
    assert torch.equal(fresh(x), x)
    assert not torch.equal(block((8, 8))(x), x)
    assert swinaccel.plan(fresh).accelerated, "the probe must not be taken in"


def test_subclass_with_another_bias_is_refused():
    one = block((8, 8))

    class Halved(type(one.attn)):
        def _relative_positional_encodings(self):
            return super()._relative_positional_encodings() / 2

    one.attn.__class__ = Halved
    (entry,) = swinaccel.plan(one)
    assert entry.status == "original"
    assert "its forward is not that of timm_cr" in entry.reason


@both_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_errs_no_more_than_the_original(dtype, backend):
    helpers.skip_interpreted_bfloat16(backend, dtype)
    one, device = block((8, 8), shift=2), helpers.DEVICES[backend]
    x = image(8, 8, batch=3).double()
    with torch.no_grad():
        exact = copy.deepcopy(one).double()(x)
        one, x = one.to(device, dtype), x.to(device, dtype)
        twin = swinaccel.accelerate(copy.deepcopy(one), backend=backend)
        expected, found = one(x), twin(x)
    helpers.assert_accelerated(twin, 1)
    helpers.assert_no_worse(found, expected, exact, dtype)


def test_factors_know_the_index_again():
    """It is made for the call, and one tensor all the same: factors are kept for as long as it is."""
    one = block((16, 16), window=16)
    reader, _ = swinaccel.families.match(one)
    x = image(16, 16)
    assert reader.section(one, x).index is reader.section(one, x).index
    with torch.inference_mode():
        first = reader.section(block((5, 5), window=5), image(5, 5)).index
    assert not first.is_inference(), "it may be needed for a backward later"
