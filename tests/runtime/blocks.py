"""What tests of the runtime share: a block of timm's, its calls, and random numbers."""

from __future__ import annotations

import helpers
import torch
from helpers import TRITON_DEVICE

# Triton's interpreter does not multiply bfloat16.
HALVES = [torch.float16, torch.bfloat16] if TRITON_DEVICE == "cuda" else [torch.float16]
HALF = HALVES[-1]
DTYPES = [*HALVES, torch.float32]
AROUND = {"_norm_kernel": "norm", "_merge_kernel": "merge", "_gelu_kernel": "gelu", "_mlp_kernel": "mlp"}
X = torch.randn(2, 8, 8, 16)


def block(**options):
    return helpers.timm_block((8, 8), shift=2, **options)


def random(*shape, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(TRITON_DEVICE, dtype)


def run(model, x=X):
    with torch.no_grad():
        return model(x)
