"""Compute SwinV2's attention within windows: cosines of q and k times a learned scale, with its gradient.

    python examples/cosine_window_attention.py

Runs anywhere; on a GPU the same calls run the window kernels, forward and backward, and hold no scores.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from swinaccel.functional import cosine_window_attention

WINDOWS, HEADS, TOKENS, HEAD_DIM = 8, 3, 144, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def step_by_step(q: Tensor, k: Tensor, v: Tensor, logit_scale: Tensor, bias: Tensor) -> Tensor:
    cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return (cosine * logit_scale.clamp(max=math.log(100.0)).exp() + bias).softmax(-1) @ v


def main() -> None:
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, requires_grad=True)

    inputs = {name: leaf(WINDOWS, HEADS, TOKENS, HEAD_DIM) for name in ("q", "k", "v")}
    inputs["logit_scale"] = torch.tensor([1.0, 2.3, 9.0], device=DEVICE).view(HEADS, 1, 1).requires_grad_()
    inputs["bias"] = leaf(HEADS, TOKENS, TOKENS)

    found, expected = cosine_window_attention(**inputs), step_by_step(**inputs)
    print(f"outputs differ by {(found - expected).abs().max().item():.0e}")
    grad = torch.randn_like(found)
    ours = torch.autograd.grad(found, tuple(inputs.values()), grad)
    theirs = torch.autograd.grad(expected, tuple(inputs.values()), grad)
    for name, one, other in zip(inputs, ours, theirs, strict=True):
        difference = ((one - other).abs().max() / other.abs().max()).item()
        print(f"gradients of {name:11} differ by {difference:.0e} of the largest")
        assert difference < 2e-2
    learned = ours[3].flatten().tolist()
    print(f"the third head's scale is clamped at 100, and takes no gradient: {learned[2] == 0}")

    # A vector of zeros has the cosine 0 with every other, and half precision is enough for the rest.
    halves = {name: value.detach().half() for name, value in inputs.items()}
    halves["q"][:, :, 0] = 0
    print(
        f"in fp16, with zeros among the queries, all finite: {bool(cosine_window_attention(**halves).isfinite().all())}"
    )


if __name__ == "__main__":
    main()
