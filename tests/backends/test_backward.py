"""Gradients of the kernels against those of the oracle in fp64: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import itertools
from typing import Any

import helpers
import pytest
import torch
from gradients import PARAMETERS, compare, exactly, gradients, leaves, named, reference_gradients, run
from helpers import TRITON_DEVICE
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_problems import (
    BIAS_KINDS,
    DTYPES,
    GPU_CASES,
    HEAD_DIMS,
    HEADS_APART,
    SMALL_AND_LARGE,
    VOLUMES,
    Case,
    bias_of_kind,
    draw_case,
    heads_apart,
    rounded_cases,
)
from torch import Tensor

from swinaccel.backends.triton import launches
from swinaccel.ops import window as window_ops

pytestmark = pytest.mark.usefixtures("strict_kernels")

CASES = [
    Case((2, 2), (6, 4)),
    Case((1, 9), (3, 20), (0, 4)),
    Case((3, 2), (7, 5), (1, 1), heads=3),
    Case((7, 7), (14, 14), (3, 3), dim=32),
    Case((8, 8), (8, 16), (0, 4), dim=32, batch=2),
    Case((4, 4), (9, 11), (1, 3), roll_first=True, batch=3),
    Case((4, 4), (3, 5), (2, 2), roll_first=True),
    Case((4, 4), (3, 3), (2, 2)),
    Case((9, 8), (18, 16), (4, 4), heads=1),
    Case((12, 12), (13, 20), (6, 6), heads=1, roll_first=True),
    Case((5, 13), (11, 13), (2, 6), batch=2),
    Case((16, 16), (16, 16), heads=1, dim=32),
]


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("case", [*CASES, *VOLUMES[:6], VOLUMES[-2]], ids=str)
def test_geometry(case, cosine):
    run(Case(**{**vars(case), "cosine": cosine}))


@pytest.mark.parametrize("dim", HEAD_DIMS)
@SMALL_AND_LARGE
def test_head_dims(window, dim):
    run(Case(window, (10, 8), (3, 3), dim=dim, cosine=dim % 4 == 2))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", rounded_cases((9, 8), (13, 16), (6, 6)), ids=str)
def test_low_precision(case, dtype):
    run(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_keys_and_values_with_a_mean(dtype):
    """Of dS, whose rows sum to zero, the rounding of the output must not make rows that do not: dQ has no mean of K."""
    qkv, options = Case((9, 8), (9, 16), heads=2).make(dtype)
    qkv[..., 32:] += 4.0
    compare(qkv, Case((9, 8), (9, 16), heads=2).geometry, **options)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rows_of_a_bias_gradient_sum_to_zero(dtype):
    """They are dS, summed over windows, of which the rounding of the output is left out by the kernel for dQ."""
    case = Case((9, 8), (9, 16), heads=2)
    qkv, options = case.make(dtype)
    qkv[..., 32:] += 4.0
    bias = torch.randn(2, 72, 72, device=TRITON_DEVICE).requires_grad_()
    out = window_ops.shifted_window_attention(qkv, case.geometry, **{**options, "table": bias, "index": None})
    out.backward(torch.randn_like(out))
    assert bias.grad.sum(-1).abs().mean() < 2e-4 * bias.grad.abs().sum(-1).mean()


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_large_logits(dtype, cosine):
    """The backward has the forward's scores, in which queries were scaled and rounded: its weights sum to one."""
    case = Case((9, 8), (9, 8), heads=2, dim=30, cosine=cosine)
    qkv, options = case.make(dtype)
    if cosine:
        options["logit_scale"] = torch.full((2,), 4.6, device=TRITON_DEVICE)
        qkv[..., 60:120] += qkv[..., :60]
    else:
        qkv[..., :120] *= 12
    compare(qkv, case.geometry, **options)


@pytest.mark.parametrize("kind", ["heads-first", "different-strides"])
@pytest.mark.parametrize("case", HEADS_APART[:4], ids=str)
def test_an_axis_for_the_heads(case, kind):
    qkv, options = case.make(torch.float32)
    grad = torch.randn(*qkv.shape[:-1], case.heads * case.dim).to(TRITON_DEVICE)
    _, exact = reference_gradients(qkv, case.geometry, grad, exactly, **options)
    leaf, options = leaves(qkv, options)
    out = window_ops.shifted_window_attention(heads_apart(leaf, case, kind), case.geometry, **options)
    out.flatten(-2).backward(grad)
    for name, tensor in named(leaf, options).items():
        helpers.assert_close(tensor.grad.double(), exact[name])


@pytest.mark.parametrize("window", [(2, 3, 3), (2, 17, 2)], ids=["small", "large"])
def test_index_of_a_larger_window(window):
    """Its first rows and columns: pairs of one offset then have rows of many others, and all of those get theirs."""
    whole = tuple(side + 1 for side in window)
    case = Case(window, tuple(side + 1 for side in window), (1, 1, 1), heads=1)
    tokens = case.geometry.tokens
    index = helpers.position_index(whole)[:tokens, :tokens].to(TRITON_DEVICE)
    run(case, index=index, table=torch.randn(helpers.table_rows(whole), 1).to(TRITON_DEVICE))


@SMALL_AND_LARGE
def test_empty_batch(window):
    case = Case(window, (10, 12), (1, 1), batch=0, cosine=True)
    qkv, options = case.make(torch.float32)
    _, found = gradients(qkv, case.geometry, torch.empty(0, 10, 12, 32, device=TRITON_DEVICE), **options)
    assert found["qkv"].shape == qkv.shape
    for name in PARAMETERS:
        assert bool((found[name] == 0).all()), name


@pytest.mark.parametrize("wanted", [1, 8, 10**6])
@SMALL_AND_LARGE
def test_sums_over_images_and_windows(monkeypatch, window, wanted):
    """However many window positions and images a program takes, each pair is counted once."""
    from swinaccel.kernels import launch

    monkeypatch.setattr(launch, "_BACKWARD_PROGRAMS", wanted)
    monkeypatch.setattr(launches, "launches", {})
    run(Case(window, (2 * window[0] - 1, window[1]), (2, 2), heads=1, batch=3, cosine=True))


@pytest.mark.parametrize("kind", ["random", "half", "some-inf"])
@SMALL_AND_LARGE
def test_mask_tensor(window, kind):
    case = Case(window, (2 * window[0], window[1]), (2, 0))
    mask = 3 * torch.randn(2, case.geometry.tokens, case.geometry.tokens).to(TRITON_DEVICE)
    if kind == "half":
        mask = mask.half()
    elif kind == "some-inf":
        mask[0, :, ::3] = float("-inf")
    run(case, mask=mask)


@SMALL_AND_LARGE
def test_logit_scale_is_clamped_from_above_only(window):
    """Above ln 100 = 4.605 there is no gradient; right below there is one, of terms that cancel to a hundredth."""
    case = Case(window, (9, 9), (2, 2), cosine=True, heads=3)
    qkv, options = case.make(torch.float32)
    options["logit_scale"] = torch.tensor([10.0, -5.0, 4.6], device=TRITON_DEVICE)
    grad = torch.randn(1, 9, 9, 48).to(TRITON_DEVICE)
    _, found = gradients(qkv, case.geometry, grad, **options)
    _, exact = reference_gradients(qkv, case.geometry, grad, exactly, **options)
    assert found["logit_scale"][0] == 0
    for name, tolerance in {"qkv": 1e-4, "table": 1e-4, "logit_scale": 1e-3}.items():
        helpers.assert_close(found[name].double(), exact[name], tolerance)


@SMALL_AND_LARGE
def test_zero_and_tiny_tokens(window):
    """Where max(norm, 1e-12) is 1e-12 that is a constant, and nothing is divided by zero."""
    case = Case(window, (9, 9), (2, 2), cosine=True)
    qkv, options = case.make(torch.float32)
    qkv[:, 2] = 0
    qkv[:, 3] *= 1e-14
    grad = torch.randn(1, 9, 9, 32).to(TRITON_DEVICE)
    _, found = gradients(qkv, case.geometry, grad, **options)
    _, exact = reference_gradients(qkv, case.geometry, grad, exactly, **options)
    for rows in ([0, 1, 4, 5, 6, 7, 8], [2, 3]):
        helpers.assert_close(found["qkv"][:, rows].double(), exact["qkv"][:, rows])


@SMALL_AND_LARGE
@pytest.mark.parametrize("kind", [kind for kind in BIAS_KINDS if kind != "double-table"])
def test_bias_operands(window, kind):
    """The index is a buffer too: the gradient goes to whatever rows it names."""
    case = Case(window, (9, 10), (2, 2))
    qkv, options = case.make(torch.float32)
    table, index = bias_of_kind(kind, options["table"], options["index"])
    if kind == "half-table":
        options["table"] = table
        grad = torch.randn(1, 9, 10, 32).to(TRITON_DEVICE)
        _, found = gradients(qkv, case.geometry, grad, **options)
        _, exact = reference_gradients(qkv, case.geometry, grad, exactly, **options)
        assert found["table"].dtype == torch.float16
        helpers.assert_close(found["table"].double(), exact["table"], 1e-3)
        return
    compare(qkv, case.geometry, **{**options, "table": table, "index": index})


@SMALL_AND_LARGE
def test_deterministic_algorithms(window):
    """With an index of its own kind the sum by atomics is replaced; gradients are bitwise equal in either mode."""
    case = Case(window, (9, 10), (2, 2), heads=1, cosine=True)
    qkv, options = case.make(torch.float32)
    grad = torch.randn(1, 9, 10, 16).to(TRITON_DEVICE)
    _, first = gradients(qkv, case.geometry, grad, **options)
    _, again = gradients(qkv, case.geometry, grad, **options)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradients(qkv, case.geometry, grad, **options)[1] for _ in range(2)]
        run(case, index=options["index"].flip(0))
    finally:
        torch.use_deterministic_algorithms(False)
    for name in first:
        assert torch.equal(first[name], again[name]), name
        assert torch.equal(runs[0][name], runs[1][name]), name
        helpers.assert_close(runs[0][name], first[name], 1e-5)


@SMALL_AND_LARGE
@pytest.mark.parametrize("kind", ["separate", "different-strides", "channels-first", "expanded-gradient"])
def test_forms_of_the_operands(window, kind):
    case = Case(window, (9, 10), (2, 2), batch=2)
    qkv, options = case.make(torch.float32)
    if kind == "separate":
        compare(tuple(part.contiguous() for part in qkv.chunk(3, dim=-1)), case.geometry, **options)
        return
    leaf = qkv.clone().requires_grad_()
    if kind == "different-strides":
        q, k, v = leaf.chunk(3, dim=-1)
        operand: Any = (q, k.contiguous(), v.transpose(1, 2).contiguous().transpose(1, 2))
    elif kind == "channels-first":
        operand = leaf.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    else:
        operand = leaf
    out = window_ops.shifted_window_attention(operand, case.geometry, **options)
    if kind == "expanded-gradient":
        grad = torch.randn(1, 1, 1, 32).to(TRITON_DEVICE).expand(out.shape)
        (out * grad).sum().backward()
    else:
        grad = torch.randn(out.shape).to(TRITON_DEVICE)
        out.backward(grad)
    _, exact = reference_gradients(qkv, case.geometry, grad, exactly, **options)
    helpers.assert_close(leaf.grad.double(), exact["qkv"])


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4))[1:], ids=str)
@SMALL_AND_LARGE
def test_subsets_of_gradients(window, needed):
    """Any subset of what may be trained gets its gradient, and the others stay without."""
    case = Case(window, (9, 10), (2, 2), cosine=True, heads=1)
    qkv, options = case.make(torch.float32)
    grad = torch.randn(1, 9, 10, 16).to(TRITON_DEVICE)
    _, exact = reference_gradients(qkv, case.geometry, grad, exactly, **options)
    qkv, options = leaves(qkv, options)
    inputs = named(qkv, options)
    for tensor, needs in zip(inputs.values(), needed, strict=True):
        tensor.requires_grad_(needs)
    window_ops.shifted_window_attention(qkv, case.geometry, **options).backward(grad)
    for (name, tensor), needs in zip(inputs.items(), needed, strict=True):
        if needs:
            helpers.assert_close(tensor.grad.double(), exact[name])
        else:
            assert tensor.grad is None, name


@SMALL_AND_LARGE
def test_nothing_of_the_scores_size_is_kept(window):
    """Saved for the backward: the operands, and for large windows the output and one number a query and head."""
    case = Case(window, (2 * window[0], 2 * window[1]), (2, 2), batch=3)
    qkv, options = leaves(*case.make(torch.float32))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        window_ops.shifted_window_attention(qkv, case.geometry, **options)
    operands = [qkv, options["table"], options["index"]]
    beyond = [t for t in kept if t is not None and not any(t is one for one in operands)]
    allowed = 0 if window == (4, 4) else qkv.numel() // 3 + 3 * 4 * 72 * 2
    assert sum(t.numel() for t in beyond) == allowed


@given(data=st.data())
@settings(max_examples=15)
def test_any_problem(data):
    case = draw_case(data, 40, most=2)
    assume(not (case.cosine and case.dim == 1))  # the gradients of q and k vanish there, and are nothing but roundings
    qkv, options = case.make(torch.float32, seed=data.draw(st.integers(0, 9), "seed"))
    if data.draw(st.booleans(), "separate"):
        qkv = tuple(part.contiguous() for part in qkv.chunk(3, dim=-1))
    compare(qkv, case.geometry, **options)


# On the GPU, all of the above runs compiled; what follows is only worth it there.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_full_sizes(case, dtype):
    run(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("window", [(8, 8), (12, 12), (16, 16), (24, 24)], ids=str)
def test_error_of_logit_scale_over_many_draws(window, dtype):
    case = Case(window, (48, 48), (4, 4), heads=8, dim=32, batch=4, cosine=True)
    errors: list[list[Tensor]] = [[], []]
    for seed in range(24):
        qkv, options = case.make(dtype, seed=seed)
        grad = torch.randn(4, 48, 48, 256, device="cuda").to(dtype)
        _, found = gradients(qkv, case.geometry, grad, **options)
        _, plain = reference_gradients(qkv, case.geometry, grad, lambda t: t, **options)
        _, exact = reference_gradients(qkv, case.geometry, grad, exactly, **options)
        size = exact["logit_scale"].abs().max()
        for one, kept in zip((found, plain), errors, strict=True):
            kept.append((one["logit_scale"].double() - exact["logit_scale"]) / size)
    ours, own = (torch.cat(kept).square().mean().sqrt() for kept in errors)
    assert ours <= 1.1 * own


@pytest.mark.gpu
@pytest.mark.parametrize("kilobytes", [64, 99, 163])
def test_small_shared_memory(with_shared_memory, kilobytes):
    """Launches adapt to GPUs with less shared memory than the one at hand."""
    with_shared_memory(kilobytes * 1024)
    for window, dim, dtype in itertools.product([(7, 7), (12, 12)], [32, 128], [torch.float16, torch.float32]):
        run(Case(window, (32, 32), (3, 3), dim=dim), dtype)
