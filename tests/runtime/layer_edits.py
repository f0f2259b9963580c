"""Edits of what is around the attention of a block, of patch mergings and of patch embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import block_gradients as training
import embeddings
import helpers
import part_edits as parts
import torch
import torch.nn.functional as F
from blocks import random
from helpers import TRITON_DEVICE
from part_edits import KEPT, Edit
from torch import nn


class Scaled(nn.Module):
    """Does nothing where its factor is one."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class OddNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def odd_norm(norm: nn.Module) -> nn.LayerNorm:
    made = OddNorm(norm.normalized_shape)
    made.load_state_dict(norm.state_dict())
    return made


def active_dropout(model: nn.Module, _: Any) -> None:
    model.mlp.drop1.train().p = 0.1


def scaled_after_a_call(model: nn.Module, _: Any) -> None:
    like = next(model.parameters())
    model.drop_path1 = Scaled(1.0)
    with torch.no_grad():
        model(torch.zeros(2, 8, 8, 16).to(like))
    model.drop_path1.factor = 2.0


BLOCK = {
    "parameters": Edit(parts.all_data(""), KEPT),
    "eps": Edit(parts.setting("norm1", "eps", 0.1), KEPT),
    "norm-without-affine": Edit(parts.replaced("norm2", lambda _: nn.LayerNorm(16, elementwise_affine=False)), KEPT),
    "product-without-bias": Edit(parts.setting("mlp.fc2", "bias", None), KEPT),
    "bias-size": Edit(parts.tensor("mlp.fc1", "bias", lambda one: nn.Parameter(one.detach()[:1]))),
    "product": Edit(parts.replaced("mlp.fc2", lambda _: helpers.randomize(nn.Linear(64, 16))), KEPT),
    "dtype": Edit(parts.quietly(lambda model: model.half()), KEPT),
    "parameter-unread": Edit(parts.setting("", "gamma", nn.Parameter(torch.ones(16, device=TRITON_DEVICE))), KEPT),
    "child": Edit(parts.setting("", "adapter", nn.Identity())),
    "hook-norm": Edit(parts.doubling_hook("norm1")),
    "hook-mlp": Edit(parts.hook("mlp", "forward_pre_hook")),
    "hook-fc2": Edit(parts.doubling_hook("mlp.fc2")),
    "hook-drop-path": Edit(parts.doubling_hook("drop_path2")),
    "hook-activation": Edit(parts.hook("mlp.act", "full_backward_hook")),
    "all-hooks-norm": Edit(parts.all_hooks(nn.LayerNorm), reason="global module hook"),
    "all-hooks-linear": Edit(parts.all_hooks(nn.Linear), reason="global module hook"),
    "norm": Edit(parts.replaced("norm2", odd_norm)),
    "activation": Edit(parts.replaced("mlp.act", lambda _: nn.ReLU())),
    "tanh": Edit(parts.replaced("mlp.act", lambda _: nn.GELU("tanh"))),
    "mlp-norm": Edit(parts.replaced("mlp.norm", lambda _: nn.LayerNorm(64))),
    "drop-path": Edit(parts.replaced("drop_path1", lambda _: Scaled(2.0))),
    "drop-path-setting": Edit(scaled_after_a_call),
    "forward": Edit(parts.method("mlp.fc1")),
    "parametrized": Edit(parts.parametrized("mlp.fc1")),
    "dropout": Edit(active_dropout),
    **{f"compiled-{part}": Edit(parts.compiled(part)) for part in ("norm1", "mlp", "mlp.act", "mlp.fc2")},
    **{
        f"class-{part}": Edit(parts.class_method(part))
        for part in ("norm1", "mlp", "mlp.act", "mlp.fc2", "mlp.drop1", "drop_path1")
    },
}

# The norms of the second version stand elsewhere; what is done to a class, or to all modules, does not ask where.
BLOCK_V2 = {
    name: edit
    for name, edit in BLOCK.items()
    if not name.startswith(("class", "all-hooks", "product", "parameter-unread", "child", "forward"))
}

# In training, all of whose draws are the same.


class Drop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop_prob = 0.5

    def drawn(self, x: torch.Tensor, axes: int = 1) -> torch.Tensor:
        return torch.empty((*x.shape[:axes], *[1] * (x.dim() - axes)), device=x.device).bernoulli_(1 - self.drop_prob)


class Centred(Drop):
    """Multiplies each sample by what the sample is like."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.flatten(1).mean(1).view(-1, *[1] * (x.dim() - 1))


class StraightThrough(Drop):
    """Drops samples, but for the gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (x * self.drawn(x) - x).detach()


class Promoting(Drop):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (1 - self.drop_prob) * self.drawn(x).float()


class Halving(nn.Module):
    """Nothing, but for the gradient."""

    p = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 + (x * 0.5).detach()


class SlowGelu(nn.Module):
    """GELU, but for the gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x.detach()) + 0 * x


class Counting(nn.Module):
    """GELU of what was called so often."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return F.gelu(x) * (1 + 0.1 * self.calls)


TRAINING = {
    name: Edit(change, modes=("training",))
    for name, change in {
        "dropout-in-training": parts.setting("mlp.drop1", "p", 0.5),
        "drop-path-of-tokens": parts.replaced("drop_path1", lambda _: training.PerToken()),
        "drop-path-by-value": parts.replaced("drop_path1", lambda _: Centred()),
        "dropout-as-drop-path": parts.replaced("drop_path1", lambda _: nn.Dropout(0.5)),
        "small-dropout-as-drop-path": parts.replaced("drop_path1", lambda _: nn.Dropout(1e-3)),
        "straight-through-drop-path": parts.replaced("drop_path1", lambda _: StraightThrough()),
        "drop-path-that-promotes": parts.replaced("drop_path1", lambda _: Promoting()),
        "halving": parts.replaced("mlp.drop1", lambda _: Halving()),
        "gelu-without-gradient": parts.replaced("mlp.act", lambda _: SlowGelu()),
        "gelu-that-counts": parts.replaced("mlp.act", lambda _: Counting()),
        "child-in-two-roles": lambda model, _: setattr(model.mlp, "drop2", model.mlp.act),
        "hook-drop-path-in-training": parts.hook("drop_path2"),
        "hook-norm-in-training": parts.hook("norm1", "forward_pre_hook"),
        "hook-fc2-in-training": parts.hook("mlp.fc2", "full_backward_hook"),
        "tanh-in-training": parts.replaced("mlp.act", lambda _: nn.GELU("tanh")),
        "norm-of-another-dtype": parts.quietly(lambda model: model.norm2.double()),
    }.items()
}

TRAINING_V2 = {
    name: TRAINING[name]
    for name in (
        "dropout-in-training", "drop-path-of-tokens", "straight-through-drop-path", "gelu-without-gradient",
        "hook-norm-in-training",
    )
}  # fmt: skip

# Patch mergings, and patch embeddings with a block beside them that is not called.

MERGING = {
    "parameters": Edit(parts.all_data("embedding"), KEPT),
    "in-place": Edit(parts.in_place("embedding", lambda one: one.mul_(2)), KEPT),
    "parameter": Edit(parts.tensor("embedding.reduction", "weight", parts.new), KEPT),
    "eps": Edit(parts.setting("embedding.norm", "eps", 0.1), KEPT),
    "hook-norm": Edit(parts.doubling_hook("embedding.norm")),
    "hook-reduction": Edit(parts.hook("embedding.reduction", "forward_pre_hook")),
    "all-hooks": Edit(parts.all_hooks(nn.LayerNorm)),
    "forward": Edit(parts.method("embedding")),
    "forward-reduction": Edit(parts.method("embedding.reduction")),
    "class": Edit(parts.setting("embedding.reduction", "__class__", parts.Doubled)),
    "class-norm": Edit(parts.class_method("embedding.norm")),
    "class-reduction": Edit(parts.class_method("embedding.reduction")),
    "norm": Edit(parts.replaced("embedding.norm", odd_norm)),
    "child": Edit(parts.setting("embedding", "adapter", nn.Identity())),
    "parametrized": Edit(parts.parametrized("embedding.reduction")),
}


def convolution(**options: Any) -> Callable:
    return parts.replaced("embedding.proj", lambda _: helpers.randomize(nn.Conv2d(3, 48, **options)))


def wrapped(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer)


class Marked(nn.Parameter):
    """A parameter of another kind."""


class DoubledConvolution(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def channels_first(model: nn.Module, _: Any) -> None:
    model.embedding.norm = nn.Identity()
    model.embedding.output_fmt = type(model.embedding.output_fmt)("NCHW")


def numbers(*shape: int) -> nn.Parameter:
    return nn.Parameter(random(*shape, dtype=embeddings.DTYPE))


EMBEDDING = {
    "parameters": Edit(parts.all_data("embedding"), KEPT),
    "in-place": Edit(parts.quietly(lambda model: model.embedding.proj.bias.data.mul_(2)), KEPT),
    "parameter": Edit(parts.tensor("embedding.proj", "weight", lambda one: nn.Parameter(1.5 * one.detach())), KEPT),
    "eps": Edit(parts.setting("embedding.norm", "eps", 0.1), KEPT),
    "dtype": Edit(parts.quietly(lambda model: model.float()), None),
    "bias-size": Edit(parts.tensor("embedding.proj", "bias", lambda one: nn.Parameter(one.detach()[:1]))),
    "hook-projection": Edit(parts.doubling_hook("embedding.proj")),
    "pre-hook-projection": Edit(parts.hook("embedding.proj", "forward_pre_hook")),
    "hook-norm": Edit(parts.doubling_hook("embedding.norm")),
    "backward-hook-norm": Edit(parts.hook("embedding.norm", "full_backward_hook")),
    "all-hooks": Edit(parts.all_hooks(nn.Conv2d)),
    "forward-projection": Edit(parts.method("embedding.proj")),
    "forward-norm": Edit(parts.method("embedding.norm")),
    "forward": Edit(parts.method("embedding")),
    "method-convolution": Edit(parts.method("embedding.proj", "_conv_forward")),
    "method": Edit(parts.setting("embedding", "feat_ratio", lambda: 1)),
    "class-convolution": Edit(parts.class_method("embedding.proj", "_conv_forward")),
    "class-projection": Edit(parts.class_method("embedding.proj")),
    "class": Edit(parts.setting("embedding.proj", "__class__", DoubledConvolution)),
    "norm": Edit(parts.replaced("embedding.norm", odd_norm)),
    "norm-is-none": Edit(parts.setting("embedding", "norm", nn.ReLU())),
    "norm-of-groups": Edit(parts.replaced("embedding.norm", lambda _: nn.GroupNorm(3, 6))),
    "norm-of-more-axes": Edit(parts.replaced("embedding.norm", lambda _: nn.LayerNorm((6, 48)))),
    "identity-class": Edit(parts.replaced("embedding.norm", lambda _: Scaled(2.0))),
    "parametrized": Edit(parts.parametrized("embedding.proj")),
    "memory-format": Edit(
        parts.data("embedding.proj", "weight", lambda one: one.to(memory_format=torch.channels_last))
    ),
    "weight-class": Edit(parts.tensor("embedding.proj", "weight", lambda one: Marked(one.data))),
    "bias-class": Edit(parts.tensor("embedding.proj", "bias", lambda one: Marked(one.data))),
    "padding": Edit(parts.setting("embedding.proj", "padding", (2, 2))),
    "dilation": Edit(parts.setting("embedding.proj", "dilation", (1, 2))),
    "stride": Edit(parts.setting("embedding.proj", "stride", (2, 2))),
    "patch-size": Edit(parts.setting("embedding", "patch_size", (8, 8))),
    "format": Edit(parts.setting("embedding", "output_fmt", "NLC")),
    "channels-first": Edit(channels_first),
    "flatten": Edit(parts.setting("embedding", "flatten", True)),
    "child": Edit(parts.setting("embedding", "adapter", nn.Identity())),
    "convolution-stride": Edit(convolution(kernel_size=4, stride=2)),
    "convolution-padding": Edit(convolution(kernel_size=4, stride=4, padding=2)),
    "convolution-dilation": Edit(convolution(kernel_size=4, stride=4, dilation=2)),
    "convolution-groups": Edit(convolution(kernel_size=4, stride=4, groups=3)),
    "convolution-patch": Edit(convolution(kernel_size=2, stride=2)),
    "convolution-in-a-sequence": Edit(parts.replaced("embedding.proj", wrapped)),
}
# Hugging Face's norm is a module's around the patch embedding; where that is unusual, the norm is its own.
EMBEDDING_AND_NORM = {
    "hook-norm": Edit(parts.doubling_hook("embedding.norm")),
    "hook-patches": Edit(parts.hook("embedding.patch_embeddings")),
    "forward-norm": Edit(parts.method("embedding.norm")),
    "forward-patches": Edit(
        parts.setting("embedding.patch_embeddings", "forward", lambda x: (x.mean() * x.new_ones(2, 36, 48), (6, 6)))
    ),
    "norm": Edit(parts.replaced("embedding.norm", odd_norm)),
    "method-padding": Edit(parts.method("embedding.patch_embeddings", "maybe_pad")),
    "positions": Edit(parts.setting("embedding", "position_embeddings", numbers(1, 36, 48))),
    "mask-token": Edit(parts.setting("embedding", "mask_token", numbers(1, 1, 48))),
    "dropout": Edit(parts.setting("embedding", "dropout", nn.Dropout(1.0).train())),
    "another-dropout": Edit(parts.setting("embedding", "dropout", nn.ReLU())),
    "child": Edit(parts.setting("embedding", "adapter", nn.Identity())),
}
