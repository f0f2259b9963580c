"""Windows that are cut already, as functions take them: problems, calls, and their comparison by one oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import helpers
import pytest
import torch
from gradients import exactly
from helpers import TRITON_DEVICE
from torch import Tensor

from swinaccel import functional
from swinaccel.spec import reference

WINDOWS = ("q", "k", "v", "bias", "logit_scale")
IMAGES = ("qkv", "table", "bias", "padding", "logit_scale")
BOTH = pytest.mark.parametrize("backend", ["triton", "torch"], indirect=True)
SMALL_AND_LARGE = pytest.mark.parametrize("tokens", [9, 66], ids=["small", "large"])


@dataclass(frozen=True)
class Case:
    """Windows that are cut already; what is not given is random, of a spread that makes weights uneven."""

    tokens: int
    windows: int = 2
    heads: int = 1
    dim: int = 12
    cosine: bool = False
    has_bias: bool = True
    masks: int = 0
    scale: float | None = None
    rows: int = 0

    def __str__(self) -> str:
        parts = [f"{self.windows}x{self.heads}x{self.tokens}x{self.dim}"]
        parts += [f"rows{self.rows}"] if self.rows else []
        parts += ["cosine"] if self.cosine else []
        parts += [] if self.has_bias else ["nobias"]
        parts += [f"masks{self.masks}"] if self.masks else []
        parts += [f"scale{self.scale}"] if self.scale is not None else []
        return "-".join(parts)

    def make(self, dtype: torch.dtype = torch.float32, device: str = TRITON_DEVICE, seed: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed + self.tokens)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        inputs: dict[str, Any] = {
            name: 1.5 * randn(self.windows, self.heads, self.tokens, self.dim) for name in ("q", "k", "v")
        }
        rows = (self.rows,) if self.rows else ()
        inputs["bias"] = randn(*rows, self.heads, self.tokens, self.tokens) if self.has_bias else None
        inputs["logit_scale"] = 1 + randn(self.heads) if self.cosine else None
        mask = torch.rand(self.masks, self.tokens, self.tokens, generator=generator) < 0.3
        inputs["mask"] = -100.0 * mask.to(device, dtype) if self.masks else None
        if self.scale is not None:
            inputs["scale"] = self.scale
        return inputs


def call(q: Tensor, k: Tensor, v: Tensor, logit_scale: Tensor | None = None, **options: Any) -> Tensor:
    if logit_scale is None:
        return functional.window_attention(q, k, v, **options)
    return functional.cosine_window_attention(q, k, v, logit_scale, **options)


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """`reference.attention` with a mask, and where there are rows of them a bias, for every window."""
    options.setdefault("scale", q.shape[-1] ** -0.5)
    bias = options.get("bias")
    if bias is not None and bias.dim() == 4:
        options["bias"] = bias[torch.arange(q.shape[0], device=bias.device) % bias.shape[0]]
    if mask is not None:
        mask = mask[torch.arange(q.shape[0], device=mask.device) % mask.shape[0]]
    return reference.attention(q, k, v, mask=mask, **options)


def differentiate(
    attend: Any, inputs: dict[str, Any], names: tuple[str, ...], grad: Tensor | None = None, change: Any = lambda t: t
) -> dict[str, Tensor]:
    """Output and gradients by name."""
    leaves = {name: change(value.detach()) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    leaves |= {name: leaves[name].clone().requires_grad_() for name in names if leaves.get(name) is not None}
    out = attend(**leaves)
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    wanted = {name: leaves[name] for name in names if leaves.get(name) is not None}
    found = torch.autograd.grad(out, tuple(wanted.values()), grad.to(out))
    return {"out": out.detach(), **dict(zip(wanted, found, strict=True))}


def compare(inputs: dict[str, Any], attend: Any = call, exact: Any = oracle, names: tuple[str, ...] = WINDOWS) -> None:
    """Output and every gradient: fp32 against fp64, lower precision by its errors beside plain PyTorch's."""
    found = differentiate(attend, inputs, names)
    truth = differentiate(exact, inputs, names, change=exactly)
    theirs = differentiate(exact, inputs, names)
    for name, expected in truth.items():
        one = found[name]
        source = inputs["q" if "q" in inputs else "qkv"] if name == "out" else inputs[name]
        assert one.shape == expected.shape, name
        assert one.dtype == source.dtype, name
        assert bool(torch.isfinite(one).all()), f"{name}: unwritten or overflown"
        own = (theirs[name].double() - expected).abs().max()
        if one.dtype == torch.float64:
            helpers.assert_close(one, expected, 1e-12)
        elif one.dtype == torch.float32:
            # Of a gradient that vanishes, what is left of its terms is no more than their roundings.
            error = (one.double() - expected).abs().max()
            times = 6 if expected.numel() < 16 else 2  # of few values, two largest errors are not alike
            allowed = max(helpers.FP32 * expected.abs().max().clamp_min(1.0), times * own)
            assert error <= allowed, f"{name} is off by {error:.1e}, {allowed:.1e} is allowed"
        elif expected.numel() < 16:  # too few for statistics
            allowed = 6 * max(own, torch.finfo(one.dtype).eps * expected.abs().max())
            assert (one.double() - expected).abs().max() <= allowed, name
        else:
            try:
                helpers.assert_no_worse(one, theirs[name], expected, one.dtype)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
