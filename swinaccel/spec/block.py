"""Parts of a block around its attention, of a patch merging and of a patch embedding, as their families name them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class Product:
    """x weightᵀ + bias, where the original takes a layer's weight past the layer.

    Attributes:
        layer: whose weight it is; read at each call, as is what `bias` gives.
        bias: gives the bias; None for the layer's own.
    """

    layer: Any
    bias: Callable[[], Tensor | None] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.read())

    def read(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias of now."""
        return self.layer.weight, self.layer.bias if self.bias is None else self.bias()


@dataclass(slots=True)
class Block:
    """x + attention(norm1(x)), x + mlp(norm2(x)); with `post_norm` (V2) x + norm1(attention(x)), x + norm2(mlp(x)).

    Here mlp is fc2(activation(fc1(x))). What is added to x goes through `drop1` and `drop2` before, where there are
    such, which drop whole samples or nothing. Every other module in the block and in `holders` must do nothing. The
    fields of type Any are modules of whatever kind; whether they are plain is for `fusion` to see.

    Attributes:
        attention: what holds the section.
        holders: the modules that hold the rest of the MLP.
        drop1, drop2: drop-paths of the attention and of the MLP; they may be one module.
        as_output: makes what the block returns out of the result, where that is not the result.
    """

    attention: Any
    norm1: Any
    norm2: Any
    holders: tuple[Any, ...]
    fc1: Any
    activation: Any
    fc2: Any
    post_norm: bool
    drop1: Any = None
    drop2: Any = None
    as_output: Callable[[Tensor], Any] | None = None


@dataclass(slots=True)
class Merging:
    """reduction(norm(merged)), or with `post_norm` (V2) norm(reduction(merged)): 2 x 2 tokens become one.

    The four follow each other left column first, top to bottom; beyond an odd height or width they are zeros.
    """

    norm: Any
    reduction: Any
    post_norm: bool


@dataclass(slots=True)
class Embedding:
    """norm(projection(image)) over channels that come last: (B, C_in, H, W) to (B, H / p, W / q, C).

    Attributes:
        projection: a convolution of p x q patches, which neither overlap nor leave gaps.
        norm: None where there is none.
        as_output: makes what the module returns out of the result, where that is not the result.
        holders: modules between this one and the projection.
    """

    projection: Any
    norm: Any
    as_output: Callable[[Tensor], Any] | None = None
    holders: tuple[Any, ...] = ()


# x and the (H, W) of its tokens, where it holds them in one axis; None in place of these where it has both axes, as an
# image to be embedded has.
Tokens = tuple[Tensor, tuple[int, int] | None]
