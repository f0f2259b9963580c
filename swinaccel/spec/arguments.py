"""Check the arguments of `functional`. Each error names the argument, what was given and what would do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def can_look() -> bool:
    """Return True if the numbers in a tensor may be asked for: nothing traces or transforms the call."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.dtype not in _FLOATS:
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {value.dtype}")
        raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64; got {value.dtype}")
    check_layout(name, value)


def check_layout(name: str, value: Tensor) -> None:
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got one of layout {value.layout}")


def check_device(name: str, value: Tensor, q: Tensor, of: str = "q") -> None:
    if value.device != q.device:
        raise ValueError(f"{name} must be on {of}'s device, {q.device}; got {value.device}")


def check_parameter(name: str, value: Any, shape: tuple[int, ...], x: Tensor, of: str = "x") -> Tensor:
    """Check that a parameter is a tensor of that shape, with which x can be multiplied."""
    check_tensor(name, value)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(value.shape)}")
    check_device(name, value, x, of)
    if value.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name} must have {of}'s dtype, {x.dtype}; got {value.dtype}")
    return value


def check_layer(name: str, layer: Any, inputs: int, outputs: int, x: Tensor, of: str = "x") -> None:
    """Raise where a layer, if it is a plain linear one, is not one that makes so many channels of so many of x."""
    if type(layer) is torch.nn.Linear:
        check_parameter(f"{name}.weight", layer.weight, (outputs, inputs), x, of)
        if layer.bias is not None:
            check_parameter(f"{name}.bias", layer.bias, (outputs,), x, of)


def check_output(name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    """Check that a module gave a tensor of this shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must give a tensor; got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{name} must give shape {tuple(shape)}; got {tuple(value.shape)}")
    return value


def check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more; got {value}")


def check_qkv(q: Any, k: Any, v: Any, axes: str = "batch, heads, tokens, head_dim") -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, value)
        if value.dim() != 4:
            raise ValueError(f"{name} must have shape ({axes}); got {tuple(value.shape)}")
        if value.shape != q.shape:
            raise ValueError(f"{name} must have q's shape, {tuple(q.shape)}; got {tuple(value.shape)}")
        if value.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype, {q.dtype}; got {value.dtype}")
        check_device(name, value, q)
    if q.shape[-1] < 1:
        raise ValueError(f"q must have a head_dim of 1 or more; got {tuple(q.shape)}")


def check_factors(q: Tensor, q_factor: Any, k_factor: Any) -> list[Tensor]:
    """Check two factors, which have the heads of q."""
    batch, heads, tokens, _ = q.shape
    found = []
    for name, value in (("q_factor", q_factor), ("k_factor", k_factor)):
        check_tensor(name, value)
        sizes = value.shape[:-1]
        fits = value.dim() in (3, 4) and sizes[-1] == tokens and sizes[-2] in (1, heads)
        if not fits or sizes[:-2] not in ((), (batch,)):
            raise ValueError(
                f"{name} must have shape (heads, tokens, rank) or (batch, heads, tokens, rank) with the sizes of q, "
                f"{tuple(q.shape)}; got {tuple(value.shape)}"
            )
        check_device(name, value, q)
        found.append(value.expand(*sizes[:-2], heads, -1, -1))
    if q_factor.shape[-1] != k_factor.shape[-1]:
        raise ValueError(f"k_factor must have q_factor's rank, {q_factor.shape[-1]}; got {k_factor.shape[-1]}")
    return found


def check_mask(q: Tensor, mask: Any, tokens: int, instead: str, count: int | None = None, of: str = "q") -> None:
    """Check a mask (M, N, N), of `count` rows where that is given; `instead` names what takes gradients."""
    check_tensor("mask", mask)
    wanted = f"(masks, {tokens}, {tokens}), 1 mask or more" if count is None else f"({count}, {tokens}, {tokens})"
    if mask.dim() != 3 or mask.shape[0] < 1 or mask.shape[1:] != (tokens, tokens):
        raise ValueError(f"mask must have shape {wanted}; got {tuple(mask.shape)}")
    if count is not None and mask.shape[0] != count:
        raise ValueError(f"mask must have shape {wanted}, one for each window of an image; got {tuple(mask.shape)}")
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"mask takes no gradient: detach it, or give what is to be learned as {instead}")
    check_device("mask", mask, q, of)


def check_bias(q: Tensor, bias: Any, heads: int, tokens: int, of: str = "q", rows: int | None = None) -> None:
    """Check a bias (heads, N, N), or (rows, heads, N, N) of so many rows where that is given."""
    check_tensor("bias", bias)
    shape = (heads, tokens, tokens)
    if bias.dim() == 4:
        count = max(1, bias.shape[0] if rows is None else rows)
        if bias.shape != (count, *shape):
            raise ValueError(
                f"bias must have shape (rows, heads, tokens, tokens), {(count, *shape)}, one for each row of windows; "
                f"got {tuple(bias.shape)}"
            )
    elif bias.shape != shape:
        raise ValueError(f"bias must have shape (heads, tokens, tokens), {shape}; got {tuple(bias.shape)}")
    check_device("bias", bias, q, of)


def check_table(q: Tensor, table: Any, index: Any, heads: int, tokens: int) -> Tensor:
    """Check the index of a table (T, heads), with its two axes."""
    for name, one, other, other_name in (("table", table, index, "index"), ("index", index, table, "table")):
        if one is None:
            raise ValueError(f"{name} must be given where {other_name} is; got None and a {type(other).__name__}")
    check_tensor("table", table)
    if table.dim() != 2 or table.shape[0] < 1 or table.shape[1] != heads:
        raise ValueError(f"table must have shape (rows, heads), {heads} heads; got {tuple(table.shape)}")
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be a tensor; got {type(index).__name__}")
    if index.dtype != torch.int64:
        raise TypeError(f"index must be torch.int64; got {index.dtype}")
    if tuple(index.shape) not in ((tokens, tokens), (tokens * tokens,)):
        raise ValueError(
            f"index must have shape ({tokens}, {tokens}), or ({tokens * tokens},), for a window of {tokens} tokens; "
            f"got {tuple(index.shape)}"
        )
    check_layout("index", index)
    for name, value in (("table", table), ("index", index)):
        check_device(name, value, q, "qkv")
    check_entries(index, table.shape[0])
    return index.reshape(tokens, tokens)


# What was last found in an index: its version then, and its smallest and largest entries.
_ranges = WeakTensorKeyDictionary()


def check_entries(index: Tensor, rows: int) -> None:
    """Raise where an index names rows that a table has not. An index is looked through once, until it is written to."""
    if torch.compiler.is_compiling():
        return  # kernels read nothing beyond the table, and give NaN
    known = _ranges.get(index)
    version = 0 if index.is_inference() else index._version
    if known is None or known[0] != version:
        if not can_look() or type(index) not in (Tensor, torch.nn.Parameter) or index.is_meta:
            return
        if index.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        low, high = (int(one) for one in index.aminmax())
        known = _ranges[index] = version, low, high
    if known[1] < 0 or known[2] >= rows:
        raise ValueError(f"index must hold rows of the table, 0 to {rows - 1}; got {known[1]} to {known[2]}")


def check_logit_scale(q: Tensor, logit_scale: Any, heads: int, of: str = "q") -> Tensor:
    """Check a logit_scale, (heads,)."""
    check_tensor("logit_scale", logit_scale)
    if tuple(logit_scale.shape) not in ((heads,), (heads, 1, 1)):
        raise ValueError(
            f"logit_scale must have shape ({heads},) or ({heads}, 1, 1), one number a head; "
            f"got {tuple(logit_scale.shape)}"
        )
    check_device("logit_scale", logit_scale, q, of)
    return logit_scale.reshape(heads)


def check_dropout(dropout: Any, name: str = "dropout") -> float:
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"{name} must be a number; got {dropout!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"{name} must lie in [0, 1); got {dropout!r}")
    return float(dropout)


def check_number(name: str, value: Any, wanted: str = "a number") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name} must be {wanted}; got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value!r}")


def check_axes(name: str, value: Any, least: int, count: int = 2) -> tuple[int, ...]:
    """Return one integer for each of `count` axes, from as many or from one for all of them."""
    axes = (value,) * count if isinstance(value, int) else value
    if not isinstance(axes, (tuple, list)) or not all(isinstance(n, int) and not isinstance(n, bool) for n in axes):
        raise TypeError(f"{name} must be an integer or {count} of them; got {value!r}")
    if len(axes) != count or min(axes) < least:
        raise ValueError(f"{name} must be {count} integers of {least} or more; got {value!r}")
    return tuple(axes)
