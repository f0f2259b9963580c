"""Factors of biases, and those of ALiBi and of distances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from swinaccel import functional

pytestmark = pytest.mark.usefixtures("strict_kernels")


def dense(factors: Any) -> Tensor:
    return factors[0].double() @ factors[1].double().mT


def low_rank(heads: int = 3, rows: int = 20, cols: int = 24, rank: int = 4, noise: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(heads, size, rank, generator=generator) for size in (rows, cols))
    return left @ right.mT + noise * torch.randn(heads, rows, cols, generator=generator)


def test_factors_of_a_given_rank():
    bias = low_rank(noise=0.1)
    for rank in (1, 4, 20):
        found = functional.factorize_bias(bias, rank=rank)
        assert found.rank == rank
        assert found.q_factor.shape == (3, 20, rank)
        assert found.k_factor.shape == (3, 24, rank)
        assert found.error == pytest.approx((bias - dense(found)).abs().max().item(), rel=1e-2, abs=1e-5)
        best = torch.linalg.svdvals(bias.double())[:, rank:].square().sum(-1)
        assert torch.allclose((bias - dense(found)).square().sum((-2, -1)), best, rtol=1e-3, atol=1e-8)


def test_factors_by_energy():
    bias = low_rank(noise=0.1)
    kept = torch.linalg.svdvals(bias.double()).square().cumsum(-1)
    kept = (kept / kept[:, -1:]).amin(0)
    for energy in (0.5, 0.995, 0.9999, 1.0):
        found = functional.factorize_bias(bias, energy=energy)
        assert kept[found.rank - 1] >= energy - 1e-6
        assert found.rank == 1 or kept[found.rank - 2] < energy + 1e-6


def test_factors_by_tolerance():
    bias = low_rank(noise=0.01)
    ranks = []
    for tolerance in (1.0, 0.05, 1e-3, 0.0):
        found = functional.factorize_bias(bias, tolerance=tolerance)
        assert found.error <= max(tolerance, 1e-5)
        assert found.rank == 1 or functional.factorize_bias(bias, rank=found.rank - 1).error > tolerance
        ranks.append(found.rank)
    assert ranks == sorted(ranks)
    exact = functional.factorize_bias(low_rank())
    assert (exact.rank, exact.error <= 2.0**-11 * low_rank().abs().max()) == (4, True)
    assert functional.factorize_bias(low_rank().double(), tolerance=1e-12).q_factor.dtype == torch.float64


@pytest.mark.parametrize(
    ("bias", "options", "kind", "words"),
    [
        (torch.zeros(3, 3), {}, ValueError, "bias must have shape (heads, N, K), none of them 0; got (3, 3)"),
        (torch.full((1, 2, 2), float("-inf")), {}, ValueError, "bias must be finite"),
        (torch.zeros(1, 2, 2).int(), {}, TypeError, "bias must be floating point; got torch.int32"),
        (torch.ones(1, 2, 3), {"rank": 3}, ValueError, "rank must lie in 1 .. 2"),
        (torch.ones(1, 2, 3), {"rank": 1.0}, TypeError, "rank must be an integer; got 1.0"),
        (torch.ones(1, 2, 3), {"energy": 1.5}, ValueError, "energy must lie in (0, 1]"),
        (torch.ones(1, 2, 3), {"tolerance": -1}, ValueError, "tolerance must be 0 or more; got -1"),
        (torch.ones(1, 2, 3), {"rank": 1, "energy": 0.9}, ValueError, "exclude each other; got rank and energy"),
    ],
)
def test_bad_biases(bias, options, kind, words):
    with pytest.raises(kind) as caught:
        functional.factorize_bias(bias, **options)
    assert words in str(caught.value)


@pytest.mark.parametrize("heads", [1, 3, 8, 12])
def test_alibi_is_exact(heads):
    tokens = 50
    q_factor, k_factor = functional.alibi_factors(heads, tokens)
    slopes = -q_factor.double().diff(dim=1)[:, 0, 0]
    place = torch.arange(tokens)
    expected = -slopes[:, None, None] * (place[:, None] - place[None, :])
    assert q_factor.shape == k_factor.shape == (heads, tokens, 2)
    assert torch.allclose(dense((q_factor, k_factor)), expected, atol=1e-5)
    # The paper's own numbers, and its rule for other counts: every other slope of twice as many heads.
    if heads == 8:
        assert torch.allclose(slopes, torch.tensor([2.0**-n for n in range(1, 9)]).double())
    if heads == 12:
        eight, sixteen = (2.0 ** (-8 / n * torch.arange(1, n + 1)).double() for n in (8, 16))
        assert torch.allclose(slopes, torch.cat((eight, sixteen[::2][:4])), atol=1e-6)


def test_alibi_takes_slopes():
    q_factor, _ = functional.alibi_factors(2, 4, slopes=[1.0, 0.25])
    assert q_factor[:, 0, 1].tolist() == [1.0, 0.25]
    with pytest.raises(ValueError, match="slopes must hold one number per head, 3; got shape"):
        functional.alibi_factors(3, 4, slopes=[1.0, 0.25])
    with pytest.raises(ValueError, match="num_tokens must be 1 or more; got 0"):
        functional.alibi_factors(3, 0)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_squared_distances_are_exact(dims):
    x, y = (100 + torch.randn(2, 20, dims, dtype=torch.float64) for _ in range(2))
    weight = torch.tensor([-1.0, -0.5, 0.25], dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    factors = functional.squared_distance_factors(x, weight, y)
    assert factors[0].shape == factors[1].shape == (2, 3, 20, dims + 2)
    expected = weight[:, None, None] * torch.cdist(x, y).square().unsqueeze(1)
    found = factors[0] @ factors[1].mT
    assert torch.allclose(found, expected, atol=1e-9)
    grad = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, weight), grad), torch.autograd.grad(expected, (x, weight), grad), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-7)
    alone = functional.squared_distance_factors(x[0])
    assert torch.allclose(alone[0] @ alone[1].mT, -torch.cdist(x[:1], x[:1]).square(), atol=1e-9)


def test_squared_distances_of_bad_positions():
    with pytest.raises(TypeError, match=r"positions must be a floating-point tensor; got torch\.int64"):
        functional.squared_distance_factors(torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"key_positions must have shape .* got \(3, 3\)"):
        functional.squared_distance_factors(torch.zeros(3, 2), key_positions=torch.zeros(3, 3))
