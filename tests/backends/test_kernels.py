"""The kernels against the oracle: in Triton's interpreter where there is no GPU, else compiled."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import helpers
import pytest
import torch
from helpers import TRITON_DEVICE, position_index, table_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swinaccel import ops
from swinaccel.ops import window as window_ops
from swinaccel.spec import reference
from swinaccel.spec.window import Geometry

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One attention problem; what is not given is random, and padding tokens hold something where there are any."""

    window: tuple[int, ...]
    size: tuple[int, ...]
    shift: tuple[int, ...] = ()
    roll_first: bool = False
    heads: int = 2
    dim: int = 16
    batch: int = 1
    cosine: bool = False
    mask_value: float = -100.0
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.size, self.window, self.shift, self.roll_first)

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.window)), "of", "x".join(map(str, self.size))]
        parts += ["shift" + ".".join(map(str, self.shift))] if any(self.shift) else []
        parts += [f"dim{self.dim}"] if self.dim != 16 else []
        parts += [f"batch{self.batch}"] if self.batch != 1 else []
        parts += ["rollfirst"] if self.roll_first else []
        parts += ["cosine"] if self.cosine else []
        return "-".join(parts)

    def make(self, dtype: torch.dtype, device: str = TRITON_DEVICE, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
        """qkv (B, H, W, 3 * heads * D) or with a depth before H, packed, and the options that go with it."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        channels = self.heads * self.dim
        qkv = 1.5 * randn(self.batch, *self.size, 3 * channels)
        options: dict[str, Any] = {
            "num_heads": self.heads,
            "table": randn(table_rows(self.window), self.heads),
            "index": position_index(self.window).to(device),
            "padding": 1.5 * randn(3 * channels) if self.geometry.is_padded else None,
            "mask_value": self.mask_value,
            "scale": self.dim**-0.5,
        }
        if self.cosine:
            options["logit_scale"] = 1 + randn(self.heads)
        return qkv, {**options, **self.options}


pytestmark = pytest.mark.usefixtures("strict_kernels")


def attend(qkv: Any, geometry: Geometry, **options: Any) -> Tensor:
    out = window_ops.shifted_window_attention(qkv, geometry, **options)
    assert not ops.has_failures()
    return out


def compare(qkv: Any, geometry: Geometry, **options: Any) -> Tensor:
    """fp32 against fp64; in lower precision, errors against those of plain PyTorch in the same dtype."""
    found = attend(qkv, geometry, **options)
    options.pop("factors", None)
    exact = helpers.oracle(qkv, geometry, **options)
    assert found.shape == exact.shape
    assert found.is_contiguous()
    assert bool(torch.isfinite(found).all()), "unwritten or overflown output"
    q, k, v = qkv.chunk(3, dim=-1) if isinstance(qkv, Tensor) else qkv
    assert found.dtype == q.dtype
    if q.dtype == torch.float32:
        helpers.assert_close(found.cpu().double(), exact)
    else:
        plain = reference.shifted_window_attention(q, k, v, geometry, **options)
        helpers.assert_no_worse(found, plain, exact, q.dtype)
    return found


def run(case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    qkv, given_options = case.make(dtype)
    return compare(qkv, case.geometry, **{**given_options, **options})


# The kernel changes above 64 tokens.
SMALL = [
    Case((2, 2), (6, 4)),
    Case((2, 2), (5, 3), (1, 1), heads=1),
    Case((1, 9), (3, 20), (0, 4)),
    Case((3, 2), (7, 5), (1, 1), heads=3),
    Case((2, 5), (5, 7), (1, 0)),
    Case((7, 7), (14, 14), (3, 3), dim=32),
    Case((7, 7), (9, 16), (3, 0), dim=32),
    Case((8, 8), (8, 16), (0, 4), dim=32),
    Case((6, 6), (13, 12), (3, 3), dim=30),
    Case((4, 4), (9, 9), (2, 2), roll_first=True),
    Case((4, 4), (9, 11), (1, 3), roll_first=True, batch=3),
    Case((4, 4), (3, 5), (2, 2), roll_first=True),
    Case((7, 7), (7, 8), (0, 3), roll_first=True),
    Case((4, 4), (4, 4), (2, 2)),
    Case((4, 4), (3, 3), (2, 2)),
]
LARGE = [
    Case((9, 8), (18, 16), (4, 4), heads=1),
    Case((12, 12), (12, 20), (0, 6), heads=1, dim=32),
    Case((12, 12), (13, 24), (6, 6), heads=1, roll_first=True),
    Case((16, 16), (16, 24), (8, 8), heads=1),
    Case((5, 13), (11, 13), (2, 6), batch=2),
    Case((24, 24), (24, 25), (12, 12), heads=1),
    Case((32, 32), (32, 32), heads=1),
]
# Of three axes: (depth, rows, columns).
VOLUMES = [
    Case((2, 3, 3), (4, 6, 5), (1, 1, 1)),
    Case((2, 3, 3), (3, 4, 7), (1, 0, 2), roll_first=True, batch=3),
    Case((1, 3, 2), (4, 5, 4), (0, 1, 1), heads=1),
    Case((3, 1, 4), (3, 3, 9), (0, 0, 2)),
    Case((2, 2, 2), (2, 2, 2), (1, 1, 1)),
    Case((2, 3, 2), (1, 5, 4), (1, 1, 1)),
    Case((2, 7, 7), (3, 7, 9), (1, 0, 3), heads=1, dim=8),
    Case((2, 17, 2), (3, 17, 2), (1, 0, 0), heads=1),
    Case((3, 5, 5), (4, 6, 7), (1, 2, 2), heads=1, roll_first=True),
]
HEAD_DIMS = (8, 10, 24, 30, 32, 44, 80, 128)


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("case", [*SMALL, *LARGE, *VOLUMES], ids=str)
def test_geometry(case, cosine):
    run(Case(**{**vars(case), "cosine": cosine}))


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("window", [(7, 7), (9, 8)], ids=["small", "large"])
def test_head_dims(window, dim):
    run(Case(window, (10, 12), (3, 3), dim=dim))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 17])
@pytest.mark.parametrize("window", [(2, 2), (9, 8)], ids=["small", "large"])
def test_batches(window, batch):
    run(Case(window, window, heads=1, batch=batch))


@pytest.mark.parametrize("window", [(2, 2), (9, 8)], ids=["small", "large"])
def test_empty_batch(window):
    case = Case(window, (10, 12), (1, 1), batch=0)
    qkv, options = case.make(torch.float32)
    assert attend(qkv, case.geometry, **options).shape == (0, 10, 12, 32)


def test_images_of_one_program_do_not_mix(monkeypatch):
    """With enough programs a small-window program runs over several images: each must come out as if alone."""
    from swinaccel.kernels import launch

    monkeypatch.setattr(launch, "_PROGRAMS_WANTED", 1)
    case = Case((4, 4), (5, 4), (2, 2), batch=7, heads=1)
    run(case)
    qkv, options = case.make(torch.float32)
    together = attend(qkv, case.geometry, **options)
    for image, one in enumerate(together):
        alone = attend(qkv[image : image + 1], case.geometry, **options)
        helpers.assert_close(alone[0], one, 1e-6)


@pytest.mark.parametrize(
    ("positions", "batch", "images"), [(24, 32, 2), (24, 21, 1), (48, 32, 3), (64, 8, 1), (4, 4, 1)]
)
def test_how_many_images_a_program_takes(positions, batch, images):
    """As many as leave about 512 programs: of 768, two each were measured to be faster than one."""
    from swinaccel.kernels import launch

    shape = {"tokens": 49, "head_dim": 32, "element_size": 2, "shared_memory": 1 << 17}
    assert launch.small(**shape, positions=positions, batch=batch).images == images


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case((7, 7), (9, 14), (3, 3), dim=32, batch=2),
        Case((7, 7), (9, 14), (3, 3), dim=32, batch=2, cosine=True),
        Case((12, 12), (13, 24), (6, 6), dim=32),
        Case((12, 12), (13, 24), (6, 6), dim=32, cosine=True),
        Case((4, 4), (9, 9), (2, 2), dim=10, roll_first=True, batch=2),
        Case((3, 4, 4), (4, 5, 8), (1, 2, 2), batch=2),
        Case((5, 4, 4), (6, 4, 6), (2, 0, 2), cosine=True),
    ],
    ids=str,
)
def test_low_precision(case, dtype):
    run(case, dtype)


# Padding tokens.


@pytest.mark.parametrize("roll_first", [False, True], ids=["pad-roll", "roll-pad"])
@pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])
def test_padding_vector_matters(window, roll_first):
    """Padding tokens are keys like any other, with the projection's bias for k and v."""
    case = Case(window, (9, 9), (2, 2), roll_first)
    with_bias = run(case)
    without = run(case, padding=None)
    assert helpers.difference(without, with_bias) > 1e-2


def test_padding_vector_is_ignored_without_padding():
    case = Case((4, 4), (8, 8), (2, 2))
    qkv, options = case.make(torch.float32)
    options["padding"] = torch.full((96,), float("nan"), device=TRITON_DEVICE)
    assert bool(torch.isfinite(attend(qkv, case.geometry, **options)).all())


def test_padding_as_half_with_fp32_tokens():
    case = Case((4, 4), (9, 9))
    _, options = case.make(torch.float32)
    run(case, padding=options["padding"].half())


@pytest.mark.parametrize("roll_first", [False, True], ids=["pad-roll", "roll-pad"])
def test_cosine_with_zero_padding_is_finite(roll_first):
    """A zero key has no direction: max(norm, 1e-12) makes its cosine 0, and 1e-12 must not underflow in fp16."""
    case = Case((4, 4), (9, 9), (2, 2), roll_first, cosine=True)
    for dtype in DTYPES:
        qkv, options = case.make(dtype)
        options["padding"] = None
        assert bool(torch.isfinite(attend(qkv, case.geometry, **options)).all()), dtype


# Masks.


def implied(case: Case) -> Tensor:
    return reference.shift_mask(case.geometry, case.mask_value).to(TRITON_DEVICE)


MASKED = [
    Case((4, 4), (8, 12), (2, 1)),
    Case((9, 8), (18, 16), (4, 4), heads=1),
    Case((4, 4), (9, 9), (2, 2), True),
    Case((2, 3, 3), (4, 5, 6), (1, 0, 2)),
    Case((5, 4, 4), (10, 4, 6), (2, 1, 0), heads=1),
]


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_mask_tensor_equal_to_the_implied_one(case):
    computed = run(case)
    helpers.assert_close(run(case, mask=implied(case)), computed, 1e-6)


@pytest.mark.parametrize("kind", ["zeros", "one-entry", "random", "half", "other-value", "some-inf"])
@pytest.mark.parametrize("case", MASKED, ids=str)
def test_mask_tensor_is_honoured(case, kind):
    """Masks are buffers: loaded with a checkpoint or edited, they may be anything, in one window or in all."""
    mask = implied(case)
    if kind == "zeros":
        mask = torch.zeros_like(mask)
    elif kind == "one-entry":
        mask[-1, 1, 2] += 7.0
    elif kind == "random":
        mask = 3 * torch.randn(mask.shape).to(mask.device)
    elif kind == "half":
        mask = mask.half()
    elif kind == "other-value":
        mask = mask / 20
    else:
        mask[0, :, ::3] = float("-inf")
    found = run(case, mask=mask)
    if kind in ("zeros", "random", "some-inf"):
        assert helpers.difference(found, run(case)) > 1e-3


@pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])
def test_mask_tensor_without_shift(window):
    case = Case(window, (2 * window[0], window[1]))
    mask = torch.randn((2, case.geometry.tokens, case.geometry.tokens)).to(TRITON_DEVICE)
    run(case, mask=mask)


@pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])
def test_mask_tensor_that_rules_out_the_first_keys(window):
    """-inf over a whole tile of keys must not turn the running maximum into NaN."""
    case = Case(window, window)
    tokens = case.geometry.tokens
    mask = torch.zeros(1, tokens, tokens, device=TRITON_DEVICE)
    mask[:, :, : tokens - 2] = float("-inf")
    run(case, mask=mask)
    mask[:, :, tokens - 2 :] = -120.0  # all that is left lies below what exp2 can tell from zero
    run(case, mask=mask)


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])
def test_mask_value_leaks_where_logits_are_large(window, cosine):
    """-100 is a number: where it is not enough, the attention looks across regions, and -200 looks less far."""
    size = (2 * window[0], 2 * window[1])
    outs = []
    for value in (-100.0, -200.0, 0.0):
        case = Case(window, size, (window[0] // 2, window[1] // 2), mask_value=value, cosine=cosine, heads=1)
        qkv, options = case.make(torch.float32)
        # Queries and keys point the same way, but for the wrapped part of the image, which points the other way.
        sign = torch.ones(size, device=TRITON_DEVICE)
        sign[: window[0] // 2] = -1
        direction = torch.full((16,), 0.25, device=TRITON_DEVICE)
        qkv[..., :16] = -direction * sign[None, :, :, None]
        qkv[..., 16:32] = direction * sign[None, :, :, None]
        options["scale"] = 50.0  # so that scores across regions are 100 higher than those within
        if cosine:
            options["logit_scale"] = torch.full((1,), math.log(50.0), device=TRITON_DEVICE)
        outs.append(compare(qkv, case.geometry, **options))
    assert helpers.difference(outs[1], outs[0]) > 1e-2
    assert helpers.difference(outs[2], outs[0]) > 1e-2


# Numbers.


@pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])
def test_large_scores_do_not_overflow(window):
    for dtype in DTYPES:
        case = Case(window, window, heads=1)
        qkv, options = case.make(dtype)
        options["scale"] = 60.0  # scores of some thousands: the softmax is one-hot
        found = attend(qkv, case.geometry, **options)
        assert bool(torch.isfinite(found).all()), dtype


@pytest.mark.parametrize("value", [10.0, -5.0, 4.6])
@pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])
def test_logit_scale_is_clamped_from_above_only(window, value):
    case = Case(window, (9, 9), (2, 2), cosine=True)
    run(case, logit_scale=torch.full((2,), value, device=TRITON_DEVICE))


@pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])
def test_per_head_logit_scales(window):
    case = Case(window, (9, 9), cosine=True, heads=3)
    run(case, logit_scale=torch.tensor([0.0, 2.0, 4.0], device=TRITON_DEVICE))


@pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])
def test_nan_stays_in_its_window(window):
    """NaN comes out where the original gives NaN, and nowhere else."""
    case = Case(window, (window[0], 2 * window[1]), heads=1)
    qkv, options = case.make(torch.float32)
    qkv[0, 0, 0, 3] = float("nan")
    found = attend(qkv, case.geometry, **options).cpu()
    expected = helpers.oracle(qkv, case.geometry, **options)
    assert torch.equal(torch.isnan(found), torch.isnan(expected))
    assert bool(torch.isfinite(found[:, :, window[1] :]).all())


@pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])
def test_runs_are_bitwise_equal(window):
    case = Case(window, (9, 9), (2, 2))
    qkv, options = case.make(torch.float32)
    first = attend(qkv, case.geometry, **options)
    assert torch.equal(attend(qkv, case.geometry, **options), first)


# Forms of the operands.


@pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])
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


HEADS_APART = [
    Case((1, 6), (5, 6), batch=2, heads=3),  # five windows of six tokens
    Case((1, 70), (2, 70)),
    Case((4, 4), (5, 6), (1, 2), batch=2),
    Case((2, 3, 3), (3, 4, 5), (1, 1, 0)),
    Case((2, 17, 2), (3, 17, 3), (1, 0, 1), heads=2, dim=10),
]


def heads_apart(qkv: Tensor, case: Case, kind: str) -> tuple[Tensor, ...]:
    """q, k and v with an axis for their heads, in memory as `kind` says."""
    tokens = [part.unflatten(-1, (case.heads, case.dim)) for part in qkv.chunk(3, dim=-1)]
    if kind == "packed-in-memory":
        return tuple(tokens)
    if kind == "odd-gap":
        return tuple(torch.nn.functional.pad(part, (0, 3))[..., :-3] for part in tokens)
    if kind == "heads-last":
        return tuple(part.contiguous() for part in tokens)
    first = tuple(part.transpose(-3, -2).contiguous().transpose(-3, -2) for part in tokens)
    return first if kind == "heads-first" else (first[0], tokens[1].contiguous(), first[2])


@pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])
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


@pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])
@pytest.mark.parametrize(
    "kind", ["permuted-index", "random-index", "transposed-table", "half-table", "double-table", "no-table"]
)
def test_bias_operands(window, kind):
    """The index is a buffer too: whatever it says is what the bias is."""
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
        table = table.half()
    elif kind == "double-table":
        table = table.double()
    else:
        table = index = None
    compare(qkv, case.geometry, **{**options, "table": table, "index": index})


@pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])
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


WINDOWS = st.tuples(st.integers(1, 10), st.integers(2, 10)) | st.tuples(*[st.integers(1, 5)] * 2, st.integers(2, 5))


def draw_case(data: Any, largest_dim: int, most: int = 3) -> Case:
    """Any small problem, of images or of volumes, and at most so many of them and heads."""
    window = data.draw(WINDOWS, "window")
    return Case(
        window,
        tuple(data.draw(st.integers(1, 2 * axis), "size") for axis in window),
        tuple(data.draw(st.integers(0, axis - 1), "shift") for axis in window),
        roll_first=data.draw(st.booleans(), "roll_first"),
        heads=data.draw(st.integers(1, most), "heads"),
        dim=data.draw(st.integers(1, largest_dim), "dim"),
        batch=data.draw(st.integers(1, most), "batch"),
        cosine=data.draw(st.booleans(), "cosine"),
        mask_value=data.draw(st.sampled_from([-100.0, -200.0, 0.0, 3.0]), "mask_value"),
    )


@given(data=st.data())
@settings(max_examples=25)
def test_any_problem(data):
    case = draw_case(data, 48)
    qkv, options = case.make(torch.float32, seed=data.draw(st.integers(0, 9), "seed"))
    if data.draw(st.booleans(), "explicit mask"):
        options["mask"] = reference.shift_mask(case.geometry, -5.0).to(TRITON_DEVICE)
    if data.draw(st.booleans(), "separate"):
        qkv = qkv.chunk(3, dim=-1)
    compare(qkv, case.geometry, **options)


# On the GPU, all of the above runs compiled; what follows is only worth it there.

GPU_CASES = [
    Case(window, size, shift, roll_first, heads=3, dim=dim, batch=batch, cosine=cosine)
    for (window, size, shift), (roll_first, cosine), dim, batch in itertools.product(
        [
            ((7, 7), (56, 56), (3, 3)),
            ((7, 7), (37, 50), (3, 3)),
            ((8, 8), (64, 64), (4, 4)),
            ((12, 12), (50, 48), (6, 6)),
            ((16, 16), (64, 64), (8, 8)),
            ((24, 24), (48, 50), (12, 12)),
            ((2, 7), (9, 30), (1, 0)),
        ],
        [(False, False), (True, True)],
        [32, 30, 128],
        [1, 9],
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_full_sizes(case, dtype):
    run(case, dtype)


@pytest.mark.gpu
def test_tf32_is_used_where_pytorch_uses_it():
    case = Case((7, 7), (28, 28), (3, 3), dim=32)
    qkv, options = case.make(torch.float32)
    exact = helpers.oracle(qkv, case.geometry, **options)
    before = torch.get_float32_matmul_precision()
    try:
        errors = []
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            errors.append(helpers.difference(attend(qkv, case.geometry, **options).cpu().double(), exact))
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors[0] <= 1e-5
    assert errors[0] < errors[1] <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offsets_beyond_32_bits(dtype):
    """An image batch of more than 2^31 elements: the last image must equal what it is alone."""
    heads, dim, size = 4, 32, (224, 224)
    batch = 2**31 // (size[0] * size[1] * 3 * heads * dim) + 2
    if torch.cuda.mem_get_info()[0] < 5 * batch * size[0] * size[1] * heads * dim * dtype.itemsize:
        pytest.skip("needs more free GPU memory")
    qkv = torch.zeros(batch, *size, 3 * heads * dim, device="cuda", dtype=dtype)
    qkv[-1] = torch.randn(qkv.shape[1:], device="cuda", dtype=dtype)
    case = Case((7, 7), size, (3, 3), heads=heads, dim=dim)
    _, options = case.make(dtype)
    found = attend(qkv, case.geometry, **options)[-1:]
    helpers.assert_close(found, attend(qkv[-1:], case.geometry, **options), 1e-6)


@pytest.mark.gpu
def test_small_shared_memory(monkeypatch):
    """Launches adapt to GPUs with less shared memory than the one at hand."""
    from swinaccel.backends.triton import devices

    monkeypatch.setattr(devices, "shared_memory_override", 64 * 1024)
    for window, dim in itertools.product([(7, 7), (12, 12), (16, 16)], [32, 128]):
        run(Case(window, (32, 32), (3, 3), dim=dim), torch.float16)
