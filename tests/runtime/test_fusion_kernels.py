"""Kernels around attention in inference against plain PyTorch."""

from __future__ import annotations

import fused_calls
import helpers
import pytest
import torch
import torch.nn.functional as F
from blocks import DTYPES, HALVES, random
from helpers import TRITON_DEVICE

from swinaccel.backends.triton import block as kernels
from swinaccel.backends.triton import devices, linear
from swinaccel.ops import block as block_ops
from swinaccel.spec.reference_block import merged

KEEPS_VERDICTS = True


pytestmark = pytest.mark.usefixtures("kernels_that_run")


def exact(*tensors):
    return [None if tensor is None else tensor.double().cpu() for tensor in tensors]


def compare(found, original, expected):
    if found.dtype == torch.float32:  # sums in another order
        helpers.assert_close(found.double().cpu(), expected, 1e-6)
    else:
        helpers.assert_no_worse(found, original, expected, found.dtype)


@pytest.mark.parametrize("affine", ["affine", "weight", "plain"])
@pytest.mark.parametrize(("rows", "channels"), [(37, 24), (5, 180), (9, 1024)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype, rows, channels, affine, poisoned):
    x, branch = (2 + random(3, rows, channels, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = None if affine == "plain" else 1 + random(channels, dtype=dtype, scale=0.3)
    bias = random(channels, dtype=dtype, seed=2) if affine == "affine" else None
    extra = random(channels, dtype=dtype, seed=3)

    def layer_norm(y, weight, bias):
        return F.layer_norm(y, (channels,), weight, bias, 1e-5)

    given = (weight, bias, 1e-5)
    ex, ebranch, eweight, ebias, eextra = exact(x, branch, weight, bias, extra)
    compare(kernels.norm(x, given), layer_norm(x, weight, bias), layer_norm(ex, eweight, ebias))
    total, out = fused_calls.add_norm(x, branch, given, extra)
    compare(total, x + branch + extra, ex + ebranch + eextra)
    compare(out, layer_norm(x + branch, weight, bias), layer_norm(ex + ebranch, eweight, ebias))
    assert torch.equal(fused_calls.add_norm(x, branch, given, None)[0], (x.float() + branch.float()).to(dtype))
    compare(
        fused_calls.norm_add(x, branch, given),
        x + layer_norm(branch, weight, bias),
        ex + layer_norm(ebranch, eweight, ebias),
    )


@pytest.mark.parametrize("shape", [(2, 4, 6, 8), (1, 5, 7, 24), (2, 1, 3, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merging(dtype, shape, poisoned):
    x, weight = random(*shape, dtype=dtype), 1 + random(4 * shape[-1], dtype=dtype, scale=0.3)

    def merge(x, weight):
        return F.layer_norm(merged(x), weight.shape, weight, None, 1e-5)

    compare(kernels.merge(x, (weight, None, 1e-5)), merge(x, weight), merge(*exact(x, weight)))


def test_merged_takes_the_left_column_first():
    x = torch.arange(6.0).view(1, 2, 3, 1)
    assert merged(x).tolist() == [[[[0, 3, 1, 4], [2, 5, 0, 0]]]]


@pytest.mark.parametrize("dtype", HALVES)
def test_gelu(dtype):
    x = torch.cat((torch.linspace(-13, 13, 5001), torch.tensor([0.0, 3e4, -3e4, 1e-7]))).to(TRITON_DEVICE, dtype)
    expected = F.gelu(x.double().cpu())
    found = kernels.gelu(x)
    compare(found, F.gelu(x), expected)
    assert (found.double().cpu() - expected).abs().max() <= 1.01 * torch.finfo(dtype).eps / 2 * 3e4
    small = x.double().cpu().abs() < 6
    close = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-6
    assert ((found.double().cpu() - expected).abs() <= close)[small].all()


def test_gelu_of_what_is_not_finite():
    x = torch.tensor([float("nan"), float("inf"), 1.0], device=TRITON_DEVICE, dtype=torch.float16)
    found = kernels.gelu(x)
    assert found[0].isnan()
    assert found[1] == float("inf")


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(("rows", "channels"), [(70, 32), (64, 48), (3, 128)])
@pytest.mark.parametrize("dtype", HALVES)
def test_mlp_in_one_kernel(dtype, rows, channels, biases, pre_norm, poisoned):
    x, branch = (random(rows, channels, dtype=dtype, seed=seed) for seed in (0, 1))
    weight, bias = 1 + random(channels, dtype=dtype, scale=0.3), random(channels, dtype=dtype, seed=2)
    weight1 = random(4 * channels, channels, dtype=dtype, scale=1.5 / channels**0.5)
    weight2 = random(channels, 4 * channels, dtype=dtype, scale=1.5 / channels**0.5)
    bias1 = random(4 * channels, dtype=dtype) if biases else None
    bias2 = random(channels, dtype=dtype, seed=5) if biases else None

    def block(x, branch, weight, bias, weight1, bias1, weight2, bias2):
        def mlp(y):
            return F.linear(F.gelu(F.linear(y, weight1, bias1)), weight2, bias2)

        if not pre_norm:
            return x + F.layer_norm(mlp(x), (channels,), weight, bias)
        return x + branch + mlp(F.layer_norm(x + branch, (channels,), weight, bias))

    inputs = (x, branch, weight, bias, weight1, bias1, weight2, bias2)
    given = branch if pre_norm else None
    found = fused_calls.mlp(x, given, (weight, bias, 1e-5), (weight1, bias1), (weight2, bias2))
    compare(found, block(*inputs), block(*exact(*inputs)))


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(
    ("rows", "channels", "hidden", "processors"),
    [(256, 64, 128, 1), (130, 128, 384, 1), (300, 64, 256, 1), (49, 256, 192, 2), (130, 128, 128, 3)],
)
@pytest.mark.parametrize("dtype", HALVES)
def test_product_and_gelu_in_one_kernel(
    dtype, rows, channels, hidden, processors, biases, few_processors, monkeypatch, poisoned
):
    """Of rows that fill no whole tile, of more tiles than there are programs, and of as few as fill them once."""
    monkeypatch.setattr(devices, "multiprocessors", lambda device: processors)
    x, weight = random(1, rows, channels, dtype=dtype), random(hidden, channels, dtype=dtype, scale=1.5 / channels**0.5)
    inputs = (x, weight, random(hidden, dtype=dtype, seed=2) if biases else None)
    linear.linear(-x, *inputs[1:], gelu=True)
    found = linear.linear(*inputs, gelu=True)  # on a GPU, without compiling
    compare(found, F.gelu(F.linear(*inputs)), F.gelu(F.linear(*exact(*inputs))))
    shifted = random(rows * channels + 1, dtype=dtype)[1:].view(rows, channels)
    assert linear.linear(shifted, weight, None, gelu=True) is None


def test_gelu_takes_the_place_of_its_input(monkeypatch):
    products, plain = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *args: products.append(plain(*args)) or products[-1])
    for dtype in (torch.float16, torch.float32):
        x, weight1, weight2 = (random(*shape, dtype=dtype) for shape in ((5, 24), (96, 24), (24, 96)))
        norm, linears = (torch.ones_like(x[0]), None, 1e-5), ((weight1, None), (weight2, None))
        bound = block_ops.BoundRest(x.shape, dtype, x.device, 96, (1e-5, 1e-5), False)
        bound.run(x, x, (norm, norm), linears)
        hidden = F.gelu(plain(F.layer_norm(2 * x, (24,)), weight1))
        torch.testing.assert_close(products.pop(), hidden, atol=2e-2, rtol=1e-2)


def test_who_multiplies(monkeypatch):
    """What is no kernel's: rows that fill multiprocessors neither once nor often, sizes that no tile divides."""
    from swinaccel.kernels import fusion_launch

    def programs(rows, channels, hidden):
        how = fusion_launch.linear_gelu(rows=rows, channels=channels, outputs=hidden, multiprocessors=132)
        return None if how is None else (how[0].block_m, how[1])

    assert programs(12544, 512, 2048) == programs(2048 + 1, 512, 2048) == (128, 264)
    assert programs(196, 512, 2048) == programs(193, 512, 2048) == (64, 128)
    assert programs(784, 256, 1024) == (64, 208)
    for problem in (
        (2048, 512, 2048),
        (12544, 500, 2048),
        (12544, 512, 2040),
        (49, 512, 2048),
        (196, 320, 1280),
        (196, 1024, 4096),
    ):
        assert programs(*problem) is None
    monkeypatch.setattr(devices, "multiprocessors", lambda device: 132)
    kind, rows = (torch.device("cpu"), torch.float16), 132 * 64
    assert kernels.pays_in_one(*kind, rows, 128, 512)
    assert not kernels.pays_in_one(*kind, rows - 1, 128, 512)
    assert not kernels.pays_in_one(*kind, rows, 256, 256)


def test_launches_fit_smaller_devices(with_shared_memory):
    from swinaccel.kernels import fusion_launch

    for limit in (232448, 166912, 101376, 65536):
        for channels in (64, 96, 128, 192, 256, 512):
            shape = fusion_launch.mlp(channels=channels, hidden=4 * channels, element_size=2, shared_memory=limit)
            if shape is not None:
                per_stage = 4 * shape.block_h * shape.block_c
                assert 2 * shape.block_m * (shape.block_c + shape.block_h) + shape.num_stages * per_stage <= limit
    with_shared_memory(16384)
    assert kernels.mlp_launch(torch.device(TRITON_DEVICE), torch.float16, 128, 512) is None
