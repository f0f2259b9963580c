"""Train an original and an accelerated Swin from one start, on real images, and lay their losses over each other.

    python docs/results/training_curves.py --out docs/images

The images are scikit-learn's handwritten digits (1,797 of them, UCI), enlarged. Four runs for each precision: the
original, the accelerated model with the same data order, the original once more (what a GPU's own scheduling
changes), and the original with another data order (what chance changes).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import swinaccel

RUNS = {
    "original": (False, 0),
    "accelerated": (True, 0),
    "original, again": (False, 0),
    "original, other data order": (False, 1),
}


def digits(path: str | None, size: int) -> tuple[Tensor, Tensor]:
    """Images (1797, 3, size, size) in [-1, 1], and their labels."""
    if path is not None:
        data = np.load(path)
        images, labels = data["images"], data["labels"]
    else:
        from sklearn.datasets import load_digits

        loaded = load_digits()
        images, labels = loaded.images, loaded.target
    small = torch.tensor(images, dtype=torch.float32)[:, None] / 8 - 1
    large = F.interpolate(small, size=(size, size), mode="bicubic", align_corners=False)
    return large.expand(-1, 3, -1, -1).contiguous(), torch.tensor(labels, dtype=torch.long)


def train(
    name: str, images: Tensor, labels: Tensor, steps: int, batch: int, autocast: bool, accelerated: bool, order: int
) -> dict[str, Any]:
    """Losses of each step, and the median time of one."""
    device = images.device
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=images.shape[-1], num_classes=10, drop_path_rate=0.1).to(device).train()
    if accelerated:
        swinaccel.accelerate(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.05, fused=device.type == "cuda")
    generator = torch.Generator().manual_seed(order)
    losses, times = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        rows = torch.randint(len(images), (batch,), generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - begin)
    report = swinaccel.report(model) if accelerated else None
    return {
        "losses": losses,
        "ms": 1e3 * float(np.median(times)),
        "fallbacks": None if report is None else sum(entry.fallbacks for entry in report),
    }


def tail(losses: list[float]) -> float:
    """The loss at the end: mean of the last tenth."""
    return float(np.mean(losses[-len(losses) // 10 :]))


def smooth(losses: list[float], width: int = 15) -> np.ndarray:
    return np.convolve(losses, np.ones(width) / width, mode="valid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=".", help="folder for training_curves.json and .png")
    parser.add_argument("--data", help="an .npz with images (n, 8, 8) and labels, in place of scikit-learn's")
    parser.add_argument("--models", nargs="+", default=["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {}
    for name in options.models:
        size = 128 if "window8" in name or "window16" in name else 112
        images, labels = (tensor.to(device) for tensor in digits(options.data, size))
        for autocast in (True, False):
            title = f"{name}, {'bf16 autocast' if autocast else 'fp32'}"
            results[title] = {}
            for run, (accelerated, order) in RUNS.items():
                one = train(name, images, labels, options.steps, options.batch, autocast, accelerated, order)
                results[title][run] = one
                write(results, Path(options.out))
                print(f"{title:45} {run:28} loss {tail(one['losses']):.4f}  {one['ms']:.1f} ms a step", flush=True)


def write(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training_curves.json").write_text(json.dumps(results))
    draw(results, folder / "training_curves.png")


def draw(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * ((len(results) + 1) // 2)), layout="constrained")
    for index, (title, runs) in enumerate(results.items()):
        axes = figure.add_subplot((len(results) + 1) // 2, 2, index + 1)
        styles = {
            "original": {"color": "#333333", "linewidth": 2.5},
            "accelerated": {"color": "#2a9d6f", "linewidth": 1.2},
            "original, again": {"color": "#8888cc", "linewidth": 1.0, "linestyle": "--"},
            "original, other data order": {"color": "#cccccc", "linewidth": 1.0},
        }
        for run, one in runs.items():
            axes.plot(smooth(one["losses"]), label=f"{run} ({tail(one['losses']):.3f})", **styles[run])
        axes.set_title(title, fontsize=9)
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, mean of 15 steps")
        axes.legend(fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
