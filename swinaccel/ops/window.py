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
from ..backends.triton.problem import empty_image, unsupported_reason
from ..errors import ArgumentError
from ..spec.window import Geometry
from .observed import count_modes, is_observed, is_profiled
from .packaged import open_in_packages
from .window_plain import (
    dense,
    geometry_of,
    head_dim_of,
    is_readable,
    lse_shape_of,
    note_failure,
    options_of,
    problem,
    reference_gradients,
    reference_of,
)

__all__ = ["BoundAttention", "bind", "problem", "shifted_window_attention", "unsupported_reason"]

_library = torch.library.Library("swinaccel", "DEF")
_INPUTS = (
    "Tensor qkv, Tensor? k, Tensor? v, Tensor? table, Tensor? index, Tensor? padding, Tensor? mask,"
    " Tensor? logit_scale, Tensor? seed"
)
_OPTIONS = "int num_heads, int[] window, int[] shift, bool roll_first, float mask_value, float scale, float dropout"
_library.define(
    f"shifted_window_attention({_INPUTS}, {_OPTIONS}, bool for_backward, Tensor[]? factors) -> (Tensor, Tensor)"
)
_library.define(
    f"shifted_window_attention_backward(Tensor grad, Tensor? out, Tensor lse, {_INPUTS}, {_OPTIONS},"
    " bool grad_table) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


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
            except (torch.OutOfMemoryError, ArgumentError):  # which say nothing of the kernel
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
    geometry: Geometry,
    *,
    dtype: torch.dtype,
    num_heads: int,
    mask_value: float = -100.0,
    scale: float = 1.0,
    **form: Any,
) -> BoundAttention:
    """Bind a problem of attention in inference, without dropout and factors, to its launches: no tensor is needed yet.

    Args:
        **form: of the tensors of a call; see `backends.triton.window.bind`, also for what it raises.
    """
    options: dict[str, Any] = {"num_heads": num_heads, "mask_value": mask_value, "scale": scale}
    return BoundAttention(forward_launches.bind(geometry, dtype=dtype, **options, **form), geometry, dtype, options)


def _forward(*arguments: Any, geometry: Geometry | None = None, bound: Any = None) -> tuple[Tensor, Any]:
    """Run the forward of the operator, whose schema names the arguments; `bound` as the backend's."""
    (
        qkv, k, v, table, index, padding, mask, logit_scale, seed,
        num_heads, window, shift, roll_first, mask_value, scale, dropout, for_backward, factors,
    ) = arguments  # fmt: skip
    if geometry is None:
        geometry = geometry_of(qkv, window, shift, roll_first)
    if not is_readable(qkv, k, v, geometry):
        qkv, k, v = (None if t is None else dense(t, geometry) for t in (qkv, k, v))
    options = options_of(num_heads, table, index, padding, mask, mask_value, scale, logit_scale)
    factors = None if factors is None or bound is not None else tuple(factors)
    drawn = {"dropout": dropout, "seed": seed}
    try:
        return forward_launches.shifted_window_attention(
            qkv, k, v, geometry, **options, **drawn, factors=factors, for_backward=for_backward, bound=bound
        )
    except (torch.OutOfMemoryError, ArgumentError):  # which say nothing of the kernel
        raise
    except Exception as error:
        if bound is not None:
            raise
        head_dim = head_dim_of(qkv, k, num_heads, geometry)
        note_failure(error, qkv, geometry, head_dim, logit_scale is not None, dropout)
        out = dense(reference_of(qkv, k, v, geometry, options).to(qkv.dtype), geometry)
        shape = lse_shape_of(qkv, geometry, num_heads, head_dim, mask is not None, for_backward)
        return out, torch.empty(shape, device=qkv.device)


def _backward(grad: Tensor, *arguments: Any, geometry: Geometry | None = None) -> tuple[Tensor, ...]:
    """Run the backward of the operator, whose schema names the arguments."""
    (
        out, lse, qkv, k, v, table, index, padding, mask, logit_scale, seed,
        num_heads, window, shift, roll_first, mask_value, scale, dropout, grad_table,
    ) = arguments  # fmt: skip
    if geometry is None:
        geometry = geometry_of(qkv, window, shift, roll_first)
    options = options_of(num_heads, table, index, padding, mask, mask_value, scale, logit_scale)
    try:
        gradients: Sequence[Tensor | None] = backward_launches.shifted_window_attention_backward(
            dense(grad, geometry), out, lse, dense(qkv, geometry), None if k is None else dense(k, geometry),
            None if v is None else dense(v, geometry), geometry, **options, dropout=dropout, seed=seed,
            grad_table=grad_table,
        )  # fmt: skip
    except (torch.OutOfMemoryError, ArgumentError):  # which say nothing of the kernel
        raise
    except Exception as error:
        head_dim = head_dim_of(qkv, k, num_heads, geometry)
        note_failure(error, qkv, geometry, head_dim, logit_scale is not None, dropout)
        gradients = reference_gradients(grad, qkv, k, v, geometry, options, create_graph=False)
    return tuple(qkv.new_empty(0) if gradient is None else gradient for gradient in gradients)


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
    qkv, k, v, table, index, padding, mask, logit_scale, _ = inputs
    found: Sequence[Tensor | None]
    twice = torch.is_grad_enabled()
    if twice or _is_batched(grad):  # these gradients are to be differentiated again, or are many at once
        num_heads, window, shift, roll_first, mask_value, scale, dropout = ctx.options
        if dropout:
            raise NotImplementedError(
                f"swinaccel cannot {'differentiate twice' if twice else 'take a batch of gradients'} through attention "
                "dropout; run that step inside swinaccel.disabled()"
            )
        options = options_of(num_heads, table, index, padding, mask, mask_value, scale, logit_scale)
        geometry = geometry or geometry_of(qkv, window, shift, roll_first)
        found = reference_gradients(grad, qkv, k, v, geometry, options, create_graph=twice)
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


def _is_batched(tensor: Tensor) -> bool:
    """Return True if a tensor stands for many tensors, which have no memory that a kernel could find."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(tensor) or functorch.is_batchedtensor(tensor)


def _operator(*arguments: Any, bound: Any = None) -> tuple[Tensor, Tensor]:
    """Return the results as an operator must, which has no way to return nothing."""
    out, lse = _forward(*arguments, bound=bound)
    return out, arguments[0].new_empty(0) if lse is None else lse


def _fake(qkv: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    mask = rest[3]
    num_heads, window, shift, roll_first = rest[6:10]
    for_backward = rest[13]
    geometry = geometry_of(qkv, window, shift, roll_first)
    head_dim = head_dim_of(qkv, k, num_heads, geometry)
    shape = lse_shape_of(qkv, geometry, num_heads, head_dim, mask is not None, for_backward)
    out = empty_image(qkv, geometry, k is None)
    return out, qkv.new_empty(shape, dtype=torch.float32 if for_backward else qkv.dtype)


def _fake_backward(grad: Tensor, out: Tensor | None, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    qkv, k, v, table, _, padding, _, logit_scale = rest[:8]
    grad_table = rest[-1]
    geometry = geometry_of(qkv, *rest[10:13])
    tokens = [None if t is None else empty_image(t, geometry, False) for t in (qkv, k, v)]
    wanted = (table if grad_table else None, padding, logit_scale)
    others = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in wanted]
    return tuple(qkv.new_empty(0) if t is None else t for t in (*tokens, *others))


for _key in ("CUDA", "CPU"):
    _library.impl("shifted_window_attention", _operator, _key)
    _library.impl("shifted_window_attention_backward", _backward, _key)
open_in_packages(_library, "shifted_window_attention", _operator, batched=3)
torch.library.register_fake("swinaccel::shifted_window_attention", _fake, lib=_library)
torch.library.register_fake("swinaccel::shifted_window_attention_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "swinaccel::shifted_window_attention", _autograd_backward, setup_context=_setup_context, lib=_library
)
