"""Run the layers around the attention where gradients are recorded, or autocast has dtypes between the layers.

As in inference, norms are fused with the sums beside them; what a layer is given is written in that layer's dtype at
once, and gradients are added where they are made. Kept for the backward are the residual stream, two numbers of each
row for each norm, two inputs of the MLP, and patches that are merged: not GELU, which is computed again.

Gradients that are to be differentiated again are PyTorch's own, of the same formulas; and so are those that a kernel
cannot give, such as of a batch of gradients.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.triton import block as kernels
from ..backends.triton import block_bwd as backward_kernels
from ..backends.triton.block import ADD, ADD_NORM, NORM, NORM_ADD, Affine
from ..backends.triton.linear import linear_gelu_kept
from ..spec.reference_block import unmerged
from .block import HALVES
from .recomputed import recomputed_gradients


def norm(x: Tensor, affine: Affine, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x, and its layer norm in a dtype: the gradients of both are added as they are made."""
    return _Norm.apply(x, *affine, dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        stats, out = _stats(x), torch.empty_like(x, dtype=dtype)
        kernels.run_norm(NORM, x, None, (weight, bias, eps), out=out, stats=stats)
        ctx.save_for_backward(x, stats, weight, bias)
        ctx.eps = eps
        return x, out

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_out: Tensor | None) -> tuple[Any, ...]:
        if grad_out is None:
            return grad_x, None, None, None, None
        x, stats, weight, bias = ctx.saved_tensors
        if not torch.is_grad_enabled():
            grad, other = torch.empty_like(x), None if grad_x is None else grad_x.contiguous()
            with suppress(kernels.LaunchError):
                sums = backward_kernels.norm(NORM, grad_out.contiguous(), other, x, stats, None, weight, grad_x=grad)
                return grad, *_like(sums, weight, bias), None, None
        own, *others = _norm_gradients(ctx.eps, x, weight, bias, grad_out)
        return own if grad_x is None else grad_x if own is None else own + grad_x, *others, None, None


def add_norm(x: Tensor, branch: Tensor, scale: Tensor | None, affine: Affine) -> tuple[Tensor, Tensor]:
    """Return x + scale · branch in the dtype of x, and its layer norm in that of branch; scale: (samples,), or None."""
    return _AddNorm.apply(x, branch, scale, *affine)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, scale: Tensor | None, weight: Any, bias: Any, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, out, stats = torch.empty_like(x), torch.empty_like(branch), _stats(x)
        kernels.run_norm(ADD_NORM, x, branch, (weight, bias, eps), out=out, total=total, stats=stats, scale=scale)
        ctx.save_for_backward(total, stats, scale, weight, bias)
        ctx.eps = eps
        return total, out

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad_out: Tensor) -> tuple[Any, ...]:
        total, stats, scale, weight, bias = ctx.saved_tensors
        if not torch.is_grad_enabled():
            grad_x = torch.empty_like(total)
            is_same = scale is None and total.dtype is grad_out.dtype
            grad_branch = None if is_same else torch.empty_like(total, dtype=grad_out.dtype)
            grads, saved = (grad_out.contiguous(), grad_total.contiguous()), (total, stats, scale, weight)
            with suppress(kernels.LaunchError):
                sums = backward_kernels.norm(ADD_NORM, *grads, *saved, grad_x=grad_x, grad_branch=grad_branch)
                grad_branch = _with_sums(grad_x if grad_branch is None else grad_branch, sums[2])
                return grad_x, grad_branch, None, *_like(sums[:2], weight, bias), None
        grad, *others = _norm_gradients(ctx.eps, total, weight, bias, grad_out)
        grad_x = grad_total if grad is None else grad_total + grad
        return grad_x, _scaled(grad_x, scale).to(grad_out.dtype), None, *others, None


def norm_add(
    x: Tensor, branch: Tensor, scale: Tensor | None, affine: Affine, dtype: torch.dtype, wants_copy: bool
) -> tuple[Tensor, Tensor | None]:
    """Return x + scale · the layer norm of branch in a dtype, and, if wanted, the same in the dtype of branch."""
    return _NormAdd.apply(x, branch, scale, *affine, dtype, wants_copy and dtype is not branch.dtype)


class _NormAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        scale: Tensor | None,
        weight: Any,
        bias: Any,
        eps: float,
        dtype: torch.dtype,
        wants_copy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        out, stats = torch.empty_like(x, dtype=dtype), _stats(x)
        other = torch.empty_like(branch) if wants_copy else None
        kernels.run_norm(NORM_ADD, x, branch, (weight, bias, eps), out=out, total=other, stats=stats, scale=scale)
        ctx.save_for_backward(branch, stats, scale, weight, bias)
        ctx.eps, ctx.dtype = eps, x.dtype
        return out, other

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_other: Tensor | None) -> tuple[Any, ...]:
        branch, stats, scale, weight, bias = ctx.saved_tensors
        if not torch.is_grad_enabled():
            is_same = grad_other is None and grad_out.dtype is ctx.dtype
            grad_x = None if is_same else torch.empty_like(grad_out, dtype=ctx.dtype)
            grad_branch = torch.empty_like(branch)
            grads = grad_out.contiguous(), None if grad_other is None else grad_other.contiguous()
            saved = branch, stats, scale, weight
            with suppress(kernels.LaunchError):
                sums = backward_kernels.norm(NORM_ADD, *grads, *saved, grad_x=grad_x, grad_branch=grad_branch)
                grad_x = grads[0] if grad_x is None else grad_x
                grad_branch = _with_sums(grad_branch, sums[2])
                return grad_x, grad_branch, None, *_like(sums[:2], weight, bias), None, None, None
        total = grad_out if grad_other is None else grad_out + grad_other
        grad, *others = _norm_gradients(ctx.eps, branch, weight, bias, _scaled(total, scale))
        return total.to(ctx.dtype), grad, None, *others, None, None, None


def merge(x: Tensor, affine: Affine | None, dtype: torch.dtype) -> Tensor:
    """Return each four neighbours of an image (B, H, W, C), or their layer norm, in a dtype."""
    if not torch.is_grad_enabled():  # as under autocast in inference, where nothing is kept
        return kernels.merge(x, affine, dtype)
    return _Merge.apply(x, dtype) if affine is None else _MergeNorm.apply(x, *affine, dtype)[1]


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.image = x.shape, x.dtype
        return kernels.merge(x, None, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _unmerged(grad, *ctx.image), None


class _MergeNorm(torch.autograd.Function):
    """Keeps the neighbours, as the original does, and not the image, which others may write to.

    They are an output for the sake of second derivatives.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, height, width, channels = x.shape
        patches = x.new_empty((batch, (height + 1) // 2, (width + 1) // 2, 4 * channels))
        stats = _stats(patches)
        out = kernels.merge(x, (weight, bias, eps), dtype, (patches, stats))
        ctx.save_for_backward(patches, stats, weight, bias)
        ctx.eps, ctx.image = eps, (x.shape, x.dtype)
        return patches, out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_out: Tensor | None) -> tuple[Any, ...]:
        patches, stats, weight, bias = ctx.saved_tensors
        others: list[Tensor | None] = [None, None]
        if grad_out is not None:
            if grad is None and not torch.is_grad_enabled():
                (shape, dtype), kept = ctx.image, (patches, stats)
                with suppress(kernels.LaunchError):
                    grad_x, sums = backward_kernels.merge(grad_out.contiguous(), shape, dtype, kept, weight)
                    return grad_x, *_like(sums, weight, bias), None, None
            own, *others = _norm_gradients(ctx.eps, patches, weight, bias, grad_out)
            grad = own if grad is None else grad if own is None else grad + own
        return None if grad is None else _unmerged(grad, *ctx.image), *others, None, None


def _unmerged(grad: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the gradient of an image from that of its merged neighbours."""
    if not torch.is_grad_enabled():
        with suppress(kernels.LaunchError):
            return backward_kernels.merge(grad.contiguous(), shape, dtype)[0]
    return unmerged(grad, shape).to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x weightᵀ + bias, as a product in a 16-bit dtype."""
    return _Linear.apply(x.to(dtype), weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        cast, needs = weight.detach().to(x.dtype), ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, cast if needs[0] else None)
        ctx.parameters, ctx.shape = (weight, bias), x.shape
        return F.linear(x, cast, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, cast), (weight, bias), needs = ctx.saved_tensors, ctx.parameters, ctx.needs_input_grad
        rows, twice = grad.reshape(-1, grad.shape[-1]), torch.is_grad_enabled()
        grad_x = grad_weight = grad_bias = None
        if needs[0]:
            grad_x = (rows @ (_saved_with_grad(cast, weight) if twice else cast)).view(ctx.shape)
        if needs[1]:
            others = x.reshape(-1, x.shape[-1])
            grad_weight = (rows.t() @ others).to(weight.dtype) if twice else _product(rows.t(), others, weight.dtype)
        if needs[2]:
            grad_bias = _column_sums(grad, twice).to(bias.dtype)
        return grad_x, grad_weight, grad_bias


def _column_sums(grad: Tensor, twice: bool) -> Tensor:
    if not twice:
        with suppress(kernels.LaunchError):
            return _scaled_columns(grad, None, grad.dtype)[1]
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)


def _with_sums(grad: Tensor, sums: Tensor) -> Tensor:
    """Return a gradient, with the sums of its columns for the layer that it goes to next."""
    if not grad.is_inference():  # whose changes nobody counts
        grad.column_sums = sums, grad._version  # type: ignore[attr-defined]
    return grad


def _scaled_columns(grad: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `block_bwd.scaled_columns` of a gradient (..., C), whose sums may have come with it."""
    rows = grad.contiguous().view(-1, grad.shape[-1])
    if scale is None and grad.dtype is dtype:
        # Taken away: they may become a parameter's gradient, which is its owner's to change.
        sums, version = grad.__dict__.pop("column_sums", (None, None))
        if sums is not None and version == grad._version:
            return rows, sums
    return backward_kernels.scaled_columns(rows, scale, dtype)


def mlp(x: Tensor | None, y: Tensor, scale: Tensor | None, fc1: Any, fc2: Any) -> Tensor:
    """Return fc2(GELU(fc1(y))) in the dtype of y, or x + scale · that in the dtype of x; fc1, fc2: weight and bias."""
    return _Mlp.apply(x, y, scale, *fc1, *fc2)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, y: Tensor, scale: Any, weight1: Any, bias1: Any, weight2: Any, bias2: Any) -> Tensor:
        dtype, rows = y.dtype, y.view(-1, y.shape[-1])
        first, second = weight1.detach().to(dtype), weight2.detach().to(dtype)
        hidden, active = _hidden(rows, first, None if bias1 is None else bias1.to(dtype))
        branch = F.linear(active, second, None if bias2 is None else bias2.to(dtype)).view(y.shape)
        ctx.save_for_backward(y, scale, hidden, first, second)
        ctx.parameters = weight1, bias1, weight2, bias2  # which may change meanwhile: what was saved counts
        if x is None:
            return branch
        out = torch.empty_like(x)
        kernels.run_norm(ADD, x, branch, (None, None, 0.0), total=out, scale=scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        y, scale, hidden, first, second = ctx.saved_tensors
        needs = ctx.needs_input_grad
        weight1, bias1, weight2, bias2 = ctx.parameters
        grad_x = grad if needs[0] else None
        if not torch.is_grad_enabled():
            with suppress(kernels.LaunchError):
                grad_branch, sums2 = _scaled_columns(grad, scale, y.dtype)
                grad_hidden, active, sums1 = _hidden_backward(grad_branch, second, hidden)
                grads = (
                    _product(grad_hidden.t(), y.view(-1, y.shape[-1]), weight1.dtype) if needs[3] else None,
                    sums1.to(bias1.dtype) if needs[4] else None,
                    _product(grad_branch.t(), active, weight2.dtype) if needs[5] else None,
                    sums2.to(bias2.dtype) if needs[6] else None,
                )
                return grad_x, (grad_hidden @ first).view(y.shape) if needs[1] else None, None, *grads
        grad_branch = _scaled(grad, scale).to(y.dtype)
        grad_y, *others = _mlp_gradients(y, ctx.parameters, (hidden, first, second), grad_branch)
        return grad_x, grad_y, None, *others


def _hidden(y: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return y weightᵀ + bias, and its GELU."""
    if y.dtype not in HALVES:
        hidden = F.linear(y, weight, bias)
        return hidden, F.gelu(hidden)
    with suppress(kernels.LaunchError):
        if (both := linear_gelu_kept(y, weight, bias)) is not None:
            return both
    hidden = F.linear(y, weight, bias)
    return hidden, kernels.gelu(hidden)


def _hidden_backward(grad: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of hidden from that of GELU(hidden) weightᵀ, GELU(hidden), and the gradient's column sums."""
    grad = grad @ weight
    if hidden.dtype in HALVES:
        return backward_kernels.gelu(grad, hidden)
    grad = torch.ops.aten.gelu_backward(grad, hidden)
    return grad, F.gelu(hidden), grad.sum(0)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a b in a dtype, to which sums are rounded from fp32 but once, where that is possible."""
    if a.is_cuda and a.dtype in HALVES and dtype is torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def _stats(x: Tensor) -> Tensor:
    """Return room for mean and reciprocal standard deviation of each row."""
    return torch.empty((2, x.numel() // x.shape[-1]), dtype=torch.float32, device=x.device)


def _like(sums: Tensor, weight: Tensor | None, bias: Tensor | None) -> list[Tensor | None]:
    """Return the gradients of a norm's parameters, in their dtypes."""
    pairs = zip(sums.unbind(), (weight, bias), strict=True)
    return [None if one is None else total if one.dtype is total.dtype else total.to(one.dtype) for total, one in pairs]


def _norm_gradients(eps: float, x: Tensor, weight: Any, bias: Any, grad: Tensor) -> list[Tensor | None]:
    """Return the gradients of x and of the parameters of its layer norm, from that of the norm."""

    def norm(x: Tensor, weight: Any, bias: Any) -> Tensor:
        weight, bias = (None if one is None else one.float() for one in (weight, bias))
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(grad.dtype)

    return recomputed_gradients(norm, (x, weight, bias), grad, torch.is_grad_enabled())


def _mlp_gradients(y: Tensor, parameters: Any, saved: tuple[Tensor, ...], grad: Tensor) -> list[Tensor | None]:
    """Return the gradients of y and of the parameters of its MLP, from that of the MLP."""

    def mlp(y: Tensor, weight1: Any, bias1: Any, weight2: Any, bias2: Any) -> Tensor:
        hidden, first, second = saved
        bias1, bias2 = (None if one is None else one.to(y.dtype) for one in (bias1, bias2))
        again = F.linear(y.view(-1, y.shape[-1]), _saved_with_grad(first, weight1), bias1)
        active = F.gelu(_saved_with_grad(hidden, again))
        return F.linear(active, _saved_with_grad(second, weight2), bias2).view(grad.shape)

    return recomputed_gradients(mlp, (y, *parameters), grad, torch.is_grad_enabled())


def _saved_with_grad(saved: Tensor, now: Tensor) -> Tensor:
    """Return a saved tensor with the gradient of what it was made of, whose numbers may have changed since."""
    now = now.to(saved.dtype)
    return saved + (now - now.detach())


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """Return each sample multiplied by its factor."""
    return x if scale is None else x * scale.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
