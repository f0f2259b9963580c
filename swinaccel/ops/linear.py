"""A linear layer without gradients, by a kernel of ours where that is faster than PyTorch's product."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.triton import linear as kernels
from ..backends.triton.block import LaunchError
from ..layers import PLAIN_TENSORS
from .block import HALVES
from .failures import failures
from .observed import count_modes


def product_of(x: Tensor) -> Callable[..., Tensor]:
    """Return what multiplies inputs of the size of x, a block's or an attention's: PyTorch's function, or ours."""
    channels = max(1, x.shape[-1])
    is_worth = x.dtype in HALVES and kernels.is_worth(x.device, x.numel() // channels, channels)
    return linear if is_worth else F.linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weightᵀ + bias."""
    # A mode is to see PyTorch's own operators.
    if _fits(x, weight, bias) and not torch._C._is_any_autocast_enabled() and not count_modes():
        problem = "linear", x.device, x.dtype, weight.shape
        if failures.get(problem) is None:
            try:
                out = kernels.linear(x, weight, bias)
            except LaunchError as error:
                failures.record(problem, str(error))
            else:
                if out is not None:
                    return out
    return F.linear(x, weight, bias)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return True if tensors are of the kind and the shapes that a kernel takes, which looks at neither."""
    parts = (x, weight) if bias is None else (x, weight, bias)
    is_plain = all(type(one) in PLAIN_TENSORS and one.dtype is x.dtype and one.device == x.device for one in parts)
    if not is_plain or x.dtype not in HALVES or weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        return False
    return bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())
