"""Attention over sequences: the kernels (interpreted where there is no GPU) and plain PyTorch, by one oracle."""

from __future__ import annotations

import contextlib
import inspect
import logging
from dataclasses import dataclass, replace
from typing import Any

import helpers
import pytest
import torch
from helpers import TRITON_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swinaccel import functional, ops
from swinaccel.backends.torch import sequence as torch_sequence
from swinaccel.backends.triton import devices, launches
from swinaccel.backends.triton import sequence as backend
from swinaccel.backends.triton.sequence import Problem
from swinaccel.errors import KernelError
from swinaccel.ops import sequence as sequence_ops
from swinaccel.spec import reference

# The interpreter cuts bfloat16 off where a GPU rounds, so errors of that dtype are compared on the GPU only.
LOW = (torch.float16, torch.bfloat16) if TRITON_DEVICE == "cuda" else (torch.float16,)
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


@pytest.fixture(autouse=True)
def _slate(strict_kernels):
    ops.forget_failures()


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16, so that a few dozen tokens make several of them."""
    from swinaccel.kernels import sequence_launch

    if TRITON_DEVICE == "cpu":
        first = sequence_launch._first
        monkeypatch.setattr(sequence_launch, "_first", lambda shapes, *rest: first(((16, 16, 2, 1),), *rest))
        monkeypatch.setattr(launches, "launches", {})


BLOCKS = [
    Case(32, block_size=16, window_blocks=1),
    Case(48, block_size=16, window_blocks=2, heads=1),  # no tile holds an edge
    Case(37, block_size=7, window_blocks=3, batch=2, heads=1),
    Case(20, block_size=50, window_blocks=4),
    Case(33, block_size=1, window_blocks=5, heads=1),
    Case(40, block_size=24, window_blocks=100, heads=1, dim=20),
    Case(1, block_size=3, window_blocks=2),
]
BIASED = [
    Case(33, rank=3),
    Case(32, rank=1, causal=True, heads=1),
    Case(35, rank=5, causal=True, masks=1, heads=1),
    Case(17, rank=20, masks=2, batch=3, heads=1, dim=16),
    Case(18, rank=2, batch=2, shared=(False, False)),
    Case(18, rank=2, batch=2, shared=(True, False), causal=True),
]


@pytest.mark.parametrize("backend", ATTEND)
@pytest.mark.parametrize("case", [*BLOCKS, *BIASED], ids=str)
def test_outputs_and_gradients(case, backend, small_tiles):
    compare(case, backend)


@pytest.mark.parametrize("backend", ATTEND)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", [BLOCKS[2], BIASED[2], BIASED[4]], ids=str)
def test_low_precision(case, dtype, backend, small_tiles):
    compare(replace(case, tokens=40), backend, dtype)


def test_launches_as_they_are():
    """One problem with the tiles that are chosen where nothing is overridden."""
    compare(Case(40, block_size=24, window_blocks=2, heads=1), "triton", torch.float16)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_fp32_positions_as_factors_of_half_precision(dtype, small_tiles):
    """ALiBi's factors have any mean, which the output's rounding must not multiply into their gradients."""
    inputs, _, grad = Case(40, heads=1).make(dtype, TRITON_DEVICE)
    factors = functional.alibi_factors(1, 40, device=TRITON_DEVICE)
    inputs += [factors[0], factors[1] + 200.0]
    problem = Problem(True, 0, 0, 0.3)
    found = differentiate(kernels, inputs, None, problem, grad)
    exact = differentiate(plain, [tensor.cpu().double() for tensor in inputs], None, problem, grad.cpu())
    theirs = differentiate(plain, inputs, None, problem, grad)
    for ours, other, truth in zip(found[:4], theirs, exact, strict=False):
        helpers.assert_no_worse(ours, other, truth, dtype)
    for ours, truth in zip(found[4:], exact[4:], strict=True):
        assert ours.dtype == torch.float32
        assert helpers.difference(ours.cpu().double(), truth) <= 1e-4


@given(data=st.data())
@settings(max_examples=12)
def test_any_block(data, small_tiles):
    case = Case(
        data.draw(st.integers(1, 50), "tokens"),
        block_size=data.draw(st.integers(1, 60), "block_size"),
        window_blocks=data.draw(st.integers(1, 6), "window_blocks"),
        dim=data.draw(st.integers(1, 20), "dim"),
        heads=1,
    )
    compare(case, "triton")


@given(data=st.data())
@settings(max_examples=40)
def test_any_block_in_plain_pytorch(data):
    case = Case(
        data.draw(st.integers(1, 300), "tokens"),
        block_size=data.draw(st.integers(1, 320), "block_size"),
        window_blocks=data.draw(st.integers(1, 9), "window_blocks"),
    )
    compare(case, "torch")


@given(data=st.data())
@settings(max_examples=8)
def test_any_bias(data, small_tiles):
    case = Case(
        data.draw(st.integers(1, 40), "tokens"),
        causal=data.draw(st.booleans(), "causal"),
        rank=data.draw(st.integers(1, 18), "rank"),
        masks=data.draw(st.integers(0, 2), "masks"),
        batch=data.draw(st.integers(1, 3), "batch"),
        shared=data.draw(st.tuples(st.booleans(), st.booleans()), "shared"),
        heads=1,
    )
    compare(case, "triton")
    compare(case, "torch")


@pytest.fixture
def descriptors(monkeypatch, small_tiles):
    """As on Hopper: tiles that pass through the pipeline come by descriptors."""
    from swinaccel.kernels import sequence_launch

    if TRITON_DEVICE == "cpu":
        monkeypatch.setattr(devices, "has_copy_engine", lambda device: True)
        for name, columns in (("FORWARD", 32), ("QUERY", 16), ("KEY", 16)):
            shape = sequence_launch.SequenceLaunch(16, columns, 64, 16, 4, 1)
            monkeypatch.setattr(sequence_launch, f"DESCRIBED_{name}", shape)
    made = []
    launch = launches.DescribedLaunch.__call__
    monkeypatch.setattr(launches.DescribedLaunch, "__call__", lambda self, *args: made.append(1) or launch(self, *args))
    return made


@pytest.mark.parametrize("layout", ["heads-first", "tokens-first", "packed"])
def test_descriptors(layout, descriptors):
    size = 32 if TRITON_DEVICE == "cpu" else 128
    problem = Problem(False, size, 2, 0.125)
    packed = torch.randn(2, 3 * size, 3, 2, 64).to(TRITON_DEVICE, torch.float16)
    inputs = [packed[:, :, part].transpose(1, 2) for part in range(3)]
    if layout != "packed":
        inputs = [tensor.contiguous() for tensor in inputs]
    if layout == "tokens-first":
        inputs = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs]
    grad = torch.randn_like(inputs[0])
    found = differentiate(kernels, inputs, None, problem, grad)
    if TRITON_DEVICE == "cpu" or torch.cuda.get_device_capability()[0] == 9:
        assert len(descriptors) == 3
    expected = differentiate(plain, inputs, None, problem, grad)
    exact = differentiate(plain, [tensor.cpu().double() for tensor in inputs], None, problem, grad.cpu())
    for ours, theirs, truth in zip(found, expected, exact, strict=True):
        helpers.assert_no_worse(ours, theirs, truth, torch.float16)


@pytest.mark.parametrize("change", ["fp32", "head_dim", "edges", "unaligned", "overlapping"])
def test_what_no_descriptor_describes(change, descriptors):
    size, dim = 32 if TRITON_DEVICE == "cpu" else 128, 32 if change == "head_dim" else 64
    dtype = torch.float32 if change == "fp32" else torch.float16
    block = size + 1 if change == "edges" else size
    memory = torch.randn(2 * size * 64 + 1).to(TRITON_DEVICE, dtype)
    q = memory[int(change == "unaligned") :][: 2 * size * dim].view(1, 1, 2 * size, dim)
    if change == "overlapping":
        q = memory.as_strided((1, 1, 2 * size, dim), (0, 0, 32, 1))
    found = differentiate(kernels, [q] * 3, None, Problem(False, block, 2, 0.125), torch.ones_like(q))
    exact = differentiate(
        plain, [q.cpu().double()] * 3, None, Problem(False, block, 2, 0.125), torch.ones_like(q).cpu()
    )
    assert not descriptors
    for ours, truth in zip(found, exact, strict=True):
        helpers.assert_close(ours.cpu().double(), truth, 5e-3 if dtype == torch.float16 else helpers.FP32)


# Masks.


@pytest.mark.parametrize("backend", ATTEND)
def test_masks_that_rule_out_keys(backend, small_tiles):
    """-inf over whole tiles and over a whole row: no NaN; a query without keys gives zeros and no gradient."""
    mask = torch.zeros(2, 36, 36)
    mask[0, :, :20] = float("-inf")
    mask[1, 5] = float("-inf")
    attend, device = ATTEND[backend]
    case = Case(36, rank=2, batch=2, heads=1)
    inputs, _, grad = case.make(torch.float32, device)
    wide = [tensor.cpu().double() for tensor in inputs]
    found = differentiate(attend, inputs, mask.to(device), case.problem, grad)
    exact = differentiate(plain, wide, mask.double(), case.problem, grad.cpu())
    assert not found[0][1, :, 5].any()
    for ours, truth in zip(found, exact, strict=True):
        helpers.assert_close(ours.cpu().double(), truth)


@pytest.mark.parametrize("value", [-1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("backend", ATTEND)
def test_masks_of_large_finite_values(backend, value, small_tiles):
    """What stands in for -inf is a number: a query that sees nothing else takes the mean of all keys."""
    attend, device = ATTEND[backend]
    mask = torch.zeros(1, 20, 20)
    mask[0, :, ::2] = value
    mask[0, 3] = value
    case = Case(20, rank=2, batch=2, heads=1)
    inputs, _, grad = case.make(torch.float32, device)
    found = differentiate(attend, inputs, mask.to(device), case.problem, grad)
    expected = differentiate(plain, inputs, mask.to(device), case.problem, grad)  # fp64 would tell those scores apart
    assert torch.allclose(found[0][:, :, 3], inputs[2].mean(2), atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        helpers.assert_close(ours, theirs, 1e-4)


@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("triton", torch.float16), ("torch", torch.float16), ("torch", torch.bfloat16), ("torch", torch.float64)],
    ids=str,
)
def test_masks_and_factors_of_any_dtype(backend, dtype, mask_dtype, monkeypatch):
    """Beside tokens of any, and factors of two others."""
    if backend == "torch":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device = ATTEND[backend][1]
    mask = torch.zeros(1, 20, 20, dtype=mask_dtype, device=device)
    mask[0, :, 3], mask[0, :, 5] = float("-inf"), torch.finfo(mask_dtype).min
    inputs, _, _ = Case(20, rank=2, batch=2, heads=1).make(dtype, device)
    inputs[3], inputs[4] = inputs[3].float(), inputs[4].to(mask_dtype if backend == "torch" else torch.float16)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    for causal in (False, True):
        found = functional.factored_bias_attention(*leaves, mask, causal=causal)
        gradients = torch.autograd.grad(found.sum(), leaves)
        exact = plain([t.double() for t in inputs], mask.double(), Problem(causal, 0, 0, inputs[0].shape[-1] ** -0.5))
        assert found.dtype == dtype
        helpers.assert_close(found.double(), exact, 16 * max(torch.finfo(dtype).eps, 1e-6 * (dtype != torch.float64)))
        assert all(one.dtype == leaf.dtype for one, leaf in zip(gradients, leaves, strict=True))


def test_scores_far_below_what_a_mask_leaves_out(small_tiles):
    """A tile that is all -inf says nothing of the maximum, however low the scores behind it."""
    q, k, v = (torch.randn(1, 1, 36, 16, device=TRITON_DEVICE) for _ in range(3))
    q, k = q.abs() * 30, -k.abs() * 30
    mask = torch.zeros(1, 36, 36, device=TRITON_DEVICE)
    mask[:, :, :20] = float("-inf")
    found = kernels([q, k, v], mask, Problem(False, 0, 0, 1.0))
    expected = plain([tensor.double() for tensor in (q, k, v)], mask.double(), Problem(False, 0, 0, 1.0))
    helpers.assert_close(found.double(), expected, 1e-4)  # of scores of some ten thousand


# The functions: what they take, and where they run.


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(TRITON_DEVICE, dtype)


def test_where_the_functions_run(monkeypatch):
    ran = []
    monkeypatch.setattr(sequence_ops, "sequence_attention", lambda *args: ran.append("triton"))
    monkeypatch.setattr(torch_sequence, "factored_bias_attention", lambda *args: ran.append("torch"))
    monkeypatch.setattr(torch_sequence, "block_sliding_window_attention", lambda *args: ran.append("torch"))

    def where(dtype: torch.dtype = torch.float32, tokens: int = 8, dim: int = 16, rank: int = 2) -> list[str]:
        ran.clear()
        q, factor = random(1, 2, tokens, dim, dtype=dtype), random(2, tokens, rank)
        functional.factored_bias_attention(q, q, q, factor, factor)
        functional.block_sliding_window_attention(q, q, q, 4, 2)
        return ran

    assert where() == ["triton", "triton"]
    assert where(rank=65) == ["torch", "triton"]
    assert where(rank=0) == ["torch", "triton"]
    assert where(dim=129) == ["torch", "torch"]
    assert where(torch.float64) == ["torch", "torch"]
    assert where(tokens=0) == ["torch", "torch"]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if TRITON_DEVICE == "cpu":
        assert where() == ["torch", "torch"]


@pytest.mark.parametrize("shape", [(0, 2, 8, 4), (1, 0, 8, 4), (1, 2, 0, 4)], ids=str)
def test_empty(shape):
    q = random(*shape).requires_grad_()
    factor = random(*shape[1:3], 2)
    for out in (
        functional.factored_bias_attention(q, q, q, factor, factor),
        functional.block_sliding_window_attention(q, q, q, 4, 2),
    ):
        assert out.shape == shape
        out.sum().backward()


@pytest.mark.parametrize("scale", [0.5, -0.5, 0, 2, None])
def test_any_scale(scale, small_tiles):
    case = Case(20, rank=2, heads=1)
    inputs, _, grad = case.make(torch.float32, TRITON_DEVICE)
    wide = case.problem._replace(scale=case.dim**-0.5 if scale is None else scale)
    found = differentiate(
        lambda tensors, *_: functional.factored_bias_attention(*tensors, scale=scale), inputs, None, wide, grad
    )
    exact = differentiate(plain, [tensor.cpu().double() for tensor in inputs], None, wide, grad.cpu())
    for name, ours, truth in zip(NAMES, found, exact, strict=False):
        if scale == 0 and name in ("q", "k"):
            assert not ours.any()
        else:
            assert helpers.difference(ours.cpu().double(), truth) <= helpers.FP32, name


def test_layouts(small_tiles):
    """Views of a packed projection are taken as they are, and the output lies as q does; other strides are copied."""
    packed = random(1, 20, 3, 2, 16)
    q, k, v = (packed[:, :, part].transpose(1, 2) for part in range(3))
    expected = functional.block_sliding_window_attention(q.contiguous(), k.contiguous(), v.contiguous(), 6, 2)
    found = functional.block_sliding_window_attention(q, k, v, 6, 2)
    helpers.assert_close(found, expected, 1e-6)
    assert found.transpose(1, 2).is_contiguous()
    reversed_axes = [tensor.mT.contiguous().mT for tensor in (q, k, v)]
    helpers.assert_close(functional.block_sliding_window_attention(*reversed_axes, 6, 2), expected, 1e-6)
    shared = q[:, :1].expand_as(q)
    helpers.assert_close(
        functional.block_sliding_window_attention(shared, k, v, 6, 2),
        functional.block_sliding_window_attention(shared.contiguous(), k, v, 6, 2),
        1e-6,
    )


def test_factors_that_all_heads_share(small_tiles):
    inputs, _, grad = Case(20, heads=3, batch=2).make(torch.float32, TRITON_DEVICE)
    inputs += functional.squared_distance_factors(random(20, 3), -0.5)
    problem = Problem(False, 0, 0, 12**-0.5)
    found = differentiate(lambda tensors, *_: functional.factored_bias_attention(*tensors), inputs, None, problem, grad)
    exact = differentiate(plain, [tensor.cpu().double() for tensor in inputs], None, problem, grad.cpu())
    for ours, truth in zip(found, exact, strict=True):
        helpers.assert_close(ours.cpu().double(), truth)


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3,), (4,), (0, 4)], ids=str)
def test_any_subset_of_gradients(wanted, small_tiles):
    case = Case(20, rank=2, heads=1, batch=2)
    inputs, _, grad = case.make(torch.float32, TRITON_DEVICE)
    everything = differentiate(kernels, inputs, None, case.problem, grad)[1:]
    leaves = [t.detach().requires_grad_(place in wanted) for place, t in enumerate(inputs)]
    found = torch.autograd.grad(kernels(leaves, None, case.problem), [leaves[place] for place in wanted], grad)
    for place, ours in zip(wanted, found, strict=True):
        helpers.assert_close(ours, everything[place], 1e-5)


def test_the_same_numbers_at_every_run(small_tiles):
    case = BIASED[4]
    inputs, mask, grad = case.make(torch.float16, TRITON_DEVICE)
    first, second = (differentiate(kernels, inputs, mask, case.problem, grad) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_autocast():
    """As scaled_dot_product_attention: q, k and v in autocast's dtype, factors as they are."""
    case = Case(16, rank=2, heads=1)
    inputs, _, _ = case.make(torch.float32, TRITON_DEVICE)
    with torch.autocast(TRITON_DEVICE, torch.float16):
        found = functional.factored_bias_attention(*inputs)
    assert found.dtype == torch.float16
    halves = [tensor.half() for tensor in inputs[:3]] + inputs[3:]
    assert torch.equal(found, functional.factored_bias_attention(*halves))


def test_autocast_keeps_the_precision_of_factors_in_plain_pytorch():
    q, k, v = (torch.randn(1, 1, 3000, 8) for _ in range(3))
    factors = functional.alibi_factors(1, 3000, [0.5])
    halves = [tensor.bfloat16() for tensor in (q, k, v)]
    expected = torch_sequence.factored_bias_attention(*halves, *factors, None, 0.3, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch_sequence.factored_bias_attention(*halves, *factors, None, 0.3, True)
    assert torch.equal(found, expected)


def _good() -> dict[str, Any]:
    q = torch.randn(2, 3, 8, 4)
    return {"q": q, "k": q, "v": q, "q_factor": torch.randn(3, 8, 2), "k_factor": torch.randn(2, 3, 8, 2)}


BAD = [
    ({"q": None}, TypeError, "q must be a tensor; got NoneType"),
    ({"q": torch.zeros(3, 8, 4)}, ValueError, "q must have shape (batch, heads, tokens, head_dim); got (3, 8, 4)"),
    ({"k": torch.zeros(2, 3, 7, 4)}, ValueError, "k must have q's shape, (2, 3, 8, 4); got (2, 3, 7, 4)"),
    ({"v": torch.zeros(2, 3, 8, 4).half()}, TypeError, "v must have q's dtype, torch.float32; got torch.float16"),
    ({"v": torch.zeros(2, 3, 8, 4).int()}, TypeError, "v must be floating point; got torch.int32"),
    ({"k": torch.zeros(2, 3, 8, 4, device="meta")}, ValueError, "k must be on q's device, cpu; got meta"),
    ({"q_factor": torch.zeros(8, 2)}, ValueError, "q_factor must have shape (heads, tokens, rank) or"),
    ({"k_factor": torch.zeros(3, 8, 3)}, ValueError, "k_factor must have q_factor's rank, 2; got 3"),
    ({"mask": torch.zeros(8, 8)}, ValueError, "mask must have shape (masks, 8, 8), 1 mask or more; got (8, 8)"),
    ({"mask": torch.zeros(1, 8, 8).bool()}, TypeError, "mask must be floating point; got torch.bool"),
    ({"mask": torch.zeros(1, 8, 8).requires_grad_()}, ValueError, "mask takes no gradient"),
    ({"scale": "1"}, TypeError, "scale must be None or a number; got '1'"),
    ({"scale": float("nan")}, ValueError, "scale must be finite; got nan"),
    ({"causal": 1}, TypeError, "causal must be True or False; got 1"),
]


@pytest.mark.parametrize(("change", "kind", "words"), BAD, ids=[words[:30] for *_, words in BAD])
def test_bad_arguments(change, kind, words):
    with pytest.raises(kind) as caught:
        functional.factored_bias_attention(**{**_good(), **change})
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["block_size", "window_blocks"])
@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [(0, ValueError, "must be 1 or more; got 0"), (2.0, TypeError, "must be an integer; got 2.0")],
)
def test_bad_blocks(name, value, kind, words):
    q = torch.randn(1, 1, 4, 4)
    with pytest.raises(kind) as caught:
        functional.block_sliding_window_attention(q, q, q, **{"block_size": 2, "window_blocks": 2, name: value})
    assert str(caught.value) == f"{name} {words}"


def test_public_names():
    assert all(getattr(functional, name).__doc__ for name in functional.__all__)
    for name in ("factored_bias_attention", "block_sliding_window_attention"):
        documented = inspect.getdoc(getattr(functional, name)).split("Args:")[1].split("Returns:")[0]
        assert all(parameter in documented for parameter in inspect.signature(getattr(functional, name)).parameters)
        assert all(word in getattr(functional, name).__doc__ for word in ("Raises:", "Differentiable"))


# As PyTorch sees them.


def test_operators_pass_opcheck(small_tiles):
    case = Case(18, rank=2, batch=2, heads=1, shared=(True, False))
    inputs, _, grad = case.make(torch.float32, TRITON_DEVICE)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    arguments = (*leaves, None, *case.problem)
    torch.library.opcheck(torch.ops.swinaccel.sequence_attention.default, arguments)
    q, k, v, *factors = (tensor.detach() for tensor in leaves)
    out, lse = torch.ops.swinaccel.sequence_attention(q, k, v, *factors, None, *case.problem)
    for factor_grad in (False, True):
        torch.library.opcheck(
            torch.ops.swinaccel.sequence_attention_backward.default,
            (grad, q, k, v, *factors, None, out, lse, *case.problem, factor_grad),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_into_one_graph(dynamic, small_tiles):
    def both(q: Tensor, k: Tensor, v: Tensor, q_factor: Tensor, k_factor: Tensor) -> Tensor:
        out = functional.block_sliding_window_attention(q, k, v, 6, 2)
        return out + functional.factored_bias_attention(q, k, v, q_factor, k_factor, causal=True)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (17, 20):
        inputs, _, grad = Case(tokens, rank=2, heads=1, dim=16).make(torch.float32, TRITON_DEVICE)
        problem = Problem(False, 0, 0, 0.25)
        found = differentiate(lambda tensors, *_: compiled(*tensors), inputs, None, problem, grad)
        expected = differentiate(lambda tensors, *_: both(*tensors), inputs, None, problem, grad)
        for ours, theirs in zip(found, expected, strict=True):
            helpers.assert_close(ours, theirs, 1e-6)


def test_compiles_without_the_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs, _, grad = Case(150, rank=2).make(torch.float32, "cpu")
    problem = Problem(False, 0, 0, 0.25)

    def both(q: Tensor, k: Tensor, v: Tensor, q_factor: Tensor, k_factor: Tensor) -> Tensor:
        out = functional.block_sliding_window_attention(q, k, v, 40, 2)
        return out + functional.factored_bias_attention(q, k, v, q_factor, k_factor)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    found = differentiate(lambda tensors, *_: compiled(*tensors), inputs, None, problem, grad)
    expected = differentiate(lambda tensors, *_: both(*tensors), inputs, None, problem, grad)
    for ours, theirs in zip(found, expected, strict=True):
        helpers.assert_close(ours, theirs, 1e-5)


class _Largest(TorchDispatchMode):
    """The most elements that any operator gave, in one tensor and in all."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.sum = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in helpers.tensors(result)]
        self.one, self.sum = max([self.one, *sizes]), self.sum + sum(sizes)
        return result


@pytest.mark.parametrize("block_size", [1, 50, 128])
def test_plain_blocks_are_linear_in_the_tokens(block_size):
    totals = []
    for tokens in (1024, 2048):
        inputs, _, grad = Case(tokens, block_size=block_size, window_blocks=3, dim=8, heads=1).make(
            torch.float32, "cpu"
        )
        problem = Problem(False, block_size, 3, 0.3)
        with _Largest() as seen:
            differentiate(pytorch, inputs, None, problem, grad)
        assert seen.one <= tokens * 400
        totals.append(seen.sum)
    assert totals[1] <= 2.2 * totals[0]


# Derivatives beyond the first, which the kernels do not have.


def _functions(case: Case) -> tuple[list[Tensor], Any, Any]:
    """Inputs, what the public function gives for them, and what the oracle does."""
    inputs, mask, _ = case.make(torch.float32, TRITON_DEVICE)

    def attend(*tensors: Tensor) -> Tensor:
        if case.block_size:
            return functional.block_sliding_window_attention(*tensors, case.block_size, case.window_blocks)
        return functional.factored_bias_attention(*tensors, mask, causal=case.causal)

    wide_mask = None if mask is None else mask.double()
    return inputs, attend, lambda *tensors: plain(list(tensors), wide_mask, case.problem)


FURTHER = pytest.mark.parametrize(
    "case",
    [
        Case(20, block_size=6, window_blocks=2), Case(70, block_size=3, window_blocks=2, heads=1),
        Case(18, rank=2, causal=True), Case(12, rank=3, masks=2, batch=2, shared=(True, False)),
    ],
    ids=str,
)  # fmt: skip


def _close(found: Any, exact: Any) -> None:
    for ours, truth in zip(found, exact, strict=True):
        helpers.assert_close(ours.double(), truth, 1e-4)


@FURTHER
@pytest.mark.parametrize("profiled", [False, True], ids=["plain", "profiled"])
def test_second_derivatives(case, profiled, small_tiles):
    inputs, attend, oracle = _functions(case)

    def penalty(attend: Any, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = attend(*leaves).square().sum()
        first = torch.autograd.grad(out, leaves, create_graph=True)
        return *first, *torch.autograd.grad(out + sum(one.square().sum() for one in first), leaves)

    with torch.profiler.profile() if profiled else contextlib.nullcontext():
        found = penalty(attend, inputs)
    _close(found, penalty(oracle, [tensor.double() for tensor in inputs]))


def test_second_derivatives_of_some_inputs(small_tiles):
    """Of q alone, which is what k is as well."""
    inputs, attend, oracle = _functions(Case(12, rank=2))

    def second(attend: Any, tensors: list[Tensor]) -> Tensor:
        leaf = tensors[0].detach().requires_grad_()
        (first,) = torch.autograd.grad(attend(leaf, leaf, *tensors[2:]).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    _close([second(attend, inputs)], [second(oracle, [tensor.double() for tensor in inputs])])


@FURTHER
def test_transforms_of_functions(case, small_tiles):
    inputs, attend, oracle = _functions(case)
    names = tuple(range(len(inputs)))

    def everything(attend: Any, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        def loss(*tensors: Tensor) -> Tensor:
            return attend(*tensors).square().sum()

        def penalty(*tensors: Tensor) -> Tensor:
            return sum(one.square().sum() for one in torch.func.grad(loss, names)(*tensors))

        stacks = tuple(torch.stack((tensor, 0.5 * tensor)) for tensor in tensors)
        return (
            *torch.func.grad(loss, names)(*tensors), *torch.func.grad(penalty, names)(*tensors),
            *torch.func.jvp(loss, tuple(tensors), tuple(tensors)), torch.func.vmap(attend)(*stacks),
            *torch.func.vmap(torch.func.grad(loss, names))(*stacks),
        )  # fmt: skip

    _close(everything(attend, inputs), everything(oracle, [tensor.double() for tensor in inputs]))


@FURTHER
def test_forward_mode(case, small_tiles):
    inputs, attend, oracle = _functions(case)

    def tangent(attend: Any, tensors: list[Tensor]) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(tensor, tensor.sin()) for tensor in tensors]
            return torch.autograd.forward_ad.unpack_dual(attend(*duals)).tangent

    _close([tangent(attend, inputs)], [tangent(oracle, [tensor.double() for tensor in inputs])])


@pytest.mark.parametrize("case", [Case(20, block_size=6), Case(18, rank=2)], ids=str)
def test_compiled_transforms(case, small_tiles):
    inputs, attend, oracle = _functions(case)

    def both(attend: Any, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        _, tangent = torch.func.jvp(attend, tuple(tensors), tuple(tensors))
        return attend(*tensors), tangent, torch.func.grad(lambda q: attend(q, *tensors[1:]).square().sum())(tensors[0])

    compiled = torch.compile(lambda *tensors: both(attend, list(tensors)), fullgraph=True, backend="aot_eager")
    _close(compiled(*inputs), both(oracle, [tensor.double() for tensor in inputs]))


def test_subclasses_of_tensors(small_tiles):
    class Marked(Tensor):
        pass

    inputs, attend, oracle = _functions(Case(20, block_size=6))
    found = attend(*(tensor.as_subclass(Marked) for tensor in inputs))
    assert type(found) is Marked
    _close([found.as_subclass(Tensor)], [oracle(*(tensor.double() for tensor in inputs))])


# Where a kernel fails, plain PyTorch gives the numbers, and says so once.


def _break(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("out of resource: shared memory\nand much more")


@pytest.mark.parametrize("case", [Case(20, rank=2, shared=(True, False), batch=2), Case(20, block_size=6)], ids=str)
@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_failed_kernels(broken, case, monkeypatch, caplog, small_tiles):
    inputs, mask, grad = case.make(torch.float32, TRITON_DEVICE)
    exact = differentiate(plain, [tensor.cpu().double() for tensor in inputs], mask, case.problem, grad.cpu())

    def attend(tensors: list[Tensor], *_: Any) -> Tensor:
        q_factor, k_factor = tensors[3:] or (None, None)
        return sequence_ops.sequence_attention(*tensors[:3], q_factor, k_factor, None, case.problem)

    monkeypatch.setattr(backend, broken, _break)
    with pytest.raises(KernelError, match="out of resource"):
        differentiate(attend, inputs, mask, case.problem, grad)
    monkeypatch.delenv("SWINACCEL_STRICT")
    with caplog.at_level(logging.WARNING, "swinaccel"):
        for _ in range(2):
            found = differentiate(attend, inputs, mask, case.problem, grad)
            for ours, truth in zip(found, exact, strict=True):
                helpers.assert_close(ours.cpu().double(), truth)
    assert [record.getMessage() for record in caplog.records] == [
        "the Triton kernel failed: RuntimeError: out of resource: shared memory;"
        " PyTorch computes the same from now on, at its own speed"
    ]


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_out_of_memory_is_no_failure(place, monkeypatch, caplog, small_tiles):
    """It comes through as it is, so that a caller can try a smaller batch, which the kernels then run."""
    case = Case(20, block_size=6)
    inputs, mask, grad = case.make(torch.float32, TRITON_DEVICE)

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "swinaccel"):
        patch.setattr(backend, place, full)
        patch.delenv("SWINACCEL_STRICT")
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            differentiate(kernels, inputs, mask, case.problem, grad)
    assert not ops.has_failures()
    assert not caplog.records
    differentiate(kernels, inputs, mask, case.problem, grad)


# Factors.


def dense(factors: Any) -> Tensor:
    return factors[0].double() @ factors[1].double().mT


def low_rank(heads: int = 3, rows: int = 20, cols: int = 24, rank: int = 4, noise: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(heads, size, rank, generator=generator) for size in (rows, cols))
    return left @ right.mT + noise * torch.randn(heads, rows, cols, generator=generator)


def test_factors_of_a_given_rank():
    bias = low_rank(noise=0.1)
    for rank in (1, 4, 20):
        found = functional.factorize_bias(bias, rank=rank)
        assert found.rank == rank
        assert found.q_factor.shape == (3, 20, rank)
        assert found.k_factor.shape == (3, 24, rank)
        assert found.error == pytest.approx((bias - dense(found)).abs().max().item(), rel=1e-2, abs=1e-5)
        best = torch.linalg.svdvals(bias.double())[:, rank:].square().sum(-1)
        assert torch.allclose((bias - dense(found)).square().sum((-2, -1)), best, rtol=1e-3, atol=1e-8)


def test_factors_by_energy():
    bias = low_rank(noise=0.1)
    kept = torch.linalg.svdvals(bias.double()).square().cumsum(-1)
    kept = (kept / kept[:, -1:]).amin(0)
    for energy in (0.5, 0.995, 0.9999, 1.0):
        found = functional.factorize_bias(bias, energy=energy)
        assert kept[found.rank - 1] >= energy - 1e-6
        assert found.rank == 1 or kept[found.rank - 2] < energy + 1e-6


def test_factors_by_tolerance():
    bias = low_rank(noise=0.01)
    ranks = []
    for tolerance in (1.0, 0.05, 1e-3, 0.0):
        found = functional.factorize_bias(bias, tolerance=tolerance)
        assert found.error <= max(tolerance, 1e-5)
        assert found.rank == 1 or functional.factorize_bias(bias, rank=found.rank - 1).error > tolerance
        ranks.append(found.rank)
    assert ranks == sorted(ranks)
    exact = functional.factorize_bias(low_rank())
    assert (exact.rank, exact.error <= 2.0**-11 * low_rank().abs().max()) == (4, True)
    assert functional.factorize_bias(low_rank().double(), tolerance=1e-12).q_factor.dtype == torch.float64


@pytest.mark.parametrize(
    ("bias", "options", "kind", "words"),
    [
        (torch.zeros(3, 3), {}, ValueError, "bias must have shape (heads, N, K), none of them 0; got (3, 3)"),
        (torch.full((1, 2, 2), float("-inf")), {}, ValueError, "bias must be finite"),
        (torch.zeros(1, 2, 2).int(), {}, TypeError, "bias must be floating point; got torch.int32"),
        (torch.ones(1, 2, 3), {"rank": 3}, ValueError, "rank must lie in 1 .. 2"),
        (torch.ones(1, 2, 3), {"rank": 1.0}, TypeError, "rank must be an integer; got 1.0"),
        (torch.ones(1, 2, 3), {"energy": 1.5}, ValueError, "energy must lie in (0, 1]"),
        (torch.ones(1, 2, 3), {"tolerance": -1}, ValueError, "tolerance must be 0 or more; got -1"),
        (torch.ones(1, 2, 3), {"rank": 1, "energy": 0.9}, ValueError, "exclude each other; got rank and energy"),
    ],
)
def test_bad_biases(bias, options, kind, words):
    with pytest.raises(kind) as caught:
        functional.factorize_bias(bias, **options)
    assert words in str(caught.value)


@pytest.mark.parametrize("heads", [1, 3, 8, 12])
def test_alibi_is_exact(heads):
    tokens = 50
    q_factor, k_factor = functional.alibi_factors(heads, tokens)
    slopes = -q_factor.double().diff(dim=1)[:, 0, 0]
    place = torch.arange(tokens)
    expected = -slopes[:, None, None] * (place[:, None] - place[None, :])
    assert q_factor.shape == k_factor.shape == (heads, tokens, 2)
    assert torch.allclose(dense((q_factor, k_factor)), expected, atol=1e-5)
    # The paper's own numbers, and its rule for other counts: every other slope of twice as many heads.
    if heads == 8:
        assert torch.allclose(slopes, torch.tensor([2.0**-n for n in range(1, 9)]).double())
    if heads == 12:
        eight, sixteen = (2.0 ** (-8 / n * torch.arange(1, n + 1)).double() for n in (8, 16))
        assert torch.allclose(slopes, torch.cat((eight, sixteen[::2][:4])), atol=1e-6)


def test_alibi_takes_slopes():
    q_factor, _ = functional.alibi_factors(2, 4, slopes=[1.0, 0.25])
    assert q_factor[:, 0, 1].tolist() == [1.0, 0.25]
    with pytest.raises(ValueError, match="slopes must hold one number per head, 3; got shape"):
        functional.alibi_factors(3, 4, slopes=[1.0, 0.25])
    with pytest.raises(ValueError, match="num_tokens must be 1 or more; got 0"):
        functional.alibi_factors(3, 0)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_squared_distances_are_exact(dims):
    x, y = (100 + torch.randn(2, 20, dims, dtype=torch.float64) for _ in range(2))
    weight = torch.tensor([-1.0, -0.5, 0.25], dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    factors = functional.squared_distance_factors(x, weight, y)
    assert factors[0].shape == factors[1].shape == (2, 3, 20, dims + 2)
    expected = weight[:, None, None] * torch.cdist(x, y).square().unsqueeze(1)
    found = factors[0] @ factors[1].mT
    assert torch.allclose(found, expected, atol=1e-9)
    grad = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, weight), grad), torch.autograd.grad(expected, (x, weight), grad), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-7)
    alone = functional.squared_distance_factors(x[0])
    assert torch.allclose(alone[0] @ alone[1].mT, -torch.cdist(x[:1], x[:1]).square(), atol=1e-9)


def test_squared_distances_of_bad_positions():
    with pytest.raises(TypeError, match=r"positions must be a floating-point tensor; got torch\.int64"):
        functional.squared_distance_factors(torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"key_positions must have shape .* got \(3, 3\)"):
        functional.squared_distance_factors(torch.zeros(3, 2), key_positions=torch.zeros(3, 3))


# Launches.


@pytest.mark.parametrize("limit", [64, 99, 163, 227])
def test_launches_fit_the_shared_memory(limit):
    """By the sums they are chosen by; every list ends in a launch that fits."""
    from swinaccel.kernels import sequence_launch

    for choose in (sequence_launch.forward, sequence_launch.grad_query, sequence_launch.grad_key):
        for element_size, factor_size in ((2, 2), (2, 4), (4, 4)):
            for head_dim, rank in ((8, 0), (64, 2), (128, 0), (128, 64)):
                for has_mask in (False, True):
                    facts = {
                        "head_dim": head_dim,
                        "rank": rank,
                        "element_size": element_size,
                        "factor_size": factor_size,
                        "has_mask": has_mask,
                    }
                    small, large = (choose(**facts, shared_memory=size) for size in (limit * 1024, 1 << 30))
                    assert small.block_d >= head_dim
                    assert small.block_r >= rank
                    assert small.block_m * small.block_n <= large.block_m * large.block_n
                    least = choose(**facts, shared_memory=0)
                    assert small != least or (least.block_m, least.block_n) == (16, 16) or large == least


def test_sequences_share_the_cache():
    from swinaccel.kernels.sequence_launch import sequences_per_group

    facts = {"head_dim": 64, "element_size": 2}
    assert sequences_per_group(span=4096, num_sequences=12, **facts) == 12
    assert sequences_per_group(span=4096, num_sequences=64, **facts) == 16
    assert sequences_per_group(span=1 << 20, num_sequences=64, **facts) == 1


def test_groups_of_sequences(monkeypatch, small_tiles):
    """More sequences than a group holds, the last group short of some."""
    from swinaccel.kernels import sequence_launch

    monkeypatch.setattr(sequence_launch, "sequences_per_group", lambda **facts: 2)
    compare(Case(20, block_size=8, window_blocks=2, batch=1, heads=3), "triton")


# On the GPU all of the above runs compiled; what follows is only worth it there.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(1024, block_size=256, window_blocks=2, dim=64),
        Case(1000, block_size=196, window_blocks=3, dim=64, batch=2),
        Case(777, block_size=100, window_blocks=2, dim=128),
        Case(700, rank=16, dim=64, causal=True),
        Case(515, rank=5, dim=40, masks=2, batch=2),
        Case(300, rank=64, dim=128),
    ],
    ids=str,
)
def test_full_sizes(case, dtype):
    compare(case, "triton", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [64, 99])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_small_shared_memory(limit, dtype, monkeypatch):
    monkeypatch.setattr(devices, "shared_memory_override", limit * 1024)
    for case in (Case(300, rank=16, dim=64, causal=True, masks=1), Case(300, block_size=64, window_blocks=2, dim=128)):
        compare(case, "triton", dtype)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """More than 2^31 elements: the last sequence must equal what it is alone."""
    tokens, dim = 1 << 18, 128
    heads = 2**31 // (tokens * dim) + 1
    if torch.cuda.mem_get_info()[0] < 5 * heads * tokens * dim * 2:
        pytest.skip("needs more free GPU memory")
    q = torch.zeros(1, heads, tokens, dim, device="cuda", dtype=torch.float16)
    q[:, -1] = torch.randn(tokens, dim, device="cuda", dtype=torch.float16)
    found = functional.block_sliding_window_attention(q, q, q, 256, 2)[:, -1:]
    last = q[:, -1:].contiguous()
    helpers.assert_close(found, functional.block_sliding_window_attention(last, last, last, 256, 2), 1e-6)
