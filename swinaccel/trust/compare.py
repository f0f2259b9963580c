"""Compare what two copies of a module did: outputs, gradients, and what they left on themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import BASE_ATTRIBUTES
from ..spec.window import is_plain
from .copies import Setting, tensors

# Such calls run the original, and are not compared.
PADDED = "the image is padded and the projection is not a plain nn.Linear; pad images to whole windows, or merge it"


class Inconclusive(Exception):
    """Reason why a trial says nothing about a module, which for now is not what its family takes it for."""


def mismatch_reason(
    name: str,
    expected: tuple[Any, ...],
    found: tuple[Any, ...],
    inputs: list[Tensor],
    clone: nn.Module,
    other: nn.Module,
    setting: Setting,
) -> str | None:
    """Return why two modules that were given one of the inputs each are not alike, or None where they are.

    Args:
        name: of the family whose reading `found` is.
        expected, found: the parts of what the original and the reading returned.
        clone, other: the copies that they ran on.
    """
    differs = _difference(name, expected, found, setting) or _other_state(clone, other)
    if differs is None and setting.grad:
        differs = _other_gradients(
            _gradients(expected, inputs[0], clone), _gradients(found, inputs[1], other), setting.tolerance
        )
    if differs is None or setting.training is setting.grad:
        return f"in training, {differs}" if differs is not None and setting.training else differs
    if setting.training:
        return f"in training mode without gradients, {differs}"
    return f"in eval mode with gradients, {differs}"


def _difference(name: str, expected: tuple[Any, ...], found: tuple[Any, ...], setting: Setting) -> str | None:
    if len(expected) != len(found):
        return f"its forward gives {len(expected)} outputs where {name} gives {len(found)}"
    for place, (one, other) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            if one is not other and not (isinstance(one, tuple) and one == other):
                return f"its forward gives other outputs than {name}"
            continue
        if (place or setting.drops) and torch.equal(one, other):  # a loss may be zero; an output shows nothing then
            continue
        if one.shape != other.shape:
            return f"its forward gives {tuple(one.shape)} where {name} gives {tuple(other.shape)}"
        if one.dtype != other.dtype:
            return f"its forward gives {one.dtype} where {name} gives {other.dtype}"
        finite = one.isfinite()
        if not torch.equal(finite, other.isfinite()):
            return f"its forward is not that of {name}: infinities and NaN come out elsewhere"
        if not finite.all():
            one, other = one[finite], other[finite]
        one, other = one.double(), other.double()
        if setting.odd and not one.numel():
            continue
        # Where numbers are rounded, one of them may go far astray, as behind a softmax of large scores: never all.
        size = torch.linalg.vector_norm if setting.dtype != torch.float64 else lambda numbers: numbers.abs().max()
        difference = size(one - other) / size(one)
        if not difference <= setting.tolerance:
            dtype = "" if setting.dtype == torch.float64 else f" in {str(setting.dtype).removeprefix('torch.')}"
            return f"its forward is not that of {name}: outputs differ by {difference:.1e} of their size{dtype}"
    return None


def _gradients(parts: tuple[Any, ...], x: Tensor, module: nn.Module) -> dict[str, Tensor | None]:
    """Return the gradients of the input and of every parameter, by name."""
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        if isinstance(part, Tensor) and part.requires_grad:
            weights = torch.linspace(-1, 1, part.numel(), dtype=torch.float64).cos().view(part.shape)
            total = total + (part * weights).sum()
    if total.requires_grad:
        total.backward()
    return {"the input": x.grad, **{name: parameter.grad for name, parameter in module.named_parameters()}}


def _other_gradients(
    expected: dict[str, Tensor | None], found: dict[str, Tensor | None], tolerance: float
) -> str | None:
    largest = max((one.abs().max() for one in expected.values() if one is not None), default=0.0)
    for name, one in expected.items():
        other = found[name]
        if one is None or other is None:
            if one is not other:
                return f"{name} has {'no' if one is None else 'a'} gradient"
        # Some vanish but for rounding, such as that of k's bias.
        elif not (one - other).abs().max() <= tolerance * (one.abs().max() + 1e-3 * largest):
            return f"the gradient of {name} is another one"
    return None


def _other_state(clone: nn.Module, other: nn.Module) -> str | None:
    """Return which attribute the original's forward wrote to, and its family's reading did not."""
    for (path, one), (_, two) in zip(clone.named_modules(), other.named_modules(), strict=True):
        left, right = ({**vars(part), **part._buffers} for part in (one, two))
        for name in sorted((left.keys() | right.keys()) - BASE_ATTRIBUTES):
            kept, expected = (list(tensors(values.get(name))) for values in (left, right))
            is_like = len(kept) == len(expected) and all(map(_is_same, kept, expected))
            if not is_like or _plain_part(left.get(name)) != _plain_part(right.get(name)):
                return f"its forward changes {'.'.join(filter(None, (path, name)))}"
    return None


def _plain_part(value: Any) -> Any:
    """Return what is not a tensor in an attribute, as far as a forward may write to it: numbers, and how many."""
    if is_plain(value):
        return value
    if isinstance(value, (list, tuple, dict, set)):
        return len(value)
    if isinstance(value, (Tensor, nn.Module, type)) or not hasattr(value, "__dict__") or callable(value):
        return None
    return {name: one if is_plain(one) else None for name, one in vars(value).items()}


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, equal_nan=True)
