"""Train a Swin with Lightning: accelerate the model where the module is made.

    python examples/lightning_module.py

Needs timm and lightning: pip install "swinaccel[bench]" lightning. Checkpoints hold the original's state dict.
"""

from __future__ import annotations

import lightning
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import swinaccel


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        small = {"img_size": 56, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32, "num_classes": 4}
        self.model = swinaccel.accelerate(timm.create_model("swin_tiny_patch4_window7_224", **small))  # the one line

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        self.log("validation_loss", F.cross_entropy(self.model(images), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def main() -> None:
    lightning.seed_everything(0)
    images = DataLoader(TensorDataset(torch.randn(16, 3, 56, 56), torch.arange(16) % 4), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=4, limit_val_batches=2, **quiet)
    classifier = Classifier()
    trainer.fit(classifier, images, images)
    print(f"trained {trainer.global_step} steps, validation loss {trainer.callback_metrics['validation_loss']:.3f}")
    print(swinaccel.report(classifier))


if __name__ == "__main__":
    main()
