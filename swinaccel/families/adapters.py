"""Modules that hold no window attention of their own, and yet are better run with what is next to it in few kernels.

torchvision's blocks, whose attention is a family's module and is called as one; and the patch mergings of all
libraries: a norm and a product, which some are told the size of their image for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..spec.block import Block, Merging, Tokens
from .shared.common import pair, positional_names
from .torchvision import Torchvision


class Captured:
    """A whole model, or a stage of one, whose calls are replayed as CUDA graphs."""

    name = "graph"
    method = "forward"
    is_captured = True


class Outermost:
    """The outermost module around attention that returns its weights; after its call, whoever reads them holds them."""

    name = "outermost"
    method = "forward"
    is_outermost = True


class TorchvisionBlock:
    """SwinTransformerBlock and SwinTransformerBlockV2."""

    name = "torchvision_block"
    method = "forward"

    def match(self, module: Any) -> bool:
        parts = (getattr(module, name, None) for name in ("norm1", "norm2", "mlp", "stochastic_depth"))
        if not all(isinstance(part, nn.Module) for part in parts) or len(module.mlp._modules) != 5:
            return False
        return len(positional_names(type(module).forward)) == 1 and Torchvision().match(module.attn) is not None

    def block(self, module: Any) -> Block:
        mlp, attn, drop = module.mlp, module.attn, module.stochastic_depth
        fc1, activation, _, fc2, _ = mlp._modules.values()
        post_norm = hasattr(attn, "logit_scale")
        return Block(attn, module.norm1, module.norm2, (mlp,), fc1, activation, fc2, post_norm, drop, drop)

    def tokens(self, module: Any, x: Tensor) -> Tokens:
        return x, None

    def inner(self, module: Any) -> tuple[Any, nn.Module]:
        return Torchvision(), module.attn

    def attend(self, module: Any) -> Any:
        return module.attn

    def example(self, module: Any) -> tuple[Any, ...]:
        return Torchvision().example(module.attn)


class PatchMerging:
    """A patch merging of (B, H, W, C); or of (B, H * W, C), told H and W by its `input_resolution` or an argument."""

    name = "patch_merging"
    method = "forward"

    def match(self, module: Any) -> bool:
        norm, reduction = (module._modules.get(name) for name in ("norm", "reduction"))
        if not isinstance(norm, nn.LayerNorm) or not isinstance(reduction, nn.Linear) or len(module._modules) != 2:
            return False
        if reduction.in_features % 4 or reduction.bias is not None or module._parameters or module._buffers:
            return False
        return len(positional_names(type(module).forward)) <= 2

    def block(self, module: Any) -> Merging:
        norm, reduction = module.norm, module.reduction
        return Merging(norm, reduction, post_norm=norm.normalized_shape[0] != reduction.in_features)

    def tokens(self, module: Any, x: Tensor, size: Any = None) -> Tokens:
        sides = pair(getattr(module, "input_resolution", None) if size is None else size)
        return x, None if sides is None else (sides[0], sides[1])

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        channels, size = module.reduction.in_features // 4, pair(getattr(module, "input_resolution", None))
        if len(positional_names(type(module).forward)) == 2:
            return [(torch.Size((2, 30, channels)), (6, 5)), (torch.Size((2, 35, channels)), (5, 7))]
        if size is not None:
            return [(torch.Size((2, size[0] * size[1], channels)),)]
        return [(torch.Size((2, 6, 5, channels)),), (torch.Size((2, 5, 8, channels)),)]
