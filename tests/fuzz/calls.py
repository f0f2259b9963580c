"""Calls that are drawn: inputs of any form, with numbers that are none, masks, gradients and windows.

Tensors are strided, expanded and empty, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import helpers
import pytest
import torch
from hypothesis import strategies as st
from judging import Results, differentiate, judge
from torch import Tensor

BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"], indirect=True)
HALVES = [torch.float16] + ([torch.bfloat16] if helpers.TRITON_DEVICE == "cuda" else [])
DTYPES = {"triton": [torch.float32, *HALVES], "torch": [torch.float32, torch.float16, torch.bfloat16, torch.float64]}


@dataclass(frozen=True)
class Form:
    """Shape, dtype, spread and layout of an input, and the one of its numbers that is none."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    spread: float = 1.0
    layout: str = "dense"
    odd: float | None = None
    whole: bool = False  # all of them are

    def make(self, generator: torch.Generator, device: str) -> Tensor:
        """A leaf, of which `view` is the input."""
        shape = list(self.shape)
        if self.layout == "gaps":
            shape[-1] *= 2
        elif self.layout == "every second":
            shape[0] *= 2
        elif self.layout == "transposed":
            shape[-2:] = reversed(shape[-2:])
        elif self.layout == "expanded":
            shape[0] = min(1, shape[0])
        leaf = self.spread * torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.odd is not None and leaf.numel():
            place = slice(None) if self.whole else int(torch.randint(leaf.numel(), (1,), generator=generator))
            leaf.view(-1)[place] = self.odd
        return leaf.to(device, self.dtype)

    def view(self, leaf: Tensor) -> Tensor:
        if self.layout == "gaps":
            return leaf[..., ::2]
        if self.layout == "every second":
            return leaf[::2]
        if self.layout == "transposed":
            return leaf.transpose(-1, -2)
        if self.layout == "expanded":
            return leaf.expand(self.shape)
        return leaf


LAYOUTS = ["dense", "dense", "dense", "gaps", "every second", "transposed", "expanded"]
ODD = [None] * 6 + [math.nan, math.inf, -math.inf]


@st.composite
def forms(draw, shape: tuple[int, ...], dtypes: list[torch.dtype], spread: float = 1.0) -> Form:
    layouts = LAYOUTS if len(shape) > 1 else ["dense", "gaps"]
    odd, layout = draw(st.sampled_from(ODD)), draw(st.sampled_from(layouts))
    return Form(shape, draw(st.sampled_from(dtypes)), spread, layout, odd, odd is not None and draw(st.booleans()))


@dataclass(frozen=True)
class Case:
    """A call: what it is given, by name, beside options; and whether gradients are wanted."""

    backend: str
    forms: dict[str, Form]
    options: dict[str, Any]
    backward: bool
    grad: str
    mask: str | None = None

    @property
    def tokens(self) -> int:
        return (
            math.prod(self.options.get("window_size", ()))
            if "window_size" in self.options
            else next(iter(self.forms.values())).shape[2]
        )

    def judge(
        self, ours: Callable[..., Tensor], plain: Callable[..., Tensor], exact: Callable[..., Tensor] | None = None
    ) -> None:
        device = helpers.DEVICES[self.backend]

        def results(seed: int) -> tuple[Results, Results, Results]:
            generator = torch.Generator().manual_seed(seed)
            leaves = {name: form.make(generator, device) for name, form in self.forms.items()}
            if self.mask is not None:
                leaves["mask"] = fill_mask(leaves["mask"], self.mask, generator)

            def by(function: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Results:
                def call(**leaves: Tensor) -> Tensor:
                    return function(
                        **{name: self.forms[name].view(one) for name, one in leaves.items()}, **self.options
                    )

                given = {name: one if dtype is None else one.to(dtype) for name, one in leaves.items()}
                wanted = [name for name in given if name != "mask"]
                return differentiate(call, given, wanted, grad, dtype is not None)

            with torch.no_grad():
                shape = plain(**{name: form.view(leaves[name]) for name, form in self.forms.items()}, **self.options)
            grad = make_grad(shape, self.grad, generator) if self.backward else None
            return by(ours), by(plain), by(exact or plain, torch.float64)

        odd = {self.grad, *(str(form.odd) for form in self.forms.values())}
        judge(
            results, next(iter(self.forms.values())).dtype, bool(odd & {"inf", "-inf"}) or self.mask in ("rows", "some")
        )


def fill_mask(mask: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """A mask of some kind in the memory of another tensor."""
    if kind == "numbers" or not mask.numel():
        return mask
    chosen = (torch.rand(mask.shape, generator=generator) < 0.3).to(mask.device)
    if kind == "rows":  # nothing is left to see
        chosen = chosen[..., :1].expand_as(mask)
    value = {"swin": -100.0, "large": -1e4, "lowest": torch.finfo(mask.dtype).min}.get(kind, -math.inf)
    return torch.where(chosen, value, torch.zeros_like(mask))


def make_grad(like: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    grad = torch.randn(like.shape, generator=generator).to(like)
    if kind == "one":  # that of a sum
        return torch.ones_like(like[..., :1]).expand_as(like)
    if kind == "strided":
        return grad.mT.contiguous().mT
    if kind in ("nan", "inf") and grad.numel():
        grad.view(-1)[int(torch.randint(grad.numel(), (1,), generator=generator))] = float(kind)
    return grad


GRADS = ["random"] * 4 + ["one", "strided", "nan", "inf"]
MASKS = [None, None, "swin", "rows", "some", "large", "lowest", "numbers"]
SPREADS = [1.0, 1.0, 1.0, 0.01, 6.0, 40.0]  # 40: all but one-hot


def dtypes_beside(dtype: torch.dtype, backend: str) -> list[torch.dtype]:
    """What a bias or a mask may be of."""
    return [dtype, dtype, torch.float32, *DTYPES[backend]]


def scales(dim: int) -> Any:
    return st.sampled_from([None, None, dim**-0.5, 1.0, 0.3, 0.0, -0.7])


def window_sizes(axes: int, length: str = "quick") -> Any:
    """Windows of 1 to 32 along an axis: most are small, few are large."""
    most = st.sampled_from([16, 36, 64, 64, 64, 90] if length == "quick" else [16, *[64] * 10, 128, 128, 300, 1024])
    sides = st.lists(st.integers(1, 32), min_size=axes, max_size=axes)

    def shrink(drawn: tuple[list[int], int]) -> tuple[int, ...]:
        window, limit = drawn
        while math.prod(window) > limit:
            longest = window.index(max(window))
            window = [max(1, side * 2 // 3) if axis == longest else side for axis, side in enumerate(window)]
        return tuple(window)

    return st.tuples(sides, most).map(shrink)


@st.composite
def cases(draw, backend: str, given: dict[str, Form], options: dict[str, Any], mask: str | None) -> Case:
    backward = draw(st.booleans())
    if "logit_scale" in given and next(iter(given.values())).shape[-1] < 6:
        backward = False  # one number has no direction: its gradient is nothing but rounding
    return Case(backend, given, options, backward, draw(st.sampled_from(GRADS)), mask)
