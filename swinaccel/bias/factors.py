"""Factors of an attention bias by decomposition (FlashBias, arXiv:2505.12044)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    """Return factors of a bias, of the rank asked for or of the smallest that is good enough; they have no gradients.

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
    options = {"rank": rank, "energy": energy, "tolerance": tolerance}
    given = [name for name, value in options.items() if value is not None]
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
            q_factor, k_factor = factorize(bias, rank)
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
        if isinstance(energy, bool) or not isinstance(energy, (int, float)):
            raise TypeError(f"energy must be None or a number in (0, 1]; got {energy!r}")
        if not 0 < energy <= 1:
            raise ValueError(f"energy must lie in (0, 1], a fraction such as 0.995; got {energy!r}")
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


def factorize(bias: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (heads, N, rank) with bias ≈ q_factor · k_factorᵀ, of least squared error, computed in fp32.

    Args:
        bias: (heads, N, N).
        rank: at most N.
    """
    bias = bias.float()
    if rank * 4 >= bias.shape[-1]:
        left, values, right = torch.linalg.svd(bias, full_matrices=False)
        right = right.mT
    else:  # subspace iteration: the same leading factors at a fraction of the cost
        seed = torch.Generator().manual_seed(0)  # torch.manual_seed would seed every GPU as well
        start = torch.randn(bias.shape[-1], rank + 16, generator=seed, device="cpu", dtype=torch.float32).to(bias)
        basis = torch.linalg.qr(bias @ start).Q
        for _ in range(6):
            basis = torch.linalg.qr(bias @ torch.linalg.qr(bias.mT @ basis).Q).Q
        left, values, right = torch.linalg.svd(basis.mT @ bias, full_matrices=False)
        left, right = basis @ left, right.mT
    root = values[..., :rank].sqrt().unsqueeze(-2)
    return left[..., :rank] * root, right[..., :rank] * root
