"""Blocks and attentions of the libraries, accelerated, and `swinaccel.nn`: any of them against their originals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import helpers
import microsoft_models
import pytest
import torch
import video_models
from calls import BACKENDS, DTYPES, GRADS, ODD, make_grad, window_sizes
from hypothesis import strategies as st
from judging import EACH_LENGTH, Results, differentiate, explore, judge
from torch import Tensor, nn

import swinaccel
from swinaccel import nn as own_nn
from swinaccel.ops.failures import failures

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A call of a module of some kind, with one number among its parameters and inputs that is none, or without."""

    backend: str
    kind: str
    window: Axes
    shift: Axes
    size: Axes
    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    training: bool
    backward: bool
    grad: str
    odd: float | None
    place: int  # of it

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    def given(self, generator: torch.Generator) -> list[Any]:
        """What the module is called with."""
        device = helpers.DEVICES[self.backend]
        x, *rest = KINDS[self.kind].inputs(self)
        x = torch.randn(x, generator=generator, dtype=torch.float64)
        return [one.to(device, self.dtype) if isinstance(one, Tensor) else one for one in (x, *rest)]

    def judge(self) -> None:
        kind = KINDS[self.kind]
        device = helpers.DEVICES[self.backend]
        original = helpers.randomize(kind.make(self)).to(device, self.dtype).train(self.training)
        ours = kind.ours(original, self)

        def results(seed: int) -> tuple[Results, Results, Results]:
            generator = torch.Generator().manual_seed(seed)
            given = self.given(generator)
            leaves = {"x": given[0], **{name: one.detach().clone() for name, one in original.named_parameters()}}
            for name in [name for name in leaves if seed and name != "x"]:
                leaves[name] = leaves[name][..., torch.randperm(leaves[name].shape[-1], generator=generator)]
            if self.odd is not None:
                target = list(leaves.values())[self.place % len(leaves)].view(-1)
                if target.numel():
                    target[int(torch.randint(target.numel(), (1,), generator=generator))] = self.odd

            def by(module: nn.Module, is_exact: bool = False) -> Results:
                if is_exact:
                    module = copy.deepcopy(module).double()
                own = {name: one.double() if is_exact else one for name, one in leaves.items()}

                def call(x: Tensor, **parameters: Tensor) -> Tensor:
                    with torch.no_grad():
                        for name, one in module.named_parameters():
                            one.copy_(parameters[name])
                    rest = [one.to(x) if isinstance(one, Tensor) else one for one in given[1:]]
                    out = module(x, *rest)
                    return out[0] if isinstance(out, tuple) else out

                return differentiate(call, own, ["x"], grad, is_exact, dict(module.named_parameters()))

            grad = None
            with torch.no_grad():
                shape = original(*given)
            if self.backward:
                grad = make_grad(shape[0] if isinstance(shape, tuple) else shape, self.grad, generator)
            return by(ours), by(original), by(original, True)

        given = self.given(torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                original(*given)
        except Exception as error:
            if self.batch:  # of no images there is nothing to be wrong
                with pytest.raises(type(error)), torch.no_grad():
                    ours(*given)
            return
        judge(results, self.dtype, self.odd in (math.inf, -math.inf) or self.grad == "inf")
        if kind.own is None:
            report = swinaccel.report(ours)
            assert report.accelerated, str(report)
            COUNTS[self.backend] = [old + new for old, new in zip(COUNTS[self.backend], _counts(report), strict=True)]


COUNTS = {"triton": [0, 0], "torch": [0, 0]}  # calls, and those of them that ran an original


def _counts(report: Any) -> tuple[int, int]:
    return sum(entry.calls for entry in report), sum(entry.fallbacks for entry in report)


class Kind:
    """How modules of a kind are made and called.

    Args:
        make: the original.
        inputs: arguments of a call, the first of them as a shape.
        axes: how many axes an image has.
        free: whether images of any size will do.
        own: makes a module of `swinaccel.nn` that takes the original's parameters; without, it is accelerated.
    """

    def __init__(
        self,
        make: Callable[[Case], nn.Module],
        inputs: Callable[[Case], list[Any]],
        axes: int = 2,
        free: bool = True,
        square: bool = False,
        own: Callable[[Case], nn.Module] | None = None,
    ) -> None:
        self.make, self.inputs, self.axes, self.free, self.square, self.own = make, inputs, axes, free, square, own

    def ours(self, original: nn.Module, case: Case) -> nn.Module:
        if self.own is None:
            return swinaccel.accelerate(copy.deepcopy(original), backend=case.backend)
        module = self.own(case).to(next(original.parameters())).train(case.training)
        module.load_state_dict(original.state_dict())
        return module


def _image(case: Case) -> list[Any]:
    return [(case.batch, *case.size, case.dim)]


def _rows(case: Case) -> list[Any]:
    return [(case.batch, math.prod(case.size), case.dim)]


def _layer(case: Case) -> list[Any]:
    return [*_rows(case), case.size]


def _volume(case: Case) -> list[Any]:
    return [*_image(case), video_models.stage_mask(case.size, case.window, case.shift)]


def _windows(case: Case) -> list[Any]:
    tokens, masks = math.prod(case.window), case.shift[0] % 3
    x = (case.batch * max(1, masks), tokens, case.dim)
    mask = torch.rand(masks, tokens, tokens, generator=torch.Generator().manual_seed(case.place)) < 0.3
    return [x, -100.0 * mask] if masks else [x]


def _timm(case: Case, v2: bool = False, **options: Any) -> nn.Module:
    return helpers.timm_block(case.size, case.window, case.shift, case.heads, v2, dim=case.dim, **options)


def _timm_cr(case: Case) -> nn.Module:
    from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock

    return SwinTransformerV2CrBlock(case.dim, case.heads, case.size, case.window, case.shift)


def _torchvision_3d(case: Case) -> nn.Module:
    from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

    return ShiftedWindowAttention3d(case.dim, list(case.window), list(case.shift), case.heads)


def _torchvision(case: Case, v2: bool = False) -> nn.Module:
    return helpers.torchvision_attention(case.window, case.shift, v2, case.dim, case.heads)


def _microsoft(case: Case, v2: bool = False) -> nn.Module:
    return helpers.microsoft_block(case.size, case.window[0], case.shift[0], case.heads, case.dim, v2=v2)


def _huggingface(name: str) -> Kind:
    def make(case: Case) -> nn.Module:
        return helpers.huggingface_layer(name, case.size, case.window[0], case.shift[0], case.dim, case.heads)

    return Kind(make, _layer, square=True)


KINDS = {
    "timm": Kind(_timm, _image),
    "timm, mask of each call": Kind(lambda case: _timm(case, dynamic_mask=True, always_partition=True), _image),
    "timm V2": Kind(lambda case: _timm(case, v2=True), _image, free=False),
    "timm CR": Kind(_timm_cr, _image, free=False),
    "torchvision": Kind(_torchvision, _image),
    "torchvision V2": Kind(lambda case: _torchvision(case, v2=True), _image),
    "torchvision 3D": Kind(_torchvision_3d, _image, axes=3),
    "Microsoft": Kind(_microsoft, _rows, free=False, square=True),
    "Microsoft V2": Kind(lambda case: _microsoft(case, v2=True), _rows, free=False, square=True),
    "Microsoft, attention": Kind(
        lambda case: microsoft_models.WindowAttention(case.dim, case.window, case.heads), _windows
    ),
    **{name: _huggingface(name) for name in ("Swin", "Swinv2", "DonutSwin", "MaskFormerSwin")},
    "video": Kind(
        lambda case: video_models.SwinTransformerBlock3D(case.dim, case.heads, case.window, case.shift),
        _volume,
        axes=3,
    ),
    "nn": Kind(
        _torchvision,
        _image,
        own=lambda case: own_nn.ShiftedWindowAttention(case.dim, case.window, case.shift, case.heads),
    ),
    "nn V2": Kind(
        lambda case: microsoft_models.WindowAttentionV2(case.dim, case.window, case.heads),
        lambda case: [(case.batch, math.prod(case.window), case.dim)],
        own=lambda case: _Windows(own_nn.ShiftedWindowAttentionV2(case.dim, case.window, 0, case.heads)),
    ),
    "nn, windows": Kind(
        lambda case: microsoft_models.WindowAttention(case.dim, case.window, case.heads),
        _windows,
        own=lambda case: own_nn.WindowAttention(case.dim, case.window, case.heads),
    ),
}


class _Windows(nn.Module):
    """An attention of images, for windows; under its own names."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(attention.__dict__)
        self.__dict__["attention"] = attention  # no submodule

    def forward(self, x: Tensor) -> Tensor:
        return self.__dict__["attention"](x.unflatten(1, self.window_size)).flatten(1, 2)


@st.composite
def calls(draw, backend: str, length: str) -> Case:
    name = draw(st.sampled_from(sorted(KINDS)))
    kind = KINDS[name]
    window = draw(window_sizes(kind.axes, length).filter(lambda sides: math.prod(sides) > 1))
    if kind.square:
        side = max(2, math.isqrt(math.prod(window)))
        window = (side, side)
    tokens = math.prod(window)
    shift = tuple(draw(st.integers(0, side - 1)) for side in window)
    if kind.square:
        shift = (shift[0],) * 2
    most = 2 if tokens <= 36 else 1
    if kind.free:
        size = tuple(draw(st.integers(1, most * side + 1)) for side in window)
    else:
        size = tuple(draw(st.integers(1, 2 if tokens <= 64 else 1)) * side for side in window)
    heads, head_dim = draw(st.integers(1, 2)), draw(st.sampled_from([8, 16, 24, 3, 33]))
    dtype = draw(st.sampled_from([one for one in DTYPES[backend] if one != torch.float64]))
    odd, place = draw(st.sampled_from(ODD)), draw(st.integers(0, 30))
    training, backward = draw(st.booleans()), draw(st.booleans())
    if name in ("torchvision V2", "nn V2"):  # of one token along an axis the originals make NaN
        window = tuple(max(2, side) for side in window)
    batch = draw(st.sampled_from([0, 1, 1, 2, 3]))
    return Case(
        backend, name, window, shift, size, batch, heads, head_dim, dtype, training, backward,
        draw(st.sampled_from(GRADS)), odd, place,
    )  # fmt: skip


@pytest.fixture
def backend(request, poisoned):
    yield request.param
    assert not failures, f"kernels failed: {failures._reasons}"


@EACH_LENGTH
@BACKENDS
def test_modules(backend, length):
    def check_modules(case: Case) -> None:
        case.judge()

    COUNTS[backend] = [0, 0]
    explore(calls(backend, length), check_modules, 40, length)
    total, fallbacks = COUNTS[backend]
    assert total > 3 * fallbacks, f"{fallbacks} of {total} calls ran their originals"
