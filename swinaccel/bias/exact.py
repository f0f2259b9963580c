"""Exact factors of biases that have a closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec.arguments import check_positive


def alibi_factors(
    num_heads: int,
    num_tokens: int,
    slopes: Sequence[float] | Tensor | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return exact factors, of rank 2, of the ALiBi bias -slope · (query - key), for causal attention.

    Gradients flow to slopes that are a tensor.

    Args:
        num_heads, num_tokens: heads and N, 1 or more.
        slopes: one per head; by default those of the paper, 2^(-8/heads) and its powers, with its rule where the
            number of heads is no power of two.
        device: where the factors lie; that of slopes, or PyTorch's default one.
        dtype: fp32 by default, whatever q's is: positions beyond 2,048 are not numbers of half precision.
    Returns:
        q_factor and k_factor, (heads, N, 2).
    Raises:
        TypeError, ValueError: for numbers that are no positive integers, or slopes that are not one per head.
    Source: Press et al. 2022, arXiv:2108.12409.
    """
    for name, value in (("num_heads", num_heads), ("num_tokens", num_tokens)):
        check_positive(name, value)
    slope = torch.as_tensor(alibi_slopes(num_heads) if slopes is None else slopes, device=device, dtype=dtype)
    if slope.shape != (num_heads,):
        raise ValueError(f"slopes must hold one number per head, {num_heads}; got shape {tuple(slope.shape)}")
    # Counted from the middle, positions are half as large and so are the roundings of what is summed.
    place = torch.arange(num_tokens, device=slope.device, dtype=dtype) - num_tokens // 2
    ones = torch.ones(num_heads, num_tokens, device=slope.device, dtype=dtype)
    slope = slope[:, None] * ones
    return torch.stack((slope * -place, slope), -1), torch.stack((ones, place * ones), -1)


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the slopes of arXiv:2108.12409: geometric for powers of two, else filled up from the next one's."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    return slopes + [2.0 ** (-4.0 * (2 * head + 1) / power) for head in range(num_heads - power)]


def squared_distance_factors(
    positions: Tensor, weight: Tensor | float = -1.0, key_positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return exact factors of weight · |x_query - x_key|², of rank 2 more than the dimensions: 5 in space.

    Gradients flow to positions, key_positions and weight.

    Args:
        positions: (N, dims), or (batch, N, dims) for positions of each batch.
        weight: a number, or (heads,).
        key_positions: where keys lie, if not where the queries do; like `positions`.
    Returns:
        q_factor and k_factor, (heads, N, dims + 2), with a batch axis in front where positions have one.
    Raises:
        TypeError, ValueError: for positions of another kind or shape; the message names the argument.
    Source: |x - y|² = |x|² - 2 x·y + |y|²; FlashBias, arXiv:2505.12044, section 3.
    """
    others = positions if key_positions is None else key_positions
    for name, value in (("positions", positions), ("key_positions", others)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating-point tensor; got {kind}")
        if value.dim() not in (2, 3) or value.shape[-1] != positions.shape[-1]:
            raise ValueError(
                f"{name} must have shape (N, dims) or (batch, N, dims), dims as positions'; got {tuple(value.shape)}"
            )
    weights = torch.as_tensor(weight, dtype=positions.dtype, device=positions.device).reshape(-1, 1, 1)
    # Distances do not change with the origin, but what cancels in them does.
    origin = positions.detach().mean(-2, keepdim=True)
    x, y = (positions - origin).unsqueeze(-3), (others - origin).unsqueeze(-3)
    ones_x, ones_y = torch.ones_like(x[..., :1]), torch.ones_like(y[..., :1])
    q_factor = torch.cat((x.square().sum(-1, keepdim=True), ones_x, -2 * x), -1) * weights
    k_factor = torch.cat((ones_y, y.square().sum(-1, keepdim=True), y), -1)
    return q_factor, k_factor.expand(*k_factor.shape[:-3], weights.shape[0], -1, -1)
