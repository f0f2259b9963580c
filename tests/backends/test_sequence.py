"""The kernels of sequences (interpreted where there is no GPU) and plain PyTorch, by one oracle."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import helpers
import pytest
import torch
from helpers import TRITON_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import ATTEND, BIASED, Case, compare, differentiate, kernels, plain
from torch import Tensor

from swinaccel import functional, ops
from swinaccel.backends.triton import devices, launches
from swinaccel.backends.triton import sequence as backend
from swinaccel.backends.triton.sequence import Problem
from swinaccel.errors import KernelError
from swinaccel.ops import sequence as sequence_ops

# The interpreter cuts bfloat16 off where a GPU rounds, so errors of that dtype are compared on the GPU only.
LOW = (torch.float16, torch.bfloat16) if TRITON_DEVICE == "cuda" else (torch.float16,)


pytestmark = pytest.mark.usefixtures("strict_kernels")


BLOCKS = [
    Case(32, block_size=16, window_blocks=1),
    Case(48, block_size=16, window_blocks=2, heads=1),  # no tile holds an edge
    Case(37, block_size=7, window_blocks=3, batch=2, heads=1),
    Case(20, block_size=50, window_blocks=4),
    Case(33, block_size=1, window_blocks=5, heads=1),
    Case(40, block_size=24, window_blocks=100, heads=1, dim=20),
    Case(1, block_size=3, window_blocks=2),
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


@pytest.mark.parametrize("limit", [64, 99, 163, 227])
def test_launches_fit_the_shared_memory(limit):
    """By the sums they are chosen by; every list ends in a launch that fits."""
    from swinaccel.kernels import sequence_launch

    for choose in (sequence_launch.forward, sequence_launch.grad_query, sequence_launch.grad_key):
        for element_size, factor_size in ((2, 2), (2, 4), (4, 4)):
            for head_dim, rank in ((8, 0), (64, 2), (128, 0), (128, 64)):
                for has_mask in (False, True):
                    sizes = sequence_launch.Sizes(head_dim, rank, element_size, factor_size, has_mask, 0)
                    small, large = (choose(sizes._replace(shared_memory=one)) for one in (limit * 1024, 1 << 30))
                    assert small.block_d >= head_dim
                    assert small.block_r >= rank
                    assert small.block_m * small.block_n <= large.block_m * large.block_n
                    least = choose(sizes)
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
def test_small_shared_memory(limit, dtype, with_shared_memory):
    with_shared_memory(limit * 1024)
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
