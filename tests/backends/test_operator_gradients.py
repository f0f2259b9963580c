"""Gradients of the kernels with attention dropout, and PyTorch's own checks of the operator and its derivatives."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch
from gradients import PARAMETERS, exactly, gradients, leaves, named, parts
from helpers import TRITON_DEVICE
from kernel_problems import SMALL_AND_LARGE, Case
from torch import Tensor

from swinaccel.ops import window as window_ops
from swinaccel.spec import reference

pytestmark = pytest.mark.usefixtures("strict_kernels")


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
