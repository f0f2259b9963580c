"""Run one call of a module's own forward, and its family's reading of it, and compare what both give."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..families import Family
from ..spec import reference
from ..spec.block import Block, Merging
from ..spec.reference_block import block_reference, embedding_reference, merging_reference
from ..spec.window import Section, with_mask
from . import compare
from .compare import PADDED, Inconclusive
from .copies import Setting, generator_state, seed
from .libraries import is_of_library
from .registry import Reading

_DRAWS = "its forward draws random numbers that its family does not; what it does by chance cannot be proven"


def compare_attention(
    clone: nn.Module,
    other: nn.Module,
    args: tuple[Any, ...],
    setting: Setting,
    family: Family,
    original: Callable[..., Any],
    reading: Reading,
) -> str | None:
    """Return why one call of the original does not do what its family reads out of it, or None where it does."""
    section = family.section(other, *args)
    if isinstance(section, str):
        raise Inconclusive(section)
    if section.padding is None and section.geometry.is_padded:
        return PADDED
    section = reading.apply(section, family.attention(other), args[0])
    if isinstance(section, str):
        return PADDED
    reason = _unkept(family, other, section, args)
    if reason is not None:
        return reason
    x, *rest = args
    inputs = [x.clone().requires_grad_(setting.grad) for _ in range(2)]
    expected = _expected(original, clone, (inputs[0], *rest), setting)
    if expected is None:
        return PADDED
    draws = generator_state()
    seed()
    images = []

    def attended(image: Tensor) -> Tensor:
        images.append(image)
        return reference.section_attention(section, image)

    if section.beside is None:
        found = _parts(family.forward(other, attended, inputs[1], *rest))
    else:
        beside = section.beside

        def attended_beside(image: Tensor, mask: Tensor | None) -> Tensor:
            return reference.section_attention(with_mask(beside, mask), image)

        found = _parts(family.forward_beside(other, attended, attended_beside, inputs[1], *rest))  # type: ignore[attr-defined]
    if generator_state() != draws and not section.dropout:
        return _DRAWS
    if reading.weights:
        found = *found, F.dropout(reference.section_weights(section, images[0]), section.dropout)
    return compare.mismatch_reason(family.name, expected, found, inputs, clone, other, setting)


def _unkept(family: Family, other: nn.Module, section: Section, args: tuple[Any, ...]) -> str | None:
    """Return which tensor of a section, or of its module, may change without anyone seeing it, or None."""
    known = {id(tensor) for tensor in (*other.parameters(), *other.buffers(), *args)}
    for tensor in (*section.sources, section.logit_scale, section.mask):
        if tensor is not None and id(tensor) not in known and id(tensor._base) not in known:
            return "what its scores start from is computed anew at each call, and is no parameter or buffer"
    for part in family.attention(other).modules():
        if is_of_library(part):
            continue
        held = {**part._buffers, **{name: one for name, one in vars(part).items() if isinstance(one, Tensor)}}
        for name, tensor in held.items():
            if tensor is None or tensor.is_floating_point():
                continue
            if section.index is not None and tensor.data_ptr() == section.index.data_ptr():
                continue
            return f"the buffer {name} of whole numbers is not its bias's index, and may be a switch"
    return None


def compare_block(
    clone: nn.Module,
    other: nn.Module,
    args: tuple[Any, ...],
    setting: Setting,
    family: Any,
    original: Callable[..., Any],
    attention: Callable[..., Any] | None,
    reading: Reading,
) -> str | None:
    """Return why a module does not do around its attention what its family reads, or None where it does."""
    facts = family.block(other)
    attended: Any = None
    if isinstance(facts, Block):
        if attention is not None:
            attended = functools.partial(attention, other)
        elif hasattr(family, "attend"):
            attended = family.attend(other)
        else:
            section = family.section(other, *args)
            if isinstance(section, str):
                raise Inconclusive(section)
            section = reading.apply(section, family.attention(other), args[0])
            if isinstance(section, str):
                return PADDED
            attended = functools.partial(reference.section_attention, section)
    inputs = [args[0].clone().requires_grad_(setting.grad) for _ in range(2)]
    expected = _expected(original, clone, (inputs[0], *args[1:]), setting)
    if expected is None:
        return PADDED
    draws = generator_state()
    seed()
    args = inputs[1], *args[1:]
    x, size = family.tokens(other, *args)
    if isinstance(facts, Merging):
        found = merging_reference(facts, x, size)
    elif not isinstance(facts, Block):
        found = embedding_reference(facts, x)
    else:
        found = block_reference(facts, attended, x, size)
    if generator_state() != draws:
        return _DRAWS
    return compare.mismatch_reason(family.name, expected, _parts(found), inputs, clone, other, setting)


def _expected(
    original: Callable[..., Any], clone: nn.Module, args: tuple[Any, ...], setting: Setting
) -> tuple[Any, ...] | None:
    """Return what the original gives, or None where it does not run in lower precision."""
    seed()
    try:
        return _parts(original(clone, *args))
    except Exception:
        if setting.is_exact:
            raise
        return None


def _parts(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)
