"""Attend over a video: every token sees its own frame and the frames just before, in time linear in the length.

    python examples/block_sliding_window.py

Runs anywhere; on a GPU the same calls run one kernel.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from swinaccel.functional import block_sliding_window_attention

FRAME, FRAMES_SEEN = 49, 4  # tokens of a 7x7 frame; how far back a frame looks, itself included
HEADS, HEAD_DIM = 4, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with a dense mask: time and memory grow with the square of the length."""
    frame = torch.arange(q.shape[2], device=q.device) // FRAME
    ago = frame[:, None] - frame[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(ago >= 0) & (ago < FRAMES_SEEN))


def milliseconds(attend, *inputs: Tensor) -> float:
    attend(*inputs)
    start = time.perf_counter()
    attend(*inputs)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    torch.manual_seed(0)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sliding_window_attention(q, k, v, FRAME, FRAMES_SEEN)

    for frames in (16, 32, 64):
        q, k, v = (torch.randn(1, HEADS, frames * FRAME, HEAD_DIM, device=DEVICE) for _ in range(3))
        difference = (attend(q, k, v) - by_mask(q, k, v)).abs().max().item()
        assert difference < 1e-2
        print(
            f"{frames} frames, {frames * FRAME} tokens: {milliseconds(attend, q, k, v):.1f} ms, "
            f"{milliseconds(by_mask, q, k, v):.1f} ms with a dense mask, outputs differ by {difference:.0e}"
        )

    # It trains, and a frame that is being generated may be cut anywhere.
    q, k, v = (torch.randn(1, HEADS, 10 * FRAME + 5, HEAD_DIM, device=DEVICE, requires_grad=True) for _ in range(3))
    block_sliding_window_attention(q, k, v, FRAME, FRAMES_SEEN)[:, :, -5:].sum().backward()
    seen = k.grad.abs().sum((0, 1, 3)) > 0
    print(
        f"the last 5 tokens look at {int(seen.sum())} of {len(seen)} tokens, from token {int(seen.int().argmax())} on"
    )


if __name__ == "__main__":
    main()
