"""The operators, as PyTorch sees them: one opaque call each for eager mode, autocast, torch.compile and export.

Dispatch and the functions reach the window kernels through here alone. A kernel that fails is not an error: the failure
is noted once, with its problem, and the same numbers are computed in plain PyTorch; dispatch then keeps to the
originals. Memory that runs out is the caller's to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul
from typing import Any

import torch
from torch import Tensor

from .backends import triton as backend
from .config import env_strict
from .errors import ArgumentError, KernelError
from .failures import failures
from .spec import reference
from .spec.window import Geometry

unsupported_reason = backend.unsupported_reason

_POSITION = ("position_table",)

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
_library.define("position_table(Tensor coords, Tensor hidden_weight, Tensor hidden_bias, Tensor weight) -> Tensor")


def problem(device: torch.device, dtype: torch.dtype, geometry: Geometry, head_dim: int, cosine: bool) -> tuple:
    """Return what failures of the window kernels are kept under."""
    return "window", device.type, device.index, dtype, geometry.window, head_dim, cosine


def has_failures() -> bool:
    """Return True if any kernel failed in this process."""
    return bool(failures)


def forget_failures() -> None:
    """Try every kernel again."""
    failures.clear()


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
    """Shifted-window attention from image to image, as `reference.shifted_window_attention`, by the Triton kernels.

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
    if _is_observed():
        return torch.ops.swinaccel.shifted_window_attention(*arguments)[0]
    if for_backward:  # the same, less the dispatcher's time
        return _Attention.apply(geometry, *arguments)
    return _forward(*arguments, geometry=geometry)[0]


def _is_observed() -> bool:
    """Whether anyone but the device looks at operators now: a compiler, a mode, a profiler."""
    return (
        torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or torch.autograd._profiler_enabled()
    )


def _geometry(qkv: Tensor, window: Sequence[int], shift: Sequence[int], roll_first: bool) -> Geometry:
    axes = len(window)
    if axes not in (2, 3) or len(shift) != axes or min(window) < 1 or qkv.dim() not in (axes + 2, axes + 3):
        raise ArgumentError(
            "window must be two or three numbers of 1 or more, shift as many, and qkv an image of so many axes, "
            f"(B, H, W, channels) if two; got {tuple(window)}, {tuple(shift)} and {tuple(qkv.shape)}"
        )
    return Geometry(tuple(qkv.shape[1 : 1 + axes]), tuple(window), tuple(shift), roll_first)


def _options(
    num_heads: int,
    table: Tensor | None,
    index: Tensor | None,
    padding: Tensor | None,
    mask: Tensor | None,
    mask_value: float,
    scale: float,
    logit_scale: Tensor | None,
) -> dict[str, Any]:
    """What the backend's functions and the reference's take by name."""
    return {
        "num_heads": num_heads,
        "table": table,
        "index": _contiguous(index),
        "padding": _contiguous(padding),
        "mask": _contiguous(mask),
        "mask_value": mask_value,
        "scale": scale,
        "logit_scale": _contiguous(logit_scale),
    }


def _forward(
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    table: Tensor | None,
    index: Tensor | None,
    padding: Tensor | None,
    mask: Tensor | None,
    logit_scale: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    roll_first: bool,
    mask_value: float,
    scale: float,
    dropout: float,
    for_backward: bool,
    factors: Sequence[Tensor] | None,
    geometry: Geometry | None = None,
) -> tuple[Tensor, Tensor | None]:
    if geometry is None:
        geometry = _geometry(qkv, window, shift, roll_first)
    if not _is_readable(qkv, k, v, geometry):
        qkv, k, v = (None if t is None else _dense(t, geometry) for t in (qkv, k, v))  # type: ignore[assignment]
    try:
        return backend.shifted_window_attention(
            qkv,
            k,
            v,
            geometry,
            num_heads=num_heads,
            table=table,
            index=None if index is None else index.contiguous(),
            padding=None if padding is None else padding.contiguous(),
            mask=None if mask is None else mask.contiguous(),
            mask_value=mask_value,
            scale=scale,
            logit_scale=None if logit_scale is None else logit_scale.contiguous(),
            factors=None if factors is None else tuple(factors),
            dropout=dropout,
            seed=seed,
            for_backward=for_backward,
        )
    except (torch.OutOfMemoryError, ArgumentError):  # which say nothing of the kernel
        raise
    except Exception as error:
        head_dim = _head_dim(qkv, k, num_heads, geometry)
        _note_failure(error, qkv, geometry, head_dim, logit_scale is not None, dropout)
        options = _options(num_heads, table, index, padding, mask, mask_value, scale, logit_scale)
        out = _dense(_reference(qkv, k, v, geometry, options).to(qkv.dtype), geometry)
        shape = _lse_shape(qkv, geometry, num_heads, head_dim, mask is not None, for_backward)
        return out, torch.empty(shape, device=qkv.device)


def _is_readable(qkv: Tensor, k: Tensor | None, v: Tensor | None, geometry: Geometry) -> bool:
    """Whether the kernels find all tokens by their strides."""
    if k is None and qkv.is_contiguous() and qkv.numel() < 2**31:
        return True
    strides = qkv.stride()
    return (
        strides[-1] == 1
        and sum(map(mul, strides[1:], qkv.shape[1:])) < 2**31  # offsets within an image have 32 bits
        and (k is None or strides == k.stride() == v.stride())  # type: ignore[union-attr]
        and not (strides[-2] % qkv.shape[-1] and backend.are_heads_apart(qkv, geometry))  # they count in heads
    )


def _head_dim(qkv: Tensor, k: Tensor | None, num_heads: int, geometry: Geometry) -> int:
    if backend.are_heads_apart(qkv, geometry):
        return qkv.shape[-1]
    return qkv.shape[-1] // num_heads // (3 if k is None else 1)


def _reference(qkv: Tensor, k: Tensor | None, v: Tensor | None, geometry: Geometry, options: dict[str, Any]) -> Tensor:
    """The same in plain PyTorch, for tokens of every form."""
    if k is None or v is None:
        q, k, v = qkv.chunk(3, dim=-1)
        return reference.shifted_window_attention(q, k, v, geometry, **options)
    if not backend.are_heads_apart(qkv, geometry):
        return reference.shifted_window_attention(qkv, k, v, geometry, **options)
    out = reference.shifted_window_attention(qkv.flatten(-2), k.flatten(-2), v.flatten(-2), geometry, **options)
    return out.unflatten(-1, qkv.shape[-2:])


def _note_failure(error: Exception, q: Tensor, geometry: Geometry, head_dim: int, cosine: bool, dropout: float) -> None:
    """Remember that a kernel failed on such a problem; raise where plain PyTorch cannot stand in for it now."""
    reason = failures.record(problem(q.device, q.dtype, geometry, head_dim, cosine), backend.first_line(error))
    if env_strict() or dropout:  # what was dropped is known to the kernels only
        raise KernelError(reason) from error


def _lse_shape(
    qkv: Tensor, geometry: Geometry, num_heads: int, head_dim: int, has_mask: bool, for_backward: bool
) -> tuple[int, ...]:
    if not for_backward or backend.is_small(qkv.device, qkv.dtype, geometry.tokens, head_dim):
        return (0,)
    return backend.lse_shape(qkv.shape[0], geometry, num_heads, has_mask)


def _backward(
    grad: Tensor,
    out: Tensor | None,
    lse: Tensor,
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    table: Tensor | None,
    index: Tensor | None,
    padding: Tensor | None,
    mask: Tensor | None,
    logit_scale: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    roll_first: bool,
    mask_value: float,
    scale: float,
    dropout: float,
    grad_table: bool,
    geometry: Geometry | None = None,
) -> tuple[Tensor, ...]:
    if geometry is None:
        geometry = _geometry(qkv, window, shift, roll_first)
    options = _options(num_heads, table, index, padding, mask, mask_value, scale, logit_scale)
    try:
        gradients: Sequence[Tensor | None] = backend.shifted_window_attention_backward(
            _dense(grad, geometry), out, lse, _dense(qkv, geometry), None if k is None else _dense(k, geometry),
            None if v is None else _dense(v, geometry), geometry, **options, dropout=dropout, seed=seed,
            grad_table=grad_table,
        )  # fmt: skip
    except (torch.OutOfMemoryError, ArgumentError):  # which say nothing of the kernel
        raise
    except Exception as error:
        head_dim = _head_dim(qkv, k, num_heads, geometry)
        _note_failure(error, qkv, geometry, head_dim, logit_scale is not None, dropout)
        gradients = _reference_gradients(grad, qkv, k, v, geometry, options, create_graph=False)
    return tuple(qkv.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _reference_gradients(
    grad: Tensor,
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    geometry: Geometry,
    options: dict[str, Any],
    create_graph: bool,
) -> list[Tensor | None]:
    """Gradients of (qkv, k, v, table, padding, logit_scale) by PyTorch's own, so that they have gradients in turn."""
    with torch.enable_grad():
        names = ("table", "padding", "logit_scale")
        inputs = [t if t is None else t.view_as(t) for t in (qkv, k, v, *(options[name] for name in names))]
        if not create_graph:
            inputs = [t if t is None else t.detach().requires_grad_() for t in inputs]
        qkv, k, v, *rest = inputs  # type: ignore[assignment]
        out = _reference(qkv, k, v, geometry, {**options, **dict(zip(names, rest, strict=True))})
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=create_graph, allow_unused=True))
        return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, *output)


def _save(ctx: Any, inputs: tuple[Any, ...], out: Tensor, lse: Tensor) -> None:
    ctx.options = inputs[9:16]
    is_small = lse.dim() == 1
    ctx.save_for_backward(*inputs[:9], None if is_small else out, lse)


class _Attention(torch.autograd.Function):
    """The operator with its gradients, where nobody looks on: a call costs half the time of the operator's."""

    @staticmethod
    def forward(ctx: Any, geometry: Geometry, *arguments: Any) -> Tensor:
        run: Any = _forward
        out, lse = run(*arguments, geometry=geometry)
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
    """One gradient, or None, for each argument of the operator."""
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
        options = _options(num_heads, table, index, padding, mask, mask_value, scale, logit_scale)
        geometry = geometry or _geometry(qkv, window, shift, roll_first)
        found = _reference_gradients(grad, qkv, k, v, geometry, options, create_graph=twice)
    else:
        arguments: tuple[Any, ...] = (grad, out, lse, *inputs, *ctx.options, needs_grad[3])
        if geometry is None or _is_observed():
            found = torch.ops.swinaccel.shifted_window_attention_backward(*arguments)
        else:
            run: Any = _backward
            found = run(*arguments, geometry)
    grad_qkv, grad_k, grad_v, grad_table, grad_padding, grad_logit_scale = found
    gradients = (grad_qkv, grad_k, grad_v, grad_table, None, grad_padding, None, grad_logit_scale)
    needed = [gradient if needs else None for gradient, needs in zip(gradients, needs_grad, strict=False)]
    return (*needed, *(None,) * (len(needs_grad) - len(needed)))


def _is_batched(tensor: Tensor) -> bool:
    """Whether this stands for many tensors, which have no memory that a kernel could find."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(tensor) or functorch.is_batchedtensor(tensor)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _dense(image: Tensor, geometry: Geometry) -> Tensor:
    """An image in memory as outputs are: without gaps, an axis for the heads before the last one of the image."""
    if not backend.are_heads_apart(image, geometry):
        return image.contiguous()
    return image.transpose(-3, -2).contiguous().transpose(-3, -2)


def position_table(coords: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, weight: Tensor) -> Tensor | None:
    """SwinV2's bias table (T, heads) by one kernel, as `backends.triton.position_table`; None where that failed."""
    if failures.get(_POSITION) is not None:
        return None
    if _is_observed():
        return torch.ops.swinaccel.position_table(coords, hidden_weight, hidden_bias, weight)
    return _position_table(coords, hidden_weight, hidden_bias, weight)


def _position_table(coords: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, weight: Tensor) -> Tensor:
    try:
        return backend.position_table(coords, hidden_weight, hidden_bias, weight)
    except (torch.OutOfMemoryError, ArgumentError):  # which say nothing of the kernel
        raise
    except Exception as error:
        failures.record(_POSITION, backend.first_line(error))
        hidden = torch.relu(coords.view(-1, 2).float() @ hidden_weight.float().t() + hidden_bias.float())
        return 16 * torch.sigmoid(weight.float() @ hidden.t()).t()


def _operator(*arguments: Any) -> tuple[Tensor, Tensor]:
    """As an operator returns it, which has no way to return nothing."""
    out, lse = _forward(*arguments)
    return out, arguments[0].new_empty(0) if lse is None else lse


def _fake(qkv: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    mask = rest[3]
    num_heads, window, shift, roll_first = rest[6:10]
    for_backward = rest[13]
    geometry = _geometry(qkv, window, shift, roll_first)
    head_dim = _head_dim(qkv, k, num_heads, geometry)
    shape = _lse_shape(qkv, geometry, num_heads, head_dim, mask is not None, for_backward)
    out = backend.empty_image(qkv, geometry, k is None)
    return out, qkv.new_empty(shape, dtype=torch.float32 if for_backward else qkv.dtype)


def _fake_backward(grad: Tensor, out: Tensor | None, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    qkv, k, v, table, _, padding, _, logit_scale = rest[:8]
    grad_table = rest[-1]
    geometry = _geometry(qkv, *rest[10:13])
    tokens = [None if t is None else backend.empty_image(t, geometry, False) for t in (qkv, k, v)]
    wanted = (table if grad_table else None, padding, logit_scale)
    others = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in wanted]
    return tuple(qkv.new_empty(0) if t is None else t for t in (*tokens, *others))


def _fake_position_table(coords: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, weight: Tensor) -> Tensor:
    return coords.new_empty((weight.shape[0], coords.numel() // 2), dtype=torch.float32).t()


for _key in ("CUDA", "CPU"):
    _library.impl("shifted_window_attention", _operator, _key)
    _library.impl("shifted_window_attention_backward", _backward, _key)
    _library.impl("position_table", _position_table, _key)
torch.library.register_fake("swinaccel::shifted_window_attention", _fake, lib=_library)
torch.library.register_fake("swinaccel::shifted_window_attention_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "swinaccel::shifted_window_attention", _autograd_backward, setup_context=_setup_context, lib=_library
)
torch.library.register_fake("swinaccel::position_table", _fake_position_table, lib=_library)
