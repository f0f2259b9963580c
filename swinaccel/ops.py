"""The operators, as PyTorch sees them: one opaque call each for eager mode, autocast, torch.compile and export.

The only importer of the Triton backend. A kernel that fails is not an error here: the failure is noted once,
with its problem, and the same numbers are computed in plain PyTorch; dispatch then keeps to the originals.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backends import triton as backend
from .config import env_strict
from .spec import Geometry

logger = logging.getLogger("swinaccel")

unsupported_reason = backend.unsupported_reason

# (device, dtype, geometry's window, head_dim, ...) of launches that failed, and why in one sentence.
_failures: dict[tuple, str] = {}

_POSITION = ("position_table",)

_library = torch.library.Library("swinaccel", "DEF")
_library.define(
    "shifted_window_attention(Tensor qkv, Tensor? k, Tensor? v, Tensor? table, Tensor? index, Tensor? padding,"
    " Tensor? mask, Tensor? logit_scale, Tensor[]? factors, int num_heads, int[2] window, int[2] shift,"
    " bool roll_first, float mask_value, float scale) -> Tensor"
)
_library.define("position_table(Tensor coords, Tensor hidden_weight, Tensor hidden_bias, Tensor weight) -> Tensor")


class KernelError(RuntimeError):
    """A kernel of ours failed and strict mode forbids the original."""


def _problem(device: torch.device, dtype: torch.dtype, geometry: Geometry, head_dim: int, cosine: bool) -> tuple:
    return device.type, device.index, dtype, geometry.window, head_dim, cosine


def failure(device: torch.device, dtype: torch.dtype, geometry: Geometry, head_dim: int, cosine: bool) -> str | None:
    """Why the kernel for such a problem failed before, or None."""
    if not _failures:
        return None
    return _failures.get(_problem(device, dtype, geometry, head_dim, cosine))


def has_failures() -> bool:
    """Whether any kernel failed in this process."""
    return bool(_failures)


def forget_failures() -> None:
    """Try every kernel again."""
    _failures.clear()


def shifted_window_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    geometry: Geometry,
    *,
    num_heads: int,
    table: Tensor | None = None,
    index: Tensor | None = None,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
    mask_value: float = -100.0,
    scale: float = 1.0,
    logit_scale: Tensor | None = None,
    factors: Sequence[Tensor] | None = None,
) -> Tensor:
    """Shifted-window attention from image to image, as `reference.shifted_window_attention`, by the Triton kernels.

    Args:
        qkv: (B, H, W, 3 * heads * D) packed as q, k, v, or the three (B, H, W, heads * D) apart.
        factors: see `backends.triton.shifted_window_attention`.
    Returns:
        (B, H, W, heads * D), dtype of qkv; softmax and sums in fp32.
    """
    packed, k, v = (qkv, None, None) if isinstance(qkv, Tensor) else qkv
    arguments = (
        packed, k, v, table, index, padding, mask, logit_scale, factors, num_heads,
        geometry.window, geometry.shift, geometry.roll_first, mask_value, scale,
    )  # fmt: skip
    if _is_observed():
        return torch.ops.swinaccel.shifted_window_attention(*arguments)
    return _forward(*arguments, geometry=geometry)  # the same, less the dispatcher's time


def _is_observed() -> bool:
    """Whether anyone but the device looks at operators now: a compiler, a mode, a profiler."""
    return (
        torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or torch.autograd._profiler_enabled()
    )


def _forward(
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    table: Tensor | None,
    index: Tensor | None,
    padding: Tensor | None,
    mask: Tensor | None,
    logit_scale: Tensor | None,
    factors: Sequence[Tensor] | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    roll_first: bool,
    mask_value: float,
    scale: float,
    geometry: Geometry | None = None,
) -> Tensor:
    if geometry is None:
        size = qkv.shape[1], qkv.shape[2]
        geometry = Geometry(size, (window[0], window[1]), (shift[0], shift[1]), roll_first)
    if qkv.stride(-1) != 1 or (k is not None and not qkv.stride() == k.stride() == v.stride()):  # type: ignore[union-attr]
        qkv, k, v = qkv.contiguous(), _contiguous(k), _contiguous(v)
    options: dict[str, Any] = {
        "num_heads": num_heads,
        "table": table,
        "index": _contiguous(index),
        "padding": _contiguous(padding),
        "mask": _contiguous(mask),
        "mask_value": mask_value,
        "scale": scale,
        "logit_scale": _contiguous(logit_scale),
    }
    try:
        return backend.shifted_window_attention(
            qkv, k, v, geometry, **options, factors=None if factors is None else tuple(factors)
        )
    except Exception as error:
        q, k, v = qkv.chunk(3, dim=-1) if k is None or v is None else (qkv, k, v)
        problem = _problem(q.device, q.dtype, geometry, q.shape[-1] // num_heads, logit_scale is not None)
        reason = f"the Triton kernel failed: {_first_line(error)}"
        if reason not in _failures.values():
            logger.warning("%s; the original runs instead", reason)
        _failures[problem] = reason
        if env_strict():
            raise KernelError(reason) from error
        return reference.shifted_window_attention(q, k, v, geometry, **options).to(q.dtype).contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def position_table(coords: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, weight: Tensor) -> Tensor | None:
    """SwinV2's bias table (T, heads) by one kernel, as `backends.triton.position_table`; None where that failed."""
    if _POSITION in _failures:
        return None
    if _is_observed():
        return torch.ops.swinaccel.position_table(coords, hidden_weight, hidden_bias, weight)
    return _position_table(coords, hidden_weight, hidden_bias, weight)


def _position_table(coords: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, weight: Tensor) -> Tensor:
    try:
        return backend.position_table(coords, hidden_weight, hidden_bias, weight)
    except Exception as error:
        _failures[_POSITION] = f"the Triton kernel failed: {_first_line(error)}"
        logger.warning("%s; PyTorch computes the bias table instead", _failures[_POSITION])
        hidden = torch.relu(coords.view(-1, 2).float() @ hidden_weight.float().t() + hidden_bias.float())
        return 16 * torch.sigmoid(hidden @ weight.float().t())


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def _fake(qkv: Tensor, k: Tensor | None, *args: object) -> Tensor:
    channels = qkv.shape[-1] if k is not None else qkv.shape[-1] // 3
    return qkv.new_empty((*qkv.shape[:-1], channels))


def _fake_position_table(coords: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, weight: Tensor) -> Tensor:
    return coords.new_empty((coords.numel() // 2, weight.shape[0]), dtype=torch.float32)


for _key in ("CUDA", "CPU"):
    _library.impl("shifted_window_attention", _forward, _key)
    _library.impl("position_table", _position_table, _key)
torch.library.register_fake("swinaccel::shifted_window_attention", _fake, lib=_library)
torch.library.register_fake("swinaccel::position_table", _fake_position_table, lib=_library)
