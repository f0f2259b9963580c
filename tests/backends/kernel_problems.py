"""Problems for the kernels of images and volumes, and what the forward gives for them beside the oracle."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import helpers
import pytest
import torch
from helpers import TRITON_DEVICE, position_index, table_rows
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

SMALL_AND_LARGE = pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["small", "large"])
HEAD_DIMS = (8, 10, 24, 30, 32, 44, 80, 128)

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


def rounded_cases(*large: Any) -> list[Case]:
    """Return problems of all forms for low precision; large: window, size and shift of those with large windows."""
    return [
        Case((7, 7), (9, 14), (3, 3), dim=32, batch=2),
        Case((7, 7), (9, 14), (3, 3), dim=32, batch=2, cosine=True),
        Case(*large, dim=32),
        Case(*large, dim=32, cosine=True),
        Case((4, 4), (9, 9), (2, 2), dim=10, roll_first=True, batch=2),
        Case((3, 4, 4), (4, 5, 8), (1, 2, 2), batch=2),
        Case((5, 4, 4), (6, 4, 6), (2, 0, 2), cosine=True),
    ]


BIAS_KINDS = ["permuted-index", "random-index", "transposed-table", "half-table", "double-table", "no-table"]


def bias_of_kind(kind: str, table: Tensor, index: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return a table and an index of one of `BIAS_KINDS`, made of ordinary ones."""
    generator = torch.Generator().manual_seed(3)
    if kind == "permuted-index":
        return table, index[torch.randperm(len(index), generator=generator).to(index.device)]
    if kind == "random-index":
        return table, torch.randint(table.shape[0], index.shape, generator=generator).to(index.device)
    if kind == "transposed-table":
        return table.t().contiguous().t(), index
    if kind == "half-table":
        return table.half(), index
    return (table.double(), index) if kind == "double-table" else (None, None)
