"""Softmax attention on CPUs: PyTorch's own, and batched products, a few windows at a time."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys

import helpers
import pytest
import torch

import swinaccel
from swinaccel.backends.torch import softmax

SHAPES = [(1, 1, 1, 1), (7, 2, 9, 4), (5, 3, 16, 8), (64, 2, 12, 32), (3, 4, 144, 8)]


@pytest.fixture
def products(monkeypatch):
    """Batched products on any CPU, and few windows at a time; counts calls."""
    calls = []
    by_products = softmax._by_products
    monkeypatch.setattr(softmax, "IS_AMD", True)
    monkeypatch.setattr(softmax, "most_scores", 400)
    monkeypatch.setattr(softmax, "_by_products", lambda *given: calls.append(None) or by_products(*given))
    return calls


def operands(windows, heads, tokens, width, packed, keys=None):
    keys = keys or tokens
    if packed:
        return torch.randn(windows, tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    return [torch.randn(windows, heads, count, width) for count in (tokens, keys, keys)]


def starts(windows, heads, tokens, keys=None):
    shape = tokens, keys or tokens
    return {
        "nothing": None,
        "one": torch.randn(1, 1, *shape),
        "heads": torch.randn(1, heads, *shape),
        "windows": torch.randn(windows, 1, *shape),
        "all": torch.randn(windows, heads, *shape),
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["nothing", "one", "heads", "windows", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batched_products(shape, kind, packed, products):
    q, k, v = operands(*shape, packed)
    start = starts(*shape[:3])[kind]
    found = softmax.attend(q, k, v, start, 0.3)
    exact = softmax.softmax(q.double(), k.double(), v.double(), None if start is None else start.double(), 0.3)
    helpers.assert_close(found.double(), exact)
    assert products


@pytest.mark.parametrize("tokens", [6, 20])
def test_more_keys_or_fewer(tokens, products):
    q, k, v = operands(5, 2, tokens, 8, False, keys=12)
    start = starts(5, 2, tokens, 12)["all"]
    exact = softmax.softmax(q.double(), k.double(), v.double(), start.double(), 0.3)
    helpers.assert_close(softmax.attend(q, k, v, start, 0.3).double(), exact)
    assert products


@pytest.mark.parametrize("where", ["start", "q", "k", "v"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("is_amd", [False, True])
def test_nan_and_infinities(where, number, is_amd, monkeypatch):
    monkeypatch.setattr(softmax, "IS_AMD", is_amd)
    q, k, v = operands(4, 2, 9, 4, True)
    given = {"q": q, "k": k, "v": v, "start": torch.randn(4, 2, 9, 9)}
    given[where] = given[where].clone()
    given[where][1, 0, 3] = number  # of the start a whole row
    expected = softmax.softmax(*given.values(), 0.5)
    torch.testing.assert_close(softmax.attend(*given.values(), 0.5), expected, equal_nan=True)


def test_products_that_overflow_before_they_are_scaled(products):
    q, k, v = (1e20 * one for one in operands(4, 2, 9, 4, False))
    torch.testing.assert_close(
        softmax.attend(q, k, v, None, 1e-10).isnan(),
        ((q @ k.mT) * 1e-10).softmax(-1).isnan().any(-1, True).expand_as(v),
    )
    assert products


def test_what_batched_products_are_not_for(products):
    q, k, v = operands(2, 2, 9, 4, False)
    attend = softmax.attend
    attend(q.double(), k.double(), v.double(), None, 1.0)
    attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, 1.0)
    attend(*operands(2, 1, 145, 4, False), None, 1.0)
    attend(q.clone().requires_grad_(), k, v, None, 1.0).sum().backward()
    attend(q[:0], k[:0], v[:0], None, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(q, k, v, None, 1.0).dtype == torch.bfloat16
    torch.compile(attend, backend="eager", fullgraph=True)(q, k, v, None, 1.0)
    assert not products


PAGES = """
import resource, torch
from swinaccel.backends.torch.memory import keep_pages

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        [torch.zeros(5 << 18) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
keep_pages()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_pages_are_kept():
    own = ("MALLOC_", "GLIBC_", "LD_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True, env=environment)
    before, after = map(int, done.stdout.split())
    if before < 1000:
        pytest.skip("pages are huge here, or are kept as it is")
    assert after < before / 20


@pytest.mark.parametrize("is_amd", [False, True])
def test_models(is_amd, monkeypatch):
    monkeypatch.setattr(softmax, "IS_AMD", is_amd)
    for make in (helpers.timm_v1, helpers.timm_v2):
        model = make(window=4, img_size=64).eval()
        x = torch.randn(3, 3, 64, 64)
        with torch.no_grad():
            expected = model(x)
            helpers.assert_close(swinaccel.accelerate(model, backend="torch")(x), expected)
