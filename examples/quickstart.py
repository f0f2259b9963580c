"""Show a photograph to a Swin Transformer, before and after one line.

    python examples/quickstart.py
    python examples/quickstart.py --model swinv2_tiny_window8_256 --batch 1 --batch 16

Needs timm and scikit-learn, which brings the photograph: pip install "swinaccel[bench]".
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time

import torch
from torch import Tensor, nn

import swinaccel
from swinaccel.cli import models

try:
    import timm
    from PIL import Image
    from sklearn.datasets import load_sample_image
except ImportError as error:
    print(f'{error}; pip install "swinaccel[bench]" brings what this example needs', file=sys.stderr)
    sys.exit(2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224", help="a timm model (%(default)s)")
    parser.add_argument("--batch", type=int, action="append", help="a batch size to measure (1 and 8)")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each behind a median (%(default)s)")
    arguments = parser.parse_args()

    on_cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_cuda else ("cpu", torch.float32)
    model, weights = load(arguments.model, device, dtype)
    photo = Image.fromarray(load_sample_image("china.jpg"))
    images = crops(photo, model, max(arguments.batch or [8])).to(device, dtype)
    place = torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"model    {arguments.model}, {weights}")
    print(f"input    {photo.width}x{photo.height} photograph, crops of {images.shape[-2]}x{images.shape[-1]}")
    print(f"device   {place}, {str(dtype).split('.')[-1]}\n")

    original = copy.deepcopy(model)
    model = swinaccel.accelerate(model)  # the one line

    with torch.no_grad():
        expected, found = original(images[:1]), model(images[:1])
    print(swinaccel.report(model), "\n")

    check = swinaccel.verify(model, images[:1])
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"outputs  differ by {difference:.1e} of the largest")
    print(
        f"errors   against fp64: {check.original_max_error:.1e} original, {check.max_error:.1e} accelerated"
        f" ({'passed' if check.passed else 'FAILED'})"
    )
    if weights == "pretrained":
        print(f"sees     {label(model, expected)} (original), {label(model, found)} (accelerated)")

    print("\nbatch      original   accelerated   speed-up")
    is_noisy = False
    for batch in arguments.batch or [1, 8]:
        times = measure(original, model, images[:batch], arguments.rounds)
        before, after = (statistics.median(each) for each in times)
        is_noisy = is_noisy or any(statistics.median(each) > 2 * min(each) for each in times)
        print(f"{batch:>5}  {before:>9.1f} ms  {after:>9.1f} ms   {before / after:>7.2f}x")
    print(f"\nMedians of up to {arguments.rounds} calls, original and accelerated by turns.")
    if is_noisy:
        print("The fastest calls took less than half of a median: this machine is busy, and the medians are rough.")
    return 0 if check.passed else 1


def load(name: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, str]:
    """Load the model, with its pretrained weights where they can be had, and say which weights it has."""
    if not timm.is_model(name):
        sys.exit(f"timm has no model {name!r}")
    try:
        return models.load(f"timm:{name}", pretrained=True, device=device, dtype=dtype).model, "pretrained"
    except ValueError:
        model = models.load(f"timm:{name}", device=device, dtype=dtype).model
        return model, "random weights (the pretrained ones could not be downloaded)"


def crops(photo: Image.Image, model: nn.Module, count: int) -> Tensor:
    """Return square crops from left to right, as the model wants them."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    room, side = photo.width - photo.height, photo.height
    lefts = [room * i // max(1, count - 1) for i in range(count)]
    return torch.stack([transform(photo.crop((left, 0, left + side, side))) for left in lefts])


def label(model: nn.Module, logits: Tensor) -> str:
    """Return the name of the most likely class."""
    info = timm.data.ImageNetInfo(timm.data.infer_imagenet_subset(model) or "imagenet-1k")
    return info.index_to_description(int(logits.argmax()))


def measure(original: nn.Module, model: nn.Module, images: Tensor, rounds: int) -> tuple[list[float], list[float]]:
    """Return milliseconds of calls of each; they take turns, for at most eight seconds or so."""
    times: dict[nn.Module, list[float]] = {original: [], model: []}
    with torch.no_grad():
        for each in (*times, *times):
            each(images)  # warm up
        end = time.perf_counter() + 8
        while len(times[model]) < rounds and (len(times[model]) < 3 or time.perf_counter() < end):
            for each, found in times.items():
                synchronize(images)
                begin = time.perf_counter()
                each(images)
                synchronize(images)
                found.append(1e3 * (time.perf_counter() - begin))
    return times[original], times[model]


def synchronize(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
