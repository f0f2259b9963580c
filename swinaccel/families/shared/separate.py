"""Projections of q, k and v that are three modules: one product where that is faster, else each by itself.

Weights are put together anew at every call, so that they are never stale. On GPUs that pays where x is much larger
than they are: x is read once in place of three times, and one product fills the device better than three. In training
the backward gains the same way, with one product for x's gradient in place of three and two sums. On CPUs one
product runs at the rate of three, and the copies of the weights are lost time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layers import PLAIN_TENSORS
from .common import is_plain_linear

# By measurement (docs/notes.md): at 24 rows a channel and 512 channels it still wins, at 3 and 1024 it loses.
widest = 512
rows_per_channel = 8  # putting together moves 6 * C^2 numbers, and saves reading 2 * rows * C of them
smallest = 1 << 20  # numbers in x; below, a call waits for the host, to which both ways are three launches


def separate_projections(*projections: Any) -> Callable[[Tensor], Any]:
    """Return the `project` of a `Section`."""

    def project(x: Tensor) -> Any:
        if _is_packed(x, projections):
            weight = torch.cat([projection.weight for projection in projections])
            return F.linear(x, weight, zero_token(*projections))
        return tuple(projection(x) for projection in projections)

    return project


def separate_padding(*projections: Any) -> Callable[[], Tensor | None] | None:
    """Return the `padding` of a `Section`."""
    return functools.partial(zero_token, *projections) if all(map(is_plain_linear, projections)) else None


def zero_token(*projections: Any) -> Tensor | None:
    """Return what plain projections make of a zero token: their biases one after the other; None where none has one."""
    if all(projection.bias is None for projection in projections):
        return None
    parts = [one.weight.new_zeros(one.weight.shape[0]) if one.bias is None else one.bias for one in projections]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _is_packed(x: Tensor, projections: tuple[Any, ...]) -> bool:
    """Return True if plain projections, which a guard watches, are better run as one for such an x."""
    if not is_worth(x, x.shape[-1]) or not all(map(is_plain_linear, projections)):
        return False
    first, *others = weights = [projection.weight for projection in projections]
    biases = [projection.bias for projection in projections if projection.bias is not None]
    if not all(type(tensor) in PLAIN_TENSORS and tensor.dtype == first.dtype for tensor in (*weights, *biases)):
        return False
    if not all(weight.shape == first.shape and weight.device == first.device for weight in others):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights, *biases)):
        # Where some of them are frozen, gradients of all of them would be more work than before.
        return all(weight.requires_grad == first.requires_grad for weight in others)
    return True


def is_worth(x: Tensor, channels: int) -> bool:
    """Return True if one product over weights put together is faster than three."""
    if not x.is_cuda or channels > widest:
        return False
    if torch.compiler.is_compiling():
        return True  # launches cost little there, and nothing may depend on how large a batch is
    if x.numel() < rows_per_channel * channels * channels:
        return False
    return x.numel() >= smallest or torch.cuda.is_current_stream_capturing()
