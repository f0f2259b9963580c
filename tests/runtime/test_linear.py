"""Linear layers by a kernel of ours: with a sum, with nothing, in blocks and attentions, and who is left to PyTorch."""

import copy
import functools

import blocks
import helpers
import pytest
import torch
import torch.nn.functional as F
from blocks import HALF
from helpers import TRITON_DEVICE
from swinaccel.kernels import fusion_launch
from torch import nn

import swinaccel
from swinaccel.backends.triton import launches, linear
from swinaccel.backends.triton.block import LaunchError
from swinaccel.ops import linear as linear_ops
from swinaccel.ops.failures import failures

# Of blocks whose products fill a multiprocessor, and whose MLP is not one kernel, or is.
SIZE, DIM, DIM_IN_ONE = ((16, 16), 120, 128) if TRITON_DEVICE == "cuda" else ((8, 8), 56, 32)


random = functools.partial(blocks.random, dtype=HALF)


@pytest.fixture
def multiplied(few_processors, monkeypatch):
    """The launches that ran, on a GPU whose tiles are small where it is interpreted."""
    if TRITON_DEVICE == "cpu":
        monkeypatch.setattr(fusion_launch, "LINEAR", fusion_launch.LinearLaunch(16, 32, 16, 2, 1, 4, 2))
    ran, plan = [], linear._plan

    def planned(*key):
        launch = plan(*key)
        return lambda *tensors: (ran.append(key), launch(*tensors))[1]

    monkeypatch.setattr(linear, "_plan", planned)
    launches.launches.clear()
    yield ran
    launches.launches.clear()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "channels", "outputs"),
    [(600, 96, 360), (517, 64, 72), (384, 136, 128)] if TRITON_DEVICE == "cuda" else [(67, 24, 88), (48, 40, 64)],
)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_product_with_a_sum(rows, channels, outputs, dtype, biases, adds, multiplied, poisoned):
    """Of rows, channels and outputs that fill no whole tile."""
    helpers.skip_interpreted_bfloat16("triton", dtype)
    x, weight = (
        random(rows, channels, dtype=dtype),
        random(outputs, channels, dtype=dtype, scale=channels**-0.5, seed=1),
    )
    bias = random(outputs, dtype=dtype, seed=2) if biases else None
    added = random(rows, outputs, dtype=dtype, seed=3) if adds else None
    found = linear.linear(x, weight, bias, added)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    exact = exact if added is None else exact + added.double()
    expected = F.linear(x, weight, bias)
    helpers.assert_no_worse(found, expected if added is None else expected + added, exact, dtype)
    assert len(multiplied) == 1


def timm_block(v2=False, dim=DIM):
    return helpers.timm_block(SIZE, shift=2, v2=v2, dim=dim).to(TRITON_DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("dim", [DIM, DIM_IN_ONE])
@pytest.mark.parametrize("moved", [False, True])
def test_blocks_multiply_by_it(v2, dim, moved, multiplied):
    """The projections, and the sum before an MLP in one kernel; PyTorch multiplies by weights that lie elsewhere."""
    model = timm_block(v2, dim).eval()
    exact, x = copy.deepcopy(model).double(), random(1, *SIZE, dim)
    model = model.half()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton", graphs=False)
    twin(x)
    multiplied.clear()
    if moved:
        for name, one in twin.named_parameters():
            if one.dim() == 2 and "cpb" not in name:
                place = torch.empty(one.numel() + 1, dtype=one.dtype, device=one.device)[1:].view_as(one)
                one.data = place.copy_(one)
    found = twin(x)
    helpers.assert_no_worse(found, model(x), exact(x.double()), HALF)
    ways = [(key[2], key[3], key[-1]) for key in multiplied if not key[-3]]
    whole = [(dim, 3 * dim, False), (dim, dim, dim == DIM_IN_ONE and not v2)]
    assert ways == ([] if moved else whole)
    helpers.assert_accelerated(twin)


@torch.no_grad()
def test_a_layer_that_is_not_plain_is_called(multiplied):
    model = timm_block(dim=DIM_IN_ONE).eval().half()
    for layer in (model.attn.proj, model.attn.qkv):
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton", graphs=False)
    x = random(1, *SIZE, DIM_IN_ONE)
    helpers.assert_close(twin(x), model(x), 5e-3)
    assert not multiplied


@torch.no_grad()
def test_what_pytorch_is_left(multiplied):
    x, weight, bias = random(600, 64), random(128, 64), random(128)
    assert linear_ops.product_of(x) is linear_ops.linear
    assert linear_ops.product_of(x.float()) is F.linear
    linear_ops.linear(x, weight, bias)
    assert multiplied
    multiplied.clear()
    for one, other in (
        (x.double(), weight.double()),
        (x[:, :60], weight[:, :60].contiguous()),
        (x.t()[:, :64], weight),
    ):
        helpers.assert_close(linear_ops.linear(one, other), F.linear(one, other))
    for odd in (bias[:1], random(256)[::2]):  # spread over all columns, and not one after the other
        assert torch.equal(linear_ops.linear(x, weight, odd), F.linear(x, weight, odd))
    assert torch.equal(linear_ops.linear(x, weight[0]), F.linear(x, weight[0]))
    with torch.autocast(TRITON_DEVICE, torch.bfloat16):
        assert linear_ops.linear(x, weight, bias).dtype == torch.bfloat16
    assert not multiplied


@torch.no_grad()
def test_a_kernel_that_fails_is_not_tried_again(multiplied, monkeypatch):
    tried = []

    def failing(*_):
        tried.append(1)
        raise LaunchError("no kernel")

    monkeypatch.setattr(linear, "run", failing)
    x, weight = random(600, 64), random(128, 64)
    for _ in range(2):
        assert torch.equal(linear_ops.linear(x, weight), F.linear(x, weight))
    assert tried == [1]
    failures.clear()
