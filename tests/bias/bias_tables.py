"""Bias tables, smooth and random, and models that have them."""

from __future__ import annotations

import helpers
import torch
from helpers import TRITON_DEVICE, table_rows

import swinaccel

WINDOW = (9, 8)
TOKENS, HEADS = 72, 1  # one more than a small window; few programs, for the interpreter takes its time
EXACT = 0.9999999  # energy that a bias of rank 16 holds and a random one does not


def smooth_table(window=WINDOW, heads=HEADS, seed=0):
    """Quadratic in the offsets, as trained tables roughly are: its bias has rank 5, exactly."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = torch.meshgrid(*(torch.arange(1 - axis, axis) / axis for axis in window), indexing="ij")
    weights = torch.randn(4, heads, generator=generator)
    terms = torch.stack((rows**2, cols**2, rows, cols), -1).view(-1, 4)
    return 2 * terms @ weights


def random_table(seed=0):
    return torch.randn(table_rows(WINDOW), HEADS, generator=torch.Generator().manual_seed(seed))


def model_with(table):
    model = helpers.torchvision_attention(window=WINDOW, shift=(4, 4), heads=HEADS).to(TRITON_DEVICE)
    with torch.no_grad():
        model.relative_position_bias_table.copy_(table)
    return model.requires_grad_(False)


IMAGE = torch.randn(1, 9, 8, 16, generator=torch.Generator().manual_seed(5)).to(TRITON_DEVICE)


def accelerate(model, **options):
    return swinaccel.accelerate(model, backend="triton", **options)


def form(model):
    (entry,) = swinaccel.report(model)
    assert entry.fallbacks == 0
    return entry.bias


def originals(model, x=IMAGE):
    with swinaccel.disabled():
        return model(x)
