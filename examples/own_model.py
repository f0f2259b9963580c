"""Build a Swin of one's own from swinaccel's modules: nothing is left to accelerate, and official weights fit.

    python examples/own_model.py

Runs anywhere; on a GPU the attention is one kernel from the projection to the projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from swinaccel.nn import ShiftedWindowAttention, ShiftedWindowAttentionV2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    """Attention and an MLP, V1 normalised before and V2 after; images (B, H, W, dim) of any size."""

    def __init__(self, dim: int, heads: int, window: int, shift: int, v2: bool) -> None:
        super().__init__()
        kind = ShiftedWindowAttentionV2 if v2 else ShiftedWindowAttention
        self.v2 = v2
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = kind(dim, window, shift, heads, attention_dropout=0.1)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.v2:
            x = x + self.norm1(self.attn(x))
            return x + self.norm2(self.mlp(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinySwin(nn.Module):
    def __init__(self, classes: int = 10, dim: int = 32, heads: int = 2, window: int = 7, v2: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.Sequential(*(Block(dim, heads, window, shift, v2) for shift in (0, window // 2)))
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).permute(0, 2, 3, 1)
        return self.head(self.blocks(x).mean((1, 2)))


def main() -> None:
    torch.manual_seed(0)
    for v2 in (False, True):
        model = TinySwin(v2=v2).to(DEVICE)
        images = torch.randn(8, 3, 60, 44, device=DEVICE)  # 15x11 patches: padded to whole windows by the attention
        labels = torch.randint(10, (8,), device=DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(15):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"{'V2' if v2 else 'V1'}: loss {losses[0]:.2f} at first, {losses[-1]:.2f} after {len(losses)} steps")
        assert losses[-1] < losses[0]
        print(f"    state dict of an attention: {', '.join(model.blocks[0].attn.state_dict())}")


if __name__ == "__main__":
    main()
