"""Segment a volume with MONAI's SwinUNETR, window by window.

    python examples/swin_unetr.py

Needs MONAI: pip install monai einops. Every sliding window is a call of one size, so that its plan is made once.
"""

from __future__ import annotations

import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import SwinUNETR

import swinaccel


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = SwinUNETR(in_channels=1, out_channels=2, feature_size=12).to(device).eval()
    volume = torch.randn(1, 1, 96, 64, 64, device=device)

    def segment() -> torch.Tensor:
        with torch.no_grad():
            return sliding_window_inference(volume, (64, 64, 64), sw_batch_size=1, predictor=model, overlap=0.25)

    expected = segment()
    swinaccel.accelerate(model)  # the one line
    found = segment()
    print(f"segmented {tuple(found.shape)}, differs by {(found - expected).abs().max() / expected.abs().max():.1e}")
    print(swinaccel.report(model))


if __name__ == "__main__":
    main()
