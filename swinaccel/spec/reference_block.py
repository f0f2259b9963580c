"""Blocks, patch mergings and patch embeddings in plain PyTorch, as their families describe them: the oracle.

Norms, products and GELU are computed from the parameters of their modules, and drop-paths as factors: what kernels
stand in for is exactly this. Modules that are no part of the description are taken to do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .block import Attend, Block, Embedding, Merging


def block_reference(block: Block, attend: Attend, x: Tensor, size: tuple[int, int] | None) -> Any:
    """Return what a block returns.

    Args:
        attend: (B, H, W, C) to the same.
        x, size: see `spec.block.Tokens`.
    """
    branch = attend_tokens(attend, x if block.post_norm else _norm(block.norm1, x), size)
    if block.post_norm:
        x = x + _dropped(block.drop1, _norm(block.norm1, branch), x)
        x = x + _dropped(block.drop2, _norm(block.norm2, _mlp(block, x)), x)
    else:
        x = x + _dropped(block.drop1, branch, x)
        x = x + _dropped(block.drop2, _mlp(block, _norm(block.norm2, x)), x)
    return x if block.as_output is None else block.as_output(x)


def attend_tokens(attend: Attend, y: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Return the attention of tokens that have one axis, or two where `size` is None."""
    return attend(y) if size is None else attend(y.view(y.shape[0], *size, y.shape[2])).view(y.shape)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _mlp(block: Block, x: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(x, block.fc1.weight, block.fc1.bias))
    return F.linear(hidden, block.fc2.weight, block.fc2.bias)


def _dropped(drop: Any, branch: Tensor, x: Tensor) -> Tensor:
    if drop is None or not drop.training:
        return branch
    return branch * drop_factors(drop, x, branch.dtype).view(-1, *[1] * (x.dim() - 1))


def drop_factors(drop: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the factor of each sample, (samples,), from the numbers that a drop-path would draw for a branch."""
    return drop(torch.ones((x.shape[0],) + (1,) * (x.dim() - 1), dtype=dtype, device=x.device)).reshape(-1)


def merging_reference(
    merging: Merging, x: Tensor, size: tuple[int, int] | None, product: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return what a patch merging returns, by its own modules, or with another product in place of its reduction's."""
    product = merging.reduction if product is None else product
    y = merged(x if size is None else x.view(x.shape[0], *size, x.shape[2]))
    out = merging.norm(product(y)) if merging.post_norm else product(merging.norm(y))
    return out if size is None else out.flatten(1, 2)


def merged(x: Tensor) -> Tensor:
    """Return the 2 x 2 neighbours of an image side by side: (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 4 * C)."""
    batch, height, width, channels = x.shape
    if height % 2 or width % 2:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    parts = x.view(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
    return parts.permute(0, 1, 3, 4, 2, 5).flatten(3)


def unmerged(patches: Tensor, shape: torch.Size) -> Tensor:
    """Return the image, of a shape (B, H, W, C), that `merged` made such patches of."""
    batch, down, across, channels = patches.shape
    parts = patches.reshape(batch, down, across, 2, 2, channels // 4).permute(0, 1, 4, 2, 3, 5)
    image = parts.reshape(batch, 2 * down, 2 * across, channels // 4)
    return image.narrow(1, 0, shape[1]).narrow(2, 0, shape[2])


def embedding_reference(embedding: Embedding, x: Tensor) -> Any:
    """Return what a patch embedding returns, by its own modules."""
    return embedded(embedding, embedding.projection(x).permute(0, 2, 3, 1))


def embedded(embedding: Embedding, image: Tensor) -> Any:
    """Return what a patch embedding makes of its projection, (B, H, W, C)."""
    image = image if embedding.norm is None else embedding.norm(image)
    return image if embedding.as_output is None else embedding.as_output(image)
