"""Decide where a call of a function runs: by the kernels, or in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.torch import sequence as torch_sequence
from ..config import env_interpret, env_strict
from ..errors import KernelError
from ..layers import PLAIN_TENSORS
from ..spec.window import Geometry
from . import sequence, window
from .failures import failures
from .observed import is_onnx_export


def serves_windows(q: Tensor, geometry: Geometry, num_heads: int, head_dim: int, cosine: bool) -> bool:
    """Return True if the window kernels can serve a call."""
    if _is_pytorchs(q):
        return False
    if not torch.compiler.is_compiling():
        problem = window.problem(q.device, q.dtype, geometry, head_dim, cosine)
        if failures.get(problem) is not None and not env_strict():
            return False
    return window.unsupported_reason(q.device, q.dtype, geometry, num_heads, head_dim, _is_interpreted(q)) is None


def serves_sequences(q: Tensor, rank: int, factor_dtype: torch.dtype) -> bool:
    """Return True if the kernels of sequences can serve a call."""
    if _is_pytorchs(q):
        return False
    return sequence.unsupported_reason(q.device, q.dtype, q.shape[-1], rank, factor_dtype, _is_interpreted(q)) is None


def _is_pytorchs(q: Tensor) -> bool:
    """Return True if a call is for PyTorch's own operators, whatever its numbers."""
    if q.numel() == 0:
        return True
    if torch.compiler.is_compiling():
        if is_onnx_export():  # which has no Triton kernels
            return True
    elif type(q) not in PLAIN_TENSORS or torch.jit.is_tracing():  # sizes are tensors in a trace
        return True
    return torch_sequence.is_transformed()


def _is_interpreted(q: Tensor) -> bool:
    return q.device.type == "cpu" and env_interpret()


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
