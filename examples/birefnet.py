"""Cut out the foreground of an image, as BiRefNet does: a Swin encoder, and a decoder that ends in a mask.

    python examples/birefnet.py                                  # a small stand-in, nothing is downloaded
    python examples/birefnet.py --pretrained ZhengPeng7/BiRefNet # the model itself; runs code of its repository

Needs timm, and for the model itself transformers, einops and kornia: pip install "swinaccel[bench]" einops kornia.
"""

from __future__ import annotations

import argparse

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swinaccel


class StandIn(nn.Module):
    """Swin features of four sizes, brought together from the smallest to the largest."""

    def __init__(self, size: int) -> None:
        super().__init__()
        small = {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "img_size": size}
        self.encoder = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **small)
        self.narrow = nn.ModuleList(nn.Conv2d(width, 16, 1) for width in self.encoder.feature_info.channels())
        self.head = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = [conv(x.permute(0, 3, 1, 2)) for conv, x in zip(self.narrow, self.encoder(images), strict=True)]
        found = features.pop()
        while features:
            larger = features.pop()
            found = larger + F.interpolate(found, larger.shape[-2:], mode="bilinear")
        return [F.interpolate(self.head(found), images.shape[-2:], mode="bilinear")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", metavar="OWNER/NAME", help="a model of the hub, whose own code is run")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if arguments.pretrained:
        from transformers import AutoModelForImageSegmentation

        size = 1024
        model = AutoModelForImageSegmentation.from_pretrained(arguments.pretrained, trust_remote_code=True)
    else:
        size = 224
        model = StandIn(size)
    model = model.to(device).eval()
    image = torch.rand(1, 3, size, size, device=device)

    with torch.no_grad():
        expected = model(image)[-1].sigmoid()
        swinaccel.accelerate(model)  # the one line
        mask = model(image)[-1].sigmoid()
    print(f"mask {tuple(mask.shape)}, {(mask > 0.5).float().mean():.0%} foreground")
    print(f"differs by {(mask - expected).abs().max():.1e} from the original's")
    print(swinaccel.report(model))


if __name__ == "__main__":
    main()
