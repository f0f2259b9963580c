"""Run the section of an attention by the Triton kernels, bound to its launches where nothing is left to decide."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..bias import table as biases
from ..config import AccelConfig
from ..errors import ArgumentError, KernelError
from ..layers import PLAIN_TENSORS, has_hooks, is_builtin
from ..ops import position, window
from ..spec.block import Product
from ..spec.window import Section, with_mask
from .block import linear
from .context import are_functions_torchs
from .plan import State


class _Bound(NamedTuple):
    """The launches of a section in inference, and the projections that they were bound for; see `bind_launches`."""

    attention: window.BoundAttention
    position: Callable[..., Tensor | None] | None
    shape: torch.Size
    dtype: torch.dtype
    table: Tensor | None  # a parameter stays what it is while the plan's guard holds, and is read where it lies
    layout: tuple[tuple[int, ...], torch.dtype] | None  # of the table
    has_padding: bool


class TritonSection:
    """A section on the Triton kernels, from image to image.

    In inference the first call binds it to its launches: a plan's guard sees to all that they depend on, but for what
    the projection gives and for the table.

    Args:
        size: height and width of the image, where calls give tokens of one axis.
    """

    __slots__ = ("_bound", "_may_bind", "config", "section", "size", "state")

    def __init__(
        self, section: Section, config: AccelConfig, state: State, size: tuple[int, int] | None = None
    ) -> None:
        self.section, self.config, self.state, self.size = section, config, state, size
        others = (section.index, section.mask, section.logit_scale)
        self._bound: _Bound | None = None
        self._may_bind = (
            not torch.is_grad_enabled()
            and not section.dropout
            and not biases.wanted(config)
            and all(one is None or one.is_contiguous() for one in others)
        )

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.size is None:
            return self.attend(x, mask)
        return self.attend(x.view(x.shape[0], *self.size, x.shape[2]), mask).view(x.shape)

    def output_layer(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Return the last layer, if it is a plain one, of as many channels as x, so that it may run apart."""
        output, channels = self.section.output, x.shape[-1]
        layer = plain_layer(output) if isinstance(output, functools.partial) else None
        if layer is None or self.section.num_heads * self.section.head_dim != channels:
            return None
        weight, bias = layer
        parts = (weight,) if bias is None else (weight, bias)
        is_plain = all(type(one) in PLAIN_TENSORS and one.dtype is x.dtype and one.is_contiguous() for one in parts)
        fits = weight.shape == (channels, channels) and (bias is None or bias.shape == (channels,))
        return layer if is_plain and fits else None

    def before_output(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention of x, to which its output's layer is still to be applied."""
        image = x if self.size is None else x.view(x.shape[0], *self.size, x.shape[2])
        return self.attended(image, self.section.project, mask).view(*x.shape[:-1], -1)

    def attend(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention of an image (B, H, W, C)."""
        return self.section.output(self.attended(image, self.section.project, mask))

    def attended(self, x: Any, project: Callable[[Tensor], Any] | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the attention of a projection, (..., heads * D), by its launches where that is as it was.

        Args:
            x: the projection; or, with `project`, the image that it is made of.
            mask: in place of the section's, and of its form.
        """
        section, bound = self.section, self._bound
        padding = padding_of(section) if bound is not None and bound.has_padding else None
        qkv = x if project is None else project(x)
        if bound is None:
            return self._first(qkv, mask)
        parts = (qkv,) if isinstance(qkv, Tensor) else qkv
        for one in parts:
            if one.shape != bound.shape or one.dtype is not bound.dtype or not one.is_contiguous():
                return self._first(qkv, mask)
        if bound.has_padding and (padding is None or not padding.is_contiguous()):
            return self._first(qkv, mask)
        table = bound.table
        if table is None and section.table is not None:
            table = None if bound.position is None else bound.position(*section.position)  # type: ignore[misc]
            table = section.table() if table is None else table
            if (table.stride(), table.dtype) != bound.layout:
                return attend_triton(with_mask(section, mask), qkv, table)
        mask = section.mask if mask is None else mask
        q, k, v = (qkv, None, None) if isinstance(qkv, Tensor) else qkv
        return bound.attention.run(q, k, v, table, section.index, padding, mask, section.logit_scale)

    def _first(self, qkv: Any, mask: Tensor | None) -> Tensor:
        """Return the attention of a projection about which nothing is known yet."""
        section, first = self.section, qkv if isinstance(qkv, Tensor) else qkv[0]
        width = section.num_heads * section.head_dim
        if (first.shape[-1] != 3 * width) if first is qkv else any(one.shape[-1] != width for one in qkv):
            raise KernelError(f"its projection does not give q, k and v of {section.num_heads} x {section.head_dim}")
        trained = torch.is_grad_enabled() and any(source.requires_grad for source in section.sources)
        factors = None
        if not trained and biases.wanted(self.config):
            factors = biases.factors(section, self.config, first.dtype)
        self.state.bias = form_of(section) if factors is None else factors.describe()
        table = table_of(section, trained)
        section = with_mask(section, mask)
        out = attend_triton(section, qkv, table, factors)
        if self._may_bind and self._bound is None:
            self._bound = bind_launches(section, qkv, table)
        return out


def bind_launches(section: Section, qkv: Any, table: Tensor | None) -> _Bound | None:
    """Return the launches of such a projection, or None where it is not what launches take.

    Args:
        table: of the call; computed anew, an MLP with dropout would draw another one.
    """
    parts = (qkv,) if isinstance(qkv, Tensor) else qkv
    first = parts[0]
    is_alike = all(one.shape == first.shape and one.dtype is first.dtype and one.is_contiguous() for one in parts)
    if not is_alike or first.dim() != len(section.geometry.size) + 2 or first.numel() >= 2**31:
        return None
    operands = operands_of(section, table)
    try:
        bound_position = None
        if section.position is not None and all(one.is_contiguous() for one in section.position):
            bound_position = position.bind(*section.position)
        attention = window.bind(qkv, section.geometry, **operands)
    except ArgumentError:
        return None
    kept = table if any(table is one for one in section.sources) else None
    layout = None if table is None else (table.stride(), table.dtype)
    return _Bound(attention, bound_position, first.shape, first.dtype, kept, layout, operands["padding"] is not None)


def direct(projection: Any, product: Callable[..., Tensor]) -> Callable[[Tensor], Any]:
    """Return the product of a plain linear layer alone, for as long as a guard finds it the same and without hooks.

    Args:
        product: of x, weight and bias, where no gradient is recorded.
    """
    if isinstance(projection, Product):
        if not are_functions_torchs():
            return projection
        layer, bias_of = projection.layer, projection.bias
        run = linear if torch.is_grad_enabled() else product
        return lambda x: run(x, layer.weight, layer.bias if bias_of is None else bias_of())
    if not is_builtin(projection, nn.Linear) or not are_functions_torchs():
        return projection
    weight, bias = projection.weight, projection.bias
    if torch.is_grad_enabled():
        return lambda x: linear(x, weight, bias)
    return functools.partial(product, weight=weight, bias=bias)


def plain_layer(product: Any) -> tuple[Tensor, Tensor | None] | None:
    """Return the weight and bias of a product that is a plain layer's, by `direct` or by itself; None of any other."""
    if isinstance(product, functools.partial) and {"weight", "bias"} == product.keywords.keys():
        return product.keywords["weight"], product.keywords["bias"]
    return (product.weight, product.bias) if is_builtin(product, nn.Linear) and not has_hooks(product) else None


def padding_of(section: Section) -> Tensor | None:
    """Return what padding tokens hold for q, k and v, where there are such, or None for zeros.

    Raises:
        KernelError: where the projection's bias is spread over them otherwise than one number for each.
    """
    if not section.geometry.is_padded or section.padding is None:
        return None
    padding = section.padding()
    if padding is not None and padding.numel() != 3 * section.num_heads * section.head_dim:
        raise KernelError(f"the bias of its projection holds {padding.numel()} numbers, which it spreads by itself")
    return padding


def table_of(section: Section, trained: bool) -> Tensor | None:
    """Return the bias table of a call: SwinV2's by one kernel where no gradient is recorded and that can be."""
    if section.table is None:
        return None
    table = None if trained or section.position is None else position.position_table(*section.position)
    return section.table() if table is None else table


def form_of(section: Section) -> str:
    """Return how a report names the bias of a section without factors."""
    return "none" if section.table is None else "table"


def attend_triton(section: Section, qkv: Any, table: Tensor | None, factors: Any = None) -> Tensor:
    """Return what a section gives, by the Triton kernels, of its projections q, k and v and its table."""
    given = None if factors is None else (factors.q, factors.k, factors.table, factors.index)
    return window.shifted_window_attention(
        qkv, section.geometry, **operands_of(section, table), factors=given, dropout=section.dropout
    )


def operands_of(section: Section, table: Tensor | None) -> dict[str, Any]:
    """Return what the operator takes of a section and of the table of a call, by name."""
    logit_scale = section.logit_scale
    return {
        "num_heads": section.num_heads,
        "table": table,
        "index": section.index,
        "padding": padding_of(section),
        "mask": section.mask,
        "mask_value": section.mask_value,
        "scale": section.scale,
        "logit_scale": None if logit_scale is None else logit_scale.reshape(-1),
    }
