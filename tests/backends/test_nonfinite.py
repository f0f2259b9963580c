"""NaN and infinities in whatever an attention is given come out where plain PyTorch has them, and nowhere else.

Heads, images and windows do not know of each other, so that one call holds many such cases.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import exactly, gradients, leaves, named, reference_gradients
from helpers import TRITON_DEVICE
from kernel_problems import Case
from torch import Tensor

from swinaccel import functional
from swinaccel.backends.torch import window as torch_backend
from swinaccel.backends.torch import windows as torch_windows
from swinaccel.backends.triton.sequence import Problem
from swinaccel.ops import position
from swinaccel.ops import sequence as sequence_ops
from swinaccel.spec import reference
from swinaccel.spec.window import Section

KEEPS_VERDICTS = True

NAN, INF = float("nan"), float("inf")
VALUES = (NAN, INF, -INF)
LOWEST = torch.finfo(torch.float16).min

pytestmark = pytest.mark.usefixtures("strict_kernels")

KINDS = {
    "small-dot-fp32": ((3, 3), False, torch.float32),
    "small-cosine-fp16": ((3, 3), True, torch.float16),
    "large-dot-fp16": ((5, 13), False, torch.float16),
    "large-cosine-fp32": ((5, 13), True, torch.float32),
}


def kinds(*left_out: str) -> Any:
    names = [name for name in KINDS if name not in left_out]
    return pytest.mark.parametrize(("window", "cosine", "dtype"), [KINDS[name] for name in names], ids=names)


BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"])


def pytorch(qkv: Tensor, case: Case, grad: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients by plain PyTorch as the functions use it; the output without gradients recorded."""
    qkv, options = leaves(qkv, options)
    inputs = named(qkv, options)
    options["bias"] = reference.bias_from_table(options.pop("table"), options.pop("index"))

    def attend() -> Tensor:
        return torch_windows.shifted_window_attention(*qkv.chunk(3, dim=-1), case.geometry, **options)

    found = torch.autograd.grad(attend(), tuple(inputs.values()), grad, materialize_grads=True, allow_unused=True)
    with torch.no_grad():
        return attend(), dict(zip(inputs, found, strict=True))


def check(backend: str, case: Case, qkv: Tensor, grad: Tensor, options: dict[str, Any]) -> None:
    """NaN in the same places of output and every gradient, and so infinities in the output."""
    if backend == "torch":
        qkv, grad = qkv.cpu(), grad.cpu()
        options = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in options.items()}
        out, found = pytorch(qkv, case, grad, **options)
    else:
        out, found = gradients(qkv, case.geometry, grad, **options)
    expected_out, expected = reference_gradients(qkv, case.geometry, grad, lambda t: t, **options)
    for name, one, other in (("output", out, expected_out), *((n, found[n], expected[n]) for n in expected)):
        assert torch.equal(one.isnan(), other.isnan()), (
            f"{name}: NaN in {int(one.isnan().sum())} places, {int(other.isnan().sum())} in plain PyTorch, "
            f"{int((one.isnan() != other.isnan()).sum())} of them others"
        )
    infinite = expected_out.isinf()
    assert torch.equal(out[infinite], expected_out[infinite])


def draw(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Tokens small enough that in half precision too no weight comes out as zero."""
    qkv, options = case.make(dtype)
    qkv *= 0.5
    return qkv, torch.randn(*qkv.shape[:-1], case.heads * case.dim).to(qkv), options


@BACKENDS
@kinds("small-cosine-fp16", "large-cosine-fp32")
def test_tokens_and_gradients(window, cosine, dtype, backend):
    """One of q, k, v and the output's gradient in each head, one value in each image; where all signs are one, too."""
    case = Case(window, window, heads=4, dim=4, batch=5, cosine=cosine)
    qkv, grad, options = draw(case, dtype)
    qkv[3:], grad[3:] = qkv[3:].abs(), grad[3:].abs()
    qkv[3:, ..., :16] *= -1  # an infinite key then rules itself out, for every query
    for image, value in enumerate((*VALUES, INF, -INF)):
        for head in range(3):
            qkv[image, 0, 1, 16 * head + 4 * head + 2] = value
        grad[image, 1, 1, 4 * 3 + 1] = value
    check(backend, case, qkv, grad, options)


@BACKENDS
@kinds()
def test_parameters(window, cosine, dtype, backend):
    """An entry of the table, all of it and logit_scale, in a head each."""
    case = Case(window, window, heads=9, dim=4, cosine=cosine)
    qkv, grad, options = draw(case, dtype)
    for head, value in enumerate(VALUES):
        options["table"][1, head] = value
        options["table"][:, 3 + head] = value
        if cosine:
            options["logit_scale"][6 + head] = value
    check(backend, case, qkv, grad, options)


@BACKENDS
@kinds("large-cosine-fp32")
def test_padding_vector(window, cosine, dtype, backend):
    """What a padding token has for q, k and v, one value in each head; queries that are padding have gradients too."""
    case = Case(window, (window[0] - 1, window[1]), heads=9, dim=4, cosine=cosine, mask_value=0.0)
    qkv, grad, options = draw(case, dtype)
    for part in range(3):
        for number, value in enumerate(VALUES):
            options["padding"][36 * part + 4 * (3 * number + part) + 1] = value
    check(backend, case, qkv, grad, options)


@BACKENDS
@kinds("large-cosine-fp32")
def test_masks(window, cosine, dtype, backend):
    """An entry, a row and all of a mask, in a window each; a row of the lowest number is one that sees all alike."""
    case = Case(window, (2 * window[0], 4 * window[1]), heads=1, dim=4, cosine=cosine)
    qkv, grad, options = draw(case, dtype)
    mask = options["mask"] = torch.zeros(8, case.geometry.tokens, case.geometry.tokens).to(qkv)
    for number, value in enumerate(VALUES):
        mask[number, 1, 2] = value
        mask[3 + number, 1] = value
    mask[6] = -INF
    mask[7, :3] = LOWEST
    check(backend, case, qkv, grad, options)


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e9, -3e4])
@pytest.mark.parametrize("window", [(3, 3), (5, 13)], ids=["small", "large"])
def test_masks_of_lowest_numbers(window, lowest):
    """A query to which all is masked by a finite number attends to all alike; its gradients are those of a mean."""
    case = Case(window, (window[0], 3 * window[1]), heads=2, dim=4)
    qkv, grad, options = draw(case, torch.float32)
    mask = options["mask"] = torch.zeros(3, case.geometry.tokens, case.geometry.tokens).to(qkv)
    mask[0, :5], mask[1, :, ::2], mask[2] = lowest, lowest, lowest
    out, found = gradients(qkv, case.geometry, grad, **options)
    expected_out, expected = reference_gradients(qkv, case.geometry, grad, lambda t: t, **options)
    exact_out, exact = reference_gradients(qkv, case.geometry, grad, exactly, **options)
    # Beside -3e4 a score is rounded to that number's last digit, so that weights err by as much of their size.
    digit = torch.finfo(torch.float32).eps * 3e4 if lowest == -3e4 else 0.0
    for one, other, truth in ((out, expected_out, exact_out), *((found[n], expected[n], exact[n]) for n in exact)):
        own, size = (other.double() - truth).abs().max(), truth.abs().max()
        assert (one.double() - truth).abs().max() <= max(2 * own, 2e-5 * size, digit * size)


@pytest.mark.parametrize("kind", ["table", "mask", "key"])
def test_sections_of_models_in_plain_pytorch(kind):
    """A query whose scores are all -inf: the originals' softmax is NaN there, that of PyTorch's operator zeros."""
    case = Case((3, 3), (6, 6), (1, 1), heads=2, dim=4)
    qkv, options = case.make(torch.float32, "cpu")
    mask = reference.shift_mask(case.geometry, -100.0)
    if kind == "table":
        options["table"][:, 1] = -INF
    elif kind == "mask":
        mask[2, 3] = -INF
    else:
        qkv = qkv.abs() * torch.tensor([-1.0, 1.0, 1.0]).repeat_interleave(8)
        qkv[..., 9] = INF
    section = Section(
        case.geometry, 2, 4, project=lambda x: x, output=lambda x: x, padding=None, table=lambda: options["table"],
        table_shape=options["table"].shape, index=options["index"], sources=(), scale=0.5,
        mask=mask if kind == "mask" else None,
    )  # fmt: skip
    found = torch_backend.shifted_window_attention(section, qkv)
    expected = reference.shifted_window_attention(
        *qkv.chunk(3, dim=-1), case.geometry, num_heads=2, table=options["table"], index=options["index"], scale=0.5,
        mask=section.mask,
    )  # fmt: skip
    assert bool(expected.isnan().any())
    assert torch.equal(found.isnan(), expected.isnan())


def seen_only(tensors: dict[str, Tensor], problem: Problem) -> Tensor:
    """Attention over a sequence in which what a query does not see is not there."""
    q, k, v, tokens = tensors["q"], tensors["k"], tensors["v"], tensors["q"].shape[2]
    seen = reference.visible_keys(
        tokens, causal=problem.causal, block_size=problem.block_size, window_blocks=max(1, problem.window_blocks)
    )
    outs = []
    for row in range(tokens):
        keys = seen[row].nonzero().squeeze(1)
        scores = q[:, :, row : row + 1] * problem.scale @ k[:, :, keys].mT
        if "q_factor" in tensors:
            scores = scores + tensors["q_factor"][:, row : row + 1] @ tensors["k_factor"][:, keys].mT
        if "mask" in tensors:
            scores = scores + tensors["mask"][:, None, row : row + 1, keys]
        outs.append(_softmax(scores) @ v[:, :, keys])
    return torch.cat(outs, 2)


def _softmax(scores: Tensor) -> Tensor:
    blind = (scores == -INF).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


@BACKENDS
@pytest.mark.parametrize("kind", ["all", "causal", "blocks", "mask"])
def test_sequences(kind, backend, monkeypatch):
    """NaN wherever a token is seen that holds it, and nowhere that plain PyTorch has none, where 0 · NaN is NaN too."""
    tokens, dim = 20, 5
    problem = Problem(kind == "causal", 6 if kind == "blocks" else 0, 2 if kind == "blocks" else 0, dim**-0.5)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(TRITON_DEVICE if backend == "triton" else "cpu")

    tensors = {name: randn(5, 6, tokens, dim) for name in ("q", "k", "v", "grad")}
    if kind != "blocks":
        tensors |= {"q_factor": randn(6, tokens, 3), "k_factor": randn(6, tokens, 3)}
    if kind == "mask":
        tensors["mask"] = randn(5, tokens, tokens)
        for number, value in enumerate(VALUES):
            tensors["mask"][number, 11, 3] = value
        tensors["mask"][3, 12] = -INF
        tensors["mask"][4, 12] = torch.finfo(torch.float32).min
    if backend == "torch":
        del tensors["grad"]  # where that is not finite, PyTorch's operator decides
    for number, value in enumerate(VALUES):
        for head, name in enumerate(("q", "k", "v", "grad")):
            if name in tensors:
                tensors[name][number, head, 11, 2] = value
    for head, name in ((4, "q_factor"), (5, "k_factor")):
        if name in tensors:
            tensors[name][head, 11, 1] = INF
    leaves = {name: tensors[name].requires_grad_() for name in tensors if name not in ("grad", "mask")}

    def results(out: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(out, tuple(leaves.values()), tensors.get("grad", torch.ones_like(out)))
        return {"output": out.detach(), **dict(zip(leaves, found, strict=True))}

    arguments = [tensors.get(name) for name in ("q", "k", "v", "q_factor", "k_factor", "mask")]
    if backend == "triton":
        found = results(sequence_ops.sequence_attention(*arguments, problem))
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if kind == "blocks":
            found = results(functional.block_sliding_window_attention(*arguments[:3], 6, 2))
        else:
            found = results(functional.factored_bias_attention(*arguments, causal=kind == "causal"))
    most = results(
        reference.sequence_attention(
            *arguments[:3], q_factor=arguments[3], k_factor=arguments[4], mask=arguments[5], scale=problem.scale,
            causal=problem.causal, block_size=problem.block_size, window_blocks=max(1, problem.window_blocks),
        )
    )  # fmt: skip
    least = results(seen_only(tensors, problem))
    for name, one in found.items():
        assert bool((one.isnan() <= most[name].isnan()).all()), f"{name}: NaN where plain PyTorch has none"
        assert bool((least[name].isnan() <= one.isnan()).all()), f"{name}: a NaN is hidden"


def test_coordinates_beyond_the_hidden_channels():
    """Infinite coordinates times channels that are not there are no NaN."""
    generator = torch.Generator().manual_seed(0)
    coords, weight1, bias1, weight2 = (
        torch.randn(shape, generator=generator).to(TRITON_DEVICE) for shape in ((9, 2), (20, 2), (20,), (2, 20))
    )
    coords[3, 0], weight1[2, 1], bias1[5], weight2[1, 7] = INF, -INF, NAN, INF
    for hidden in (slice(0, 2), slice(3, 5), slice(0, 20)):  # without NaN, with and without what is infinite
        expected = 16 * torch.sigmoid(weight2[:, hidden] @ torch.relu(coords @ weight1[hidden].t() + bias1[hidden]).t())
        found = position.position_table(coords, weight1[hidden], bias1[hidden], weight2[:, hidden])
        assert torch.equal(found.isnan(), expected.t().isnan())


def test_gelu():
    from swinaccel.backends.triton import block as triton_block
    from swinaccel.backends.triton import block_bwd as triton_block_bwd

    x = torch.tensor([[NAN, INF, -INF, 1.0, -1.0, 0.0]] * 2, dtype=torch.float16, device=TRITON_DEVICE)
    x.requires_grad_()
    plain = torch.nn.functional.gelu(x)
    (slope,) = torch.autograd.grad(plain.sum(), x)
    expected = torch.where(x == INF, INF, plain)  # PyTorch has NaN there on some CPUs, where it takes many at a time
    found_slope, out, _ = triton_block_bwd.gelu(torch.ones_like(x), x.detach())
    for one in (triton_block.gelu(x.detach()), out):
        torch.testing.assert_close(one, expected.detach(), equal_nan=True)
    torch.testing.assert_close(found_slope, slope, equal_nan=True)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_infinities_of_wider_masks_stay_infinite(dtype, backend, monkeypatch):
    """Finite numbers that a narrower dtype has not become its largest; -inf is no number."""
    if backend == "torch":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64).to(device, dtype) for _ in range(3))
    mask = torch.zeros(1, 9, 9, dtype=torch.float64, device=device)
    mask[0, 0], mask[0, 1], mask[0, 2, 1:] = -INF, torch.finfo(torch.float64).min, -INF
    factors = torch.zeros(2, 9, 1, dtype=dtype, device=device)
    windows = functional.window_attention(q, k, v, mask=mask)
    sequence = functional.factored_bias_attention(q, k, v, factors, factors, mask)
    assert windows[:, :, 0].isnan().all()
    assert not sequence[:, :, 0].any()  # of sequences, a query that sees nothing gets zeros
    for out in (windows, sequence):
        assert out[:, :, 1:].isfinite().all()
        torch.testing.assert_close(out[:, :, 1], v.float().mean(2).to(dtype), atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(out[:, :, 2], v[:, :, 0], atol=2e-3, rtol=2e-3)
