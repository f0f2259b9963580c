"""All of a block after its attention, without gradients: a function, and an operator that compilers keep whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.triton import block as kernels
from ..backends.triton.block import Affine, LaunchError
from ..errors import ArgumentError
from .failures import failures

_HALVES = (torch.float16, torch.bfloat16)

Layer = tuple[Tensor, Tensor | None]  # weight and bias


def after_attention(
    x: Tensor, branch: Tensor, norms: tuple[Affine, Affine], linears: tuple[Layer, Layer], post_norm: bool
) -> Tensor:
    """What a block returns whose input is x, and whose attention gave branch; see `spec.block.Block`.

    Raises:
        LaunchError: a kernel did not compile or fit.
    """
    (norm1, norm2), (fc1, fc2) = norms, linears
    hidden, channels = fc1[0].shape
    in_one = kernels.is_one_kernel(x, fc1[0])
    if post_norm:
        total = kernels.norm_add(x, branch, norm1)
        if in_one:
            return kernels.mlp(total, None, norm2, fc1, fc2)
        return kernels.norm_add(total, F.linear(_active(total, fc1), *fc2), norm2)
    if in_one:
        return kernels.mlp(x, branch, norm2, fc1, fc2)
    weight, bias = fc2
    total, y = kernels.add_norm(x, branch, norm2, bias)
    # The second product adds to the sum, which holds its bias already, where it lies.
    total.view(-1, channels).addmm_(_active(y, fc1).view(-1, hidden), weight.t())
    return total


def _active(x: Tensor, fc1: Layer) -> Tensor:
    is_half = x.dtype in _HALVES
    active = kernels.linear_gelu(x, *fc1) if is_half else None
    if active is None:
        hidden = F.linear(x, *fc1)
        active = kernels.gelu(hidden, out=hidden) if is_half else torch.ops.aten.gelu_(hidden)
    return active


def compiled_after_attention(
    x: Tensor, branch: Tensor, norms: tuple[Affine, Affine], linears: tuple[Layer, Layer], post_norm: bool
) -> Tensor:
    """The same, for a compiler's trace; a kernel that fails is replaced by plain PyTorch."""
    return torch.ops.swinaccel.after_attention(x, branch, *norms[0], *norms[1], *linears[0], *linears[1], post_norm)


_library = torch.library.Library("swinaccel", "FRAGMENT")
_library.define(
    "after_attention(Tensor x, Tensor branch, Tensor? norm1_weight, Tensor? norm1_bias, float eps1,"
    " Tensor? norm2_weight, Tensor? norm2_bias, float eps2, Tensor weight1, Tensor? bias1, Tensor weight2,"
    " Tensor? bias2, bool post_norm) -> Tensor"
)


def _operator(x: Tensor, branch: Tensor, *arguments: Any) -> Tensor:
    norms, linears = (arguments[:3], arguments[3:6]), (arguments[6:8], arguments[8:10])
    _check(x, branch, *arguments)
    x, branch = x.contiguous(), branch.contiguous()
    problem = "after attention", x.device, x.dtype, x.shape[-1], linears[0][0].shape, arguments[10]
    if failures.get(problem) is None:
        try:
            return after_attention(x, branch, norms, linears, arguments[10])
        except LaunchError as error:
            failures.record(problem, str(error))
    return _plain(x, branch, norms, linears, arguments[10])


def _check(
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    _: float,
    weight2: Tensor | None,
    bias2: Tensor | None,
    __: float,
    fc1: Tensor,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_bias: Tensor | None,
    *___: bool,
) -> None:
    """Raise where the kernels would read a tensor otherwise than it is."""
    channels, hidden, dtype = x.shape[-1:], fc1.shape[:1], x.dtype
    for name, one, shape in (
        ("branch", branch, x.shape),
        ("norm1_weight", weight, channels),
        ("norm1_bias", bias, channels),
        ("norm2_weight", weight2, channels),
        ("norm2_bias", bias2, channels),
        ("weight1", fc1, hidden + channels),
        ("bias1", fc1_bias, hidden),
        ("weight2", fc2, channels + hidden),
        ("bias2", fc2_bias, channels),
    ):
        if one is not None and (one.shape != shape or one.dtype is not dtype):
            raise ArgumentError(f"{name} must have shape {tuple(shape)}, {dtype}; got {tuple(one.shape)}, {one.dtype}")
        if one is not None and one is not branch and not one.is_contiguous():
            raise ArgumentError(f"{name} must be contiguous; got strides {one.stride()}")


def _plain(x: Tensor, branch: Tensor, norms: Any, linears: Any, post_norm: bool) -> Tensor:
    def norm(y: Tensor, affine: Affine) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], *affine)

    def mlp(y: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(y, *linears[0])), *linears[1])

    x = x + (norm(branch, norms[0]) if post_norm else branch)
    return x + (norm(mlp(x), norms[1]) if post_norm else mlp(norm(x, norms[1])))


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


for _key in ("CUDA", "CPU"):
    _library.impl("after_attention", _operator, _key)
torch.library.register_fake("swinaccel::after_attention", _fake, lib=_library)
