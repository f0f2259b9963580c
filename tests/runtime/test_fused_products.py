"""What training fuses beside norms: GELU in a product, gradients that bring the sums of their columns, mergings."""

from __future__ import annotations

import helpers
import pytest
import torch
import torch.nn.functional as F
from block_gradients import DTYPES, check, layer_norm, leaves, narrowed, results, scaled
from blocks import HALF, HALVES, random
from helpers import TRITON_DEVICE
from swinaccel.kernels import fusion_launch

from swinaccel.backends.triton import block as kernels
from swinaccel.backends.triton import block_bwd, linear
from swinaccel.ops import block_autograd as recorded
from swinaccel.spec.reference_block import merged

AFFINE = 1e-5


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that ran, in order."""
    names = []

    def run(launch, *tensors):
        names.append(launch.kernel.__name__)
        plain(launch, *tensors)

    plain = kernels.run
    for module in (kernels, linear, block_bwd):
        monkeypatch.setattr(module, "run", run, raising=False)
    return names


@pytest.mark.parametrize(("rows", "channels", "hidden"), [(129, 32, 256), (300, 96, 128), (256, 64, 128)])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("biases", [False, True])
def test_mlp(rows, channels, hidden, dtype, biases, few_processors, launched, poisoned):
    """Of rows that fill no whole tile, and of channels that the large step does not divide."""
    x, y = random(3, rows, channels, seed=3), random(3, rows, channels, dtype=dtype)
    scale = torch.tensor([1.25, 0, 1.25]).to(TRITON_DEVICE, dtype)
    bias1, bias2 = (random(hidden, seed=1), random(channels, seed=2)) if biases else (None, None)
    weights = random(hidden, channels, scale=0.3), bias1, random(channels, hidden, scale=0.1), bias2

    def original(x, y, *parameters):
        weight1, bias1, weight2, bias2 = (None if one is None else narrowed(one, dtype) for one in parameters)
        return (x + scaled(F.linear(F.gelu(F.linear(y, weight1, bias1)), weight2, bias2), scale.to(x.device)),)

    def ours(x, y, weight1, bias1, weight2, bias2):
        return (recorded.mlp(x, y, scale, (weight1, bias1), (weight2, bias2)),)

    check(ours, original, (x, y, *weights), [random(3, rows, channels, seed=8)], dtype)
    assert "_linear_kernel" in launched
    assert "_gelu_kernel" not in launched


def test_what_lies_otherwise_is_left_to_others(few_processors):
    x, weight = random(300, 64, dtype=HALF), random(128, 64, dtype=HALF)
    assert linear.linear_gelu_kept(x, weight, None) is not None
    shifted = torch.empty(300 * 64 + 1, dtype=HALF, device=TRITON_DEVICE)[1:].view(300, 64).copy_(x)
    for one in (shifted, x.t().contiguous().t()):
        assert linear.linear_gelu_kept(one, weight, None) is None
    assert linear.linear_gelu_kept(x, weight.t().contiguous().t(), None) is None
    assert linear.linear_gelu_kept(x, weight[:96], None) is None  # no whole tile of columns
    assert linear.linear_gelu_kept(x[:128], weight, None) is None  # a single tile


@pytest.mark.parametrize("shape", [(1, 3, 5), (700, 24), (257, 2, 180)])
def test_sums_of_programs_are_added_up(shape):
    """More of them than are loaded at once, and columns that fill no whole tile."""
    parts = random(*shape)
    helpers.assert_close(block_bwd._add_parts(parts).double(), parts.double().sum(0), 1e-6)


BRANCHES = ["added", "normalised and added"]


def branch_of(way, x, y, weight, bias, drops=None):
    """Return what a block adds to x of a product, where its norm stands before or after the sum."""
    branch = recorded.linear(y, weight, bias, y.dtype)
    if way == "added":
        return recorded.add_norm(x, branch, drops, (None, None, AFFINE))[1]
    return recorded.norm_add(x, branch, drops, (None, None, AFFINE), x.dtype, False)[0]


@pytest.mark.parametrize(("wide", "dtype"), DTYPES)
@pytest.mark.parametrize("way", BRANCHES)
@pytest.mark.parametrize("drops", [False, True])
def test_sums_come_with_a_gradient(way, wide, dtype, drops, launched):
    if dtype is torch.float32:
        pytest.skip("products of 32 bits are PyTorch's")
    x, y = random(3, 37, 24, dtype=wide), random(3, 37, 24, dtype=dtype)
    scale = torch.tensor([1.25, 0, 1.25]).to(TRITON_DEVICE, dtype) if drops else None
    weight, bias = random(24, 24).requires_grad_(), random(24, seed=1).requires_grad_()
    grad = random(3, 37, 24, seed=2)
    branch_of(way, x.requires_grad_(), y, weight, bias, scale).backward(grad.to(dtype if way == "added" else wide))
    assert "_norm_bwd_kernel" in launched
    assert "_column_sums_kernel" not in launched
    (own,) = torch.autograd.grad(reference(way, x, y, weight, bias, scale), bias, grad.double())
    torch.testing.assert_close(bias.grad.double(), own.double(), rtol=2e-2, atol=2e-2)


def reference(way, x, y, weight, bias, scale):
    branch = F.linear(y.double(), weight.double(), bias.double())
    norm = (24,), None, None, AFFINE
    if way == "added":
        return F.layer_norm(x.double() + scaled(branch, scale), *norm)
    return x.double() + scaled(F.layer_norm(branch, *norm), scale)


@pytest.mark.parametrize("way", BRANCHES)
def test_gradients_that_are_changed_are_summed_again(way):
    """By hooks, in place: what came with them is no longer theirs."""
    x, y, weight = random(3, 37, 24), random(3, 37, 24, dtype=HALF), random(24, 24)
    found = []
    for factor in (1, 2):
        bias = random(24, seed=1).requires_grad_()
        out = branch_of(way, x.clone().requires_grad_(), y, weight.clone().requires_grad_(), bias)
        node = out.grad_fn.next_functions[1][0]
        assert type(node).__name__ == "_LinearBackward"
        node.register_prehook(lambda grads, factor=factor: (grads[0].mul_(factor),))
        out.backward(random(3, 37, 24, seed=2).to(out.dtype))
        found.append(bias.grad)
    torch.testing.assert_close(found[1], 2 * found[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("wide", "dtype"), DTYPES)
@pytest.mark.parametrize("size", [(2, 6, 4, 24), (3, 5, 7, 12), (1, 1, 2, 180)])
@pytest.mark.parametrize("norm", ["none", "plain", "affine"])
def test_merging(size, norm, wide, dtype, poisoned):
    """Of sides that are odd, too."""
    x, channels = random(*size, dtype=wide), 4 * size[-1]
    weight, bias = (random(channels), random(channels, seed=1)) if norm == "affine" else (None, None)

    def original(x, weight, bias):
        patches = merged(x)
        if norm != "none":
            patches = layer_norm(patches, weight, bias)
        return (narrowed(patches, dtype),)

    def ours(x, weight, bias):
        return (recorded.merge(x, None if norm == "none" else (weight, bias, AFFINE), dtype),)

    check(
        ours,
        original,
        (x, weight, bias),
        [random(size[0], -(-size[1] // 2), -(-size[2] // 2), channels, seed=8)],
        dtype,
    )


def test_nothing_is_kept_of_a_merging_without_gradients(monkeypatch):
    kept, plain = [], kernels.merge
    monkeypatch.setattr(kernels, "merge", lambda *args: kept.extend(args[3:]) or plain(*args))
    x, affine = random(2, 5, 4, 8), (random(32).requires_grad_(), random(32, seed=1), AFFINE)
    expected = recorded.merge(x, affine, HALF)
    assert len(kept) == 1
    with torch.no_grad():
        found = recorded.merge(x, affine, HALF)
    assert len(kept) == 1
    assert torch.equal(found, expected)


@pytest.mark.parametrize("affine", [None, AFFINE])
def test_second_derivatives_of_a_merging(affine):
    x, weight, bias = random(2, 3, 4, 8), random(32), random(32, seed=1)
    found = []
    for function in (
        lambda x, w, b: recorded.merge(x, None if affine is None else (w, b, affine), torch.float32),
        lambda x, w, b: merged(x) if affine is None else layer_norm(merged(x), w, b),
    ):
        leaf = x.clone().requires_grad_()
        out = function(leaf, weight, bias).pow(3).mean()
        (first,) = torch.autograd.grad(out, leaf, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    helpers.assert_close(found[0], found[1])


@pytest.mark.parametrize("affine", [None, AFFINE])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_merged_may_be_written_to(affine, when):
    """By who was given the output of a stage; the original has copied it."""
    image, weight, bias = random(2, 5, 4, 8), random(32), random(32, seed=1)
    found = []
    for function in (
        lambda x, w, b: recorded.merge(x, None if affine is None else (w, b, affine), torch.float32),
        lambda x, w, b: merged(x).clone() if affine is None else layer_norm(merged(x), w, b),
    ):
        tensors = leaves(image, weight, bias)
        x = tensors[0] * 1
        if when == "before":
            x.mul_(2)
        out = function(x, *tensors[1:])
        if when == "after":
            x.mul_(2)
        (out.square().sum() + x.square().sum()).backward()
        found.append([one.grad for one in tensors])
    for ours, expected in zip(*found, strict=True):
        assert (ours is None) == (expected is None)
        if expected is not None:
            helpers.assert_close(ours, expected)


@pytest.mark.parametrize("affine", [None, AFFINE])
def test_a_merging_whose_backward_fails(affine, monkeypatch):
    def fail(*args):
        raise kernels.LaunchError("no")

    def ours(x, weight, bias):
        return [recorded.merge(x, None if affine is None else (weight, bias, affine), torch.float32)]

    given = (random(2, 5, 3, 8), random(32), random(32, seed=1)), [random(2, 3, 2, 32)]
    expected = results(ours, *given)
    monkeypatch.setattr(block_bwd, "merge", fail)
    for one, other in zip(results(ours, *given), expected, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            helpers.assert_close(one, other)


@pytest.mark.parametrize("affine", [None, AFFINE])
@pytest.mark.parametrize("sides", [(5, 3), (6, 4)])
def test_batches_of_gradients_of_a_merging(sides, affine):
    x, grads = random(2, *sides, 8).requires_grad_(), random(4, 2, 3, 2, 32)
    weight, bias = random(32), random(32, seed=1)
    out = recorded.merge(x, None if affine is None else (weight, bias, affine), torch.float32)
    (found,) = torch.autograd.grad(out, x, grads, is_grads_batched=True, retain_graph=True)
    for one, grad in zip(found, grads, strict=True):
        helpers.assert_close(one, torch.autograd.grad(out, x, grad, retain_graph=True)[0])


@pytest.mark.parametrize("way", BRANCHES)
def test_a_backward_in_inference_mode(way):
    """Where nobody counts changes of tensors."""
    x, y, weight = random(3, 37, 24), random(3, 37, 24, dtype=HALF), random(24, 24).requires_grad_()
    found = []
    for mode in (False, True):
        bias = random(24, seed=1).requires_grad_()
        out = branch_of(way, x.clone().requires_grad_(), y, weight, bias)
        grad = random(3, 37, 24, seed=2).to(out.dtype)
        with torch.inference_mode(mode):
            found += torch.autograd.grad(out, bias, grad)
    helpers.assert_close(found[1], found[0], 1e-2)


def test_gradients_of_two_biases_are_two_tensors():
    """Which hooks may change in place, one and not the other."""
    x, y, weight = random(3, 37, 24).requires_grad_(), random(3, 37, 24, dtype=HALF), random(24, 24)
    biases = [random(24, seed=seed).requires_grad_() for seed in (1, 2)]
    for bias in biases:
        bias.register_hook(lambda grad: grad.mul_(2))
    first, second = (recorded.linear(y, weight, bias, HALF) for bias in biases)
    recorded.add_norm(x, first + second, None, (None, None, AFFINE))[1].backward(random(3, 37, 24, dtype=HALF, seed=2))
    helpers.assert_close(biases[0].grad, biases[1].grad, 1e-2)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_product_of_one_row(twice, fails, monkeypatch):
    """Whose only axis is that of channels."""

    def fail(*args):
        raise kernels.LaunchError("no")

    if fails:
        monkeypatch.setattr(block_bwd, "scaled_columns", fail)
    bias = random(40).requires_grad_()
    recorded.linear(random(24, dtype=HALF), random(40, 24), bias, HALF).sum().backward(create_graph=twice)
    assert bias.grad.tolist() == [1] * 40


def test_tokens_that_32_bits_do_not_count_are_not_merged():
    most = 2**31 - 2048
    assert fusion_launch.merged_rows(most - 1, 8) == fusion_launch.rows(32)
    with pytest.raises(ValueError, match="more than the kernel counts"):
        fusion_launch.merged_rows(most, 8)
