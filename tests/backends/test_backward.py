"""Gradients of the kernels against those of the oracle in fp64: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import itertools
from typing import Any

import helpers
import pytest
import torch
from helpers import TRITON_DEVICE
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_kernels import DTYPES, GPU_CASES, HEAD_DIMS, HEADS_APART, VOLUMES, Case, draw_case, heads_apart
from torch import Tensor

from swinaccel import ops
from swinaccel.backends.triton import devices, launches
from swinaccel.ops import window as window_ops
from swinaccel.spec import reference
from swinaccel.spec.window import Geometry

PARAMETERS = ("table", "padding", "logit_scale")  # differentiable, beside the tokens


pytestmark = pytest.mark.usefixtures("strict_kernels")


def leaves(qkv: Any, options: dict[str, Any], change: Any = lambda t: t) -> tuple[Any, dict[str, Any]]:
    """The same problem with every differentiable tensor a leaf of its own."""

    def leaf(t: Tensor) -> Tensor:
        return change(t.detach()).clone().requires_grad_()

    options = {
        name: leaf(value) if name in PARAMETERS and value is not None else value for name, value in options.items()
    }
    return (leaf(qkv) if isinstance(qkv, Tensor) else tuple(leaf(part) for part in qkv)), options


def named(qkv: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    tokens = {"qkv": qkv} if isinstance(qkv, Tensor) else dict(zip("qkv", qkv, strict=True))
    return {**tokens, **{name: options[name] for name in PARAMETERS if options.get(name) is not None}}


def parts(qkv: Any) -> tuple[Tensor, ...]:
    return qkv.chunk(3, dim=-1) if isinstance(qkv, Tensor) else qkv


def gradients(qkv: Any, geometry: Geometry, grad: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients by the kernels."""
    qkv, options = leaves(qkv, options)
    out = window_ops.shifted_window_attention(qkv, geometry, **options)
    inputs = named(qkv, options)
    found = torch.autograd.grad(out, tuple(inputs.values()), grad)
    assert not ops.has_failures()
    return out.detach(), dict(zip(inputs, found, strict=True))


def reference_gradients(
    qkv: Any, geometry: Geometry, grad: Tensor, change: Any, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients by plain PyTorch, with every tensor changed first."""
    qkv, options = leaves(qkv, options, change)
    options = {
        name: change(value) if isinstance(value, Tensor) and name not in PARAMETERS else value
        for name, value in options.items()
    }
    out = reference.shifted_window_attention(*parts(qkv), geometry, **options)
    inputs = named(qkv, options)
    found = torch.autograd.grad(out, tuple(inputs.values()), change(grad).to(out.dtype), allow_unused=True)
    return out.detach(), {
        name: torch.zeros_like(inputs[name]) if one is None else one for name, one in zip(inputs, found, strict=True)
    }


def exactly(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def compare(qkv: Any, geometry: Geometry, **options: Any) -> dict[str, Tensor]:
    """fp32 against fp64; in lower precision, errors against those of plain PyTorch in the same dtype."""
    q = parts(qkv)[0]
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(q.shape, generator=generator).to(q)
    out, found = gradients(qkv, geometry, grad, **options)
    exact_out, exact = reference_gradients(qkv, geometry, grad, exactly, **options)
    if q.dtype == torch.float32:
        helpers.assert_close(out.double(), exact_out)
    _, plain = reference_gradients(qkv, geometry, grad, lambda t: t, **options)
    for name, expected in exact.items():
        one = found[name]
        assert one.shape == expected.shape, name
        assert bool(torch.isfinite(one).all()), f"unwritten or overflown gradient of {name}"
        if q.dtype == torch.float32:
            error = (one.double() - expected).abs().max()
            if error > helpers.FP32 * expected.abs().max().clamp_min(1e-3):
                # What is a small sum of large terms comes inexact from anyone: as inexact as its inputs make it.
                own = (plain[name].double() - expected).abs().max()
                allowed = max(2 * own, 4 * change_by_rounding(name, qkv, geometry, grad, expected, **options))
                assert error <= allowed, f"gradient of {name} is off by {error:.1e}, {allowed:.1e} is allowed"
        else:
            assert_no_worse(name, one, plain[name], expected)
    return found


def change_by_rounding(
    name: str, qkv: Any, geometry: Geometry, grad: Tensor, expected: Tensor, **options: Any
) -> Tensor:
    """How far a gradient moves if every input is off by about one rounding to fp32; the largest of four draws."""
    moved = []
    for seed in range(4):
        generator = torch.Generator(grad.device).manual_seed(seed)

        def off(tensor: Tensor, generator: torch.Generator = generator) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            noise = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float64)
            return tensor.double() * (1 + 2.0**-24 * noise)

        _, gradient = reference_gradients(qkv, geometry, grad, off, **options)
        moved.append((gradient[name] - expected).abs().max())
    return torch.stack(moved).max()


def assert_no_worse(name: str, found: Tensor, plain: Tensor, exact: Tensor) -> None:
    if exact.numel() < 16:  # too few for statistics, for which see test_error_of_logit_scale_over_many_draws
        own = (plain.double() - exact).abs().max()
        allowed = max(6 * own, 16 * torch.finfo(found.dtype).eps * exact.abs().max())
        assert (found.double() - exact).abs().max() <= allowed, name
        return
    try:
        helpers.assert_no_worse(found, plain, exact, found.dtype)
    except AssertionError as error:
        raise AssertionError(f"gradient of {name}: {error}") from None


def run(case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Tensor]:
    qkv, given_options = case.make(dtype)
    return compare(qkv, case.geometry, **{**given_options, **options})


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
SMALL_AND_LARGE = pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("case", [*CASES, *VOLUMES[:6], VOLUMES[-2]], ids=str)
def test_geometry(case, cosine):
    run(Case(**{**vars(case), "cosine": cosine}))


@pytest.mark.parametrize("dim", HEAD_DIMS)
@SMALL_AND_LARGE
def test_head_dims(window, dim):
    run(Case(window, (10, 8), (3, 3), dim=dim, cosine=dim % 4 == 2))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case((7, 7), (9, 14), (3, 3), dim=32, batch=2),
        Case((7, 7), (9, 14), (3, 3), dim=32, batch=2, cosine=True),
        Case((9, 8), (13, 16), (6, 6), dim=32),
        Case((9, 8), (13, 16), (6, 6), dim=32, cosine=True),
        Case((4, 4), (9, 9), (2, 2), dim=10, roll_first=True, batch=2),
        Case((3, 4, 4), (4, 5, 8), (1, 2, 2), batch=2),
        Case((5, 4, 4), (6, 4, 6), (2, 0, 2), cosine=True),
    ],
    ids=str,
)
def test_low_precision(case, dtype):
    run(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_keys_and_values_with_a_mean(dtype):
    """Of dS, whose rows sum to zero, the rounding of the output must not make rows that do not: dQ has no mean of K."""
    qkv, options = Case((9, 8), (9, 16), heads=2).make(dtype)
    qkv[..., 32:] += 4.0
    compare(qkv, Case((9, 8), (9, 16), heads=2).geometry, **options)


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
@pytest.mark.parametrize("kind", ["permuted-index", "random-index", "transposed-table", "half-table", "no-table"])
def test_bias_operands(window, kind):
    """The index is a buffer too: the gradient goes to whatever rows it names."""
    case = Case(window, (9, 10), (2, 2))
    qkv, options = case.make(torch.float32)
    table, index = options["table"], options["index"]
    generator = torch.Generator().manual_seed(3)
    if kind == "permuted-index":
        index = index[torch.randperm(len(index), generator=generator).to(index.device)]
    elif kind == "random-index":
        index = torch.randint(table.shape[0], index.shape, generator=generator).to(index.device)
    elif kind == "transposed-table":
        table = table.t().contiguous().t()
    elif kind == "half-table":
        options["table"] = table.half()
        grad = torch.randn(1, 9, 10, 32).to(TRITON_DEVICE)
        _, found = gradients(qkv, case.geometry, grad, **options)
        _, exact = reference_gradients(qkv, case.geometry, grad, exactly, **options)
        assert found["table"].dtype == torch.float16
        helpers.assert_close(found["table"].double(), exact["table"], 1e-3)
        return
    else:
        table = index = None
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


# Attention dropout.


def dropped(window: tuple[int, int], dropout: float, seed: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Attention weights after dropout, and without, (batch, M, heads, N, N): values are unit vectors."""
    tokens = window[0] * window[1]
    case = Case(window, (window[0], 2 * window[1]), heads=2, dim=tokens, batch=batch)
    qkv, options = case.make(torch.float32)
    places = torch.eye(tokens, device=qkv.device).view(*window, tokens)
    qkv[..., -2 * tokens :] = torch.cat((places, places), dim=1).repeat(1, 1, 2)
    weights = []
    for rate in (dropout, 0.0):
        torch.manual_seed(seed)
        out = window_ops.shifted_window_attention(qkv, case.geometry, **options, dropout=rate)
        weights.append(reference.split_heads(reference.cut(out, case.geometry), 2))
    return weights[0], weights[1]


@SMALL_AND_LARGE
def test_dropout_drops_at_its_rate(window):
    found, weights = dropped(window, 0.3, seed=1, batch=4)
    kept = found != 0
    rate = 1 - kept.float().mean().item()
    assert abs(rate - 0.3) < 4 * (0.21 / kept.numel()) ** 0.5
    helpers.assert_close(found, weights * kept / 0.7, 1e-5)
    for axis in range(4):  # no pattern along images and windows, heads, queries or keys
        assert 0.2 < (kept != kept.roll(1, axis)).float().mean().item() < 0.6, axis


@SMALL_AND_LARGE
def test_dropout_follows_the_generator(window):
    one, again, other = (dropped(window, 0.5, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@SMALL_AND_LARGE
@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
def test_gradients_with_dropout(window, cosine):
    """Against plain PyTorch with the very weights dropped: those are found by values that name their token."""
    tokens = window[0] * window[1]
    case = Case(window, window, heads=2, dim=tokens, batch=2, cosine=cosine)
    qkv, options = case.make(torch.float32)
    geometry = case.geometry
    unit = qkv.clone()
    unit[..., -2 * tokens :] = torch.eye(tokens, device=qkv.device).view(*window, tokens).repeat(1, 1, 2)
    torch.manual_seed(7)
    kept = window_ops.shifted_window_attention(unit, geometry, **options, dropout=0.4) != 0
    kept = reference.split_heads(kept.view(2, tokens, 2 * tokens), 2)

    grad = torch.randn(2, *window, 2 * tokens).to(TRITON_DEVICE)
    torch.manual_seed(7)
    out, found = gradients(qkv, geometry, grad, **options, dropout=0.4)
    exact_qkv, exact_options = leaves(qkv, options, exactly)
    q, k, v = (reference.split_heads(reference.cut(p, geometry), 2) for p in exact_qkv.chunk(3, dim=-1))
    if cosine:
        q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
        q = q * exact_options["logit_scale"].exp().view(-1, 1, 1)
    else:
        q = q * options["scale"]
    scores = q @ k.mT + reference.bias_from_table(exact_options["table"], options["index"])
    exact_out = reference.join((scores.softmax(-1) * kept / 0.6 @ v).transpose(1, 2).flatten(2), geometry)
    helpers.assert_close(out.double(), exact_out.detach())
    inputs = named(exact_qkv, exact_options)
    exact = torch.autograd.grad(exact_out, tuple(inputs.values()), grad.double())
    for name, expected in zip(inputs, exact, strict=True):
        helpers.assert_close(found[name].double(), expected)


# PyTorch's own checks.


@SMALL_AND_LARGE
def test_operator_passes_opcheck(window):
    case = Case(window, (9, 10), (2, 2), heads=1, cosine=True)
    qkv, options = leaves(*case.make(torch.float32))
    arguments = (
        qkv, None, None, options["table"], options["index"], options["padding"], None, options["logit_scale"], None,
        1, list(window), [2, 2], False, -100.0, 1.0, 0.0, True, None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.swinaccel.shifted_window_attention.default, arguments)
    out, lse = torch.ops.swinaccel.shifted_window_attention(*arguments)
    detached = tuple(t.detach() if isinstance(t, Tensor) else t for t in arguments[:16])
    backward = (torch.randn_like(out), out.detach(), lse, *detached, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.swinaccel.shifted_window_attention_backward.default, backward, test_utils=checks)


def test_gradcheck_of_the_oracle():
    case = Case((2, 3), (5, 5), (1, 1), dim=3, cosine=True)
    qkv, options = case.make(torch.float64, device="cpu")
    inputs = [t.requires_grad_() for t in (*qkv.chunk(3, dim=-1), *(options[name] for name in PARAMETERS))]

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return reference.shifted_window_attention(
            q, k, v, case.geometry, **{**options, **dict(zip(PARAMETERS, rest, strict=True))}
        )

    inputs[:3] = [t.detach().clone().requires_grad_() for t in inputs[:3]]
    assert torch.autograd.gradcheck(attend, tuple(inputs))


@SMALL_AND_LARGE
def test_second_derivatives(window):
    """A gradient penalty: gradients of gradients are those of plain PyTorch."""
    case = Case(window, (9, 10), (2, 2), cosine=True, heads=1)
    made = case.make(torch.float32)

    def penalty(attend: Any, change: Any) -> tuple[Tensor, ...]:
        qkv, options = leaves(*made, change)
        options["index"] = change(options["index"])
        out = attend(qkv, options)
        inputs = tuple(named(qkv, options).values())
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in first), inputs)

    found = penalty(
        lambda qkv, options: window_ops.shifted_window_attention(qkv, case.geometry, **options), lambda t: t
    )
    exact = penalty(
        lambda qkv, options: reference.shifted_window_attention(*parts(qkv), case.geometry, **options), exactly
    )
    for one, other in zip(found, exact, strict=True):
        helpers.assert_close(one.double(), other, 1e-4)


def test_second_derivatives_with_dropout_are_refused():
    case = Case((4, 4), (4, 4))
    qkv, options = leaves(*case.make(torch.float32))
    out = window_ops.shifted_window_attention(qkv, case.geometry, **options, dropout=0.1)
    with pytest.raises(NotImplementedError, match=r"swinaccel\.disabled"):
        torch.autograd.grad(out.square().sum(), qkv, create_graph=True)


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
def test_small_shared_memory(monkeypatch, kilobytes):
    """Launches adapt to GPUs with less shared memory than the one at hand."""
    monkeypatch.setattr(devices, "shared_memory_override", kilobytes * 1024)
    for window, dim, dtype in itertools.product([(7, 7), (12, 12)], [32, 128], [torch.float16, torch.float32]):
        run(Case(window, (32, 32), (3, 3), dim=dim), dtype)
