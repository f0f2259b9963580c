"""Blocks that grew from the official one.

The numbers are those of the survey that runtime/traps.py tells of.
"""

from __future__ import annotations

import copy

import descendant_models as models
import helpers
import microsoft_models
import pytest
import torch
from descendants import attention, detection, detection_mask, family, hat, hat_arguments, moe, openmmlab, swinir, tokens
from helpers import BACKENDS, both_backends, check, check_fallback, randomize, versions

import swinaccel
from swinaccel import families

KEEPS_VERDICTS = True


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
