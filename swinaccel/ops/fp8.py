"""A block with products of 8 bits (e4m3): q, k and v, and the MLP's two. Each row of an operand has a scale.

The kernels that write the operands quantise them: norms, and the first product of the MLP with its GELU, whose rows'
scales are known before from what they cannot exceed (`kernels.quantise`). The projection stays in 16 bits: to quantise
what the attention gives takes longer than its product in 8 bits saves. The weights are quantised at each call, in one
launch: `Tensor.data` can be written to without a trace, and a copy that was kept would be stale then, in a replayed
CUDA graph as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backends.triton import block as kernels
from ..backends.triton import linear8, quantise
from ..backends.triton.block import Affine
from ..backends.triton.launches import BoundLaunch
from .block import Layer
from .linear import linear

EIGHT = torch.float8_e4m3fn
MULTIPLE = 16  # of which both sides of a product of 8 bits must be: where a row can begin, for descriptors

Operand = tuple[Tensor, Tensor]  # numbers of 8 bits (rows, K), and scales (rows,)


class BoundBlock:
    """A block in products of 8 bits, bound to its launches, in inference.

    Args:
        shape, dtype, device: of the block's input (..., C); the device with its index, as tensors have it.
        product: what dtype the attention takes.
        sizes: rows of the weight of q, k and v, and hidden channels.
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
        sizes: tuple[int, int],
        eps: tuple[float, float],
        post_norm: bool,
    ) -> None:
        channels, rows, (qkv, hidden) = shape[-1], math.prod(shape[:-1]), sizes
        self._product, self._total, self._rows, self._post_norm = product, total, rows, post_norm
        self._shapes = (qkv, channels), (hidden, channels), (channels, hidden)
        first, second = (quantise.PLAIN, quantise.NORM_ADD) if post_norm else (quantise.NORM, quantise.ADD_NORM)
        own = device, rows, channels
        self._weights = BoundLaunch(quantise.weights_launch(device, channels, *sizes))
        self._first = BoundLaunch(quantise.rows_launch(first, *own, hidden, 0.0 if post_norm else eps[0], limits=True))
        self._second = BoundLaunch(quantise.rows_launch(second, *own, hidden, eps[0 if post_norm else 1]))
        self._qkv = linear8.linear8_launch(*own, qkv)
        self._up = linear8.linear8_launch(*own, hidden, gelu=True)
        self._down = linear8.linear8_launch(device, rows, hidden, channels, adds=not post_norm)
        if post_norm:
            self._last = BoundLaunch(kernels.norm_launch(kernels.NORM_ADD, device, rows, channels, eps[1]))

    def run(
        self, x: Tensor, attend: Callable[[Tensor], Tensor], norms: tuple[Affine, Affine], layers: Sequence[Layer]
    ) -> Tensor:
        """Return what the block returns.

        Args:
            attend: (..., 3 * width), of q, k and v, to (..., width).
            layers: weight and bias of the products: of q, k and v, of the projection, and of the MLP.
        """
        (before, after), (qkv_layer, projection, (_, bias1), (_, bias2)) = norms, layers
        qkv, fc1, fc2, hidden_norm = self._operands([qkv_layer[0], layers[2][0], layers[3][0]])
        limits, hidden_scale = _fp32(x, 2), _fp32(x, self._rows)
        affine = (None, None) if self._post_norm else before[:2]
        y = self._room(x)
        self._first(*y, x, None, None, *affine, limits, hidden_norm, bias1, None)
        image = x.new_empty((*x.shape[:-1], len(qkv[0])), dtype=self._product)
        self._qkv(image, None, *y, *qkv, qkv_layer[1], None)
        attended = attend(image)
        weight, bias = projection
        branch = linear(attended, weight.to(attended.dtype), None if bias is None else bias.to(attended.dtype))
        total = x.new_empty(x.shape, dtype=self._total)
        affine = (before if self._post_norm else after)[:2]
        y = self._room(x)
        self._second(*y, x, branch.contiguous(), total, *affine, limits, None, None, hidden_scale)
        active = x.new_empty((self._rows, len(fc1[0])), dtype=EIGHT)
        self._up(active, hidden_scale, *y, *fc1, bias1, None)
        if not self._post_norm:
            self._down(total, None, active, hidden_scale, *fc2, bias2, total)
            return total
        added, out = torch.empty_like(total, dtype=self._product), torch.empty_like(total)
        self._down(added, None, active, hidden_scale, *fc2, bias2, None)
        self._last(total, out, None, None, added, None, *after[:2], None)
        return out

    def _room(self, x: Tensor) -> Operand:
        """Return room for the rows of x in 8 bits."""
        return x.new_empty((self._rows, x.shape[-1]), dtype=EIGHT), _fp32(x, self._rows)

    def _operands(self, weights: Sequence[Tensor]) -> tuple[Operand, Operand, Operand, Tensor]:
        """Return the weights of now in 8 bits, and the norms of the rows of the second."""
        sizes, rows = [n * k for n, k in self._shapes], [n for n, _ in self._shapes]
        numbers = weights[0].new_empty(sum(sizes), dtype=EIGHT)
        scales, norms = _fp32(numbers, sum(rows)), _fp32(numbers, rows[1])
        self._weights(numbers, scales, norms, *weights)
        parts = (part.view(shape) for part, shape in zip(numbers.split(sizes), self._shapes, strict=True))
        qkv, fc1, fc2 = zip(parts, scales.split(rows), strict=True)
        return qkv, fc1, fc2, norms


def _fp32(like: Tensor, numbers: int) -> Tensor:
    return like.new_empty(numbers, dtype=torch.float32)
