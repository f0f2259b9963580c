"""Blocks that grew from the official one, and what they are called with."""

from __future__ import annotations

import descendant_models as models
import microsoft_models
import torch
from helpers import randomize

import swinaccel


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


KINDS = {
    "v1": microsoft_models.WindowAttention,
    "v2": microsoft_models.WindowAttentionV2,
    "moe": models.MoEAttention,
    "openmmlab": models.WindowMSA,
}


def attention(kind="v1", window=(4, 4), **options):
    return randomize(KINDS[kind](16, window, 2, **options))
