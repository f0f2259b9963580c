"""The block around the official attention, in the forms that its many copies share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...spec.block import Block
from ...spec.window import Geometry, WindowSpec
from .common import positional_names
from .official import attention_spec


def block_spec(family: str, module: Any, arguments: int, has_index: bool = True) -> WindowSpec | None:
    """Return the facts of a block around an official attention whose forward takes so many arguments, else None."""
    attn, size, shift = (getattr(module, name, None) for name in ("attn", "window_size", "shift_size"))
    if attn is None or not isinstance(size, int) or not isinstance(shift, int):
        return None
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in ("norm1", "norm2", "mlp", "drop_path")):
        return None
    if len(positional_names(type(module).forward)) != arguments:
        return None
    spec = attention_spec(family, attn, (shift, shift), has_index)
    return spec if spec is not None and spec.window == (size, size) else None


def block_forward(module: Any, attend: Any, x: Tensor, size: Any) -> Any:
    """Run the official block on (B, H * W, C): V1 normalises before attention and MLP, V2 after them.

    Where the MLP is a mixture of experts, their balancing loss is returned as well.
    """
    image = (x.shape[0], *size, x.shape[2])
    if hasattr(module.attn, "logit_scale"):
        x = x + module.drop_path(module.norm1(attend(x.view(image)).view(x.shape)))
        return x + module.drop_path(module.norm2(module.mlp(x)))
    x = x + module.drop_path(attend(module.norm1(x).view(image)).view(x.shape))
    if getattr(module, "is_moe", False):
        out, loss = module.mlp(module.norm2(x))
        return x + module.drop_path(out), loss
    return x + module.drop_path(module.mlp(module.norm2(x)))


def block_facts(module: Any) -> Block:
    """Return the parts of the official block, in the order of their use."""
    attn, mlp = module.attn, module.mlp
    post_norm = hasattr(attn, "logit_scale")
    names = ("drop_path1", "drop_path2") if hasattr(module, "drop_path1") else ("drop_path", "drop_path")
    drops = [getattr(module, name) for name in names]
    return Block(attn, module.norm1, module.norm2, (mlp,), mlp.fc1, mlp.act, mlp.fc2, post_norm, *drops)


def strange_mask(mask: Any, x: Tensor) -> str | None:
    """Return why a mask that came as an argument is left to the original, or None."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or not mask.is_floating_point() or mask.dim() != 3 or mask.device != x.device:
        return "the mask is no floating-point tensor (windows, N, N) on the device of the input"
    return None


def undivided(geometry: Geometry) -> str | None:
    """Return why a block that does not pad must run its original (which raises), or None."""
    if geometry.is_padded:
        (height, width), (rows, cols) = geometry.size, geometry.window
        return f"{height}x{width} tokens do not divide into windows of {rows}x{cols}, and the original does not pad"
    return None
