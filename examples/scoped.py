"""Accelerate a model for a while, or stop for a while: contexts, their nesting, and what the report says.

    python examples/scoped.py

Needs timm: pip install "swinaccel[bench]".
"""

from __future__ import annotations

import timm
import torch
from torch import nn

import swinaccel


def state(model: nn.Module) -> str:
    entries = list(swinaccel.report(model))
    accelerated = sum(entry.status == "accelerated" for entry in entries)
    ran = sum(entry.calls - entry.fallbacks for entry in entries)
    return f"{accelerated} of {len(entries)} modules accelerated, {ran} accelerated calls so far"


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=112, depths=(2, 2), num_heads=(3, 6), num_classes=10
    ).eval()
    images = torch.randn(2, 3, 112, 112)

    with torch.no_grad():
        expected = model(images)
        print(f"before                 {state(model)}")

        # Within the block only. What leaves it, also by an exception, is the model as it was.
        with swinaccel.accelerated(model, filter=lambda name, module: name.startswith("layers.0")) as fast:
            assert fast is model
            print(f"its first stage        {state(model)}")

            # Blocks nest, each with its own options.
            with swinaccel.accelerated(model, bias="table"):
                found = model(images)
                print(f"  all of it            {state(model)}")

                # Originals run inside, in this thread; the model keeps its state, and calls are not counted.
                with swinaccel.disabled():
                    exact = model(images)
                    print(f"    disabled()         {state(model)}")
                assert torch.equal(exact, expected)
            print(f"its first stage again  {state(model)}")
        print(f"after                  {state(model)}")

        # For good, until restore().
        swinaccel.accelerate(model)
        model(images)
        print(f"accelerate(model)\n\n{swinaccel.report(model)}\n")
        swinaccel.restore(model)
        print(f"restore(model)         {state(model)}")
        assert torch.equal(model(images), expected)

    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"\nAccelerated and original outputs differ by {difference:.1e} of the largest.")
    assert difference < 1e-4


if __name__ == "__main__":
    main()
