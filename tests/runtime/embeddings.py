"""Patch embeddings of every library, in a model with an attention, and their comparison with the original."""

from __future__ import annotations

import importlib

import helpers
import microsoft_models
import torch
from blocks import HALVES
from helpers import TRITON_DEVICE
from torch import nn

import swinaccel

# Convolutions of fp32 stay cuDNN's, which may use TF32.

DTYPES = HALVES if TRITON_DEVICE == "cuda" else [*HALVES, torch.float32]
DTYPE = DTYPES[-1]


# Modules: each in a model with an attention, without which none is touched.


class Model(nn.Module):
    """An embedding, and a block that is not called."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding
        self.block = helpers.timm_block((8, 8))

    def forward(self, x):
        return self.embedding(x)


def timm(kind=None, **options):
    from timm.layers import PatchEmbed

    settings = {"img_size": 24, "patch_size": 4, "embed_dim": 48, "norm_layer": nn.LayerNorm, **options}
    if "flatten" not in settings:
        settings.setdefault("output_fmt", "NHWC")
    return (kind or PatchEmbed)(**settings)


def huggingface(kind="Swin", part="PatchEmbeddings", **options):
    folder = {"Swin": "swin", "Swinv2": "swinv2", "DonutSwin": "donut", "MaskFormerSwin": "maskformer"}[kind]
    stem = {"donut": "donut_swin", "maskformer": "maskformer_swin"}.get(folder, folder)
    library = importlib.import_module(f"transformers.models.{folder}.modeling_{stem}")
    config = importlib.import_module("transformers").SwinConfig(image_size=24, embed_dim=48, **options)
    return getattr(library, f"{kind}{part}")(config)


def microsoft(**options):
    return microsoft_models.PatchEmbed(24, embed_dim=48, **options)


# name: (embedding, shape of an image)
EMBEDDINGS = {
    "timm": (timm, (2, 3, 24, 24)),
    "timm-no-norm": (lambda: timm(norm_layer=None), (2, 3, 24, 24)),
    "timm-no-bias": (lambda: timm(bias=False), (2, 3, 24, 24)),
    "timm-any-size": (lambda: timm(strict_img_size=False), (2, 3, 12, 32)),
    "timm-no-size": (lambda: timm(img_size=None), (3, 3, 12, 32)),
    "timm-padding": (lambda: timm(strict_img_size=False, dynamic_img_pad=True), (2, 3, 12, 32)),
    "timm-tokens": (lambda: timm(output_fmt="NLC"), (2, 3, 24, 24)),
    "timm-flat": (lambda: timm(flatten=True), (2, 3, 24, 24)),
    "timm-rectangular": (lambda: timm(img_size=(24, 30), patch_size=(4, 6), in_chans=2), (2, 2, 24, 30)),
    "microsoft": (microsoft, (2, 3, 24, 24)),
    "microsoft-norm": (lambda: microsoft(norm_layer=nn.LayerNorm), (2, 3, 24, 24)),
    "hf-swin": (huggingface, (2, 3, 20, 36)),
    "hf-swinv2": (lambda: huggingface("Swinv2"), (2, 3, 20, 36)),
    "hf-donut": (lambda: huggingface("DonutSwin"), (2, 3, 20, 36)),
    "hf-maskformer": (lambda: huggingface("MaskFormerSwin"), (2, 3, 20, 36)),
    "hf-swin-norm": (lambda: huggingface("Swin", "Embeddings"), (2, 3, 20, 36)),
    "hf-swinv2-norm": (lambda: huggingface("Swinv2", "Embeddings"), (2, 3, 20, 36)),
    "hf-donut-norm": (lambda: huggingface("DonutSwin", "Embeddings"), (2, 3, 20, 36)),
}


def accelerated(embedding, dtype=DTYPE, **options):
    model = helpers.randomize(Model(embedding)).to(TRITON_DEVICE, dtype)
    return swinaccel.accelerate(model, backend="triton", **options)


def given(model, x):
    with torch.no_grad():
        return model(x)


def same_as_the_original(model, x):
    """Output for output, to the last bit."""
    found = given(model, x)
    with swinaccel.disabled():
        expected = given(model, x)
    assert type(found) is type(expected)
    pairs = zip(helpers.tensors(found), helpers.tensors(expected), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)
