"""Train with one line added to the loop.

    python examples/finetune.py
    python examples/finetune.py --compare            # the original beside it, from the same start
    python examples/finetune.py --model swinv2_tiny_window16_256 --size 256 --batch 64 --steps 200 --full

Needs timm; the images are scikit-learn's handwritten digits where it is installed (pip install "swinaccel[bench]"
brings both), and synthetic ones elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swinaccel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224", help="a timm model (%(default)s)")
    parser.add_argument("--size", type=int, default=56, help="side of the images (%(default)s)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--full", action="store_true", help="the model at its full depth and width, not a small one")
    parser.add_argument("--data", choices=("auto", "digits", "synthetic"), default="auto")
    parser.add_argument("--compare", action="store_true", help="train the original as well, from the same start")
    arguments = parser.parse_args()

    images, labels, classes, source = load(arguments.data)
    torch.manual_seed(0)
    small = {} if arguments.full else {"depths": (2, 2), "num_heads": (3, 6), "embed_dim": 48}
    model = timm.create_model(
        arguments.model, img_size=arguments.size, in_chans=1, num_classes=classes, drop_path_rate=0.1, **small
    ).to(DEVICE)
    original = copy.deepcopy(model)
    print(f"{arguments.model}, {arguments.size}x{arguments.size}, batch {arguments.batch}, {DEVICE}; {source}")

    model = swinaccel.accelerate(model)  # the one line

    runs = [train(model, images, labels, arguments)]
    if arguments.compare:
        runs.append(train(original, images, labels, arguments))
    print("\n step      loss" + ("   original's" if arguments.compare else ""))
    steps = list(zip(*runs, strict=True))  # by turns, so that both meet the same machine
    for number in sorted({*range(0, len(steps), max(1, len(steps) // 5)), len(steps) - 1}):
        print(f"{number:>5}" + "".join(f"  {loss:>8.4f}   " for loss, _ in steps[number]).rstrip())

    report = swinaccel.report(model)
    calls, fallbacks = sum(entry.calls for entry in report), sum(entry.fallbacks for entry in report)
    print(f"\n{len(report.accelerated)} window attentions, {calls - fallbacks} of {calls} calls accelerated")
    medians = [statistics.median(step[run][1] for step in steps) for run in range(len(runs))]
    print(f"median step {1e3 * medians[0]:.1f} ms")
    if arguments.compare:
        print(f"original's  {1e3 * medians[1]:.1f} ms, {medians[1] / medians[0]:.2f} times as long")
        print(f"losses differ by {max(abs(ours[0] - theirs[0]) for ours, theirs in steps):.1e} at most")


def load(data: str) -> tuple[Tensor, Tensor, int, str]:
    """Return images (count, 1, side, side) in -1 .. 1, their labels, the number of classes, and their source."""
    hint = ""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        if data == "digits":
            raise SystemExit("the digits come with scikit-learn: pip install scikit-learn") from None
        data, hint = "synthetic", " (pip install scikit-learn for real images)"
    if data != "synthetic":
        digits = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
        return images, torch.from_numpy(digits.target), 10, f"{len(images)} handwritten digits of scikit-learn"
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (512,), generator=generator)
    turns = torch.linspace(-1, 1, 16)
    waves = torch.stack([torch.sin((2 + kind) * 3 * turns)[None, :] * torch.ones(16, 1) for kind in range(4)])
    images = waves[labels] + 0.3 * torch.randn(512, 16, 16, generator=generator)
    return images[:, None], labels, 4, f"512 synthetic waves{hint}"


def train(
    model: nn.Module, images: Tensor, labels: Tensor, arguments: argparse.Namespace
) -> Iterator[tuple[float, float]]:
    """Yield the loss and the seconds of one training step after another."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(arguments.steps):
        torch.manual_seed(step)  # the same batch and the same dropped paths for whoever trains
        chosen = torch.randint(len(images), (arguments.batch,))
        batch = F.interpolate(images[chosen].to(DEVICE), (arguments.size, arguments.size), mode="bilinear")
        start = time.perf_counter()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = F.cross_entropy(model(batch).float(), labels[chosen].to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item(), time.perf_counter() - start  # item() waits for the device


if __name__ == "__main__":
    main()
