"""Decide where a call of a function runs: by the kernels, or in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.torch import sequence as torch_sequence
from ..config import env_interpret, env_strict
from ..errors import KernelError
from ..spec.window import Geometry
from . import has_failures, sequence, window
from .failures import failures
from .observed import is_onnx_export


def window_reason(q: Tensor, geometry: Geometry, num_heads: int, head_dim: int, cosine: bool) -> str | None:
    """Return why the window kernels cannot serve a call, or None."""
    reason = _pytorch_reason(q)
    if reason is not None:
        return reason
    if not torch.compiler.is_compiling() and has_failures():
        failed = failures.get(window.problem(q.device, q.dtype, geometry, head_dim, cosine))
        if failed is not None and not env_strict():
            return failed
    interpret = q.device.type == "cpu" and env_interpret()
    return window.unsupported_reason(q.device, q.dtype, geometry, num_heads, head_dim, interpret)


def _pytorch_reason(q: Tensor) -> str | None:
    """Return why a call is for PyTorch's own operators, whatever its numbers, or None."""
    if q.numel() == 0:
        return "there is nothing to compute"
    if torch.compiler.is_compiling():
        if is_onnx_export():
            return "ONNX has no Triton kernels"
    elif type(q) not in (Tensor, torch.nn.Parameter):
        return f"q is a {type(q).__name__}"
    elif torch.jit.is_tracing():
        return "the call is being traced, and sizes are tensors then"
    if torch_sequence.is_in_transform():
        return "the call is inside a torch.func transform, which kernels have no rules for"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active, which kernels have no rules for"
    return None


def try_window_kernels(qkv: Any, geometry: Geometry, **options: Any) -> Tensor | None:
    """Return what the kernels give; None where one failed that plain PyTorch can stand in for."""
    if torch.compiler.is_compiling():
        return window.shifted_window_attention(qkv, geometry, **options)
    try:
        return window.shifted_window_attention(qkv, geometry, **options)
    except KernelError:
        if env_strict():
            raise
        return None


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in autocast's dtype where that is on, as `scaled_dot_product_attention` takes them."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) for tensor in tensors)


def sequence_reason(q: Tensor, rank: int, factor_dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot serve a call, or None."""
    reason = _pytorch_reason(q)
    if reason is not None:
        return reason
    interpret = q.device.type == "cpu" and env_interpret()
    return sequence.unsupported_reason(q.device, q.dtype, q.shape[-1], rank, factor_dtype, interpret)
