"""Multiply on x86 CPUs by oneDNN, which PyTorch's `linear` does not use in single precision, GELU in its epilogue.

That is faster with AVX-512 only; with AVX2 `linear`, which is MKL's, is. The numbers are those of `linear` and `gelu`,
NaN and infinities among them. Weights stay where they lie: packing them once gains another 2 to 10 % for 100 rows and
more, and packed ones would have to be compared with the live ones at each call.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

fewest = 1 << 16  # multiplications, below which the call itself is what takes time

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
USES_ONEDNN = HAS_ONEDNN and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weightᵀ + bias."""
    return _pointwise(x, weight, bias, "none", "") if _suits(x, weight, bias) else F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return GELU(x weightᵀ + bias), the exact one, by erf."""
    if _suits(x, weight, bias):
        return _pointwise(x, weight, bias, "gelu", "none")
    return torch.ops.aten.gelu_.default(F.linear(x, weight, bias))


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, name: str, algorithm: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return True if a product is one of single precision on a CPU, of which no gradient is recorded."""
    given = (x, weight) if bias is None else (x, weight, bias)
    if not all(type(one) in PLAIN_TENSORS for one in given):
        return False
    if not USES_ONEDNN or not all(_is_plain(one) for one in given):
        return False
    if x.numel() * weight.shape[0] < fewest or not weight.is_contiguous() or not x.is_contiguous():
        return False
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return False
    if bias is not None:
        fits = bias.shape == weight.shape[:1] and bias.is_contiguous()
        if not fits or (torch.is_grad_enabled() and bias.requires_grad):
            return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    return (
        _is_exact()
        and torch._C._get_mkldnn_enabled()
        and torch._C._len_torch_dispatch_stack() == 0  # which would see other operators
        and not torch.is_autocast_enabled("cpu")
    )


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.device.type == "cpu" and tensor.layout is torch.strided


def _is_exact() -> bool:
    """Return True if PyTorch computes products of single precision in it."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the process configures precision through torch.backends.*.fp32_precision
        return False
