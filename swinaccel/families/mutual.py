"""VRT's attention of windows of two frames, by itself: (windows, N, C) in and out.

Beside the official attention under another name (`qkv_self`) each frame's queries meet the other's keys, with
encodings of positions in place of a bias (`qkv_mut`, `position_bias`), and one projection takes both. To the kernels
the second is a section beside the first, of the same windows, whose mask leaves each query the other frame alone;
where there are none it is PyTorch's `scaled_dot_product_attention`, whose windows are half as long.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._nn import scaled_dot_product_attention

from ..spec.window import Section, WindowSpec
from .renamed import Renamed
from .shared.common import fan_in
from .shared.stacked import stacked_image, window_arguments


class Mutual(Renamed):
    """An attention by other names that also has `qkv_mut`, and `position_bias` for the tokens of one frame."""

    name = "mutual_attention"

    def match(self, module: Any) -> WindowSpec | None:
        spec = self.named(module)
        if spec is None or spec.window[0] != 2 or not isinstance(module.qkv_mut, nn.Module):
            return None
        channels = fan_in(module.proj) // 2
        tokens = module.relative_position_index.shape[-1] // 2
        if tuple(module.position_bias.shape) != (1, tokens, channels):
            return None
        return dataclasses.replace(spec, head_dim=channels // spec.num_heads)

    def projections(self, module: Any) -> tuple[nn.Module, ...]:
        return *super().projections(module), module.qkv_mut

    def section(self, module: Any, *args: Any, **kwargs: Any) -> Section | str:
        section = super().section(module, *args, **kwargs)
        if isinstance(section, str):
            return section
        x, mask = window_arguments(module, args, kwargs)
        section = dataclasses.replace(section, head_dim=section.head_dim // 2, output=lambda y: y)
        tokens = x.shape[1]
        if mask is None or mask.shape[1:] == (tokens, tokens):  # others are refused
            section.beside = dataclasses.replace(
                section, project=module.qkv_mut, mask=_between_frames(x, mask), table=None, index=None, sources=(),
                dropout=0.0,
            )  # fmt: skip
        return section

    def forward(self, module: Any, attend: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self._joined(module, attend, functools.partial(_by_pytorch, module), args, kwargs)

    def forward_beside(self, module: Any, attend: Any, beside: Any, *args: Any, **kwargs: Any) -> Tensor:
        def exchanged(x: Tensor, mask: Tensor | None) -> Tensor:
            image = stacked_image(x, mask, self.window(module))
            # Without a mask all windows are closed alike, as the section has it.
            out = beside(image, None if mask is None else _between_frames(x, mask))
            # A query's answer stands where its keys were.
            return out.view(len(x), 2, x.shape[1] // 2, out.shape[-1]).flip(1)

        return self._joined(module, attend, exchanged, args, kwargs)

    def _joined(
        self,
        module: Any,
        attend: Any,
        exchanged: Callable[[Tensor, Tensor | None], Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Return both attentions of a call, projected; `exchanged` has the one between frames, by those of the keys."""
        x, mask = window_arguments(module, args, kwargs)
        mixed = super().forward(module, attend, *args, **kwargs)
        aligned = exchanged(x + module.position_bias.repeat(1, 2, 1), mask)
        return module.proj(torch.cat((aligned.reshape(mixed.shape), mixed), 2))


def _between_frames(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mask (M, N, N) of windows whose queries see the other of two frames alone, one of one window without.

    Which of those they see is the mask's for the first frame, whichever they are of.
    """
    windows, tokens = 1 if mask is None else len(mask), x.shape[1] // 2
    closed = (x if mask is None else mask).new_full((windows, 2, tokens, 2, tokens), -math.inf)
    half = 0.0 if mask is None else mask[:, :tokens, :tokens]
    closed[:, 0, :, 1] = closed[:, 1, :, 0] = half
    return closed.view(windows, 2 * tokens, 2 * tokens)


def _by_pytorch(module: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention between frames, (2 * windows, N / 2, C): all frames in one call."""
    windows, tokens, _ = x.shape
    frames = module.qkv_mut(x).unflatten(1, (2, tokens // 2)).flatten(0, 1)
    q, k, v = frames.unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q = q.unflatten(0, (windows, 2)).flip(1).flatten(0, 1)
    if mask is not None:
        mask = mask[:, None, : tokens // 2, : tokens // 2].to(q.dtype)
        mask = mask.masked_fill((mask == -math.inf).all(-1, keepdim=True), math.nan)  # as softmax has it
        mask = mask.repeat(windows // mask.shape[0], 2, 1, 1).flatten(0, 1)[:, None]
    return scaled_dot_product_attention(q, k, v, mask, scale=module.scale).transpose(1, 2)
