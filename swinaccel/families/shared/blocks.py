"""The block around the official attention, in the forms that its many copies share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...spec.block import Attend, Block, Tokens
from ...spec.reference_block import attend_tokens
from ...spec.window import Geometry, WindowSpec
from .common import pair, positional_names
from .official import attention_projections, attention_spec


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


class OfficialAttention:
    """Members that families of blocks around the official attention share."""

    method = "forward"

    def attention(self, module: Any) -> nn.Module:
        return module.attn

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        return attention_projections(module.attn)


class OfficialBlock(OfficialAttention):
    """Members that families of the official block share: it may run in fewer kernels as a whole.

    V1 normalises before attention and MLP, V2 after them. A mixture of experts in place of the MLP returns its
    balancing loss as well.
    """

    def tokens(self, module: Any, *args: Any, **kwargs: Any) -> Tokens:
        raise NotImplementedError

    def forward(self, module: Any, attend: Attend, *args: Any, **kwargs: Any) -> Any:
        x, size = self.tokens(module, *args, **kwargs)
        if hasattr(module.attn, "logit_scale"):
            x = x + module.drop_path(module.norm1(attend_tokens(attend, x, size)))
            return x + module.drop_path(module.norm2(module.mlp(x)))
        x = x + module.drop_path(attend_tokens(attend, module.norm1(x), size))
        if getattr(module, "is_moe", False):
            out, loss = module.mlp(module.norm2(x))
            return x + module.drop_path(out), loss
        return x + module.drop_path(module.mlp(module.norm2(x)))

    def block(self, module: Any) -> Block:
        attn, mlp = module.attn, module.mlp
        post_norm = hasattr(attn, "logit_scale")
        names = ("drop_path1", "drop_path2") if hasattr(module, "drop_path1") else ("drop_path", "drop_path")
        drops = [getattr(module, name) for name in names]
        return Block(attn, module.norm1, module.norm2, (mlp,), mlp.fc1, mlp.act, mlp.fc2, post_norm, *drops)

    def inner(self, module: Any) -> tuple[Any, nn.Module]:
        return self, module


def sized_geometry(x: Tensor, size: Any, window: Any, shift: int) -> Geometry | str:
    """Return the windows of tokens (B, H * W, C) that a call is told H and W of, or why the original must run."""
    sides = pair(size)
    if sides is None:
        return "height and width are not there as numbers"
    if x.dim() != 3 or x.shape[1] != sides[0] * sides[1]:
        return f"the input's tokens are not {sides[0]}x{sides[1]}"
    return Geometry(sides, pair(window) or (0, 0), (shift, shift))


def strange_mask(mask: Any, x: Tensor) -> str | None:
    """Return why a mask that came as an argument is left to the original, or None."""
    if mask is None:
        return None
    is_dense = isinstance(mask, Tensor) and mask.layout == torch.strided and mask.is_floating_point()
    if not is_dense or mask.dim() != 3 or mask.device != x.device:
        return "the mask is no floating-point tensor (windows, N, N) on the device of the input"
    return None


def undivided(geometry: Geometry) -> str | None:
    """Return why a block that does not pad must run its original (which raises), or None."""
    if geometry.is_padded:
        (height, width), (rows, cols) = geometry.size, geometry.window
        return f"{height}x{width} tokens do not divide into windows of {rows}x{cols}, and the original does not pad"
    return None
