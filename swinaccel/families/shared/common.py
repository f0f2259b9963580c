"""Readings of attributes that several families share: sizes, bias tables, projections, dropouts."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from ...layers import is_builtin
from ...spec.window import Axes


class AttentionItself:
    """Members of families whose module is the attention and nothing around it."""

    method = "forward"

    def attention(self, module: Any) -> nn.Module:
        return module


def pair(value: object) -> tuple[int, int] | None:
    """Return (int, int) of an int or of two of them; None of anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return value[0], value[1]
    return None


def sides(value: object) -> Axes | None:
    """Return the lengths along the axes of an image: `pair`, or (int, int, int) of three; None of anything else."""
    if isinstance(value, (tuple, list)) and len(value) == 3 and all(isinstance(v, int) for v in value):
        return tuple(value)
    return pair(value)


def is_table(table: object, index: object, window: Axes, num_heads: int) -> bool:
    """Return True if these are the bias table and index of a window, with no room for extra tokens."""
    return has_table_rows(table, window, num_heads) and is_index(index, math.prod(window))


def has_table_rows(table: object, window: Axes, num_heads: int) -> bool:
    rows = math.prod(2 * side - 1 for side in window)
    return isinstance(table, Tensor) and tuple(table.shape) == (rows, num_heads)


def is_index(index: object, tokens: int) -> bool:
    whole = (torch.int64, torch.int32)
    return isinstance(index, Tensor) and index.dtype in whole and index.numel() == tokens * tokens


def is_position_mlp(mlp: object, num_heads: int) -> bool:
    """Return True if this is SwinV2's MLP from log-spaced coordinates to one bias a head."""
    return (
        isinstance(mlp, nn.Sequential)
        and len(mlp) == 3
        and getattr(mlp[0], "in_features", None) == 2
        and getattr(mlp[2], "out_features", None) == num_heads
    )


def position_bias(mlp: Any, coords: Tensor, num_heads: int) -> dict[str, Any]:
    """Return SwinV2's bias (eq. 3) as fields of a `Section`: 16 · sigmoid of the MLP commutes with the gathering."""
    hidden, activation, last = mlp._modules.values()  # indexing a Sequential costs more than all else here
    plain = type(hidden) is nn.Linear and type(activation) is nn.ReLU and type(last) is nn.Linear
    position = None
    if plain and hidden.bias is not None and last.bias is None:
        width = hidden.weight.shape[0]
        fits = hidden.weight.shape[1] == 2 and hidden.bias.shape == (width,) and last.weight.shape == (num_heads, width)
        if fits:
            position = (coords, hidden.weight, hidden.bias, last.weight)
    return {
        "table": lambda: 16 * torch.sigmoid(mlp(coords).view(-1, num_heads)),
        "table_shape": mlp_table_shape(coords, last, num_heads),
        "sources": position or (*mlp.parameters(), coords),
        "position": position,
    }


def logit_scale_reason(logit_scale: object, num_heads: int) -> str | None:
    """Return why a SwinV2's logit_scale is not one number a head, as originals spread it over scores, or None."""
    if not isinstance(logit_scale, Tensor):
        return f"its logit_scale is {logit_scale!r}"
    if tuple(logit_scale.shape) != (num_heads, 1, 1):
        return f"its logit_scale {tuple(logit_scale.shape)} is not one number for each of {num_heads} heads"
    return None


def cosine_bias(mlp: Any, coords: Tensor, logit_scale: Any, num_heads: int) -> dict[str, Any] | str:
    """Return SwinV2's bias and scale as fields of a `Section`, or why its scale is not one."""
    reason = logit_scale_reason(logit_scale, num_heads)
    return {**position_bias(mlp, coords, num_heads), "logit_scale": logit_scale} if reason is None else reason


def mlp_table_shape(coords: Tensor, last: Any, num_heads: int) -> tuple[int, int]:
    """Return the shape of a table that an MLP computes, whatever the width of its last layer, as originals view it."""
    width = last.weight.shape[0] if type(last) is nn.Linear else last.out_features
    return coords.numel() // 2 * width // num_heads, num_heads


def fan_in(layer: Any) -> int:
    """Return how many numbers a linear layer takes: by its weight, where what it says of itself may be out of date."""
    is_whole = type(layer) is nn.Linear and layer.weight.dim() == 2  # FSDP leaves parameters empty between calls
    width: int = layer.weight.shape[1] if is_whole else layer.in_features
    return width


def is_plain_linear(module: nn.Module) -> bool:
    """Return True if the projection is exactly nn.Linear with its own weight, so that its bias may be read."""
    return is_builtin(module, nn.Linear)


def separate_bias(attn: Any) -> Tensor | None:
    """Return the bias of SwinV2's packed projection, (3 * heads * D,), or None: q's, zeros or k_bias, v's."""
    if attn.q_bias is None:
        return None
    k_bias = getattr(attn, "k_bias", None)
    return torch.cat((attn.q_bias, torch.zeros_like(attn.v_bias) if k_bias is None else k_bias, attn.v_bias))


def drop_rate(dropout: Any) -> float:
    """Return the probability at which a dropout drops now; its own mode counts, as Monte Carlo dropout sets it."""
    return getattr(dropout, "p", 0.0) if dropout.training else 0.0


def is_idle(dropout: Any) -> bool:
    """Return True if this is a dropout that hands on what it is given, so that it need not be called."""
    return type(dropout) is nn.Dropout and not (dropout.training and dropout.p)


def dropped(projection: Any, dropout: Any) -> Any:
    """Return a projection with the dropout behind it: the projection alone, where that does nothing now."""
    return projection if is_idle(dropout) else lambda y: dropout(projection(y))


def argument(place: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an argument of a call by its place or its name, or None."""
    return args[place] if len(args) > place else kwargs.get(name)


def positional_names(method: object) -> tuple[str, ...]:
    """Return the names of a method's positional parameters after self."""
    parameters = list(inspect.signature(method).parameters.values())[1:]  # type: ignore[arg-type]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)
