"""Attend within windows that a model has cut already: with a bias, with the mask of shifted windows, with dropout.

    python examples/window_attention.py

Runs anywhere; on a GPU the same calls run the window kernels, forward and backward, and hold no scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swinaccel.functional import window_attention

IMAGES, WINDOWS, HEADS = 2, 4, 3  # windows of an image
SIDE, HEAD_DIM = 14, 30  # windows of 14x14 tokens, and no power of two anywhere
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def step_by_step(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Attend as models write it: every score of every window in memory, several times."""
    scores = q @ k.mT * HEAD_DIM**-0.5 + bias
    scores = scores.unflatten(0, (-1, mask.shape[0])) + mask[:, None]
    return scores.flatten(0, 1).softmax(-1) @ v


def shift_mask() -> Tensor:
    """Return the mask (windows, N, N) of 2x2 windows shifted by half of one: -100 between tokens of different sides."""
    side = torch.arange(SIDE, device=DEVICE) >= SIDE // 2
    masks = []
    for row in (False, True):
        for col in (False, True):
            region = 2 * (side & row)[:, None].int() + (side & col)[None, :].int()
            masks.append(-100.0 * (region.view(-1, 1) != region.view(1, -1)))
    return torch.stack(masks)


def main() -> None:
    torch.manual_seed(0)
    tokens, channels = SIDE * SIDE, HEADS * HEAD_DIM
    bias = torch.randn(HEADS, tokens, tokens, device=DEVICE, requires_grad=True)
    mask = shift_mask()
    # One projection gives q, k and v; its views go in as they are, and nothing is copied.
    qkv = torch.randn(IMAGES * WINDOWS, tokens, 3 * channels, device=DEVICE, requires_grad=True)
    q, k, v = qkv.unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)

    found = window_attention(q, k, v, bias, mask)
    expected = step_by_step(q, k, v, bias, mask)
    print(f"{SIDE}x{SIDE} windows, head_dim {HEAD_DIM}: outputs differ by {(found - expected).abs().max().item():.0e}")

    grad = torch.randn_like(found)
    for name, ours, theirs in zip(
        ("q, k and v", "the bias"),
        torch.autograd.grad(found, (qkv, bias), grad),
        torch.autograd.grad(expected, (qkv, bias), grad),
        strict=True,
    ):
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        print(f"gradients of {name} differ by {difference:.0e} of the largest")
        assert difference < 1e-2

    # Attention dropout follows PyTorch's generator.
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(window_attention(q, k, v, bias, mask, dropout=0.1))
    print(f"dropout: equal for one seed {torch.equal(runs[0], runs[1])}, for another {torch.equal(runs[0], runs[2])}")


if __name__ == "__main__":
    main()
