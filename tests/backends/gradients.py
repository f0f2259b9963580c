"""Gradients by the kernels and by the oracle, and their comparison in fp64."""

from __future__ import annotations

from typing import Any

import helpers
import torch
from kernel_problems import Case
from torch import Tensor

from swinaccel import ops
from swinaccel.ops import window as window_ops
from swinaccel.spec import reference
from swinaccel.spec.window import Geometry

PARAMETERS = ("table", "padding", "logit_scale")  # differentiable, beside the tokens


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
