"""Patch embeddings: timm's of Swin and SwinV2, the official code's, Hugging Face's and the norm that follows those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import BASE_ATTRIBUTES
from ..spec.block import Embedding, Tokens
from ..spec.window import Axes
from .shared.common import pair, positional_names


def _tokens(image: Tensor) -> Tensor:
    return image.flatten(1, 2)


def _tokens_and_size(image: Tensor) -> tuple[Tensor, tuple[int, int]]:
    return image.flatten(1, 2), (image.shape[1], image.shape[2])


_FORMATS: dict[str, Callable[[Tensor], Any] | None] = {"NHWC": None, "NLC": _tokens}  # timm's; of others, none is here


class PatchEmbed:
    """`proj` and `norm`: (B, C_in, H, W) to (B, H / p, W / q, C) or (B, N, C). `projection`: to (B, N, C) and its size.

    Images that the original pads, cuts or refuses are its own to take.
    """

    name = "patch_embed"
    method = "forward"

    def match(self, module: Any) -> bool:
        projection, norm = _projection(module), module._modules.get("norm")
        if not isinstance(projection, nn.Conv2d) or not isinstance(norm, (nn.LayerNorm, nn.Identity, type(None))):
            return False
        if module._parameters or module._buffers or not module._modules.keys() <= {"proj", "projection", "norm"}:
            return False
        _as_output(module)
        patch, form = pair(module.patch_size), positional_names(type(module).forward)
        return projection.kernel_size == projection.stride == patch and len(form) == 1

    def block(self, module: Any) -> Embedding:
        norm = module._modules.get("norm")
        return Embedding(_projection(module), None if isinstance(norm, nn.Identity) else norm, _as_output(module))

    def tokens(self, module: Any, x: Tensor) -> Tokens:
        _, _, height, width = x.shape
        patch, size = _projection(module).kernel_size, getattr(module, "img_size", None)
        if pair(module.patch_size) != patch or not height or height % patch[0] or not width or width % patch[1]:
            raise ValueError("the image does not consist of patches")
        if size is not None and getattr(module, "strict_img_size", True) and pair(size) != (height, width):
            raise ValueError("the image is of another size than the module demands")
        return x, None

    def constrains_sizes(self, module: Any) -> bool:
        """Return True if the original asks of an image what `tokens` does: no more for compilers to find out."""
        if "projection" in module._modules:
            return True
        return getattr(module, "img_size", None) is not None and getattr(module, "strict_img_size", True)

    def shrink(self, module: Any) -> None:
        """Leave a copy a few patches, where its code is known to do the same with any number of them."""
        _few_patches(module)

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        projection, size = _projection(module), pair(getattr(module, "img_size", None))
        height, width = projection.kernel_size
        sizes: list[Axes] = [(3 * height, 2 * width), (2 * height, 5 * width)]
        if size is not None:
            sizes = [size] if getattr(module, "strict_img_size", True) else [size, *sizes]
        return [(torch.Size((2, projection.in_channels, *sides)),) for sides in sizes]


# What timm's and the official code keep of an image's size, and their other attributes.
_GRIDS = ("grid_size", "patches_resolution")
_KNOWN = {
    *BASE_ATTRIBUTES, *_GRIDS, "img_size", "num_patches", "patch_size", "in_chans", "embed_dim", "flatten",
    "output_fmt", "strict_img_size", "dynamic_img_pad",
}  # fmt: skip


def _few_patches(module: Any) -> None:
    """Leave a copy that takes images of one size a few patches of it, which cost a trial less."""
    size, (height, width) = pair(getattr(module, "img_size", None)), _projection(module).kernel_size
    small = 3 * height, 2 * width
    if size is None or not vars(module).keys() <= _KNOWN or size[0] <= small[0] or size[1] <= small[1]:
        return
    grid = size[0] // height, size[1] // width
    held = {"img_size": (size, small), **dict.fromkeys(_GRIDS, (grid, (3, 2)))}
    for name, (old, new) in held.items():
        value = getattr(module, name, None)
        if isinstance(value, (tuple, list)) and tuple(value) == old:
            setattr(module, name, type(value)(new))
    if getattr(module, "num_patches", None) == grid[0] * grid[1]:
        module.num_patches = 6


class Embeddings:
    """Hugging Face's: `patch_embeddings`, a norm and a dropout, where neither masks nor positions come in between."""

    name = "embeddings"
    method = "forward"

    def match(self, module: Any) -> bool:
        parts = module._modules
        if parts.keys() != {"patch_embeddings", "norm", "dropout"} or module._parameters or module._buffers:
            return False
        inner = parts["patch_embeddings"]
        has_projection_only = inner._modules.keys() == {"projection"} and PatchEmbed().match(inner)
        return has_projection_only and isinstance(parts["norm"], nn.LayerNorm)

    def block(self, module: Any) -> Embedding:
        inner = module.patch_embeddings
        return Embedding(inner.projection, module.norm, _tokens_and_size, (inner,))

    def tokens(
        self, module: Any, pixel_values: Tensor, bool_masked_pos: Any = None, interpolate_pos_encoding: Any = False
    ) -> Tokens:
        if bool_masked_pos is not None or interpolate_pos_encoding:
            raise ValueError("tokens are to be masked, or positions to be added")
        return PatchEmbed().tokens(module.patch_embeddings, pixel_values)

    def constrains_sizes(self, module: Any) -> bool:
        return False  # compilers fuse the norm with its neighbours, and find the patch embedding inside

    def example(self, module: Any) -> list[tuple[Any, ...]]:
        return PatchEmbed().example(module.patch_embeddings)


def _projection(module: Any) -> Any:
    children = module._modules
    return children["projection"] if "projection" in children else children["proj"]


def _as_output(module: Any) -> Callable[[Tensor], Any] | None:
    """Return what makes the module's own output of an image of tokens; KeyError where that is another form."""
    if "projection" in module._modules:
        return _tokens_and_size
    return _tokens if getattr(module, "flatten", True) else _FORMATS[module.output_fmt]
