"""Modules for people who write their own model: Swin's attention, with the state dicts that its checkpoints have.

They run on the kernels where those can serve a call and in plain PyTorch elsewhere, in training and in evaluation; see
`functional`. Nothing is patched, and `swinaccel.accelerate` is not needed for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .spec.arguments import (
    check_axes,
    check_dropout,
    check_layer,
    check_mask,
    check_output,
    check_parameter,
    check_positive,
    check_tensor,
)

__all__ = ["ShiftedWindowAttention", "ShiftedWindowAttentionV2", "WindowAttention"]


class _Attention(nn.Module):
    """Base of the modules: projections, a bias from positions, and how state dicts are read."""

    relative_position_index: Tensor

    def __init__(
        self, dim: int, window_size: int | tuple[int, int], num_heads: int, qkv_bias: bool, proj_bias: bool
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_heads", num_heads)):
            check_positive(name, value)
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads, {num_heads}; got {dim}")
        self.dim, self.num_heads = dim, num_heads
        self.window_size = check_axes("window_size", window_size, 1)
        self.register_buffer("relative_position_index", _position_index(self.window_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def _check(self, x: Any, axes: int, wanted: str) -> None:
        """Raise where the input, or a parameter that was replaced, does not fit the module."""
        check_tensor("x", x)
        if x.dim() != axes or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape ({wanted}, {self.dim}); got {tuple(x.shape)}")
        check_layer("qkv", self.qkv, self.dim, 3 * self.dim, x)
        check_layer("proj", self.proj, self.dim, self.dim, x)

    def _positions(self) -> None:
        rows = math.prod(2 * side - 1 for side in self.window_size)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, self.num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Read what libraries write differently: indices that are flat, and buffers that are not stored at all."""
        for name, buffer in self.named_buffers(recurse=False):
            stored = state_dict.get(prefix + name)
            if stored is None:
                state_dict[prefix + name] = buffer
            elif isinstance(stored, Tensor) and stored.numel() == buffer.numel():
                state_dict[prefix + name] = stored.view(buffer.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, window_size={self.window_size}, num_heads={self.num_heads}"


class WindowAttention(_Attention):
    """Attention within windows that are cut already, with the official Swin's constructor, forward and state dict.

    Args:
        dim: channels, which num_heads divides.
        window_size: tokens of a window, (rows, columns) or one number for both.
        num_heads: heads.
        qkv_bias: whether the projection to q, k and v has a bias.
        qk_scale: multiplies q kᵀ; (dim / num_heads)^-0.5 without, or where it is 0.
        attn_drop, proj_drop: dropout of attention weights and of the output, in training.
    Shapes:
        forward(x, mask=None): x (B * M, N, dim), windows of N tokens, those of an image one after the other;
        mask (M, N, N), 0 or a large negative, or None; gives (B * M, N, dim).
    State dict:
        relative_position_bias_table, relative_position_index, qkv.weight, qkv.bias, proj.weight, proj.bias. The index
        may be missing or flat.
    Raises:
        TypeError, ValueError: for arguments of another kind or shape; the message names the argument.
    Source: Liu et al. 2021, arXiv:2103.14030, eq. 4.
    """

    def __init__(
        self,
        dim: int,
        window_size: int | tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(dim, window_size, num_heads, qkv_bias, proj_bias=True)
        self._positions()
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        height, width = self.window_size
        self._check(x, 3, f"windows, {height * width}")
        if x.shape[1] != height * width:
            raise ValueError(f"x must have shape (windows, {height * width}, {self.dim}); got {tuple(x.shape)}")
        if not isinstance(self.attn_drop, (nn.Dropout, nn.Identity)):
            raise TypeError(f"attn_drop must be nn.Dropout or nn.Identity; got {type(self.attn_drop).__name__}")
        masks = 1 if mask is None else _count_masks(x, mask)
        # A window's tokens are a small image of their own; those of one image lie below each other.
        qkv = check_output("qkv", self.qkv(x), (*x.shape[:2], 3 * self.dim))
        qkv = qkv.reshape(x.shape[0] // masks, masks * height, width, 3 * self.dim)
        out = functional.shifted_window_attention(
            qkv, (height, width), self.num_heads, table=self.relative_position_bias_table,
            index=self.relative_position_index, mask=mask, scale=self.scale,
            dropout=self.attn_drop.p if isinstance(self.attn_drop, nn.Dropout) and self.attn_drop.training else 0.0,
        )  # fmt: skip
        return self.proj_drop(check_output("proj", self.proj(out.reshape(x.shape)), x.shape))


def _count_masks(x: Tensor, mask: Tensor) -> int:
    check_mask(x, mask, x.shape[1], "relative_position_bias_table", of="x")
    if x.shape[0] % mask.shape[0]:
        raise ValueError(f"mask must have a number of rows that divides the {x.shape[0]} windows; got {mask.shape[0]}")
    return mask.shape[0]


class ShiftedWindowAttention(_Attention):
    """Attention within the shifted windows of an image: pad, shift, mask, attention, shift back and crop in one.

    Constructor and forward are torchvision's. Along an axis that holds a single window nothing is shifted.

    Args:
        dim: channels, which num_heads divides.
        window_size: tokens of a window, (rows, columns) or one number for both.
        shift_size: how far windows are shifted down and right, likewise; 0 or more and less than window_size.
        num_heads: heads.
        qkv_bias, proj_bias: whether the projections have a bias. Padding tokens hold what qkv makes of zeros.
        attention_dropout, dropout: of attention weights and of the output, in training.
    Shapes:
        forward(x): (B, H, W, dim) to (B, H, W, dim), any H and W.
    State dict:
        relative_position_bias_table, relative_position_index, qkv.weight, qkv.bias, proj.weight, proj.bias: that of
        torchvision's module and of the official WindowAttention. The index may be missing or flat.
    Raises:
        TypeError, ValueError: for arguments of another kind or shape; the message names the argument.
    Source: Liu et al. 2021, arXiv:2103.14030, section 3.2.
    """

    def __init__(
        self,
        dim: int,
        window_size: int | tuple[int, int],
        shift_size: int | tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, window_size, num_heads, qkv_bias, proj_bias)
        self.shift_size = check_axes("shift_size", shift_size, 0)
        if not all(step < side for step, side in zip(self.shift_size, self.window_size, strict=True)):
            raise ValueError(f"shift_size must be less than window_size, {self.window_size}; got {shift_size!r}")
        self.attention_dropout = check_dropout(attention_dropout, "attention_dropout")
        self.dropout = check_dropout(dropout)
        self._positions()

    def _scores(self) -> dict[str, Any]:
        """Return what belongs to the scores: their bias and their scale."""
        return {"table": self.relative_position_bias_table}

    def _project(self) -> Callable[[Tensor], Tensor]:
        return self.qkv

    def _padding(self, x: Tensor) -> Tensor | None:
        if _is_plain(self.qkv):
            return self.qkv.bias
        return self._project()(x.new_zeros(1, 1, 1, self.dim)).view(-1)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x, 4, "B, H, W")
        window = check_axes("window_size", self.window_size, 1)
        sizes = zip(x.shape[1:3], window, check_axes("shift_size", self.shift_size, 0), strict=True)
        shift = tuple(step if length > side else 0 for length, side, step in sizes)
        is_padded = any(length % side for length, side in zip(x.shape[1:3], window, strict=True))
        out = functional.shifted_window_attention(
            check_output("qkv", self._project()(x), (*x.shape[:3], 3 * self.dim)), window, self.num_heads, shift,
            index=self.relative_position_index,
            padding=self._padding(x) if is_padded else None,
            dropout=self.attention_dropout if self.training else 0.0, **self._scores(),
        )  # fmt: skip
        return F.dropout(check_output("proj", self.proj(out), x.shape), self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shift_size={self.shift_size}"


class ShiftedWindowAttentionV2(ShiftedWindowAttention):
    """SwinV2's attention from image to image: cosine scores, and a bias that an MLP makes of log-spaced offsets.

    Args:
        dim, window_size, shift_size, num_heads, proj_bias, attention_dropout, dropout: as for
            `ShiftedWindowAttention`.
        qkv_bias: whether q and v have a bias; k has none.
        pretrained_window_size: window that the MLP was trained with, likewise, where it is another; 0 for window_size.
    Shapes:
        forward(x): (B, H, W, dim) to (B, H, W, dim), any H and W.
    State dict:
        logit_scale, q_bias, v_bias, cpb_mlp.0.weight, cpb_mlp.0.bias, cpb_mlp.2.weight, relative_coords_table,
        relative_position_index, qkv.weight, proj.weight, proj.bias: that of the official SwinV2. Torchvision's is read
        as well: its qkv.bias, whose k part it never uses, becomes q_bias and v_bias. The two buffers may be missing.
    Raises:
        TypeError, ValueError: for arguments of another kind or shape; the message names the argument.
    Source: Liu et al. 2022, arXiv:2111.09883, eq. 2 and 3.
    """

    relative_coords_table: Tensor

    def __init__(
        self,
        dim: int,
        window_size: int | tuple[int, int],
        shift_size: int | tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        pretrained_window_size: int | tuple[int, int] = 0,
    ) -> None:
        self._pretrained = check_axes("pretrained_window_size", pretrained_window_size, 0)
        super().__init__(dim, window_size, shift_size, num_heads, False, proj_bias, attention_dropout, dropout)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None

    def _positions(self) -> None:
        self.pretrained_window_size = self._pretrained
        self.logit_scale = nn.Parameter(torch.full((self.num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, self.num_heads, bias=False)
        )
        self.register_buffer("relative_coords_table", _log_offsets(self.window_size, self._pretrained))

    def _check(self, x: Any, axes: int, wanted: str) -> None:
        super()._check(x, axes, wanted)
        if self.q_bias is not None:
            for name in ("q_bias", "v_bias"):
                check_parameter(name, getattr(self, name), (self.dim,), x)
        coords, mlp = self.relative_coords_table, self.cpb_mlp
        check_tensor("logit_scale", self.logit_scale)
        check_tensor("relative_coords_table", coords)
        if coords.dim() < 1 or coords.shape[-1] != 2:
            raise ValueError(f"relative_coords_table must have shape (..., 2); got {tuple(coords.shape)}")
        if isinstance(mlp, nn.Sequential) and len(mlp) == 3 and type(mlp[0]) is nn.Linear:
            check_tensor("cpb_mlp.0.weight", mlp[0].weight)
            hidden = mlp[0].weight.shape[0] if mlp[0].weight.dim() else 0
            check_layer("cpb_mlp.0", mlp[0], 2, hidden, coords, "relative_coords_table")
            check_layer("cpb_mlp.2", mlp[2], hidden, self.num_heads, coords, "relative_coords_table")

    def _scores(self) -> dict[str, Any]:
        coords = self.relative_coords_table
        table = check_output("cpb_mlp", self.cpb_mlp(coords), (*coords.shape[:-1], self.num_heads))
        return {"table": 16 * torch.sigmoid(table.view(-1, self.num_heads)), "logit_scale": self.logit_scale}

    def _project(self) -> Callable[[Tensor], Tensor]:
        bias = self._bias()
        if _is_plain(self.qkv):
            return lambda x: F.linear(x, self.qkv.weight, bias)
        if bias is None:
            return self.qkv
        return lambda x: check_output("qkv", self.qkv(x), (*x.shape[:-1], 3 * self.dim)) + bias

    def _padding(self, x: Tensor) -> Tensor | None:
        return self._bias() if _is_plain(self.qkv) else super()._padding(x)

    def _bias(self) -> Tensor | None:
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        packed = state_dict.get(prefix + "qkv.bias")
        if self.q_bias is not None and isinstance(packed, Tensor) and packed.shape == (3 * self.dim,):
            del state_dict[prefix + "qkv.bias"]
            state_dict[prefix + "q_bias"], _, state_dict[prefix + "v_bias"] = packed.chunk(3)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _is_plain(linear: nn.Module) -> bool:
    """Return True if a projection is a linear layer and nothing else, so that its parameters say what it does."""
    watched = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return type(linear) is nn.Linear and not watched and "forward" not in linear.__dict__


def _position_index(window: tuple[int, ...]) -> Tensor:
    """Return the row of the bias table for each (query, key), (N, N), int64; rows count through the columns first."""
    place = torch.stack(torch.meshgrid(*(torch.arange(side) for side in window), indexing="ij"), -1).flatten(0, -2)
    offset = place[:, None] - place[None, :]
    index = torch.zeros(offset.shape[:2], dtype=torch.int64)
    for axis, side in enumerate(window):
        index = index * (2 * side - 1) + offset[..., axis] + side - 1
    return index


def _log_offsets(window: tuple[int, ...], pretrained: tuple[int, ...]) -> Tensor:
    """Return (1, 2h - 1, 2w - 1, 2) offsets between tokens, 8 at the far end of the trained window, log-spaced."""
    axes = []
    for side, known in zip(window, pretrained, strict=True):
        axes.append(8.0 * torch.arange(1 - side, side) / max(1, (known or side) - 1))
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).unsqueeze(0)
    return grid.sign() * (grid.abs() + 1).log2() / math.log2(8)
