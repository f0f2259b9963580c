"""Writes the table of supported models into the README, by building, accelerating and comparing each of them.

    python docs/supported.py

Random parameters, fp32, batch 1, plain PyTorch on the CPU; the largest difference is relative to the output's size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import swinaccel

os.environ.setdefault("HF_HUB_OFFLINE", "1")
README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- models:start -->", "<!-- models:end -->"


def models() -> Iterator[tuple[str, Callable[[], nn.Module], int]]:
    """Name, constructor and image size."""
    import timm
    from torchvision.models import swin_transformer as torchvision
    from transformers import SwinBackbone, SwinConfig, SwinModel, Swinv2Config, Swinv2Model

    for name in timm.list_models(["swin_*", "swinv2_*"], exclude_filters=["*_cr_*", "*large*", "*small_*"]):
        size = timm.get_pretrained_cfg(name).input_size[-1]
        yield f"timm `{name}`", lambda name=name: timm.create_model(name), size
    yield "Hugging Face `SwinModel`", lambda: SwinModel(SwinConfig()), 224
    yield "Hugging Face `SwinBackbone`", lambda: SwinBackbone(SwinConfig()), 224
    yield "Hugging Face `Swinv2Model`", lambda: Swinv2Model(Swinv2Config()), 224
    yield "torchvision `swin_t`", torchvision.swin_t, 224
    yield "torchvision `swin_v2_t`", torchvision.swin_v2_t, 256


def row(name: str, make: Callable[[], nn.Module], size: int) -> str:
    torch.manual_seed(0)
    model = make().eval()
    with torch.inference_mode():
        for parameter in model.parameters():  # fresh tables and SwinV2's fresh norms are zero and would hide anything
            scale = 1.2 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.5
            parameter.copy_(torch.randn_like(parameter) * scale)
        image = torch.randn(1, 3, size, size)
        expected = output(model(image))
        found = output(swinaccel.accelerate(model)(image))
    report = swinaccel.report(model)
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    fallbacks = sum(entry.fallbacks for entry in report)
    return f"| {name} | {len(report.accelerated)} of {len(report)} | {fallbacks} | {difference:.0e} |"


def output(result: object) -> Tensor:
    if isinstance(result, Tensor):
        return result
    hidden = getattr(result, "last_hidden_state", None)
    return hidden if hidden is not None else result.feature_maps[-1]  # type: ignore[attr-defined]


def main() -> None:
    lines = ["| model | blocks accelerated | calls that ran the original | largest difference |", "|---|---|---|---|"]
    for model in models():
        lines.append(row(*model))
        print(lines[-1], flush=True)
    text = README.read_text()
    before, after = text.split(START)[0], text.split(END)[1]
    README.write_text(before + START + "\n" + "\n".join(lines) + "\n" + END + after)


if __name__ == "__main__":
    main()
