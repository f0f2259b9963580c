"""What the tests of verdicts share: tokens, an official block around an attention, and its original."""

from __future__ import annotations

import helpers
import torch

import swinaccel

X = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(2))


def block_of(kind, **options):
    block = helpers.microsoft_block((8, 8), shift=2)
    block.attn = kind(16, (4, 4), 2, **options)
    return helpers.randomize(block)


def statuses(model):
    return [entry.status for entry in swinaccel.report(model)]


def assert_like_the_original(model, x, tolerance=helpers.FP32):
    with torch.no_grad():
        found = model(x)
        with swinaccel.disabled():
            expected = model(x)
    helpers.assert_close(found, expected, tolerance)


def huggingface(kind="Swin"):
    return helpers.huggingface_layer(kind, shift=2), (torch.randn(2, 64, 16), (8, 8))
