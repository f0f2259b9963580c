"""What the tests of attention over sequences share: problems, the kernels, plain PyTorch, and one oracle for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import helpers
import torch
from helpers import TRITON_DEVICE
from torch import Tensor

from swinaccel import ops
from swinaccel.backends.torch import sequence as torch_sequence
from swinaccel.backends.triton.sequence import Problem
from swinaccel.ops import sequence as sequence_ops
from swinaccel.spec import reference

NAMES = ("out", "q", "k", "v", "q_factor", "k_factor")


@dataclass(frozen=True)
class Case:
    """One problem, with random inputs of a spread that makes weights uneven."""

    tokens: int
    causal: bool = False
    block_size: int = 0
    window_blocks: int = 1
    rank: int = 0
    masks: int = 0
    dim: int = 12
    batch: int = 1
    heads: int = 2
    shared: tuple[bool, bool] = (True, True)  # whether all of a batch shares the factors of q, of k

    def __str__(self) -> str:
        parts = [f"{self.tokens}x{self.dim}"]
        parts += ["causal"] if self.causal else []
        parts += [f"blocks{self.block_size}.{self.window_blocks}"] if self.block_size else []
        parts += [f"rank{self.rank}"] if self.rank else []
        parts += [f"masks{self.masks}"] if self.masks else []
        parts += [f"batch{self.batch}"] if self.batch > 1 else []
        return "-".join(parts)

    @property
    def problem(self) -> Problem:
        return Problem(self.causal, self.block_size, self.window_blocks, self.dim**-0.5)

    def make(
        self, dtype: torch.dtype, device: str, factor_dtype: torch.dtype | None = None
    ) -> tuple[list, Any, Tensor]:
        """[q, k, v] and factors if any; mask or None; the output's gradient."""
        generator = torch.Generator().manual_seed(self.tokens)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        shape = (self.batch, self.heads, self.tokens, self.dim)
        inputs = [1.5 * randn(*shape).to(dtype) for _ in range(3)]
        for shared in self.shared if self.rank else ():
            factor = randn(*(() if shared else (self.batch,)), self.heads, self.tokens, self.rank)
            inputs.append((factor * self.rank**-0.25).to(factor_dtype or dtype))
        mask = randn(self.masks, self.tokens, self.tokens).to(dtype) if self.masks else None
        return inputs, mask, randn(*shape).to(dtype)


def plain(inputs: list[Tensor], mask: Tensor | None, problem: Problem) -> Tensor:
    q_factor, k_factor = inputs[3:] or (None, None)
    return reference.sequence_attention(
        *inputs[:3], q_factor=q_factor, k_factor=k_factor, mask=mask, scale=problem.scale, causal=problem.causal,
        block_size=problem.block_size, window_blocks=problem.window_blocks,
    )  # fmt: skip


def kernels(inputs: list[Tensor], mask: Tensor | None, problem: Problem) -> Tensor:
    q_factor, k_factor = inputs[3:] or (None, None)
    out = sequence_ops.sequence_attention(*inputs[:3], q_factor, k_factor, mask, problem)
    assert not ops.has_failures()
    return out


def pytorch(inputs: list[Tensor], mask: Tensor | None, problem: Problem) -> Tensor:
    if problem.block_size:
        return torch_sequence.block_sliding_window_attention(
            *inputs, problem.block_size, problem.window_blocks, problem.scale
        )
    q_factor, k_factor = inputs[3:] or (None, None)
    return torch_sequence.factored_bias_attention(
        *inputs[:3], q_factor, k_factor, mask, problem.scale, problem.causal
    )  # fmt: skip


ATTEND = {"triton": (kernels, TRITON_DEVICE), "torch": (pytorch, "cpu")}


def differentiate(attend: Any, inputs: list[Tensor], mask: Tensor | None, problem: Problem, grad: Tensor) -> tuple:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = attend(leaves, mask, problem)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def compare(case: Case, backend: str, dtype: torch.dtype = torch.float32, factor_dtype: Any = None) -> None:
    """Output and every gradient: fp32 against fp64, lower precision by its errors beside plain PyTorch's."""
    attend, device = ATTEND[backend]
    inputs, mask, grad = case.make(dtype, device, factor_dtype)
    found = differentiate(attend, inputs, mask, case.problem, grad)
    wide = [tensor.cpu().double() for tensor in inputs]
    wide_mask = None if mask is None else mask.cpu().double()
    exact = differentiate(plain, wide, wide_mask, case.problem, grad.cpu())
    expected = differentiate(plain, inputs, mask, case.problem, grad) if dtype != torch.float32 else exact
    for name, ours, theirs, truth, source in zip(NAMES, found, expected, exact, [inputs[0], *inputs], strict=False):
        assert ours.shape == truth.shape, name
        assert ours.dtype == source.dtype, name
        assert bool(torch.isfinite(ours).all()), f"{name}: unwritten or overflown"
        if dtype == torch.float32:
            # Of a gradient that vanishes, what is left of its terms is no more than their roundings.
            error = (ours.cpu().double() - truth).abs().max() / truth.abs().max().clamp_min(1.0)
            assert error <= helpers.FP32, name
        else:
            helpers.assert_no_worse(ours, theirs, truth, source.dtype)


BIASED = [
    Case(33, rank=3),
    Case(32, rank=1, causal=True, heads=1),
    Case(35, rank=5, causal=True, masks=1, heads=1),
    Case(17, rank=20, masks=2, batch=3, heads=1, dim=16),
    Case(18, rank=2, batch=2, shared=(False, False)),
    Case(18, rank=2, batch=2, shared=(True, False), causal=True),
]
