"""What the tests of traps share: layers of every library, and how a Hugging Face layer is called.

Each test of a trap is about what implementations of Swin do differently from each other, against the real libraries.
The numbers are those of the survey that these tests were written from; numbers that are missing concern
implementations that no family claims, or stand in tests/families (40, 41, 42).
"""

from __future__ import annotations

import importlib

import helpers
import torch
from helpers import check

TRANSFORMERS_5 = importlib.import_module("transformers").__version__ >= "5"


def hf_check(layer, size, backend="torch", batch=2, **arguments):
    """A Hugging Face layer, called as its stage calls it."""
    x = torch.randn(batch, size[0] * size[1], 16)
    return check(layer, x, size, backend=backend, arguments=arguments)


def layers(model):
    return [module for module in model.modules() if hasattr(module, "shift_size")]


HOOKABLE = {
    "timm": (lambda: helpers.timm_block((8, 8), shift=2), "attn", (torch.randn(2, 8, 8, 16),)),
    "timm-v2": (lambda: helpers.timm_block((8, 8), shift=2, v2=True), "attn", (torch.randn(2, 8, 8, 16),)),
    "microsoft": (lambda: helpers.microsoft_block((8, 8), shift=2), "attn", (torch.randn(2, 64, 16),)),
    "microsoft-v2": (lambda: helpers.microsoft_block((8, 8), shift=2, v2=True), "attn", (torch.randn(2, 64, 16),)),
    "torchvision": (lambda: helpers.torchvision_attention(shift=(2, 2)), "", (torch.randn(2, 8, 8, 16),)),
    "torchvision-v2": (lambda: helpers.torchvision_attention(shift=(2, 2), v2=True), "", (torch.randn(2, 8, 8, 16),)),
    "hf-swin": (lambda: helpers.huggingface_layer("Swin", shift=2), "attention", (torch.randn(2, 64, 16), (8, 8))),
    "hf-swinv2": (lambda: helpers.huggingface_layer("Swinv2", shift=2), "attention", (torch.randn(2, 64, 16), (8, 8))),
}
