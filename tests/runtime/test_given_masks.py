"""Calls that bring their mask, or an index: one plan serves all of a form, and each call gets its own numbers."""

import copy

import bias_models as biased
import changed_models as changed
import descendant_models as descendants
import helpers
import microsoft_models as official
import pytest
import torch
import video_models as videos
import weather_models as weather

import swinaccel
from swinaccel.runtime import call

torch.manual_seed(0)
IMAGE, TOKENS = torch.randn(2, 8, 8, 16), torch.randn(2, 64, 16)


def detection():
    block = descendants.DetectionBlock(16, 2, 4, 2)
    block.H = block.W = 8
    return block, lambda mask: (TOKENS, mask), (4, 16, 16)


def sdpa():
    block = changed.SdpaBlock(16, 2, 4, 2)
    block.H = block.W = 8
    return block, lambda mask: (TOKENS, mask), (4, 16, 16)


def video():
    block = videos.SwinTransformerBlock3D(16, 2, (2, 4, 4), (0, 2, 2))
    return block, lambda mask: (IMAGE[:, None].expand(-1, 2, -1, -1, -1), mask), (4, 32, 32)


def hat():
    block, index = descendants.HAB(16, (8, 8), 2, 4, 2), official.position_index((4, 4))
    return block, lambda mask: (TOKENS, (8, 8), index, mask), (4, 16, 16)


def half():
    model, qkv = biased.SpatialAttention(16, (2, 4), 2), torch.randn(3, 2, 64, 16)
    return model, lambda mask: (qkv, 8, 8, mask), (8, 8, 8)


def earth():
    model, x = weather.EarthAttention(16, (1, 2, 4), 2, 3), torch.randn(4, 3, 8, 16)
    return model, lambda mask: (x, None if mask is None else mask.view(2, 3, 8, 8)), (6, 8, 8)


KINDS = {one.__name__: one for one in (detection, sdpa, video, hat, half, earth)}


@pytest.fixture
def planned(monkeypatch):
    """The calls that were planned, rather than run by a plan of before."""
    made = []
    for name in ("_plan_fused", "_attention_plan"):  # `_fused_plan` is asked each time where a CPU does not gain by it
        plan = getattr(call, name)
        monkeypatch.setattr(call, name, lambda *given, plan=plan: (made.append(1), plan(*given))[1])
    return made


def twins(kind, backend):
    """Return a model, its accelerated twin, what makes the arguments of a call of its mask, and the mask's shape."""
    model, arguments, shape = KINDS[kind]()
    device = helpers.DEVICES[backend]
    model = helpers.randomize(model).eval().to(device)

    def moved(mask):
        return [one.to(device) if isinstance(one, torch.Tensor) else one for one in arguments(mask)]

    return model, swinaccel.accelerate(copy.deepcopy(model), backend=backend), moved, shape


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "backend"), [*((kind, "torch") for kind in KINDS), ("sdpa", "triton"), ("half", "triton")]
)
def test_masks_of_one_form_have_one_plan_and_their_own_numbers(kind, backend, planned):
    model, twin, arguments, shape = twins(kind, backend)
    twin(*arguments(torch.randn(shape)))
    before = len(planned)
    for mask in (torch.randn(shape), 3 * torch.randn(shape), torch.zeros(shape)):
        helpers.assert_close(twin(*arguments(mask)), model(*arguments(mask)))
    assert len(planned) == before > 0
    others = [None] if kind != "sdpa" else []  # which expects one
    for mask in (*others, torch.randn(shape).mT, torch.randn(shape).half()):
        helpers.assert_close(twin(*arguments(mask)), model(*arguments(mask)))
    helpers.assert_accelerated(twin)


@torch.no_grad()
def test_an_index_that_comes_with_a_call_is_the_one_that_is_used(planned):
    model, twin, arguments, shape = twins("hat", "torch")
    x, size, index, mask = arguments(torch.randn(shape))
    other = index.flip(0).contiguous()
    for given in (index, other, index):
        helpers.assert_close(twin(x, size, given, mask), model(x, size, given, mask))
    before = len(planned)
    twin(x, size, other, mask)
    assert len(planned) == before
    other.copy_(index.flip(1))
    helpers.assert_close(twin(x, size, other, mask), model(x, size, other, mask))
    with torch.inference_mode():
        written = index.clone()
        for given in (index, other):
            written.copy_(given)
            helpers.assert_close(twin(x, size, written, mask), model(x, size, written, mask))
    helpers.assert_accelerated(twin)


def test_gradients_are_those_of_each_calls_mask():
    model, twin, arguments, shape = twins("detection", "triton")
    for mask in (torch.randn(shape), torch.randn(shape)):
        found = [
            torch.autograd.grad(one(*arguments(mask)).square().sum(), [*one.parameters()]) for one in (model, twin)
        ]
        for expected, grad in zip(*found, strict=True):
            helpers.assert_close(grad, expected, 1e-4)
    helpers.assert_accelerated(twin)
