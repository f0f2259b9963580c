"""Launches the sequence kernels. Imports Triton at the first use only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import devices
from .checks import check_sequence
from .launches import DescribedLaunch, Launch, keep, launches
from .problem import shapes_of

MAX_HEAD_DIM, MAX_RANK = 128, 64


class Problem(NamedTuple):
    """All that a launch depends on, less the tensors' sizes and strides.

    Attributes:
        causal: keys up to the query's own.
        block_size, window_blocks: keys of the query's own block of `block_size` tokens and the `window_blocks - 1`
            before it; block_size 0 for all keys.
        scale: multiplies q kᵀ; positive.
    """

    causal: bool
    block_size: int
    window_blocks: int
    scale: float


class Operands(NamedTuple):
    """Tensors of one call.

    Attributes:
        q, k, v: (batch, heads, N, D).
        q_factor, k_factor: (heads, N, R) or (batch, heads, N, R); natural units.
        mask: (M, N, N).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_factor: Tensor | None
    k_factor: Tensor | None
    mask: Tensor | None


def unsupported_reason(
    device: torch.device, dtype: torch.dtype, head_dim: int, rank: int, factor_dtype: torch.dtype, interpret: bool
) -> str | None:
    """Return why the kernels cannot serve a problem, as one sentence, or None."""
    reason = devices.unsupported_reason(device, (dtype, factor_dtype), interpret)
    if reason is not None:
        return reason
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is larger than {MAX_HEAD_DIM}"
    if rank > MAX_RANK:
        return f"factors of rank {rank} are larger than {MAX_RANK}"
    return None


def empty_like(tensor: Tensor) -> Tensor:
    """Return an empty tensor laid out as `tensor` is, where its last axis stays the fastest."""
    made = torch.empty_like(tensor)
    return made if made.stride(-1) == 1 else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def lse_shape(q: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    """Return the shape of what the forward keeps of the softmax: see `kernels.softmax`."""
    rows = q.shape[:-1]
    return rows if mask is None else (*rows[:-1], 2, *rows[-1:])


def forward(call: Operands, problem: Problem, bound: Callable[[Launch], Any] | None = None) -> tuple[Tensor, Tensor]:
    """Attend over sequences by one kernel.

    Args:
        bound: what the launch, without descriptors then, is made into.
    Returns:
        (batch, heads, N, D), laid out as q is, and what is kept of the softmax, of `lse_shape`, fp32.
    """
    q, k, v, q_factor, k_factor, mask = call
    out = empty_like(q)
    lse = torch.empty(lse_shape(q, mask), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v, q_factor, k_factor = (_rows(tensor) for tensor in (q, k, v, q_factor, k_factor))
    mask = None if mask is None else mask.contiguous()
    strides = _strides(out, q, k, v, q_factor, k_factor)
    described = bound is None and _describable(q_factor, mask, k, v)
    shapes = shapes_of(k, v, q_factor, k_factor, mask)
    key = ("sequence", *_key(q, q_factor, problem), strides, described, shapes)
    launch = launches.get(key)
    if launch is None:
        check_sequence(q.shape, shapes, problem)
        launch = keep(key, _plan_forward(q, q_factor, mask, problem, strides, described))
    run = launch if bound is None else bound(launch)
    run(out, lse, q, k, v, q_factor, k_factor, mask)
    return out, lse


def backward(
    grad: Tensor, call: Operands, out: Tensor, lse: Tensor, problem: Problem, factor_grad: bool
) -> tuple[Tensor, ...]:
    """Return gradients of q, k and v, and with `factor_grad` of q_factor and k_factor.

    Args:
        grad: of the output, (batch, heads, N, D).
        out, lse: what `forward` gave.
    """
    q, k, v, q_factor, k_factor, mask = call
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    batch, heads, tokens, _ = q.shape if q.dim() == 4 else (0, 0, 0, 0)
    factors = (q_factor, k_factor) if factor_grad and q_factor is not None and k_factor is not None else ()
    # Factors that all of the batch shares gather its gradients, which must not be rounded before they are summed.
    parts = [
        torch.empty(
            (batch, heads, tokens, factor.shape[-1]),
            dtype=torch.float32 if factor.dim() == 3 else factor.dtype,
            device=q.device,
        )
        for factor in factors
    ]
    if q.numel():
        grad, q, k, v, out, q_factor, k_factor = (_rows(t) for t in (grad, q, k, v, out, q_factor, k_factor))
        mask = None if mask is None else mask.contiguous()
        delta = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
        strides = _strides(dq, dk, dv, grad, out, q, k, v, q_factor, k_factor)
        described = _describable(q_factor, mask, grad, q, k, v)
        shapes = shapes_of(k, v, q_factor, k_factor, mask, grad, out, lse)
        key = ("sequence backward", *_key(q, q_factor, problem), factor_grad, strides, described, shapes)
        kept = launches.get(key)
        if kept is None:
            check_sequence(q.shape, shapes, problem, lse_shape(q, mask))
            kept = keep(key, _plan_backward(q, q_factor, mask, problem, bool(parts), strides, described))
        dq_part, dk_part = parts if parts else (None, None)
        kept[0](dq, dq_part, delta, grad, out, q, k, v, lse, q_factor, k_factor, mask)
        kept[1](dk, dv, dk_part, delta, grad, q, k, v, lse, q_factor, k_factor, mask)
    sums = (
        (part.sum(0) if factor.dim() == 3 else part).to(factor.dtype)
        for part, factor in zip(parts, factors, strict=True)
    )
    return dq, dk, dv, *sums


def _rows(tensor: Any) -> Any:
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return strides of batch, head and token of each; factors without a batch axis are one for all."""
    found: list[int] = []
    for tensor in tensors:
        stride = (0, 0, 0) if tensor is None else tensor.stride()[:-1]
        found.extend(stride if len(stride) == 3 else (0, *stride))
    return tuple(found)


def _key(q: Tensor, q_factor: Tensor | None, problem: Problem) -> tuple:
    factor_dtype = None if q_factor is None else q_factor.dtype
    return q.device, q.dtype, q.shape, factor_dtype, problem, devices.precision(q.dtype)


class _Facts(NamedTuple):
    """Facts that the plans of all three kernels share."""

    sizes: Any  # `sequence_launch.Sizes`
    numbers: tuple[float, ...]  # arguments of the kernels: sizes and scale
    pattern: int
    blocks: tuple[int, int]  # 0, 0 where the pattern has none


def _facts(q: Tensor, q_factor: Tensor | None, mask: Tensor | None, problem: Problem) -> _Facts:
    from ...kernels import sequence_fwd, sequence_launch

    batch, heads, tokens, head_dim = q.shape
    rank, factor_dtype = (0, q.dtype) if q_factor is None else (q_factor.shape[-1], q_factor.dtype)
    pattern, block_size, window_blocks, span = sequence_fwd.PATTERN_ALL, 1, 1, tokens
    if problem.block_size:
        pattern = sequence_fwd.PATTERN_BLOCKS
        block_size = min(problem.block_size, tokens)
        window_blocks = min(problem.window_blocks, -(-tokens // block_size))
        span = min(tokens, block_size * window_blocks)
    elif problem.causal:
        pattern = sequence_fwd.PATTERN_CAUSAL
    group = sequence_launch.sequences_per_group(
        span=span, head_dim=head_dim, element_size=q.element_size(), num_sequences=batch * heads
    )
    masks = 1 if mask is None else mask.shape[0]
    return _Facts(
        sequence_launch.Sizes(
            head_dim, rank, q.element_size(), factor_dtype.itemsize, mask is not None, devices.shared_memory(q.device)
        ),
        (batch * heads, heads, tokens, masks, block_size, window_blocks, group, problem.scale),
        pattern.value,
        (block_size, window_blocks) if problem.block_size else (0, 0),
    )


def _has_edges(facts: _Facts, tokens: int, block_m: int, block_n: int) -> bool:
    """Return True if a tile of scores may hold some that do not count."""
    from ...kernels import sequence_fwd

    if facts.pattern == sequence_fwd.PATTERN_CAUSAL.value or tokens % block_m or tokens % block_n:
        return True
    block_size = facts.blocks[0]
    return bool(block_size and (block_size % block_m or block_size % block_n))


def _describable(q_factor: Tensor | None, mask: Tensor | None, *tensors: Tensor) -> bool:
    """Return True if the tensors that pass through a pipeline may be described: see `sequence_launch.describe`."""
    from ...kernels.sequence_launch import DESCRIBED_HEAD_DIM

    first = tensors[0]
    if q_factor is not None or mask is not None or first.shape[-1] != DESCRIBED_HEAD_DIM or first.element_size() != 2:
        return False
    if not devices.has_copy_engine(first.device):
        return False
    for tensor in tensors:
        if tensor.dim() != 4:
            return False
        batch, head, token, _ = tensor.stride()
        if token < DESCRIBED_HEAD_DIM or token % 8 or tensor.data_ptr() % 16 or batch % token:
            return False
        if head % token and (tensor.shape[1] - 1) * head + DESCRIBED_HEAD_DIM > token:
            return False
    return True


def _plan(
    kernel: Any,
    shapes: tuple[Any, Any],
    facts: _Facts,
    q: Tensor,
    strides: tuple[int, ...],
    names: tuple[str, ...],
    passing: tuple[int, int],
    *flags: bool,
    keys: bool = False,
) -> Launch:
    """Plan one launch: of a shape with descriptors of the tensors at the places `passing`, or of one without.

    Args:
        shapes: the one, if it may be, and what gives the other.
        keys: programs go through the keys, and queries pass; else queries, and keys pass.
    """
    batch, heads, tokens, head_dim = q.shape
    shape, has_mask = shapes[0], facts.sizes.has_mask
    described = shape is not None and not _has_edges(facts, tokens, shape.block_m, shape.block_n)
    if not described:
        shape = shapes[1](facts.sizes)
    rows, passing_rows = (shape.block_n, shape.block_m) if keys else (shape.block_m, shape.block_n)
    options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
    if shape.max_registers is not None:
        options["maxnreg"] = shape.max_registers
    arguments = (
        (-(-tokens // rows) * batch * heads,),
        (
            *strides, *facts.numbers, head_dim, facts.sizes.rank, facts.pattern, has_mask,
            _has_edges(facts, tokens, shape.block_m, shape.block_n), described, *flags, devices.precision(q.dtype),
            shape.block_m, shape.block_n, shape.block_d, shape.block_r,
        ),
        (*names, "q_factor", "k_factor", "mask"),
    )  # fmt: skip
    if described:
        from ...kernels import sequence_launch

        tiles = dict.fromkeys(passing, partial(sequence_launch.describe, rows=passing_rows))
        return DescribedLaunch(tiles, kernel, *arguments, **options)
    return Launch(kernel, *arguments, **options)


def _plan_forward(
    q: Tensor, q_factor: Tensor | None, mask: Tensor | None, problem: Problem, strides: tuple[int, ...], described: bool
) -> Launch:
    from ...kernels import sequence_fwd, sequence_launch

    shapes = sequence_launch.DESCRIBED_FORWARD if described else None, sequence_launch.forward
    kernel, names, passing = sequence_fwd._sequence_attention_fwd_kernel, ("", "", "q", "k", "v"), (3, 4)
    return _plan(kernel, shapes, _facts(q, q_factor, mask, problem), q, strides, names, passing)


def _plan_backward(
    q: Tensor,
    q_factor: Tensor | None,
    mask: Tensor | None,
    problem: Problem,
    factor_grad: bool,
    strides: tuple[int, ...],
    described: bool,
) -> tuple[Launch, Launch]:
    from ...kernels import sequence_bwd, sequence_launch

    facts = _facts(q, q_factor, mask, problem)
    dq, dk, dv, grad, out, rest = *(strides[3 * i : 3 * i + 3] for i in range(5)), strides[15:]
    shapes = sequence_launch.DESCRIBED_QUERY if described else None, sequence_launch.grad_query
    kernel, names = sequence_bwd._sequence_attention_bwd_query_kernel, ("", "", "", "grad", "out", "q", "k", "v", "lse")
    queries = _plan(kernel, shapes, facts, q, (*dq, *grad, *out, *rest), names, (6, 7), factor_grad)
    shapes = sequence_launch.DESCRIBED_KEY if described else None, sequence_launch.grad_key
    kernel, names = sequence_bwd._sequence_attention_bwd_key_kernel, ("", "", "", "", "grad", "q", "k", "v", "lse")
    keys = _plan(kernel, shapes, facts, q, (*dk, *dv, *grad, *rest), names, (4, 5), factor_grad, keys=True)
    return queries, keys
