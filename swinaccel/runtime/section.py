"""Run the section of an attention by the Triton kernels, bound to its launches where nothing is left to decide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bias import table as bias
from ..config import AccelConfig
from ..errors import ArgumentError, KernelError
from ..ops import position, window
from ..spec.window import Section
from .plan import State


class TritonSection:
    """A section on the Triton kernels: (B, H, W, C) to the same.

    In inference the first call binds it to its launches: a plan's guard sees to all that they depend on, but for what
    the projection gives and for the table.
    """

    __slots__ = ("_bound", "_may_bind", "config", "section", "state")

    def __init__(self, section: Section, config: AccelConfig, state: State) -> None:
        self.section, self.config, self.state = section, config, state
        others = (section.index, section.mask, section.logit_scale)
        self._bound: BoundSection | None = None
        self._may_bind = (
            not torch.is_grad_enabled()
            and not section.dropout
            and not bias.wanted(config)
            and all(one is None or one.is_contiguous() for one in others)
        )

    def __call__(self, image: Tensor) -> Tensor:
        section = self.section
        return section.output(self.attended(section.project(image)))

    def attended(self, qkv: Any) -> Tensor:
        """Return the attention of a projection, (..., heads * D)."""
        bound = self._bound
        out = None if bound is None else bound.run(qkv)
        return self._attend(qkv) if out is None else out

    def _attend(self, qkv: Any) -> Tensor:
        """Return the attention of a projection about which nothing is known yet."""
        section, first = self.section, qkv if isinstance(qkv, Tensor) else qkv[0]
        width = section.num_heads * section.head_dim
        if (first.shape[-1] != 3 * width) if first is qkv else any(one.shape[-1] != width for one in qkv):
            raise KernelError(f"its projection does not give q, k and v of {section.num_heads} x {section.head_dim}")
        trained = torch.is_grad_enabled() and any(source.requires_grad for source in section.sources)
        factors = None
        if not trained and bias.wanted(self.config):
            factors = bias.factors(section, self.config, first.dtype)
        self.state.bias = form_of(section) if factors is None else factors.describe()
        table = table_of(section, trained)
        out = attend_triton(section, qkv, table, factors)
        if self._may_bind and self._bound is None:
            self._bound = bind(section, qkv, table)
        return out


class BoundSection:
    """A section in inference, bound to its launches; see `bind`."""

    __slots__ = (
        "_attention",
        "_dtype",
        "_has_padding",
        "_is_packed",
        "_layout",
        "_position",
        "_section",
        "_shape",
        "_table",
    )

    def __init__(
        self,
        section: Section,
        first: Tensor,
        is_packed: bool,
        table: Tensor | None,
        attention: window.BoundAttention,
        bound_position: position.BoundPosition | None,
    ) -> None:
        self._section, self._attention, self._position = section, attention, bound_position
        self._shape, self._dtype, self._is_packed = first.shape, first.dtype, is_packed
        # A parameter stays what it is while the plan's guard holds, and is read where it lies.
        self._table = table if any(table is one for one in section.sources) else None
        self._layout = None if table is None else (table.stride(), table.dtype)
        self._has_padding = padding_of(section) is not None

    def run(self, qkv: Any) -> Tensor | None:
        """Return the attention of a projection, or None where that, or the padding, is not as it was."""
        section, shape, dtype = self._section, self._shape, self._dtype
        if self._is_packed:
            parts, qkv = (qkv, None, None), (qkv,)
        else:
            parts = qkv
        for one in qkv:
            if not isinstance(one, Tensor) or one.shape != shape or one.dtype is not dtype or not one.is_contiguous():
                return None
        padding = padding_of(section) if self._has_padding else None
        if self._has_padding and (padding is None or not padding.is_contiguous()):
            return None
        table, bound = self._table, self._position
        if table is None and section.table is not None:
            table = None if bound is None else bound.run(*section.position)  # type: ignore[misc]
            table = section.table() if table is None else table
            if (table.stride(), table.dtype) != self._layout:
                return attend_triton(section, qkv if len(qkv) > 1 else qkv[0], table)
        return self._attention.run(*parts, table, section.index, padding, section.mask, section.logit_scale)


def bind(section: Section, qkv: Any, table: Tensor | None) -> BoundSection | None:
    """Return a section bound to the launches of such a projection, or None where it is not what launches take.

    Args:
        table: of the call; computed anew, an MLP with dropout would draw another one.
    """
    is_packed = isinstance(qkv, Tensor)
    parts = (qkv,) if is_packed else qkv
    first = parts[0]
    is_alike = all(one.shape == first.shape and one.dtype is first.dtype and one.is_contiguous() for one in parts)
    if not is_alike or first.dim() != len(section.geometry.size) + 2 or first.numel() >= 2**31:
        return None
    try:
        bound_position = None
        if section.position is not None and all(one.is_contiguous() for one in section.position):
            bound_position = position.bind(first.device, *[one.shape for one in section.position])
        attention = window.bind(
            section.geometry,
            device=first.device,
            dtype=first.dtype,
            batch=first.shape[0],
            num_heads=section.num_heads,
            head_dim=section.head_dim,
            packed=is_packed,
            table=None if table is None else (table.shape, table.stride()),
            has_padding=padding_of(section) is not None,
            has_mask=section.mask is not None,
            mask_value=section.mask_value,
            scale=section.scale,
            cosine=section.logit_scale is not None,
        )
    except ArgumentError:
        return None
    return BoundSection(section, first, is_packed, table, attention, bound_position)


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
    logit_scale = section.logit_scale
    return window.shifted_window_attention(
        qkv,
        section.geometry,
        num_heads=section.num_heads,
        table=table,
        index=section.index,
        padding=padding_of(section),
        mask=section.mask,
        mask_value=section.mask_value,
        scale=section.scale,
        logit_scale=None if logit_scale is None else logit_scale.reshape(-1),
        factors=None if factors is None else (factors.q, factors.k, factors.table, factors.index),
        dropout=section.dropout,
    )
