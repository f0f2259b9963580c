"""Return attention weights lazily where gradients are recorded.

Weights have a place in the graph of gradients, between q and k and the attention's output, whether they have numbers or
not. As long as nobody has read them, the gradient of the output goes past them, through the backward of the kernels.
Where somebody has, or still may, it goes through them step by step, so that whoever asks for their own gradient, or
has added to it, finds it whole.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.recomputed import recomputed_gradients
from ..spec.reference import cut, join, section_scores, section_weights, split_heads
from ..spec.window import Section, with_mask
from .section import TritonSection, padding_of
from .weights import LazyTensor, Numbers, Record, detached_copy, weights_like


class _Call:
    """One call whose weights are put off.

    Attributes:
        section: of copies, as far as what it holds may change.
        count: of tensors that hold q, k and v. They come first among the sources of a call; then table, padding and
            logit_scale, any of them None.
        record: of its weights.
    """

    def __init__(self, section: Section, sources: Sequence[Any]) -> None:
        *parts, table, padding, _ = sources
        given = dataclasses.replace(section, project=_giving([]), table=_giver(table), padding=_giver(padding))
        self.section, self.count, self.record = detached_copy(given), len(parts), Record()
        self.section.project = _giving([one.detach() for one in parts])

    def made(self, first: Tensor) -> LazyTensor:
        """Return the weights, to be computed when they are read; `first` of the sources."""
        section = self.section
        like = weights_like(section, first)
        made = LazyTensor(like, first.device, lambda: section_weights(section, first.detach()), self.record)
        self.record.weights = weakref.ref(made)
        return made

    def weights(self, sources: Sequence[Any]) -> Tensor:
        """Return the weights anew, since they may have been written to, in their place in the graph of gradients."""
        held = self.record.weights()

        def compute() -> Tensor:
            return self.scores(*sources).softmax(-1)

        with torch.autocast(sources[0].device.type, enabled=False):
            return compute() if held is None else Numbers.apply(held, compute)

    def scores(self, *sources: Any) -> Tensor:
        """Return the scores, of which softmax makes the weights, with gradients for the sources."""
        *parts, table, padding, logit_scale = sources
        section = dataclasses.replace(
            self.section,
            project=_giving(parts),
            table=_giver(table),
            padding=_giver(padding),
            logit_scale=logit_scale,
        )
        return section_scores(section, parts[0])

    def mixed(self, weights: Tensor, *sources: Any) -> Tensor:
        """Return the values, mixed by the weights, as an image."""
        *parts, _, padding, _ = sources
        values = parts[0].chunk(3, dim=-1)[2] if self.count == 1 else parts[2]
        windows = cut(values, self.section.geometry, None if padding is None else padding.chunk(3)[2])
        mixed = weights.to(values.dtype) @ split_heads(windows, self.section.num_heads)
        return join(mixed.transpose(1, 2).flatten(2), self.section.geometry)


def _giving(parts: list[Tensor]) -> Callable[[Tensor], Any]:
    """Return a projection that gives what is known of q, k and v."""
    return lambda _: parts[0] if len(parts) == 1 else tuple(parts)


def _giver(one: Tensor | None) -> Any:
    return None if one is None else lambda: one


def attend_recorded(run: TritonSection, image: Tensor, mask: Tensor | None) -> tuple[Tensor, LazyTensor]:
    """Return the attention of an image by the kernels, and its weights."""
    section = with_mask(run.section, mask)
    qkv = section.project(image)
    parts = (qkv,) if isinstance(qkv, Tensor) else qkv
    out = run.attended(qkv, None, mask)
    table = None if section.table is None else section.table()
    sources = (*parts, table, padding_of(section), section.logit_scale)
    call = _Call(section, sources)
    weights = _PutOff.apply(call, *sources)
    return section.output(_Past.apply(call, out, weights, *sources)), weights


class _PutOff(torch.autograd.Function):
    """From sources to their weights."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *sources: Any) -> LazyTensor:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(*sources)
        return call.made(sources[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        sources = ctx.saved_tensors
        if grad is None:
            return None, *(None for _ in sources)
        weights = ctx.call.weights(sources)
        grad = torch._softmax_backward_data(grad, weights, -1, weights.dtype)
        return None, *recomputed_gradients(ctx.call.scores, sources, grad, torch.is_grad_enabled())


class _Past(torch.autograd.Function):
    """From weights and sources to an output that is there already."""

    @staticmethod
    def forward(ctx: Any, call: _Call, out: Tensor, weights: LazyTensor, *sources: Any) -> Tensor:
        ctx.call, call.record.mixed = call, weakref.ref(ctx)
        ctx.save_for_backward(*sources)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        call, sources = ctx.call, ctx.saved_tensors
        if call.record.weights() is None:
            return None, grad, None, *(None for _ in sources)
        weights = call.weights(sources)
        if not weights.requires_grad:
            weights = weights.detach().requires_grad_()
        return None, None, *recomputed_gradients(call.mixed, (weights, *sources), grad, torch.is_grad_enabled())
