"""The operators, as PyTorch sees them: one opaque call each for eager mode, autocast, torch.compile and export.

Dispatch and the functions reach the window kernels through here alone. A kernel that fails is not an error: the failure
is noted once, with its problem, and the same numbers are computed in plain PyTorch; dispatch then keeps to the
originals. Memory that runs out is the caller's to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.triton import window as forward_launches
from ..backends.triton import window_bwd as backward_launches
from ..backends.triton.problem import Operands, empty_image, unsupported_reason
from ..spec.window import Geometry
from .failures import NOT_THE_KERNELS
from .observed import count_modes, is_observed, is_profiled
from .operators import register
from .window_plain import (
    dense,
    geometry_of,
    is_readable,
    lse_shape_of,
    note_failure,
    operands_of,
    problem,
    reference_gradients,
    reference_of,
)

__all__ = ["BoundAttention", "bind", "problem", "shifted_window_attention", "unsupported_reason"]


def shifted_window_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    geometry: Geometry,
    *,
    num_heads: int,
    table: Tensor | None = None,
    index: Tensor | None = None,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
    mask_value: float = -100.0,
    scale: float = 1.0,
    logit_scale: Tensor | None = None,
    factors: Sequence[Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend from image to image as `reference.shifted_window_attention` does, by the Triton kernels.

    Args:
        qkv: (B, H, W, 3 * heads * D) packed as q, k, v, or the three (B, H, W, heads * D) or (B, H, W, heads, D)
            apart; images of volumes have their depth before H.
        factors: see `backends.triton.shifted_window_attention`; not used where gradients are recorded.
        dropout: probability at which an attention weight is dropped; drawn from PyTorch's generator.
    Returns:
        (B, H, W, heads * D), or (B, H, W, heads, D) as q; dtype of qkv, softmax and sums in fp32. Differentiable in
        qkv, table, padding and logit_scale.
    """
    packed, k, v = (qkv, None, None) if isinstance(qkv, Tensor) else qkv
    for_backward = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (packed, k, v, table, padding, logit_scale)
    )
    seed = torch.randint(2**62, (1,), device=packed.device) if dropout else None
    arguments = (
        packed, k, v, table, index, padding, mask, logit_scale, seed, num_heads, geometry.window, geometry.shift,
        geometry.roll_first, mask_value, scale, dropout, for_backward, None if for_backward else factors,
    )  # fmt: skip
    if is_observed():
        return torch.ops.swinaccel.shifted_window_attention(*arguments)[0]
    if for_backward:  # the same, less the dispatcher's time
        return _Attention.apply(geometry, *arguments)
    return _forward(*arguments, geometry=geometry)[0]


_setting = torch.get_float32_matmul_precision


class BoundAttention:
    """Attention of one problem in inference, bound to its launches; see `bind`."""

    __slots__ = ("_forward", "_geometry", "_options", "_precision")

    def __init__(self, forward: Any, geometry: Geometry, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self._forward, self._geometry, self._options = forward, geometry, options
        self._precision: Any = None  # of products in fp32, as PyTorch was told
        if dtype is torch.float32:
            try:
                self._precision = _setting()
            except RuntimeError:  # there is more than one setting, which calls look at
                self._precision = object()

    def run(
        self,
        qkv: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        table: Tensor | None,
        index: Tensor | None,
        padding: Tensor | None = None,
        mask: Tensor | None = None,
        logit_scale: Tensor | None = None,
    ) -> Tensor:
        """Return what `shifted_window_attention` gives, to the last bit; no gradient is recorded.

        Shapes, strides, dtypes and the device are those that were bound: nothing here looks at them again. Of
        logit_scale only the numbers count.
        """
        if not count_modes() and not is_profiled():  # `is_observed`, of a call that no compiler traces
            try:
                if self._precision is None or _setting() == self._precision:
                    return self._forward.run(qkv, k, v, table, index, padding, mask, logit_scale)[0]
            except NOT_THE_KERNELS:
                raise
            except Exception:  # which the operator meets again, notes, and does without
                pass
        tokens = qkv if k is None or v is None else (qkv, k, v)
        logit_scale = None if logit_scale is None else logit_scale.reshape(-1)
        given: dict[str, Any] = {
            "table": table,
            "index": index,
            "padding": padding,
            "mask": mask,
            "logit_scale": logit_scale,
        }
        with torch.no_grad():
            return shifted_window_attention(tokens, self._geometry, **given, **self._options)


def bind(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    geometry: Geometry,
    *,
    num_heads: int,
    mask_value: float = -100.0,
    scale: float = 1.0,
    **tensors: Tensor | None,
) -> BoundAttention:
    """Bind attention in inference, without dropout and factors, to its launches.

    Args:
        qkv, **tensors: as of `shifted_window_attention`; only their forms count.
    Raises:
        ArgumentError: see `backends.triton.window.bind`.
    """
    parts = (qkv, None, None) if isinstance(qkv, Tensor) else qkv
    others = map(tensors.get, ("table", "index", "padding", "mask", "logit_scale"))
    place = num_heads, geometry.window, geometry.shift, geometry.roll_first
    call = Operands._make((*parts, *others, None, *place, mask_value, scale, 0.0))
    options = {"num_heads": num_heads, "mask_value": mask_value, "scale": scale}
    return BoundAttention(forward_launches.bind(call, geometry), geometry, parts[0].dtype, options)


def _forward(*arguments: Any, geometry: Geometry | None = None, bound: Any = None) -> tuple[Tensor, Any]:
    """Run the forward of the operator, whose schema names the arguments; `bound` as the backend's."""
    call = operands_of(arguments)
    for_backward, factors = arguments[16:]
    geometry = geometry or geometry_of(call)
    if not is_readable(call.qkv, call.k, call.v, geometry):
        call = operands_of(arguments, geometry)
    factors = None if factors is None or bound is not None else tuple(factors)
    try:
        return forward_launches.shifted_window_attention(call, geometry, factors, for_backward, bound)
    except NOT_THE_KERNELS:
        raise
    except Exception as error:
        if bound is not None:
            raise
        note_failure(error, call, geometry)
        out = dense(reference_of(call, geometry).to(call.qkv.dtype), geometry)
        return out, torch.empty(lse_shape_of(call, geometry, for_backward), device=out.device)


def _backward(grad: Tensor, *arguments: Any, geometry: Geometry | None = None) -> tuple[Tensor, ...]:
    """Run the backward of the operator, whose schema names the arguments."""
    out, lse, *rest, grad_table = arguments
    geometry = geometry or geometry_of(Operands._make(rest))
    call = operands_of(rest, geometry)
    try:
        gradients: Sequence[Tensor | None] = backward_launches.shifted_window_attention_backward(
            dense(grad, geometry), out, lse, call, geometry, grad_table
        )
    except NOT_THE_KERNELS:
        raise
    except Exception as error:
        note_failure(error, call, geometry)
        gradients = reference_gradients(grad, call, geometry, twice=False)
    return tuple(call.qkv.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, *output)


def _save(ctx: Any, inputs: tuple[Any, ...], out: Tensor, lse: Tensor) -> None:
    ctx.options = inputs[9:16]
    is_small = lse.dim() == 1
    ctx.save_for_backward(*inputs[:9], None if is_small else out, lse)


class _Attention(torch.autograd.Function):
    """The operator with its gradients, for calls that are not observed: half the time of PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, geometry: Geometry, *arguments: Any) -> Tensor:
        out, lse = _forward(*arguments, geometry=geometry)
        _save(ctx, arguments, out, lse)
        ctx.geometry = geometry
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_gradients(ctx, grad, ctx.needs_input_grad[1:], ctx.geometry))


def _autograd_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad, ctx.needs_input_grad, None)


def _gradients(
    ctx: Any, grad: Tensor, needs_grad: tuple[bool, ...], geometry: Geometry | None
) -> tuple[Tensor | None, ...]:
    """Return one gradient, or None, for each argument of the operator."""
    *inputs, out, lse = ctx.saved_tensors
    found: Sequence[Tensor | None]
    twice = torch.is_grad_enabled()
    if twice or is_batched(grad):  # these gradients are to be differentiated again, or are many at once
        call = operands_of((*inputs, *ctx.options))
        if call.dropout:
            raise NotImplementedError(
                f"swinaccel cannot {'differentiate twice' if twice else 'take a batch of gradients'} through attention "
                "dropout; run that step inside swinaccel.disabled()"
            )
        found = reference_gradients(grad, call, geometry or geometry_of(call), twice)
    else:
        arguments: tuple[Any, ...] = (grad, out, lse, *inputs, *ctx.options, needs_grad[3])
        if geometry is None or is_observed():
            found = torch.ops.swinaccel.shifted_window_attention_backward(*arguments)
        else:
            found = _backward(*arguments, geometry=geometry)
    grad_qkv, grad_k, grad_v, grad_table, grad_padding, grad_logit_scale = found
    gradients = (grad_qkv, grad_k, grad_v, grad_table, None, grad_padding, None, grad_logit_scale)
    needed = [gradient if needs else None for gradient, needs in zip(gradients, needs_grad, strict=False)]
    return (*needed, *(None,) * (len(needs_grad) - len(needed)))


def is_batched(tensor: Tensor) -> bool:
    """Return True if a tensor stands for many tensors, which have no memory that a kernel could find."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(tensor) or functorch.is_batchedtensor(tensor)


def _operator(*arguments: Any, bound: Any = None) -> tuple[Tensor, Tensor]:
    """Return the results as an operator must, which has no way to return nothing."""
    out, lse = _forward(*arguments, bound=bound)
    return out, arguments[0].new_empty(0) if lse is None else lse


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    *rest, for_backward, _ = arguments
    call = Operands(*rest)
    geometry = geometry_of(call)
    shape, dtype = lse_shape_of(call, geometry, for_backward), torch.float32 if for_backward else call.qkv.dtype
    return empty_image(call.qkv, geometry, call.k is None), call.qkv.new_empty(shape, dtype=dtype)


def _fake_backward(grad: Tensor, out: Tensor | None, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *rest, grad_table = arguments
    call = Operands(*rest)
    geometry = geometry_of(call)
    tokens = [None if t is None else empty_image(t, geometry, False) for t in call[:3]]
    wanted = (call.table if grad_table else None, call.padding, call.logit_scale)
    others = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in wanted]
    return tuple(call.qkv.new_empty(0) if t is None else t for t in (*tokens, *others))


_INPUTS = (
    "Tensor qkv, Tensor? k, Tensor? v, Tensor? table, Tensor? index, Tensor? padding, Tensor? mask,"
    " Tensor? logit_scale, Tensor? seed, int num_heads, int[] window, int[] shift, bool roll_first, float mask_value,"
    " float scale, float dropout"
)
register(
    f"shifted_window_attention({_INPUTS}, bool for_backward, Tensor[]? factors) -> (Tensor, Tensor)",
    _operator, _fake, gradients=(_autograd_backward, _setup_context), inside=_operator, batched=3,
)  # fmt: skip
register(
    f"shifted_window_attention_backward(Tensor grad, Tensor? out, Tensor lse, {_INPUTS}, bool grad_table)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward, _fake_backward,
)  # fmt: skip
