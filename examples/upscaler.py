"""Make an image four times as large with Swin2SR, tile by tile.

    python examples/upscaler.py                                                 # small, with random weights
    python examples/upscaler.py --pretrained caidas/swin2SR-realworld-sr-x4-64-bsrgan-psnr

Needs transformers: pip install "swinaccel[bench]".
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

import swinaccel

TILE, SCALE = 64, 4


def upscale(model: nn.Module, image: Tensor) -> Tensor:
    """Return an image, (3, H, W) of whole tiles, at four times its sides; tiles of one size have one plan."""
    rows = []
    for strip in image.split(TILE, dim=1):
        tiles = torch.stack(strip.split(TILE, dim=2))
        rows.append(torch.cat(list(model(tiles).reconstruction), dim=2))
    return torch.cat(rows, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", metavar="OWNER/NAME", help="a Swin2SR of the hub that enlarges four times")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if arguments.pretrained:
        model = Swin2SRForImageSuperResolution.from_pretrained(arguments.pretrained)
    else:
        small = {"embed_dim": 36, "depths": [2, 2], "num_heads": [3, 3], "window_size": 8, "image_size": TILE}
        model = Swin2SRForImageSuperResolution(Swin2SRConfig(upscale=SCALE, upsampler="pixelshuffledirect", **small))
    model = model.to(device).eval()
    image = torch.rand(3, TILE, 2 * TILE, device=device)

    with torch.no_grad():
        expected = upscale(model, image)
        swinaccel.accelerate(model)  # the one line
        large = upscale(model, image)
    print(f"{tuple(image.shape)} to {tuple(large.shape)}, differs by {(large - expected).abs().max():.1e}")
    print(swinaccel.report(model))


if __name__ == "__main__":
    main()
