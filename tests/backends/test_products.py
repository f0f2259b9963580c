"""Products on CPUs: PyTorch's own numbers, and PyTorch's own operators wherever anybody could tell."""

from __future__ import annotations

import contextlib
import importlib.util

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from swinaccel.backends.torch import block, products

pytestmark = pytest.mark.skipif(not products.HAS_ONEDNN, reason="this PyTorch has no oneDNN for x86")


class Quantized(torch.Tensor):
    """A weight that has a product of its own, as quantised ones have."""


@pytest.fixture
def taken(monkeypatch):
    """Return a list that grows with each product that oneDNN takes."""
    for module in (products, block):
        monkeypatch.setattr(module, "USES_ONEDNN", True)  # on whatever CPU
    names, own = [], products._pointwise
    monkeypatch.setattr(products, "_pointwise", lambda *given: names.append(given[3]) or own(*given))
    return names


def operands(rows=300, fan_in=24, fan_out=40):
    return torch.randn(rows, fan_in), torch.randn(fan_out, fan_in), torch.randn(fan_out)


@pytest.mark.parametrize("which", [1, 2])
def test_parameters_elsewhere_are_left_to_pytorch(taken, which):
    """Which raises an error for such a bias."""
    given = list(operands())
    given[which] = given[which].to("meta")
    with contextlib.nullcontext() if which == 1 else pytest.raises(RuntimeError):
        products.linear(*given)
    assert not taken


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
def test_numbers_are_pytorchs(taken, gelu, with_bias):
    x, weight, bias = operands()
    bias = bias if with_bias else None
    x[3, 5], x[4, 5], x[5, 5], x[6] = float("nan"), float("inf"), -float("inf"), 1e-42
    run = products.linear_gelu if gelu else products.linear

    def own(*given):
        out = F.linear(*given)
        return F.gelu(out) if gelu else out

    out, expected = run(x, weight, bias), own(x, weight, bias)
    assert taken
    torch.testing.assert_close(out[3:7], expected[3:7], equal_nan=True)
    exact = own(*(None if one is None else one.double() for one in (x, weight, bias)))
    helpers.assert_no_worse(out[7:], expected[7:], exact[7:], torch.float32)


def test_others_are_left_to_pytorch(taken):
    x, weight, bias = operands()
    products.linear(x.double(), weight.double(), bias.double())
    products.linear(x[:2], weight, bias)
    products.linear(x.t().contiguous().t(), weight, bias)
    products.linear(x, weight.t().contiguous().t(), bias)
    products.linear(x, weight, bias[:1])
    products.linear(x, weight.as_subclass(Quantized), bias)
    products.linear(x, weight, bias.requires_grad_())
    products.linear_gelu(x, weight.requires_grad_(), bias.detach())
    weight, bias = weight.detach(), bias.detach()
    with FlopCounterMode(display=False) as counted:
        products.linear(x, weight, bias)
    assert counted.get_total_flops() > 0
    with torch.backends.mkldnn.flags(enabled=False):
        products.linear(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, weight, bias).dtype == torch.bfloat16
    torch.set_float32_matmul_precision("medium")
    try:
        products.linear(x, weight, bias)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not taken


def test_whole_models_take_them(taken):
    model, x = helpers.timm_v1(), torch.randn(2, 3, 56, 56)
    helpers.check(model, x, backend="torch")
    assert {"none", "gelu"} <= {*taken}


@pytest.mark.parametrize(("capability", "uses"), [("AVX512", True), ("AVX2", False), ("DEFAULT", False)])
def test_processors_without_avx_512_have_pytorchs_products(monkeypatch, capability, uses):
    """There oneDNN's are slower than MKL's."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    spec = importlib.util.find_spec(products.__name__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.USES_ONEDNN is uses
