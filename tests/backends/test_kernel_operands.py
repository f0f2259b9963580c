"""Forms of what the kernels are given: strides, heads apart, biases and parameters of any dtype; the operator."""

from __future__ import annotations

import helpers
import pytest
import torch
from kernel_problems import (
    BIAS_KINDS,
    DTYPES,
    HEADS_APART,
    SMALL_AND_LARGE,
    Case,
    attend,
    bias_of_kind,
    compare,
    heads_apart,
)

pytestmark = pytest.mark.usefixtures("strict_kernels")


@SMALL_AND_LARGE
@pytest.mark.parametrize("kind", ["channels-slice", "row-step", "transposed-image", "channels-first", "expanded-batch"])
def test_strided_tokens(window, kind):
    case = Case(window, (9, 10), (2, 2), batch=2)
    qkv, options = case.make(torch.float32)
    batch, height, width, channels = qkv.shape
    if kind == "channels-slice":
        strided = torch.randn(batch, height, width, channels + 5, device=qkv.device)[..., 2:-3]
    elif kind == "row-step":
        strided = torch.randn(batch, 2 * height, width + 1, channels, device=qkv.device)[:, ::2, 1:]
    elif kind == "transposed-image":
        strided = torch.randn(batch, width, height, channels, device=qkv.device).transpose(1, 2)
    elif kind == "channels-first":
        strided = torch.randn(batch, channels, height, width, device=qkv.device).permute(0, 2, 3, 1)
    else:
        strided = torch.randn(1, height, width, channels, device=qkv.device).expand(batch, -1, -1, -1)
    assert strided.shape == qkv.shape
    assert not strided.is_contiguous()
    compare(strided, case.geometry, **options)


@SMALL_AND_LARGE
@pytest.mark.parametrize("kind", ["contiguous", "slices", "different-strides"])
def test_separate_q_k_v(window, kind):
    case = Case(window, (9, 10), (2, 2), batch=2)
    qkv, options = case.make(torch.float32)
    q, k, v = qkv.chunk(3, dim=-1)
    if kind == "contiguous":
        q, k, v = (part.contiguous() for part in (q, k, v))
    elif kind == "different-strides":
        k, v = k.contiguous(), v.transpose(1, 2).contiguous().transpose(1, 2)
    found = compare((q, k, v), case.geometry, **options)
    helpers.assert_close(attend(qkv, case.geometry, **options), found, 1e-6)


@pytest.mark.parametrize("case", HEADS_APART, ids=str)
@pytest.mark.parametrize("kind", ["heads-first", "heads-last", "packed-in-memory", "odd-gap", "different-strides"])
def test_an_axis_for_the_heads(case, kind):
    """(B, H, W, heads, D) with the heads anywhere in memory: windows that were cut already are read in place."""
    qkv, options = case.make(torch.float32)
    tokens = heads_apart(qkv, case, kind)
    found = attend(tokens, case.geometry, **options)
    assert found.shape == tokens[0].shape
    assert found.transpose(-3, -2).is_contiguous()
    helpers.assert_close(found.flatten(-2), attend(qkv, case.geometry, **options), 1e-6)


@SMALL_AND_LARGE
@pytest.mark.parametrize("kind", BIAS_KINDS)
def test_bias_operands(window, kind):
    """The index is a buffer too: whatever it says is what the bias is."""
    case = Case(window, (9, 10), (2, 2))
    qkv, options = case.make(torch.float32)
    table, index = bias_of_kind(kind, options["table"], options["index"])
    compare(qkv, case.geometry, **{**options, "table": table, "index": index})


@SMALL_AND_LARGE
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_fp32_parameters_with_half_tokens(window, dtype):
    """As under autocast: projections come in half, table, logit_scale and mask are fp32."""
    case = Case(window, (9, 10), (2, 2), cosine=True)
    qkv, options = case.make(dtype)
    options["table"], options["logit_scale"] = options["table"].float(), options["logit_scale"].float()
    found = attend(qkv, case.geometry, **options)
    exact = helpers.oracle(qkv, case.geometry, **options)
    assert found.dtype == dtype
    helpers.assert_close(found.cpu().double(), exact, 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("window", [(9, 8), (12, 12)], ids=["9x8", "12x12"])
def test_large_tables_keep_their_sign_and_order(window):
    """Where the dense bias is narrower than the table, values beyond its range are limited and never infinite."""
    case = Case(window, window, heads=1)
    qkv, options = case.make(torch.float16)
    options["table"] = 1e5 * torch.sign(options["table"].float())
    found = attend(qkv, case.geometry, **options)
    helpers.assert_close(found.cpu().double(), helpers.oracle(qkv, case.geometry, **options), 1e-2)


def test_operator_is_registered():
    """The same numbers through torch.ops, and its fake gives the shape: what compilers rely on."""
    case = Case((4, 4), (9, 9), (2, 2))
    qkv, options = case.make(torch.float32)
    expected = attend(qkv, case.geometry, **options)
    arguments = (
        qkv, None, None, options["table"], options["index"], options["padding"], None, None, None, 2,
        [4, 4], [2, 2], False, -100.0, options["scale"], 0.0, False, None,
    )  # fmt: skip
    assert torch.equal(torch.ops.swinaccel.shifted_window_attention(*arguments)[0], expected)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.swinaccel.shifted_window_attention.default, arguments, test_utils=checks)
