"""Factors of an attention bias: by decomposition (FlashBias, arXiv:2505.12044), or exact where it has a closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import bias as window_bias


class BiasFactors(NamedTuple):
    """A bias as a product.

    Attributes:
        q_factor: (heads, N, R), for the queries.
        k_factor: (heads, K, R), for the keys; bias ≈ q_factor k_factorᵀ.
        rank: R.
        error: the largest absolute difference to the bias over all heads and entries, in the bias's own units.
    """

    q_factor: Tensor
    k_factor: Tensor
    rank: int
    error: float


def factorize_bias(
    bias: Tensor, rank: int | None = None, energy: float | None = None, tolerance: float | None = None
) -> BiasFactors:
    """Factors of a bias, of the rank asked for or of the smallest that is good enough; they have no gradients.

    Args:
        bias: (heads, N, K), finite; natural units, as added to the scores.
        rank: the rank to use, from 1 to min(N, K): the best in the sense of least squares, head by head.
        energy: in place of a rank, the fraction in (0, 1] of every head's squared singular values that must be kept
            (0.995 is what FlashBias uses).
        tolerance: in place of either, the largest `BiasFactors.error` allowed. Without any of the three, it is what
            rounding the bias to half precision costs: 2⁻¹¹ of its largest absolute value.
    Returns:
        BiasFactors in fp32, computed in fp32 (fp64 stays fp64).
    Raises:
        TypeError, ValueError: for arguments of another kind, shape or range, or more than one of the last three.
    """
    _check_bias(bias)
    least, largest = 1, min(bias.shape[1:])
    given = [
        name for name, value in (("rank", rank), ("energy", energy), ("tolerance", tolerance)) if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"rank, energy and tolerance exclude each other; got {' and '.join(given)}")
    bias = bias.detach()
    bias = bias if bias.dtype == torch.float64 else bias.float()
    if rank is not None:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank must be an integer; got {rank!r}")
        if not 1 <= rank <= largest:
            raise ValueError(f"rank must lie in 1 .. {largest} for a bias of shape {tuple(bias.shape)}; got {rank}")
        if bias.dtype == torch.float32:
            q_factor, k_factor = window_bias.factorize(bias, rank)
            return BiasFactors(q_factor.contiguous(), k_factor.contiguous(), rank, _error(bias, q_factor, k_factor))

    left, values, right = torch.linalg.svd(bias, full_matrices=False)
    root = values.sqrt().unsqueeze(-2)
    left, right = left * root, right.mT * root

    def of(rank: int) -> BiasFactors:
        q_factor, k_factor = left[..., :rank].contiguous(), right[..., :rank].contiguous()
        return BiasFactors(q_factor, k_factor, rank, _error(bias, q_factor, k_factor))

    if rank is not None:
        return of(rank)
    if energy is not None:
        _check_fraction("energy", energy)
        kept = values.double().square().cumsum(-1)
        enough = kept >= energy * (1 - 1e-12) * kept[..., -1:]
        return of(int(enough.int().argmax(-1).max()) + 1)
    if tolerance is None:
        tolerance = 2.0**-11 * bias.abs().max().item()
    elif isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance must be None or a number; got {tolerance!r}")
    elif not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more; got {tolerance!r}")
    # Errors fall with the rank but for rounding, so a bisection finds the smallest; the full rank is the last resort.
    while least < largest:
        middle = (least + largest) // 2
        if of(middle).error <= tolerance:
            largest = middle
        else:
            least = middle + 1
    return of(largest)


def _error(bias: Tensor, q_factor: Tensor, k_factor: Tensor) -> float:
    return (bias - q_factor @ k_factor.mT).abs().max().item()


def _check_bias(bias: Tensor) -> None:
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor of shape (heads, N, K); got {type(bias).__name__}")
    if not bias.is_floating_point():
        raise TypeError(f"bias must be floating point; got {bias.dtype}")
    if bias.dim() != 3 or not bias.numel():
        raise ValueError(f"bias must have shape (heads, N, K), none of them 0; got {tuple(bias.shape)}")
    if not bool(torch.isfinite(bias).all()):
        raise ValueError("bias must be finite to have factors; keep -inf for the mask")


def _check_fraction(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be None or a number in (0, 1]; got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], a fraction such as 0.995; got {value!r}")


def alibi_factors(
    num_heads: int,
    num_tokens: int,
    slopes: Sequence[float] | Tensor | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Exact factors, of rank 2, of the ALiBi bias -slope · (query - key), for causal attention.

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
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer; got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be 1 or more; got {value}")
    slope = torch.as_tensor(alibi_slopes(num_heads) if slopes is None else slopes, device=device, dtype=dtype)
    if slope.shape != (num_heads,):
        raise ValueError(f"slopes must hold one number per head, {num_heads}; got shape {tuple(slope.shape)}")
    # Counted from the middle, positions are half as large and so are the roundings of what is summed.
    place = torch.arange(num_tokens, device=slope.device, dtype=dtype) - num_tokens // 2
    ones = torch.ones(num_heads, num_tokens, device=slope.device, dtype=dtype)
    slope = slope[:, None] * ones
    return torch.stack((slope * -place, slope), -1), torch.stack((ones, place * ones), -1)


def alibi_slopes(num_heads: int) -> list[float]:
    """The slopes of arXiv:2108.12409: geometric for a power of two, else filled up from the next one's odd places."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    return slopes + [2.0 ** (-4.0 * (2 * head + 1) / power) for head in range(num_heads - power)]


def squared_distance_factors(
    positions: Tensor, weight: Tensor | float = -1.0, key_positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Exact factors of weight · |x_query - x_key|², of rank 2 more than the dimensions: 5 in space.

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
