"""Hugging Face's Donut, CLAP audio, MaskFormerSwin and Swin2SR: one layout, and what each does in its own way.

The numbers are those of the survey that runtime/traps.py tells of, whose tests hold further ones of them.
"""

from __future__ import annotations

import copy
import importlib

import helpers
import pytest
import torch
from helpers import both_backends, check, check_fallback, randomize
from traps import TRANSFORMERS_5

import swinaccel
from swinaccel.spec import reference

KEEPS_VERDICTS = True

KINDS = {"DonutSwin": "donut_swin", "ClapAudio": "clap", "MaskFormerSwin": "maskformer_swin", "Swin2SR": "swin2sr"}


def layer(kind, resolution=(8, 8), shift=2, dim=16, heads=2, **options):
    library = importlib.import_module("transformers")
    stem = KINDS[kind]
    module = importlib.import_module(f"transformers.models.{stem.split('_')[0]}.modeling_{stem}")
    config = getattr(library, f"{kind}Config")(window_size=4, **options)
    return randomize(getattr(module, f"{kind}Layer")(config, dim, resolution, heads, shift_size=shift))


def tokens(size, batch=2, dim=16):
    return torch.randn(batch, size[0] * size[1], dim)


@both_backends
@pytest.mark.parametrize("size", [(8, 8), (9, 10), (4, 8)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layer(kind, size, backend):
    found = check(layer(kind), tokens(size), size, backend=backend, count=1)
    assert isinstance(found, tuple)
    assert len(found) == 1


@pytest.mark.parametrize(("kind", "shift"), [("DonutSwin", 0), ("ClapAudio", 0), ("MaskFormerSwin", 2), ("Swin2SR", 2)])
def test_traps_04_07_12_one_window(kind, shift):
    """Donut and CLAP give their shift up for good where the image is one window; the others never look."""
    model = layer(kind)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    for size in ((8, 8), (4, 4), (8, 8)):
        x = tokens(size)
        with torch.no_grad():
            helpers.assert_close(twin(x, size), model(x, size))
    assert twin.shift_size == model.shift_size == shift
    helpers.assert_accelerated(twin, 1)


def overruling(model, dim=16, size=(8, 8)):
    """A layer and an input whose scores across regions outweigh one mask of -100, but not two."""
    attn = model.attention.self
    half = dim // attn.num_attention_heads
    with torch.no_grad():
        for projection, sign in ((attn.query, 1), (attn.key, -1)):
            projection.weight.copy_(sign * torch.eye(dim))
            if projection.bias is not None:
                projection.bias.zero_()
        attn.logit_scale.fill_(10)
    x = torch.randn(1, 1, 1, half).repeat(1, *size, attn.num_attention_heads) + 0.01 * torch.randn(1, *size, dim)
    x[:, : model.shift_size] *= -1
    return x.flatten(1, 2)


@both_backends
def test_trap_16_swin2sr_adds_its_mask_twice(backend):
    """Tokens that the roll brings together match so well that -100 lets them through and -200 does not."""
    model = layer("Swin2SR")
    x = overruling(model)
    found = check(model, x, (8, 8), backend=backend, tolerance=1e-4)
    reader, _ = swinaccel.families.match(model)
    section = reader.section(model, x, (8, 8))
    assert section.mask_value == -200
    outputs = []
    for value in (-200.0, -100.0):
        section.mask_value = value
        with torch.no_grad():
            attended = reference.section_attention(section, x.view(1, 8, 8, 16)).flatten(1, 2)
            y = x + model.layernorm_before(attended)
            outputs.append(y + model.layernorm_after(model.output(model.intermediate(y))))
    helpers.assert_close(outputs[0], found[0].cpu(), 1e-4)
    assert helpers.difference(outputs[1], outputs[0]) > 1e-2, "the input does not tell one mask from two"


@pytest.mark.parametrize("dim", [60, 180])
def test_trap_34_swin2sr_head_dims(dim):
    check(layer("Swin2SR", dim=dim, heads=6), tokens((8, 8), dim=dim), (8, 8), backend="triton")


@pytest.mark.parametrize("kind", KINDS)
def test_traps_20_36_attention_weights_by_position(kind):
    """The place of output_attentions differs between versions of the library."""
    before = () if TRANSFORMERS_5 else (None,)  # head_mask
    found = check_fallback(layer(kind), tokens((8, 8)), (8, 8), *before, True, reason="attention weights are requested")
    assert found[1].shape == (8, 2, 16, 16)


@pytest.mark.skipif(TRANSFORMERS_5, reason="transformers 5 has no head_mask")
@pytest.mark.parametrize("kind", KINDS)
def test_trap_21_head_mask(kind):
    mask = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    check_fallback(layer(kind), tokens((8, 8)), (8, 8), mask, reason="head_mask")


@pytest.mark.parametrize("kind", KINDS)
def test_trap_39_dropout_set_apart_counts(kind):
    """Monte Carlo dropout: the layer is in eval mode, the dropout of its attention is not."""
    model = layer(kind)
    dropout = model.attention.self.dropout
    dropout.p = 0.5
    reader, _ = swinaccel.families.match(model)
    assert reader.section(model, tokens((8, 8)), (8, 8)).dropout == 0
    dropout.train()
    assert reader.section(model, tokens((8, 8)), (8, 8)).dropout == 0.5
