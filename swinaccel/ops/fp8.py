"""A block whose four products are of 8 bits (e4m3): each row of what is multiplied, and each of a weight, has a scale.

The kernels that write the operands quantise them: norms, GELU, and of what the attention gives one of its own. The
weights are quantised at each call, in one launch: `Tensor.data` can be written to without a trace, and a copy that was
kept would be stale then, in a replayed CUDA graph as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.triton import block as kernels
from ..backends.triton import linear8, quantise
from ..backends.triton.block import Affine
from ..backends.triton.launches import BoundLaunch
from .block import Layer
from .linear import linear

EIGHT = torch.float8_e4m3fn
MULTIPLE = 16  # of which both sides of a product of 8 bits must be
WIDE = torch.bfloat16  # what products come out in: of rows with scales they come out in no other

fast_accumulation = True  # within the tensor cores for longer, whose sums hold fewer bits than fp32, more than e4m3

Operand = tuple[Tensor, Tensor]  # numbers of 8 bits (rows, K), and scales (rows, 1)


class BoundBlock:
    """A block in products of 8 bits, bound to its launches, in inference.

    Args:
        shape, dtype, device: of the block's input (..., C); the device with its index, as tensors have it.
        product: what dtype the attention takes.
        sizes: rows of the weight of q, k and v, width of the attention, and hidden channels.
        eps: of both norms.
        total: the dtype of the sums.
    Raises:
        LaunchError: a kernel cannot be planned.
    """

    def __init__(
        self,
        shape: Sequence[int],
        device: torch.device,
        product: torch.dtype,
        total: torch.dtype,
        sizes: tuple[int, int, int],
        eps: tuple[float, float],
        post_norm: bool,
    ) -> None:
        channels, rows = shape[-1], math.prod(shape[:-1])
        qkv, width, hidden = sizes
        self._product, self._total, self._rows, self._post_norm = product, total, rows, post_norm
        self._shapes = (qkv, channels), (channels, width), (hidden, channels), (channels, hidden)

        self._in_groups = _launches_in_groups(device, rows, channels, hidden, not post_norm)
        self._projects = PROJECTS

        def bound(mode: int, numbers: int, eps: float = 0.0) -> BoundLaunch:
            return BoundLaunch(quantise.rows_launch(mode, device, rows, numbers, eps))

        self._weights = BoundLaunch(quantise.weights_launch(device, channels, *sizes, PROJECTS))
        self._attended, self._active = bound(quantise.PLAIN, width), bound(quantise.GELU, hidden)
        if post_norm:
            self._first = bound(quantise.PLAIN, channels)
            self._second = bound(quantise.NORM_ADD, channels, eps[0])
            self._last = BoundLaunch(kernels.norm_launch(kernels.NORM_ADD, device, rows, channels, eps[1]))
        else:
            self._first = bound(quantise.NORM, channels, eps[0])
            self._second = bound(quantise.ADD_NORM, channels, eps[1])

    def run(
        self, x: Tensor, attend: Callable[[Tensor], Tensor], norms: tuple[Affine, Affine], layers: Sequence[Layer]
    ) -> Tensor:
        """Return what the block returns.

        Args:
            attend: (..., 3 * width), of q, k and v, to (..., width).
            layers: weight and bias of the products: of q, k and v, of the projection, and of the MLP.
        """
        before, after = norms
        channels, width, hidden = x.shape[-1], self._shapes[1][1], self._shapes[2][0]
        qkv, proj, fc1, fc2 = self._operands(layers)
        first = None if self._post_norm else before
        y = self._row(self._first, x, channels, affine=first)
        image = _product(y, qkv, layers[0][1]).view(*x.shape[:-1], -1)
        attended = attend(image.to(self._product)).contiguous()
        if self._projects:
            branch = _product(self._row(self._attended, attended, width), proj, layers[1][1])
        else:
            weight, bias = layers[1]
            branch = linear(
                attended, weight.to(attended.dtype), None if bias is None else bias.to(attended.dtype)
            ).view(-1, channels)
        total = x.new_empty(x.shape, dtype=self._total)
        y = self._row(self._second, x, channels, branch, total, before if self._post_norm else after)
        if self._in_groups is not None:
            added = self._mlp_in_groups(y, total, fc1, fc2, layers[2][1], layers[3][1])
            if not self._post_norm:
                return total
        else:
            y = self._row(self._active, _product(y, fc1, layers[2][1]), hidden)
            added = _product(y, fc2, layers[3][1])
            if not self._post_norm:
                return total.add_(added.view(x.shape))
        out = torch.empty_like(total)
        self._last(total, out, None, None, added, None, *after[:2], None)
        return out

    def _mlp_in_groups(self, y: Operand, total: Tensor, fc1: Operand, fc2: Operand, bias1: Any, bias2: Any) -> Tensor:
        up, down = self._in_groups
        hidden, channels = self._shapes[2]
        active = total.new_empty((self._rows, hidden), dtype=EIGHT)
        scale = total.new_empty((hidden // 128, self._rows), dtype=torch.float32)
        up(active, scale, *y, fc1[0].t(), fc1[1], bias1, None)
        out = total.new_empty((self._rows, channels), dtype=self._product) if self._post_norm else total
        down(out, None, active, scale, fc2[0].t(), fc2[1], bias2, None if self._post_norm else total)
        return out

    def _row(
        self,
        launch: BoundLaunch,
        x: Tensor,
        numbers: int,
        branch: Tensor | None = None,
        total: Tensor | None = None,
        affine: Affine | None = None,
    ) -> Operand:
        out, scale = x.new_empty((self._rows, numbers), dtype=EIGHT), x.new_empty((self._rows, 1), dtype=torch.float32)
        weight, bias = (None, None) if affine is None else affine[:2]
        launch(out, scale, x, branch, total, weight, bias)
        return out, scale

    def _operands(self, layers: Sequence[Layer]) -> list[Operand]:
        """Return the weights of now in 8 bits, transposed, and their scales (1, N)."""
        weights = [weight for weight, _ in layers]
        shapes = list(self._shapes)
        if not self._projects:
            shapes[1] = (0, 0)
            weights[1] = None
        sizes, rows = [n * k for n, k in shapes], [n for n, _ in shapes]
        numbers = weights[0].new_empty(sum(sizes), dtype=EIGHT)
        scales = weights[0].new_empty(sum(rows), dtype=torch.float32)
        self._weights(numbers, scales, *weights)
        parts = zip(numbers.split(sizes), scales.split(rows), shapes, strict=True)
        return [(part.view(shape).t(), scale.view(1, -1)) for part, scale, shape in parts]


PROJECTS = True


def _launches_in_groups(device: torch.device, rows: int, channels: int, hidden: int, adds: bool) -> Any:
    up = linear8.gelu_launch(device, rows, channels, hidden)
    down = linear8.sum_launch(device, rows, hidden, channels, adds)
    return None if up is None or down is None else (up, down)


def _product(x: Operand, weight: Operand, bias: Tensor | None) -> Tensor:
    """Return x weightᵀ + bias, (rows, N)."""
    (left, left_scale), (right, right_scale) = x, weight
    bias = None if bias is None else bias.to(WIDE)
    scales = {"scale_a": left_scale, "scale_b": right_scale}
    return torch._scaled_mm(left, right, **scales, bias=bias, out_dtype=WIDE, use_fast_accum=fast_accumulation)
