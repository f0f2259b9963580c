"""Kernels around the attention, each called by itself, as the package calls them only together."""

from __future__ import annotations

import torch
from torch import Tensor

from swinaccel.backends.triton import block as kernels
from swinaccel.backends.triton.block import ADD_NORM, NORM_ADD, Affine


def add_norm(x: Tensor, branch: Tensor, affine: Affine, total_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x + branch + total_bias, and the layer norm of x + branch, which is not rounded before."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    kernels.run_norm(ADD_NORM, x, branch, affine, out=out, total=total, more_bias=total_bias)
    return total, out


def norm_add(x: Tensor, branch: Tensor, affine: Affine) -> Tensor:
    """Return x + the layer norm of branch, which is not rounded before."""
    out = torch.empty_like(x)
    kernels.run_norm(NORM_ADD, x, branch, affine, out=out)
    return out


def mlp(
    x: Tensor,
    branch: Tensor | None,
    affine: Affine,
    fc1: tuple[Tensor, Tensor | None],
    fc2: tuple[Tensor, Tensor | None],
) -> Tensor:
    """Run all of a block after its attention, where `mlp_launch` has a launch; branch is the attention's output."""
    (hidden, channels), (weight, bias, eps) = fc1[0].shape, affine
    rows, out = x.numel() // channels, torch.empty_like(x)
    if rows:
        launch = kernels.whole_mlp_launch(x.device, x.dtype, rows, channels, hidden, eps, branch is not None)
        kernels.run(launch, out, x, branch, weight, bias, *fc1, *fc2)
    return out
