"""Attend with a bias that is a product of factors: learned ones by decomposition, ALiBi and distances in space exactly.

    python examples/flash_bias.py

Runs anywhere; on a GPU the same calls run one kernel, which never holds a bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from swinaccel.functional import alibi_factors, factored_bias_attention, factorize_bias, squared_distance_factors

HEADS, TOKENS, HEAD_DIM = 4, 256, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, TOKENS, HEAD_DIM, device=DEVICE) for _ in range(3))

    # A smooth bias over a 16x16 window, such as a trained model has: few singular values carry it.
    side = torch.arange(16.0, device=DEVICE)
    place = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).view(TOKENS, 2)
    width = torch.tensor([4.0, 6.0, 8.0, 16.0], device=DEVICE).view(HEADS, 1, 1)
    bias = 4 * torch.exp(-torch.cdist(place, place).square() / (2 * width**2))
    for rule in ({"energy": 0.995}, {"tolerance": 1e-2}, {}):
        factors = factorize_bias(bias, **rule)
        found = factored_bias_attention(q, k, v, factors.q_factor, factors.k_factor)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        print(
            f"{rule or 'as exact as half precision'!s:28} rank {factors.rank:2}, bias off by {factors.error:.0e}, "
            f"output by {(found - expected).abs().max().item():.0e}"
        )

    # ALiBi: rank 2, exact, for causal attention.
    factors = alibi_factors(HEADS, TOKENS, device=DEVICE)
    found = factored_bias_attention(q, k, v, *factors, causal=True)
    later = torch.ones(TOKENS, TOKENS, device=DEVICE).triu(1).bool()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=(factors[0] @ factors[1].mT).masked_fill(later, -1e9))
    print(f"ALiBi: rank 2, output off by {(found - expected).abs().max().item():.0e}")

    # Distances between points: rank 5 in space, exact, with a gradient for the points.
    points = torch.randn(TOKENS, 3, device=DEVICE, requires_grad=True)
    found = factored_bias_attention(q, k, v, *squared_distance_factors(points, -0.5))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=-0.5 * torch.cdist(points, points).square()[None])
    found.square().sum().backward()
    print(
        f"squared distances: rank 5, output off by {(found - expected).abs().max().item():.0e}, "
        f"gradient of the points {tuple(points.grad.shape)}"
    )


if __name__ == "__main__":
    main()
