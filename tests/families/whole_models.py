"""Whole models of every family, and images for them."""

from __future__ import annotations

import helpers
import torch
from torch import nn

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def images(height, width=None):
    return IMAGES[:, :, :height, : width or height]


# name: (model, input, window attentions in it)
MODELS = {
    "timm-v1": (lambda: helpers.timm_v1(), lambda: images(56), 3),
    "timm-v1-masked": (lambda: helpers.timm_v1(window=4, img_size=64), lambda: images(64), 3),
    "timm-v1-padded": (lambda: helpers.timm_v1(window=5, img_size=52, patch_size=4), lambda: images(52), 3),
    "timm-v1-resizable": (
        lambda: helpers.timm_v1(window=4, always_partition=True, strict_img_size=False),
        lambda: images(52, 60),
        3,
    ),
    "timm-v1-head-dim": (lambda: helpers.timm_v1(head_dim=10), lambda: images(56), 3),
    "timm-v1-no-bias": (lambda: helpers.timm_v1(qkv_bias=False), lambda: images(56), 3),
    "timm-v2": (lambda: helpers.timm_v2(), lambda: images(64), 3),
    "timm-v2-masked": (lambda: helpers.timm_v2(window=4), lambda: images(64), 3),
    "timm-v2-rectangular": (lambda: helpers.timm_v2(window=(4, 8)), lambda: images(64), 3),
    "timm-v2-no-bias": (lambda: helpers.timm_v2(qkv_bias=False), lambda: images(64), 3),
    "torchvision-v1": (lambda: helpers.torchvision_model(), lambda: images(32), 4),
    "torchvision-v1-padded": (lambda: helpers.torchvision_model(), lambda: images(44, 36), 4),
    "torchvision-v1-rectangular": (lambda: helpers.torchvision_model(window=(4, 6)), lambda: images(64), 4),
    "torchvision-v2": (lambda: helpers.torchvision_model(v2=True), lambda: images(32), 4),
    "torchvision-v2-padded": (lambda: helpers.torchvision_model(v2=True), lambda: images(44, 36), 4),
    "hf-swin": (lambda: helpers.huggingface("Swin"), lambda: images(32), 4),
    "hf-swin-padded": (lambda: helpers.huggingface("Swin"), lambda: images(44, 36), 4),
    "hf-swin-backbone": (lambda: helpers.huggingface("Swin", "Backbone"), lambda: images(32), 4),
    "hf-swin-no-bias": (lambda: helpers.huggingface("Swin", qkv_bias=False), lambda: images(32), 4),
    "hf-swinv2": (lambda: helpers.huggingface("Swinv2"), lambda: images(32), 4),
    "hf-swinv2-padded": (lambda: helpers.huggingface("Swinv2"), lambda: images(44, 36), 4),
    "hf-swinv2-backbone": (lambda: helpers.huggingface("Swinv2", "Backbone"), lambda: images(32), 4),
    "hf-donut": (lambda: helpers.huggingface("DonutSwin"), lambda: images(32), 4),
    "hf-classifier": (lambda: helpers.huggingface("Swin", "ForImageClassification"), lambda: images(32), 4),
    "microsoft-v1": (lambda: microsoft(), lambda: torch.randn(2, 64, 16), 2),
    "microsoft-v1-no-bias": (lambda: microsoft(qkv_bias=False), lambda: torch.randn(2, 64, 16), 2),
    "microsoft-v2": (lambda: microsoft(v2=True), lambda: torch.randn(2, 64, 16), 2),
    "microsoft-v2-no-bias": (lambda: microsoft(v2=True, qkv_bias=False), lambda: torch.randn(2, 64, 16), 2),
}


def microsoft(**options):
    return nn.Sequential(
        helpers.microsoft_block((8, 8), shift=0, **options), helpers.microsoft_block((8, 8), shift=2, **options)
    )
