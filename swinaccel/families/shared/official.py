"""The official `WindowAttention` and its copies, timm's among them, read apart from the block around them.

V1 has a table of position biases and calls `qkv`. V2 has an MLP for the biases, cosine scores, and reads `qkv.weight`
past the module (timm's calls it where its bias is absent or separate). Swin-MoE has V2's MLP without its sigmoid,
and V1's scores. V2's first version (`rpe_mlp`, in Feature-Distillation and AiT) has any of these together. Libraries
differ in the block: where height, width and mask come from, and what pads and clamps.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import Tensor, nn

from ...spec.block import Product
from ...spec.window import SHIFT_MASK_VALUE, Axes, Geometry, Section, WindowSpec
from .common import (
    drop_rate,
    dropped,
    fan_in,
    has_table_rows,
    is_index,
    is_plain_linear,
    is_position_mlp,
    logit_scale_reason,
    mlp_table_shape,
    position_bias,
    separate_bias,
    sides,
)
from .separate import separate_padding, zero_token


def attention_spec(family: str, attn: Any, shift: Axes | None = None, has_index: bool = True) -> WindowSpec | None:
    """Return what an official window attention is, by structure; None for anything else.

    Args:
        has_index: the attention keeps the index of its position biases; HAT's is given it at each call.
    """
    window, heads = sides(getattr(attn, "window_size", None)), getattr(attn, "num_heads", None)
    if window is None or not isinstance(heads, int):
        return None
    if not all(isinstance(getattr(attn, name, None), nn.Module) for name in ("qkv", "proj", "attn_drop", "proj_drop")):
        return None
    if has_index and not is_index(attn.relative_position_index, math.prod(window)):
        return None
    cosine = hasattr(attn, "logit_scale")
    if (mlp := _position_mlp(attn)) is not None:
        if not is_position_mlp(mlp, heads) or getattr(attn, "rpe_output_type", "sigmoid") not in ("normal", "sigmoid"):
            return None
        if cosine and attn.logit_scale.numel() != heads:
            return None
    elif cosine or not has_table_rows(attn.relative_position_bias_table, window, heads):
        return None
    return WindowSpec(family, window, shift or (0,) * len(window), heads, fan_in(attn.proj) // heads)


def attention_section(
    attn: Any,
    geometry: Geometry,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    *,
    implied: bool = True,
) -> Section | str:
    """Return the live facts of a call of an official window attention over these windows, or why it must run itself.

    Args:
        mask: as in `Section`.
        index: of the position biases, where it is not the one that the attention keeps.
        implied: without a mask the shift has its own.
    """
    heads, tokens, head_dim = attn.num_heads, geometry.tokens, fan_in(attn.proj) // attn.num_heads
    index = attn.relative_position_index if index is None else index
    common: dict[str, Any] = {
        "geometry": geometry,
        "num_heads": heads,
        "head_dim": head_dim,
        "output": dropped(attn.proj, attn.proj_drop),
        "index": index.view(tokens, tokens) if index.numel() == tokens * tokens else index,
        "mask": mask,
        "mask_value": SHIFT_MASK_VALUE if implied or mask is not None else 0.0,
        "dropout": _dropout(attn),
    }
    if hasattr(attn, "logit_scale"):
        reason, common["logit_scale"] = logit_scale_reason(attn.logit_scale, heads), attn.logit_scale
    else:
        reason = None if isinstance(attn.scale, (int, float)) else "its scale is no number"
        common["scale"] = attn.scale  # timm's fused path takes the default, which the probe finds
    if reason is not None:
        return reason
    if hasattr(attn, "q_bias"):
        common["padding"] = _padding_v2(attn)
        if not _calls_qkv(attn):
            common["project"] = Product(attn.qkv, functools.partial(separate_bias, attn))
        else:
            common["project"] = attn.qkv if attn.q_bias is None else lambda x: attn.qkv(x) + separate_bias(attn)
    else:
        common["project"] = attn.qkv
        common["padding"] = separate_padding(attn.qkv)
    if (mlp := _position_mlp(attn)) is None:
        table = attn.relative_position_bias_table
        return Section(table=lambda: table, sources=(table,), **common)
    coords = attn.relative_coords_table
    if getattr(attn, "rpe_output_type", "sigmoid" if hasattr(attn, "logit_scale") else "normal") == "sigmoid":
        return Section(**position_bias(mlp, coords, heads), **common)
    common["table_shape"] = mlp_table_shape(coords, mlp[2], heads)
    return Section(table=lambda: mlp(coords).view(-1, heads), sources=(*mlp.parameters(), coords), **common)


def attention_projections(attn: Any) -> tuple[nn.Module, ...]:
    """Return the projections that a section calls: V2 reads its first one's weight past the module."""
    return (attn.qkv, attn.proj) if not hasattr(attn, "q_bias") or _calls_qkv(attn) else (attn.proj,)


def flash_reason(attn: Any) -> str | None:
    """Return why the attention must run itself where its flash path (MONAI's) may be taken, or None."""
    if getattr(attn, "use_flash_attention", False) and drop_rate(attn.attn_drop) > 0:
        return "dropout is active, and its flash path leaves it out"
    return None


def _position_mlp(attn: Any) -> Any:
    """Return the MLP from coordinates to biases, by the name that SwinV2 or its first version gives it, or None."""
    return getattr(attn, "cpb_mlp", getattr(attn, "rpe_mlp", None))


def _dropout(attn: Any) -> float:
    if getattr(attn, "fused_attn", False):  # timm passes the rate on, and its own mode decides
        return attn.attn_drop.p if attn.training else 0.0
    return drop_rate(attn.attn_drop)


def _calls_qkv(attn: Any) -> bool:
    separate = getattr(attn, "qkv_bias_separate", None)  # timm's
    return separate is not None and (separate or attn.q_bias is None)


def _padding_v2(attn: Any) -> Any:
    if _calls_qkv(attn) and not is_plain_linear(attn.qkv):
        return None

    def padding() -> Tensor | None:
        bias = separate_bias(attn)
        own = zero_token(attn.qkv) if _calls_qkv(attn) else None
        return bias if own is None else own if bias is None else own + bias

    return padding
