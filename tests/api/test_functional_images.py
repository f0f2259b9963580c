"""Attention from image to image as a function, on the kernels and in plain PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import helpers
import pytest
import torch
from kernel_problems import Case as ImageCase
from swinaccel.kernels import launch
from torch import Tensor
from window_problems import BOTH, IMAGES, SMALL_AND_LARGE, Case, call, compare

from swinaccel import functional
from swinaccel.backends.triton import launches
from swinaccel.spec import reference
from swinaccel.spec.window import Geometry


def image_call(qkv: Any, geometry: Geometry, num_heads: int, **options: Any) -> Tensor:
    if options.get("logit_scale") is not None:
        options["scale"] = None
    return functional.shifted_window_attention(
        qkv, geometry.window, num_heads, geometry.shift, roll_first=geometry.roll_first, **options
    )


def row_oracle(
    qkv: Any, geometry: Geometry, bias: Tensor, num_heads: int, mask_value: float, padding: Any, **options: Any
) -> Tensor:
    """Each window with its own bias: that of the row of windows which it stands in."""
    del options["table"], options["index"]
    biases = torch.stack([bias[number // geometry.grid[-1]] for number in range(geometry.num_windows)])
    pads = (None,) * 3 if padding is None else padding.chunk(3)
    cut = [reference.cut(one, geometry, pad) for one, pad in zip(qkv.chunk(3, dim=-1), pads, strict=True)]
    q, k, v = (reference.split_heads(one, num_heads) for one in cut)
    if options.get("mask") is None and geometry.is_shifted and mask_value:
        options["mask"] = reference.shift_mask(geometry, mask_value, device=qkv.device)
    out = reference.attention(q, k, v, bias=biases, **options)
    return reference.join(out.transpose(1, 2).flatten(2), geometry)


def image_oracle(qkv: Any, geometry: Geometry, bias: Tensor | None = None, **options: Any) -> Tensor:
    if bias is not None and bias.dim() == 4:
        return row_oracle(qkv, geometry, bias, **options)
    if bias is not None:
        tokens = geometry.tokens
        options["table"] = bias.flatten(1).t()
        options["index"] = torch.arange(tokens * tokens, device=bias.device).view(tokens, tokens)
    q, k, v = qkv.chunk(3, dim=-1) if isinstance(qkv, Tensor) else qkv
    return reference.shifted_window_attention(q, k, v, geometry, **options)


GEOMETRIES = [
    ImageCase((4, 4), (8, 12), (2, 1), dim=6, heads=1, batch=2),
    ImageCase((4, 4), (9, 7), (1, 3), cosine=True),
    ImageCase((7, 7), (7, 14), (0, 3), dim=10, heads=1),
    ImageCase((3, 5), (7, 4), (2, 2), heads=3),
    ImageCase((4, 4), (9, 5), (2, 3), roll_first=True),
    ImageCase((4, 4), (10, 10), (2, 2), mask_value=0.0),
    ImageCase((9, 8), (13, 8), (4, 0), heads=1, cosine=True),
    ImageCase((1, 1), (3, 2), dim=7),
]


@BOTH
@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, "table") for case in GEOMETRIES] + list(itertools.product(GEOMETRIES[1::5], ["bias", "no-bias", "rows"])),
    ids=str,
)
def test_images(case, kind, backend):
    qkv, options = case.make(torch.float32, backend)
    if kind != "table":
        options["bias"] = None if kind == "no-bias" else reference.bias_from_table(options["table"], options["index"])
        if kind == "rows":
            factors = torch.linspace(-1, 2, case.geometry.grid[0]).view(-1, 1, 1, 1)
            options["bias"] = options["bias"] * factors.to(backend)
        options["table"] = options["index"] = None
    compare({"qkv": qkv, "geometry": case.geometry, **options}, image_call, image_oracle, IMAGES)


@BOTH
@pytest.mark.parametrize("biases", [(), (4,)], ids=["one-bias", "rows"])
def test_volumes(biases, backend):
    """A depth before the rows; along it windows are cut, shifted and padded as along the others."""
    geometry = Geometry((3, 4, 5), (2, 2, 3), (1, 0, 2))
    generator = torch.Generator().manual_seed(1)
    inputs: dict[str, Any] = {"geometry": geometry, "num_heads": 2}
    inputs["qkv"] = 1.5 * torch.randn(2, 3, 4, 5, 36, generator=generator).to(backend)
    inputs["padding"] = torch.randn(36, generator=generator).to(backend)
    inputs["bias"] = torch.randn(*biases, 2, 12, 12, generator=generator).to(backend)
    inputs["scale"] = 0.4
    if biases:
        inputs |= {"table": None, "index": None, "mask_value": -100.0}
    compare(inputs, image_call, image_oracle, IMAGES)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("programs", [1, 12])
@SMALL_AND_LARGE
def test_programs_of_the_backward_take_many_windows_of_a_row(tokens, programs, backend, monkeypatch):
    """Of one bias: windows next to each other in an image, and apart where windows are cut already."""
    monkeypatch.setattr(launch, "_BACKWARD_PROGRAMS", programs)
    monkeypatch.setattr(launches, "launches", {})
    compare(Case(tokens, windows=12, heads=1, dim=8, rows=2, masks=6).make(device=backend))
    geometry = Geometry((3 * 3, 5 * tokens // 3), (3, tokens // 3), (1, 0))
    generator = torch.Generator().manual_seed(2)
    inputs: dict[str, Any] = {"geometry": geometry, "num_heads": 1, "table": None, "index": None, "mask_value": -100.0}
    inputs["qkv"] = torch.randn(2, *geometry.size, 24, generator=generator).to(backend)
    inputs["bias"] = torch.randn(3, 1, tokens, tokens, generator=generator).to(backend)
    compare({**inputs, "padding": None, "scale": 0.4}, image_call, image_oracle, IMAGES)


@BOTH
def test_images_in_three_parts(backend):
    case = GEOMETRIES[1]
    qkv, options = case.make(torch.float32, backend)
    q, k, v = qkv.chunk(3, dim=-1)
    whole = image_call(qkv, case.geometry, **options)
    apart = image_call((q, k.contiguous(), v), case.geometry, **options)
    helpers.assert_close(apart, whole, 1e-6)


@BOTH
@pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])
def test_images_with_a_mask(window, backend):
    """In place of the one that the shift implies; a flattened index, as torchvision's, is as good as a square one."""
    case = ImageCase(window, (2 * window[0], window[1]), (1, 0), heads=1)
    qkv, options = case.make(torch.float32, backend)
    options["mask"] = torch.randn(2, case.geometry.tokens, case.geometry.tokens, device=backend)
    inputs = {"qkv": qkv, "geometry": case.geometry, **options}
    compare(inputs, image_call, image_oracle, IMAGES)
    flat = {**inputs, "index": options["index"].flatten()}
    helpers.assert_close(image_call(**flat), image_call(**inputs), 1e-6)


@BOTH
def test_images_with_dropout(backend):
    case = ImageCase((4, 4), (8, 8), (2, 2), dim=16, batch=4)
    qkv, options = case.make(torch.float32, backend)
    qkv[..., -32:] = 1.0
    sums = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sums.append(image_call(qkv, case.geometry, **options, dropout=0.25))
    assert torch.equal(sums[0], sums[1])
    assert not torch.equal(sums[0], sums[2])
    assert abs(sums[0].mean().item() - 1) < 0.1
    assert sums[0].std() > 0.05


@BOTH
@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
def test_image_and_windows_agree(cosine, backend):
    case = ImageCase((4, 4), (8, 8), (2, 2), cosine=cosine)
    qkv, options = case.make(torch.float32, backend)
    q, k, v = (reference.split_heads(reference.cut(p, case.geometry), 2) for p in qkv.chunk(3, dim=-1))
    bias = reference.bias_from_table(options["table"], options["index"])
    mask = reference.shift_mask(case.geometry, -100.0, device=backend)
    out = call(q, k, v, bias=bias, mask=mask, logit_scale=options.get("logit_scale"))
    out = reference.join(out.transpose(1, 2).flatten(2), case.geometry)
    helpers.assert_close(out, image_call(qkv, case.geometry, **options))
