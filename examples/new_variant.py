"""Accelerate a window attention that swinaccel has never seen, by a class that says how to read it.

    python examples/new_variant.py

Needs nothing but swinaccel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import swinaccel
from swinaccel import families
from swinaccel.spec.window import Geometry, Section, WindowSpec


class TileMixer(nn.Module):
    """Attention within the tiles of an image (B, H, W, C), which start `offset` pixels in: one's own code."""

    def __init__(self, dim: int, heads: int, tile: int, offset: int) -> None:
        super().__init__()
        self.heads, self.tile, self.offset = heads, tile, offset
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.distance_bias = nn.Parameter(torch.randn((2 * tile - 1) ** 2, heads))
        steps = torch.arange(tile)
        rows = (steps[:, None] - steps + tile - 1).repeat_interleave(tile, 0).repeat_interleave(tile, 1)
        columns = (steps[:, None] - steps + tile - 1).repeat(tile, tile)
        self.register_buffer("distance", rows * (2 * tile - 1) + columns)

    def forward(self, image: Tensor) -> Tensor:
        batch, height, width, dim = image.shape
        image = image.roll((-self.offset, -self.offset), (1, 2))
        tiles = self.cut(self.to_qkv(image)).view(-1, self.tile**2, 3, self.heads, dim // self.heads)
        q, k, v = tiles.permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * q.shape[-1] ** -0.5 + self.distance_bias[self.distance].permute(2, 0, 1)
        scores = scores.unflatten(0, (batch, -1)) + self.walls(height, width)[:, None].to(scores)
        mixed = scores.flatten(0, 1).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).reshape(batch, height // self.tile, width // self.tile, *[self.tile] * 2, dim)
        mixed = mixed.transpose(2, 3).reshape(batch, height, width, dim)
        return self.to_out(mixed.roll((self.offset, self.offset), (1, 2)))

    def cut(self, image: Tensor) -> Tensor:
        """Cut (B, H, W, C) into (B * tiles, tile * tile, C)."""
        batch, height, width, dim = image.shape
        tiles = image.view(batch, height // self.tile, self.tile, width // self.tile, self.tile, dim)
        return tiles.transpose(2, 3).reshape(-1, self.tile**2, dim)

    def walls(self, height: int, width: int) -> Tensor:
        """Return a mask (tiles, N, N): -100 between pixels that only the roll made neighbours."""
        side = torch.zeros(1, height, width, 1, device=self.distance.device)
        if self.offset:
            side[:, -self.offset :] += 1
            side[:, :, -self.offset :] += 2
        side = self.cut(side)[..., 0]
        return -100.0 * (side[:, :, None] != side[:, None, :])


class TileMixers:
    """A `swinaccel.families.Family`, which reads a TileMixer."""

    name = "tile_mixer"
    method = "forward"

    def match(self, module: nn.Module) -> WindowSpec | None:
        if not isinstance(module, TileMixer):
            return None
        window, shift = (module.tile,) * 2, (module.offset,) * 2
        head_dim = module.to_out.in_features // module.heads
        return WindowSpec(self.name, window, shift, module.heads, head_dim)

    def attention(self, module: nn.Module) -> nn.Module:
        return module

    def projections(self, module: nn.Module) -> tuple[nn.Module, ...]:
        return module.to_qkv, module.to_out

    def section(self, module: nn.Module, image: Tensor) -> Section | str:
        height, width = image.shape[1:3]
        if height % module.tile or width % module.tile:
            return "the image does not divide into tiles"
        head_dim = module.to_out.in_features // module.heads
        return Section(
            geometry=Geometry((height, width), (module.tile,) * 2, (module.offset,) * 2),
            num_heads=module.heads,
            head_dim=head_dim,
            project=module.to_qkv,
            output=module.to_out,
            padding=lambda: module.to_qkv.bias,
            table=lambda: module.distance_bias,
            index=module.distance,
            sources=(module.distance_bias,),
            scale=head_dim**-0.5,
        )

    def forward(self, module: nn.Module, attend: Any, image: Tensor) -> Tensor:
        return attend(image)

    def example(self, module: nn.Module) -> tuple[Any, ...]:
        return (torch.Size((2, 2 * module.tile, 3 * module.tile, module.to_out.in_features)),)


class Careless(TileMixers):
    """The same with a mistake: it forgets that tiles are shifted."""

    name = "careless"

    def section(self, module: nn.Module, image: Tensor) -> Section | str:
        section = super().section(module, image)
        if isinstance(section, Section):
            section.geometry = Geometry(section.geometry.size, section.geometry.window)
        return section


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(TileMixer(64, 2, 8, 0), TileMixer(64, 2, 8, 4)).to(device).eval()
    image = torch.randn(2, 32, 48, 64, device=device)
    with torch.no_grad():
        expected = model(image)
    print(f"Unknown yet:\n  {swinaccel.plan(model)}\n")

    # Each kind of module is proven against its own forward before it is replaced; a wrong reading is found out.
    families.FAMILIES.append(Careless())
    print(f"Read wrongly:\n{swinaccel.plan(model)}\n")
    families.FAMILIES.pop()

    families.FAMILIES.append(TileMixers())
    swinaccel.accelerate(model)
    with torch.no_grad():
        found = model(image)
    print(f"Read rightly:\n{swinaccel.report(model)}\n")

    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"Outputs before and after differ by {difference:.1e} of the largest.")
    assert len(swinaccel.report(model).accelerated) == 2
    assert difference < (1e-5 if device == "cpu" else 5e-3)  # a GPU may multiply fp32 in TF32


if __name__ == "__main__":
    main()
