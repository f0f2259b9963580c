"""Fine-tune a Swin with the Trainer of Hugging Face: one line before it.

    python examples/trainer.py

Needs transformers and accelerate: pip install "swinaccel[bench]" accelerate. The model is small and its images are
noise, so that nothing is downloaded; from_pretrained() and a data set take their places.
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import SwinConfig, SwinForImageClassification, Trainer, TrainingArguments

import swinaccel


class Noise(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 56, 56, generator=generator), "labels": torch.tensor(index % 4)}


def main() -> None:
    torch.manual_seed(0)
    config = SwinConfig(image_size=56, embed_dim=32, depths=[2, 2], num_heads=[2, 4], num_labels=4)
    model = SwinForImageClassification(config)

    swinaccel.accelerate(model)  # the one line

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, per_device_train_batch_size=4, max_steps=4, report_to=[], save_steps=4)
        trainer = Trainer(model, arguments, train_dataset=Noise(), eval_dataset=Noise())
        trained = trainer.train()
        measured = trainer.evaluate()
    print(f"trained {trained.global_step} steps, loss {trained.training_loss:.3f}")
    print(f"evaluated, loss {measured['eval_loss']:.3f}")
    print(swinaccel.report(trainer.model))


if __name__ == "__main__":
    main()
