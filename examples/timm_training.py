"""Train with timm's own parts: its optimizer, schedule, mixup and averaged weights.

    python examples/timm_training.py

Needs timm: pip install "swinaccel[bench]". In a copy of timm's train.py, the one line goes right after create_model().
"""

from __future__ import annotations

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import swinaccel

CLASSES, STEPS, DEVICE = 4, 4, "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    torch.manual_seed(0)
    small = {"img_size": 56, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32, "num_classes": CLASSES}
    model = timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.1, **small).to(DEVICE)

    swinaccel.accelerate(model)  # the one line; the averaged copy below is accelerated with it

    average = ModelEmaV3(model, decay=0.9)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    schedule = CosineLRScheduler(optimizer, t_initial=STEPS, warmup_t=1, t_in_epochs=False)
    mixup, criterion = Mixup(mixup_alpha=0.8, num_classes=CLASSES), SoftTargetCrossEntropy()
    for step in range(STEPS):
        images, labels = mixup(torch.randn(8, 3, 56, 56).to(DEVICE), torch.arange(8).to(DEVICE) % CLASSES)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step_update(step)
        average.update(model)
        print(f"step {step}: loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        averaged = average.module.eval()(torch.randn(2, 3, 56, 56).to(DEVICE))
    print(f"averaged weights: {tuple(averaged.shape)}, {swinaccel.report(average.module).summary()}")
    print(swinaccel.report(model))


if __name__ == "__main__":
    main()
