"""Blocks that grew from the official one, and the official attention by itself, where its block is nobody's.

The numbers are those of the survey that runtime/traps.py tells of.
"""

from __future__ import annotations

import copy

import descendant_models as models
import helpers
import microsoft_models
import pytest
import torch
from helpers import BACKENDS, both_backends, check, check_fallback, randomize, versions
from torch import nn

import swinaccel
from swinaccel import families

KEEPS_VERDICTS = True


def tokens(*size, batch=2, dim=16):
    return torch.randn(batch, size[0] * size[1], dim)


def swinir(resolution=(8, 8), shift=2, **options):
    return randomize(models.SwinIRBlock(16, resolution, 2, 4, shift, 2, **options))


def hat_arguments(size, window=4, shift=2):
    return size, microsoft_models.position_index((window, window)), models.shift_mask(*size, window, shift)


def hat(resolution=(8, 8), shift=2, **options):
    return randomize(models.HAB(16, resolution, 2, 4, shift, **options))


def moe(resolution=(8, 8), shift=2, **options):
    return randomize(models.MoEBlock(16, resolution, 2, 4, shift, **options))


def detection(size, shift=2, **options):
    block = randomize(models.DetectionBlock(16, 2, 4, shift, **options))
    block.H, block.W = size
    return block


def detection_mask(size, window=4, shift=2):
    return models.shift_mask(*(side + -side % window for side in size), window, shift)


def openmmlab(shift=2, **options):
    return randomize(models.ShiftWindowMSA(16, 2, 4, shift, **options))


def family(model):
    return [entry.family for entry in swinaccel.plan(model) if entry.status == "accelerated"]


# SwinIR.


@both_backends
@versions
@pytest.mark.parametrize("size", [(8, 8), (8, 12)], ids=str)
@pytest.mark.parametrize("shift", [0, 2])
def test_swinir_at_its_own_and_other_sizes(shift, size, v2, backend):
    model = swinir(shift=shift, v2=v2)
    assert family(model) == ["swinir"]
    check(model, tokens(*size), size, backend=backend, count=1)


@both_backends
def test_trap_13_swinir_shift_is_that_of_the_size_it_was_made_for(backend):
    """One window at construction: never a shift, at any size."""
    model = swinir(resolution=(4, 4))
    assert model.shift_size == 0
    check(model, tokens(16, 16), (16, 16), backend=backend)


@both_backends
def test_trap_09_swinir_edited_mask_counts_at_its_own_size_alone(backend):
    model = swinir()
    with torch.no_grad():
        model.attn_mask[3] = 0
    check(model, tokens(8, 8), (8, 8), backend=backend)
    check(model, tokens(8, 12), (8, 12), backend=backend)


def test_swinir_that_does_not_divide_raises_as_before():
    model = swinir()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    for one in (model, twin):
        with pytest.raises(RuntimeError), torch.no_grad():
            one(tokens(8, 10), (8, 10))
    assert "does not pad" in swinaccel.report(twin).accelerated[0].reason


@pytest.mark.parametrize("dim", [60, 180])
def test_trap_34_head_dims_of_restoration(dim):
    """10 and 30, with six heads."""
    model = randomize(models.SwinIRBlock(dim, (8, 8), 6, 8, 0, 2))
    check(model, tokens(8, 16, dim=dim), (8, 16))


# HAT.


@both_backends
@pytest.mark.parametrize("size", [(8, 8), (8, 12)], ids=str)
@pytest.mark.parametrize("shift", [0, 2])
def test_hat(shift, size, backend):
    """An unshifted block is given the mask as well, and leaves it alone."""
    model = hat(shift=shift)
    assert family(model) == ["hat"]
    check(model, tokens(*size), *hat_arguments(size), backend=backend, count=1)


def test_trap_17_hat_honours_the_mask_and_the_index_it_is_given():
    model, x = hat(), tokens(8, 8)
    size, index, mask = hat_arguments((8, 8))
    with torch.no_grad():
        plain = model(x, size, index, mask)
        mask[0, 1, 2], index = -3.0, index.flip(0)
        assert helpers.difference(model(x, size, index, mask), plain) > 1e-3
    for backend in helpers.BACKENDS:
        check(model, x, size, index, mask, backend=backend)
    check(model, x, size, index, None)


def test_hat_index_of_another_window_runs_the_original():
    twin = swinaccel.accelerate(hat(shift=0), backend="torch")
    with pytest.raises(RuntimeError), torch.no_grad():
        twin(tokens(8, 8), (8, 8), microsoft_models.position_index((2, 2)), None)
    assert "bias index" in swinaccel.report(twin).accelerated[0].reason


# Mixture of experts.


@both_backends
@pytest.mark.parametrize("is_moe", [False, True])
@pytest.mark.parametrize("shift", [0, 2])
def test_trap_35_moe_returns_its_loss(shift, is_moe, backend):
    model = moe(shift=shift, is_moe=is_moe)
    assert family(model) == ["microsoft"]
    found = check(model, tokens(8, 8), backend=backend, count=1)
    assert isinstance(found, tuple) is is_moe


@pytest.mark.parametrize("backend", BACKENDS)
def test_trap_27_moe_bias_has_no_sigmoid(backend):
    """An MLP for the biases alone does not make it V2's: scores are products, and biases as they come out."""
    model = moe(qk_scale=0.5)
    with torch.no_grad():
        model.attn.cpb_mlp[2].weight.mul_(5)
    check(model, tokens(8, 8), backend=backend)
    entry = swinaccel.plan(model).accelerated[0]
    assert entry.num_heads == 2


# Detection and segmentation.


@both_backends
@pytest.mark.parametrize("size", [(8, 8), (9, 10), (3, 8), (4, 4)], ids=str)
@pytest.mark.parametrize("shift", [0, 2])
def test_detection_pads_and_never_clamps(shift, size, backend):
    model = detection(size, shift)
    assert family(model) == ["detection"]
    check(model, tokens(*size), detection_mask(size), backend=backend, count=1)


@both_backends
def test_trap_02_detection_padding_tokens_are_live(backend):
    model = detection((9, 9))
    with torch.no_grad():
        model.attn.qkv.bias.mul_(6)
        model.norm1.bias.fill_(2)
    check(model, tokens(9, 9), detection_mask((9, 9)), backend=backend)


def test_trap_14_detection_height_and_width_are_read_at_each_call():
    model = detection((4, 16))
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    x = tokens(8, 8)
    for size in ((4, 16), (8, 8), (16, 4)):
        model.H, model.W = twin.H, twin.W = size
        with torch.no_grad():
            helpers.assert_close(twin(x, detection_mask(size)), model(x, detection_mask(size)))
    helpers.assert_accelerated(twin, 1)


@both_backends
def test_trap_17_detection_mask_is_an_argument(backend):
    """A shifted block honours what it is given, or none; an unshifted one ignores it."""
    x, mask = tokens(8, 8), detection_mask((8, 8))
    mask[0, 1, 2] = -4.0
    check(detection((8, 8)), x, mask, backend=backend)
    check(detection((8, 8)), x, None, backend=backend)
    check(detection((8, 8), shift=0), x, mask, backend=backend)


@pytest.mark.parametrize(
    "mask",
    [torch.zeros(4, 16, 16, dtype=torch.bool), torch.zeros(16, 16), torch.ones(4, 16, 16).to_sparse()],
    ids=["bool", "2d", "sparse"],
)
def test_detection_mask_of_another_kind_runs_the_original(mask):
    model = detection((8, 8))
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    outputs = []
    for one in (model, twin):
        try:
            outputs.append(one(tokens(8, 8) * 0 + 1, mask).detach())
        except (RuntimeError, IndexError) as error:
            outputs.append(str(error))
    assert outputs[0] == outputs[1] if isinstance(outputs[0], str) else torch.equal(*outputs)
    assert "the mask is no floating-point tensor" in swinaccel.report(twin).accelerated[0].reason


def test_detection_stage_sets_height_and_width():
    model = randomize(models.DetectionStage(16, 2, 4))
    assert model.blocks[0].H is None
    check(model, tokens(9, 10), 9, 10, count=2)
    assert model.blocks[0].H is None, "the probe must not touch the module itself"


# OpenMMLab.


@both_backends
@pytest.mark.parametrize("size", [(8, 8), (9, 10), (4, 8), (3, 8)], ids=str)
@pytest.mark.parametrize("pad_small_map", [None, True], ids=["mmdet", "mmpretrain"])
def test_openmmlab(pad_small_map, size, backend):
    model = openmmlab(pad_small_map=pad_small_map)
    assert family(model) == ["openmmlab"]
    check(model, tokens(*size), size, backend=backend, count=1)


@both_backends
@versions
def test_trap_03_mmpretrain_drops_the_shift_of_one_window(v2, backend):
    """Unless pad_small_map, and mmdet never does."""
    x, model = tokens(4, 8), openmmlab(pad_small_map=False, v2=v2)
    assert family(model) == ["openmmlab"]
    dropped = check(model, x, (4, 8), backend=backend)
    model.pad_small_map = True
    kept = check(model, x, (4, 8), backend=backend)
    assert helpers.difference(kept, dropped) > 1e-3


def test_mmpretrain_refuses_less_than_a_window_as_before():
    twin = swinaccel.accelerate(openmmlab(pad_small_map=False), backend="torch")
    with pytest.raises(AssertionError), torch.no_grad():
        twin(tokens(3, 8), (3, 8))
    assert "smaller than the window" in swinaccel.report(twin).accelerated[0].reason


def test_mmdet_block_is_accelerated_at_its_attention():
    model = randomize(models.SwinBlock(16, 2, 4, shift=True))
    assert [(entry.name, entry.family) for entry in swinaccel.plan(model)] == [("attn", "openmmlab")]
    check(model, tokens(9, 10), (9, 10), count=1)


# The attention by itself.

KINDS = {
    "v1": microsoft_models.WindowAttention,
    "v2": microsoft_models.WindowAttentionV2,
    "moe": models.MoEAttention,
    "openmmlab": models.WindowMSA,
}
kinds = pytest.mark.parametrize("kind", KINDS)


def attention(kind="v1", window=(4, 4), **options):
    return randomize(KINDS[kind](16, window, 2, **options))


@both_backends
@kinds
@pytest.mark.parametrize("window", [(4, 4), (3, 5)], ids=str)
def test_attention_without_a_mask(window, kind, backend):
    model, n = attention(kind, window), window[0] * window[1]
    assert family(model) == ["window_attention"]
    check(model, torch.randn(6, n, 16), backend=backend, count=1)


@both_backends
@kinds
def test_attention_with_any_mask(kind, backend):
    """Window i of a batch has row i mod M of the mask."""
    model, mask = attention(kind), torch.randn(3, 16, 16)
    x = torch.randn(2, 1, 16, 16).expand(2, 3, 16, 16).flatten(0, 1).clone()
    found = check(model, x, mask, backend=backend)
    assert helpers.difference(found[1], found[0]) > 1e-3
    assert not torch.equal(found[3], found[0])
    check(model, x, backend=backend, arguments={"mask": mask.to(helpers.DEVICES[backend])})
    check(model, x, torch.zeros(3, 16, 16), backend=backend)


def test_attention_takes_keywords():
    model, x = attention(), torch.randn(6, 16, 16)
    check(model, arguments={"x": x, "mask": None})


@pytest.mark.parametrize("shape", [(6, 9, 16), (6, 16, 16, 1)], ids=str)
def test_attention_over_other_than_whole_windows_runs_the_original(shape):
    twin = swinaccel.accelerate(attention(), backend="torch")
    with pytest.raises((RuntimeError, ValueError, IndexError)), torch.no_grad():
        twin(torch.randn(shape))
    assert "is not of windows" in swinaccel.report(twin).accelerated[0].reason


def test_attention_with_a_mask_that_does_not_divide_raises_as_before():
    twin = swinaccel.accelerate(attention(), backend="torch")
    with pytest.raises(RuntimeError), torch.no_grad():
        twin(torch.randn(5, 16, 16), torch.zeros(3, 16, 16))
    assert "do not divide" in swinaccel.report(twin).accelerated[0].reason


def test_attention_wrong_arguments_are_the_originals_error():
    twin = swinaccel.accelerate(attention(), backend="torch")
    with pytest.raises(TypeError):
        twin(torch.randn(6, 16, 16), None, 3)


@both_backends
@kinds
@pytest.mark.parametrize("shift", [0, 2])
def test_unknown_block_is_accelerated_at_its_attention(shift, kind, backend):
    model = randomize(models.UnknownBlock(16, 2, 4, shift, kind=KINDS[kind]))
    assert [(entry.name, entry.family) for entry in swinaccel.plan(model)] == [("attn", "window_attention")]
    x = torch.randn(2, 16, 8, 8)
    if shift and backend == "torch":
        _, found, expected = helpers.both(model, x)
        helpers.assert_close(found, expected)
    else:
        check(model, x, backend=backend, count=1)


class Unmasked(microsoft_models.WindowAttention):
    """The official one in all but a mask, which it counts twice."""

    def forward(self, x, mask=None):
        return super().forward(x, None if mask is None else 2 * mask)


class Elsewhere(microsoft_models.WindowAttention):
    """The official one with a mask, and something else without."""

    def forward(self, x, mask=None):
        return super().forward(x, mask) if mask is not None else 2 * super().forward(x)


class Told(microsoft_models.WindowAttention):
    """A third argument, which is always given, and of which the probe would know nothing."""

    def forward(self, x, mask, gain):
        return gain * super().forward(x, mask)


@pytest.mark.parametrize("kind", [Unmasked, Elsewhere])
def test_trap_41_attention_with_another_branch_is_refused(kind):
    """Every branch that a call may take is probed."""
    (entry,) = swinaccel.plan(randomize(kind(16, (4, 4), 2)))
    assert entry.status == "original"
    assert "its forward is not that of window_attention" in entry.reason


def test_trap_41_attention_with_further_arguments_is_not_recognised():
    (entry,) = swinaccel.plan(randomize(Told(16, (4, 4), 2)))
    assert (entry.family, entry.status) == ("unknown", "original")


class Placed(microsoft_models.WindowAttention):
    """A third argument that need not be given."""

    def forward(self, x, mask=None, pos_embed=None):
        out = super().forward(x, mask)
        return out if pos_embed is None else out + pos_embed


@both_backends
def test_arguments_that_need_not_be_given(backend):
    """The section where they are not; where they are, by whatever way, the original."""
    model = randomize(Placed(16, (4, 4), 2))
    twin = swinaccel.accelerate(copy.deepcopy(model), backend=backend)
    x, mask, place = torch.randn(6, 16, 16), -100.0 * (torch.rand(3, 16, 16) < 0.3), torch.randn(16)
    calls = (
        lambda one: one(x, mask),
        lambda one: one(x, mask=mask, pos_embed=None),
        lambda one: one(x, None, None),
        lambda one: one(x, mask, place),
        lambda one: one(x, pos_embed=place),
    )
    for count, call in enumerate(calls):
        with torch.no_grad():
            helpers.assert_close(call(twin), call(model))
        (entry,) = swinaccel.report(twin)
        assert entry.fallbacks == max(0, count - 2), count
    assert "pos_embed" in entry.reason


class Insistent(microsoft_models.WindowAttention):
    """MONAI's wants its mask named, if only as None."""

    def forward(self, x, mask):
        return super().forward(x, mask)


def test_attention_whose_mask_has_no_default():
    model = randomize(Insistent(16, (4, 4), 2))
    assert family(model) == ["window_attention"]
    check(model, torch.randn(6, 16, 16), None)


def test_trap_38_monais_flash_path_leaves_dropout_out():
    """It is taken where no gradients are recorded, in training too: whether it drops is for the original to know."""
    model = attention(attn_drop=0.5).train()
    model.use_flash_attention = True
    with torch.no_grad():
        reason = families.match(model)[0].section(model, torch.randn(6, 16, 16))
    assert "flash path" in reason


class Doubled(models.SwinIRBlock):
    """SwinIR's but at other sizes."""

    def forward(self, x, x_size):
        x = super().forward(x, x_size)
        return x if x_size == self.input_resolution else 2 * x


def test_trap_41_block_with_another_branch_is_accelerated_at_its_attention():
    model = randomize(Doubled(16, (8, 8), 2, 4, 0, 2))
    (entry,) = swinaccel.plan(model)
    assert (entry.name, entry.family) == ("attn", "window_attention")
    for size in ((8, 8), (8, 12)):
        check(model, tokens(*size), size, count=1)


# One attention, one entry: a block's, or its own.


def test_filter_leaves_a_block_alone_and_all_that_is_in_it():
    model = nn.Sequential(helpers.microsoft_block((8, 8)), randomize(Doubled(16, (8, 8), 2, 4, 0, 2)))
    report = swinaccel.plan(model, filter=lambda name, module: name not in ("0", "1"))
    assert [(entry.name, entry.status) for entry in report] == [("0", "original"), ("1", "original")]
    report = swinaccel.plan(model, filter=lambda name, module: name != "1.attn")
    assert [(entry.name, entry.status) for entry in report] == [("0", "accelerated"), ("1", "original")]


def test_restore_takes_an_inner_attention_back():
    model = randomize(Doubled(16, (8, 8), 2, 4, 0, 2))
    before = vars(type(model.attn)).copy()
    swinaccel.restore(swinaccel.accelerate(model))
    assert vars(type(model.attn)).keys() == before.keys()
    assert [entry.status for entry in swinaccel.report(model)] == ["original"]


def test_strict_is_content_with_the_attention_of_an_unknown_block():
    swinaccel.accelerate(randomize(Doubled(16, (8, 8), 2, 4, 0, 2)), strict=True)


# What holds for all of them.

BLOCKS = {
    "swinir": (swinir, (tokens(8, 8), (8, 8)), "attn"),
    "hat": (hat, (tokens(8, 8), *hat_arguments((8, 8))), "attn"),
    "moe": (moe, (tokens(8, 8),), "attn"),
    "detection": (lambda **o: detection((9, 8), **o), (tokens(9, 8), detection_mask((9, 8))), "attn"),
    "openmmlab": (openmmlab, (tokens(9, 8), (9, 8)), "w_msa"),
    "attention": (lambda **o: attention(), (torch.randn(6, 16, 16),), ""),
}
blocks = pytest.mark.parametrize("name", BLOCKS)


@blocks
def test_trap_45_hooks_in_the_attention_run_the_original(name):
    make, inputs, path = BLOCKS[name]
    model, seen = make(), []
    model.get_submodule(f"{path}.qkv".lstrip(".")).register_forward_hook(lambda *_: seen.append(1))
    check_fallback(model, *inputs, reason="has hooks")
    assert len(seen) == 2


@blocks
def test_trap_25_parameters_are_read_at_each_call(name):
    make, inputs, _ = BLOCKS[name]
    model = make()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    for one in (model, twin):
        randomize(one, seed=7)
    with torch.no_grad():
        helpers.assert_close(twin(*inputs), model(*inputs))
    helpers.assert_accelerated(twin, 1)


@blocks
def test_trap_39_dropout_set_apart_counts(name):
    """Monte Carlo dropout: the module is in eval mode, its dropouts are not."""
    make, inputs, path = BLOCKS[name]
    model = make()
    dropout = model.get_submodule(f"{path}.attn_drop".lstrip("."))
    dropout.p = 0.999
    dropout.train()
    reader, _ = families.match(model)
    assert reader.section(model, *inputs).dropout == 0.999
    dropout.eval()
    assert reader.section(model, *inputs).dropout == 0


@blocks
def test_window_changed_by_hand_is_the_originals_to_judge(name):
    """Table and index do not fit it: nothing of ours raises in the original's place."""
    make, inputs, _ = BLOCKS[name]
    model = make()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    outcomes = []
    for one in (model, twin):
        one.window_size = 2 if name != "attention" else (2, 2)
        try:
            with torch.no_grad():
                outcomes.append(helpers.tensors(one(*inputs))[0])
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] if isinstance(outcomes[0], str) else torch.equal(*outcomes)
    assert swinaccel.report(twin).accelerated[0].fallbacks == 1


@blocks
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_trap_19_low_precision_errs_no_more_than_the_original(name, dtype):
    make, inputs, _ = BLOCKS[name]
    model = make(shift=0) if name != "attention" else make()  # a mask of fp32 makes the originals raise in half
    inputs = [value.double() if getattr(value, "is_floating_point", bool)() else value for value in inputs]
    halves = [value.to(dtype) if getattr(value, "is_floating_point", bool)() else value for value in inputs]
    with torch.no_grad():
        exact = helpers.tensors(copy.deepcopy(model).double()(*inputs))[0]
        model = model.to(dtype)
        twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
        expected, found = (helpers.tensors(one(*halves))[0] for one in (model, twin))
    helpers.assert_accelerated(twin, 1)
    helpers.assert_no_worse(found, expected, exact, dtype)
