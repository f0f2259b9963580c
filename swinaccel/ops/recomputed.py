"""Gradients by PyTorch's own operators: for second derivatives, and where a kernel failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def recomputed_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor, twice: bool
) -> list[Tensor | None]:
    """Return the gradients of a function's inputs, None for one that takes none.

    Args:
        grad: of the function's output.
        twice: they are to have gradients in turn; else all inputs have one.
    """
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):  # which would round what is wide
        own = [t if t is None else t.view_as(t) if twice else t.detach().requires_grad_() for t in inputs]
        wanted = [t for t in own if t is not None and t.requires_grad]
        if not wanted:
            return [None] * len(own)
        out = function(*own)
        found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=twice, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in own]
