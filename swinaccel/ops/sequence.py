"""Attention over sequences as PyTorch operators, forward and backward; see `ops.window` for the windows'.

A kernel that fails is noted once, with its problem, and plain PyTorch gives the same numbers in its place, then and
for every later call of that kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends.torch import sequence as torch_sequence
from ..backends.triton import sequence as backend
from ..backends.triton.launches import Launch, first_line
from ..backends.triton.sequence import Operands, Problem
from ..config import env_strict
from ..errors import KernelError
from .failures import NOT_THE_KERNELS, failures
from .observed import is_observed
from .operators import register
from .recomputed import recomputed_gradients

unsupported_reason = backend.unsupported_reason


def sequence_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_factor: Tensor | None,
    k_factor: Tensor | None,
    mask: Tensor | None,
    problem: Problem,
) -> Tensor:
    """Attend as `reference.sequence_attention` does, by the Triton kernels; see `backends.triton.sequence.forward`."""
    if is_observed():
        return torch.ops.swinaccel.sequence_attention(q, k, v, q_factor, k_factor, mask, *problem)[0]
    return _Direct.apply(q, k, v, q_factor, k_factor, mask, *problem)[0]


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Run the forward of the operator, whose schema names the arguments."""
    call, problem = _operands(arguments), Problem(*arguments[6:])
    found = _by_kernels(call, problem, lambda: backend.forward(call, problem))
    if found is not None:
        return found
    out = backend.empty_like(call.q)
    return out.copy_(_plain(call, problem)), _fake_lse(call.q, call.mask).fill_(float("nan"))


def _traced(*arguments: Any, bound: Callable[[Launch], Any]) -> tuple[Tensor, Tensor]:
    """Compute what the operator does, as compilers see it."""
    return backend.forward(_operands(arguments), Problem(*arguments[6:]), bound)


def _backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    """Run the backward of the operator, whose schema names the arguments."""
    call, (out, lse, *numbers, factor_grad) = _operands(arguments), arguments[6:]
    problem = Problem(*numbers)
    grads = _by_kernels(
        call, problem, lambda: backend.backward(grad.resolve_neg(), call, out, lse, problem, factor_grad)
    )
    if grads is not None:
        return list(grads)

    def plain(*inputs: Tensor) -> Tensor:
        return _plain(Operands._make((*inputs, *call[len(inputs) :])), problem)

    inputs: Any = call[:5] if factor_grad else call[:3]
    found: Any = recomputed_gradients(plain, inputs, grad, twice=False)
    made = [backend.empty_like(one) if place < 3 else torch.empty_like(one) for place, one in enumerate(inputs)]
    return [place.copy_(one) for place, one in zip(made, found, strict=True)]


def _operands(arguments: tuple[Any, ...]) -> Operands:
    """Return the operands of the operator; kernels read numbers as they lie."""
    return Operands._make(None if t is None else t.resolve_neg() for t in arguments[:6])


def _plain(call: Operands, problem: Problem, twice: bool = False) -> Tensor:
    q, k, v, q_factor, k_factor, mask = call
    _, block_size, window_blocks, scale = problem
    if block_size:
        return torch_sequence.block_sliding_window_attention(q, k, v, block_size, window_blocks, scale, twice)
    return torch_sequence.factored_bias_attention(q, k, v, q_factor, k_factor, mask, scale, problem.causal, twice)


def _by_kernels(call: Operands, problem: Problem, run: Callable[[], tuple[Tensor, ...]]) -> Any:
    """Return what kernels give; None where they fail, which is noted, or have failed before."""
    q, factor = call.q, None if call.q_factor is None else (call.q_factor.shape[-1], call.q_factor.dtype)
    is_blocked = bool(problem.block_size)
    key = "sequence", q.device, q.dtype, q.shape[-1], factor, call.mask is None, problem.causal, is_blocked
    if failures.get(key) is None:
        try:
            return run()
        except NOT_THE_KERNELS:
            raise
        except Exception as error:
            reason = failures.record(key, first_line(error))
            if env_strict():
                raise KernelError(reason) from error
    return None


def _fake_lse(q: Tensor, mask: Tensor | None) -> Tensor:
    return q.new_empty(backend.lse_shape(q, mask), dtype=torch.float32)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, q_factor: Any, k_factor: Any, mask: Tensor | None, *args: object
) -> tuple[Tensor, Tensor]:
    return backend.empty_like(q), _fake_lse(q, mask)


def _fake_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    q, k, v, q_factor, k_factor, *_, factor_grad = arguments
    factors = [torch.empty(f.shape, dtype=f.dtype, device=f.device) for f in (q_factor, k_factor) if f is not None]
    return [backend.empty_like(tensor) for tensor in (q, k, v)] + (factors if factor_grad else [])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, q_factor, k_factor, mask, *problem = inputs
    ctx.save_for_backward(q, k, v, q_factor, k_factor, mask, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.problem = problem


def _autograd(ctx: Any, grad: Tensor, _: Any) -> tuple:
    return _gradients(torch.ops.swinaccel.sequence_attention_backward, ctx, grad)


def _gradients(backward: Callable[..., list[Tensor]], ctx: Any, grad: Tensor) -> tuple:
    if torch.is_grad_enabled():  # these gradients are to be differentiated again
        *inputs, mask, _, _ = ctx.saved_tensors

        def plain(*inputs: Tensor) -> Tensor:
            return _plain(Operands._make((*inputs, mask)), Problem(*ctx.problem), twice=True)

        grads = recomputed_gradients(plain, inputs, grad, twice=True)
    else:
        factor_grad = any(ctx.needs_input_grad[3:5])
        grads = [*backward(grad, *ctx.saved_tensors, *ctx.problem, factor_grad), None, None][:5]
    wanted = (found if needed else None for found, needed in zip(grads, ctx.needs_input_grad, strict=False))
    return *wanted, None, None, None, None, None


class _Direct(torch.autograd.Function):
    """The operators without the dispatcher and its autograd, which take longer than the rest of a short call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple:
        return _gradients(_backward, ctx, grad)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? q_factor, Tensor? k_factor, Tensor? mask"
_PROBLEM = "bool causal, int block_size, int window_blocks, float scale"
register(
    f"sequence_attention({_INPUTS}, {_PROBLEM}) -> (Tensor, Tensor)",
    _forward, _fake, gradients=(_autograd, _setup_context), inside=_traced,
)  # fmt: skip
register(
    f"sequence_attention_backward(Tensor grad, {_INPUTS}, Tensor out, Tensor lse, {_PROBLEM}, bool factor_grad)"
    " -> Tensor[]",
    _backward, _fake_backward,
)  # fmt: skip
