"""Plan patch mergings and patch embeddings: a norm with the product beside it, and patches as rows of a product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.torch import products
from ..backends.triton import block as kernels
from ..config import AccelConfig
from ..layers import is_builtin
from ..ops import block_autograd as recorded
from ..spec.block import Embedding, Merging
from ..spec.reference_block import embedded, embedding_reference, merging_reference
from .block import failed, needs_autograd, norm_dtype, require, require_no_dropout, require_no_hooks, require_norm_size
from .context import product_dtype


class MergingFacts:
    """Parts of a plain patch merging: a norm (weight, bias, eps) and a product."""

    __slots__ = ("affine", "channels", "merging", "reduction")

    def __init__(self, module: nn.Module, merging: Merging) -> None:
        norm, layer = merging.norm, merging.reduction
        require(is_builtin(layer, nn.Linear), "its reduction is no plain linear layer")
        require(is_builtin(norm, nn.LayerNorm), "its norm is no layer norm")
        require_no_hooks(module.modules())
        width, channels = layer.weight.shape
        require_norm_size(norm, width if merging.post_norm else channels)
        require(channels % 4 == 0, "its channels are not those of four neighbours")
        require(layer.bias is None or tuple(layer.bias.shape) == (width,), "a bias of it has another size")
        self.merging, self.channels = merging, channels // 4
        self.affine, self.reduction = (norm.weight, norm.bias, norm.eps), (layer.weight, layer.bias)

    def parameters(self) -> list[Tensor]:
        """Return the parameters that kernels are given."""
        return [one for one in (*self.affine[:2], *self.reduction) if one is not None]

    def accepts(self, x: Tensor) -> bool:
        """Return True if x is what the module merges."""
        return x.is_contiguous() and x.shape[-1] == self.channels

    def problem(self, x: Tensor) -> tuple:
        """Return what failures of its kernels are kept under."""
        return "merging", x.device, product_dtype(x), self.channels, needs_autograd(x, self.parameters())

    def runner(
        self, x: Tensor, size: tuple[int, int] | None, config: AccelConfig, backend: str
    ) -> Callable[[Tensor], Tensor]:
        """Return what merges inputs like x in few kernels: each four neighbours become one token."""
        merging, affine, reduction = self.merging, self.affine, self.reduction
        if backend == "torch":
            product = partial(products.linear, weight=reduction[0], bias=reduction[1])
            return partial(merging_reference, merging, size=size, product=product)
        is_recorded = needs_autograd(x, self.parameters())

        def run(x: Tensor) -> Tensor:
            image = x if size is None else x.view(x.shape[0], *size, x.shape[2])
            try:
                if is_recorded:
                    patches = recorded.merge(image, None if merging.post_norm else affine, product_dtype(x))
                    out = F.linear(patches, *reduction)
                    if merging.post_norm:
                        out = recorded.norm(out, affine, norm_dtype(x))[1]
                elif merging.post_norm:
                    out = kernels.norm(F.linear(kernels.merge(image, None), *reduction), affine)
                else:
                    out = F.linear(kernels.merge(image, affine), *reduction)
            except kernels.LaunchError as error:
                failed(self.problem(x), error, config)
                return merging_reference(merging, x, size)
            return out if size is None else out.flatten(1, 2)

        return run


class EmbeddingFacts:
    """Parts of a plain patch embedding: a convolution and, or not, a norm."""

    __slots__ = ("affine", "channels", "embedding", "projection")

    def __init__(self, module: nn.Module, embedding: Embedding) -> None:
        layer, norm = embedding.projection, embedding.norm
        require(is_builtin(layer, nn.Conv2d) and is_patchwise(layer), "its projection is no plain product of patches")
        require(norm is None or is_builtin(norm, nn.LayerNorm), "its norm is no layer norm")
        require_no_hooks(module.modules())
        require_no_dropout(module.modules(), ())
        width, self.channels, *patch = layer.weight.shape
        if norm is not None:
            require_norm_size(norm, width)
        numbers = self.channels * patch[0] * patch[1]
        require(kernels.embed_launch(width, numbers) is not None, "its patches are too large for the kernel")
        self.embedding, self.projection = embedding, (layer.weight, layer.bias)
        self.affine = None if norm is None else (norm.weight, norm.bias, norm.eps)

    def parameters(self) -> list[Tensor]:
        """Return the parameters that kernels are given."""
        norm = () if self.affine is None else self.affine[:2]
        return [one for one in (*self.projection, *norm) if one is not None]

    def accepts(self, x: Tensor) -> bool:
        """Return True if x is what the module embeds, and the kernel is to be preferred."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            return False
        return needs_autograd(x, self.parameters()) or (x.is_contiguous() and _is_worth(x))

    def problem(self, x: Tensor) -> tuple:
        """Return what failures of its kernels are kept under."""
        shape = self.projection[0].shape
        return "embedding", x.device, product_dtype(x), shape, self.affine is None, needs_autograd(x, self.parameters())

    def runner(
        self, x: Tensor, size: tuple[int, int] | None, config: AccelConfig, backend: str
    ) -> Callable[[Tensor], Any]:
        """Return what embeds images like x, of whole patches, in one kernel, and gives what the module gives."""
        embedding, affine, (weight, bias) = self.embedding, self.affine, self.projection
        is_recorded = needs_autograd(x, self.parameters())

        def run(x: Tensor) -> Any:
            try:
                if is_recorded:
                    image = multiplied(x, weight, bias)
                    if affine is not None:
                        image = recorded.norm(image, affine, norm_dtype(x))[1]
                else:
                    image = kernels.embed(x, weight, bias, affine)
            except kernels.LaunchError as error:
                failed(self.problem(x), error, config)
                return embedding_reference(embedding, x)
            return image if embedding.as_output is None else embedding.as_output(image)

        return run


def is_patchwise(layer: Any) -> bool:
    """Return True if a plain convolution is one of patches that neither overlap nor leave gaps."""
    return (
        layer.kernel_size == layer.stride == tuple(layer.weight.shape[2:])
        and layer.padding == (0, 0)
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and (layer.bias is None or layer.bias.shape == layer.weight.shape[:1])
    )


def _is_worth(image: Tensor) -> bool:
    """Return True if the kernel can be used: in fp32 convolutions may use TF32; patches are told by 32 bits."""
    if image.dtype is torch.float32 and image.is_cuda:
        return False
    return image.shape[0] * image.shape[2] * image.shape[3] < 2**31 - 64


def multiplied(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution of patches as a product: (B, C_in, H, W) to (B, H / p, W / q, C), in products' dtype."""
    parts = x.unflatten(3, (-1, weight.shape[3])).unflatten(2, (-1, weight.shape[2])).permute(0, 2, 4, 1, 3, 5)
    patches = parts.to(product_dtype(x), memory_format=torch.contiguous_format).flatten(3)
    return F.linear(patches, weight.flatten(1), bias)


def embedding_of(embedding: Embedding, x: Tensor) -> Any:
    """Return what a patch embedding returns, by a product, which compilers fuse with its neighbours."""
    return embedded(embedding, multiplied(x, embedding.projection.weight, embedding.projection.bias))
