"""Functions of sequences: what they take, where they run, as PyTorch sees them, and their derivatives."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import helpers
import pytest
import torch
from helpers import TRITON_DEVICE
from sequences import BIASED, NAMES, Case, differentiate, kernels, plain, pytorch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swinaccel import functional
from swinaccel.backends.torch import sequence as torch_sequence
from swinaccel.backends.triton.sequence import Problem
from swinaccel.ops import sequence as sequence_ops

pytestmark = pytest.mark.usefixtures("strict_kernels")


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
