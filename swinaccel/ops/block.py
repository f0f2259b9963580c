"""All of a block after its attention, without gradients: a function, and an operator that compilers keep whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.triton import block as kernels
from ..backends.triton import linear
from ..backends.triton.block import ADD_NORM, NORM_ADD, Affine, LaunchError
from ..backends.triton.launches import BoundLaunch, Launch, first_line
from ..backends.triton.problem import expected
from ..backends.triton.traced import traced_launch
from ..errors import ArgumentError
from ..layers import PLAIN_TENSORS
from .failures import failures
from .operators import register

HALVES = (torch.float16, torch.bfloat16)

Layer = tuple[Tensor, Tensor | None]  # weight and bias


def is_like(branch: Any, x: Tensor, dtype: torch.dtype) -> bool:
    """Return True if an attention gave what plain projections give: a tensor as x, of this dtype."""
    return (
        type(branch) in PLAIN_TENSORS
        and branch.dtype is dtype
        and branch.shape == x.shape
        and branch.device == x.device
        and branch.is_contiguous()
    )


class BoundRest:
    """All of a block after its attention, bound to its launches, without gradients; see `spec.block.Block`.

    Args:
        shape, dtype, device: of the block's input (..., C); the device with its index, as tensors have it.
        hidden: channels within the MLP.
        eps: of both norms.
        bound: how each launch is bound, if it is.
    Raises:
        LaunchError: a kernel cannot be planned.
    """

    __slots__ = (
        "_active", "_add", "_channels", "_gelu", "_hidden", "_in_one", "_is_half", "_last", "_parted", "_parts",
        "_project", "_run",
    )  # fmt: skip

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        hidden: int,
        eps: tuple[float, float],
        post_norm: bool,
        bound: Callable[[Launch], Any] = BoundLaunch,
    ) -> None:
        channels = shape[-1]
        rows = math.prod(shape[:-1])  # may be a symbol
        self._channels, self._hidden, self._is_half = channels, hidden, dtype in HALVES
        self._add: Any = None
        self._in_one: Any = None
        self._last: Any = None
        self._active: Any = None
        self._gelu: Any = None
        self._project: Any = None
        self._parted: Any = None
        self._parts = 1
        if not expected(rows):
            self._run: Any = BoundRest._nothing
            return
        has_descriptors = self._is_half and bound is not traced_launch
        if post_norm:
            self._add = bound(kernels.norm_launch(NORM_ADD, device, rows, channels, eps[0]))
        if kernels.pays_in_one(device, dtype, expected(rows), channels, hidden):
            launch = kernels.whole_mlp_launch(device, dtype, rows, channels, hidden, eps[1], not post_norm)
            self._in_one = bound(launch)
            self._run = BoundRest._with_mlp_in_one
            if has_descriptors and not post_norm:
                self._project = linear.linear_launch(device, rows, channels, channels, adds=True)
            return
        if has_descriptors:
            self._active = linear.linear_launch(device, rows, channels, hidden, gelu=True)
        if self._is_half:
            self._gelu = bound(kernels.gelu_launch(device, rows * hidden))
        if has_descriptors and post_norm:
            self._parted, self._parts = linear.parted_launch(device, rows, hidden, channels)
        mode = NORM_ADD if post_norm else ADD_NORM
        self._last = bound(kernels.norm_launch(mode, device, rows, channels, eps[1], parts=self._parts))
        self._run = BoundRest._in_parts

    @property
    def projects(self) -> bool:
        """Return True if it may be given the attention's last layer, whose product and sum are then one kernel."""
        return self._project is not None

    def run(
        self,
        x: Tensor,
        branch: Tensor,
        norms: tuple[Affine, Affine],
        linears: tuple[Layer, Layer],
        output: Layer | None = None,
    ) -> Tensor | None:
        """Return what a block returns whose input is x, and whose attention gave branch; None if that is not as x.

        Other tensors are contiguous, of the shapes, dtype and device that were bound: nothing looks at them again.

        Args:
            output: the attention's last layer, (C, C), which is still to be applied to branch, at every call or none.

        Raises:
            LaunchError: a kernel did not compile or fit.
        """
        if not is_like(branch, x, x.dtype):
            return None
        try:
            if output is None:
                return self._run(self, x, branch, norms, linears)
            return self._run(self, self._projected(x, branch, output), None, norms, linears)
        except torch.OutOfMemoryError:  # which says nothing of the kernels
            raise
        except Exception as error:
            raise LaunchError(first_line(error)) from error

    def _nothing(self, x: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(x)

    def _projected(self, x: Tensor, branch: Tensor, output: Layer) -> Tensor:
        """Return the sum of x and the attention."""
        total = torch.empty_like(x)
        if not linear.are_describable(x, branch, output[0]):
            return torch.add(x, F.linear(branch, *output), out=total)
        self._project(total, branch, *output, None, x)
        return total

    def _in_parts(
        self, x: Tensor, branch: Tensor, norms: tuple[Affine, Affine], linears: tuple[Layer, Layer]
    ) -> Tensor:
        (weight, bias, _), (fc1, (weight2, bias2)) = norms[1], linears
        post_norm = self._add is not None
        if post_norm:
            y = total = self._added(x, branch, norms[0])
        else:
            total, y = torch.empty_like(x), torch.empty_like(x)
            self._last(x, y, total, None, branch, None, weight, bias, bias2)
        if self._active is not None and not (y.data_ptr() | fc1[0].data_ptr()) & 15:  # where a descriptor can begin
            hidden = x.new_empty((*x.shape[:-1], self._hidden))
            self._active(hidden, y, *fc1, None, None)
        else:
            hidden = F.linear(y, *fc1)
            if self._is_half:
                self._gelu(hidden, hidden)  # in its place
            else:
                torch.ops.aten.gelu_(hidden)
        if post_norm:
            out = torch.empty_like(x)
            if self._parted is None:
                self._last(total, out, None, None, F.linear(hidden, weight2, bias2), None, weight, bias, None)
            else:
                branch = x.new_empty((self._parts, *x.shape), dtype=torch.float32)
                self._parted(branch, hidden, weight2, None, None, None)
                self._last(total, out, None, None, branch, None, weight, bias, bias2)
            return out
        # The second product adds to the sum, which holds its bias already, where it lies.
        total.view(-1, self._channels).addmm_(hidden.view(-1, self._hidden), weight2.t())
        return total

    def _with_mlp_in_one(self, x: Tensor, branch: Tensor | None, norms: Any, linears: Any) -> Tensor:
        if self._add is not None:
            x, branch = self._added(x, cast(Tensor, branch), norms[0]), None
        out, (weight, bias, _), (fc1, fc2) = torch.empty_like(x), norms[1], linears
        self._in_one(out, x, branch, weight, bias, *fc1, *fc2)
        return out

    def _added(self, x: Tensor, branch: Tensor, affine: Affine) -> Tensor:
        """Return x + norm(branch)."""
        total = torch.empty_like(x)
        self._add(x, total, None, None, branch, None, *affine[:2], None)
        return total


def _traced(x: Tensor, branch: Tensor, *arguments: Any, bound: Callable[[Launch], Any]) -> Tensor:
    """Compute what the operator does, as compilers see it."""
    norms, linears = (arguments[:3], arguments[3:6]), (arguments[6:8], arguments[8:10])
    _check(x, branch, *arguments)
    eps, hidden = (norms[0][2], norms[1][2]), linears[0][0].shape[0]
    rest = BoundRest(x.shape, x.dtype, x.device, hidden, eps, arguments[10], bound)
    return cast(Tensor, rest._run(rest, x.contiguous(), branch.contiguous(), norms, linears))


def _operator(x: Tensor, branch: Tensor, *arguments: Any) -> Tensor:
    """Return what a block returns whose input is x, and whose attention gave branch; see `spec.block.Block`."""
    norms, linears, post_norm = (arguments[:3], arguments[3:6]), (arguments[6:8], arguments[8:10]), arguments[10]
    _check(x, branch, *arguments)
    x, branch, hidden = x.contiguous(), branch.contiguous(), linears[0][0].shape[0]
    problem = "after attention", x.device, x.dtype, x.shape[-1], linears[0][0].shape, post_norm
    if failures.get(problem) is None:
        try:  # with launches that are looked at anew at each call
            eps = norms[0][2], norms[1][2]
            rest = BoundRest(x.shape, x.dtype, x.device, hidden, eps, post_norm, lambda launch: launch)
            return cast(Tensor, rest.run(x, branch, norms, linears))
        except LaunchError as error:
            failures.record(problem, str(error))
    return _plain(x, branch, norms, linears, post_norm)


def _check(x: Tensor, branch: Tensor, *arguments: Any) -> None:
    """Raise where the kernels would read a tensor otherwise than it is."""
    weight, bias, _, weight2, bias2, _, fc1, fc1_bias, fc2, fc2_bias, _ = arguments
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


register(
    "after_attention(Tensor x, Tensor branch, Tensor? norm1_weight, Tensor? norm1_bias, float eps1,"
    " Tensor? norm2_weight, Tensor? norm2_bias, float eps2, Tensor weight1, Tensor? bias1, Tensor weight2,"
    " Tensor? bias2, bool post_norm) -> Tensor",
    _operator, _fake, inside=_traced, batched=2,
)  # fmt: skip
