"""Linear layers by a kernel of ours: with a sum, with nothing, in blocks and attentions, and who is left to PyTorch."""

import ast
import copy
import functools
import itertools
import re
from pathlib import Path

import blocks
import helpers
import pytest
import torch
import torch.nn.functional as F
from blocks import HALF
from helpers import TRITON_DEVICE
from swinaccel.kernels import dependent, fusion_launch
from torch import nn

import swinaccel
from swinaccel.backends.triton import block as kernels
from swinaccel.backends.triton import devices, launches, linear, traced
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


@pytest.fixture
def few_launches(few_rows, kernels_that_run, monkeypatch):
    """The launches of products of few rows, with all that their kernels take beside tensors."""
    ran, plain = [], launches.Launch.__call__

    def call(self, *tensors):
        if self.kernel.__name__ == "_linear_few_kernel":
            ran.append(self)
        plain(self, *tensors)

    monkeypatch.setattr(launches.Launch, "__call__", call)
    return ran


@torch.no_grad()
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
@pytest.mark.parametrize(("rows", "channels", "outputs"), [(67, 96, 288), (49, 256, 128), (130, 64, 64), (1, 32, 32)])
@pytest.mark.parametrize("biases", [False, True])
def test_product_of_few_rows(rows, channels, outputs, dtype, biases, few_launches, poisoned):
    helpers.skip_interpreted_bfloat16("triton", dtype)
    x, weight = (
        random(rows, channels, dtype=dtype),
        random(outputs, channels, dtype=dtype, scale=channels**-0.5, seed=1),
    )
    bias = random(outputs, dtype=dtype, seed=2) if biases else None
    found = linear_ops.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    helpers.assert_no_worse(found, F.linear(x, weight, bias), exact, dtype)
    assert len(few_launches) == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "channels", "outputs", "parts"), [(67, 256, 64, 2), (130, 2048, 128, 16), (9, 384, 96, 1)]
)
def test_sums_in_parts(rows, channels, outputs, parts, few_launches, poisoned):
    """Long sums of few rows have programs for each part; a norm adds them up, with the product's bias."""
    x, weight = random(rows, channels, dtype=HALF), random(outputs, channels, dtype=HALF, scale=channels**-0.5, seed=1)
    launch, found = linear.parted_launch(x.device, rows, channels, outputs)
    assert found == parts
    if launch is None:
        return
    sums = x.new_empty((parts, rows, outputs), dtype=torch.float32)
    launch(sums, x, weight, None, None, None)
    exact = F.linear(x.double(), weight.double())
    torch.testing.assert_close(sums.sum(0).double(), exact, atol=1e-4, rtol=1e-4)
    affine = random(outputs, dtype=HALF, seed=2), random(outputs, dtype=HALF, seed=3), 1e-5
    total, bias, out = (random(rows, outputs, dtype=HALF, seed=4), random(outputs, dtype=HALF, seed=5), None)
    norm = kernels.norm_launch(kernels.NORM_ADD, x.device, rows, outputs, 1e-5, parts=parts)
    out = torch.empty_like(total)
    norm(total, out, None, None, sums, None, *affine[:2], bias)
    normed = F.layer_norm(exact + bias.double(), (outputs,), affine[0].double(), affine[1].double(), 1e-5)
    helpers.assert_no_worse(
        out, total + F.layer_norm(F.linear(x, weight, bias), (outputs,), *affine), total.double() + normed, HALF
    )


def test_which_rows_are_few():
    """One image of the base models, two of the tiny one; not twice as many, and no long image of few channels."""
    for rows, channels, expected in (
        (3136, 128, True), (784, 256, True), (196, 512, True), (49, 1024, True), (256, 512, True), (392, 384, True),
        (392, 512, False), (512, 512, False), (784, 384, False), (65536, 32, False),
    ):  # fmt: skip
        assert fusion_launch.are_few(rows, channels) == expected, (rows, channels)
    few = functools.partial(fusion_launch.few, rows=196)
    assert few(channels=512, outputs=1536) == ((64, 128, 64, 1, 4, 4), 48)
    assert few(channels=512, outputs=512) == ((64, 32, 128, 1, 4, 4), 64)
    assert few(channels=2048, outputs=512, may_part=True) == ((64, 64, 128, 4, 4, 3), 32)
    assert few(channels=40, outputs=120) is None
    assert few(channels=64, outputs=40) is None


def test_who_follows_without_a_gap(few_rows, monkeypatch):
    """Kernels that wait by themselves, on a GPU: no interpreter lets them, and compilers launch them as others."""
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(devices, "has_copy_engine", lambda device: True)
    assert devices.are_few(cpu, 196, 512)
    assert not devices.are_dependent(cpu, 196, 512)
    launch = kernels.norm_launch(kernels.NORM, gpu, 196, 512, 1e-5)
    assert launch.options["launch_pdl"]
    assert launch.arguments[-1] is True
    many = kernels.norm_launch(kernels.NORM, gpu, 12544, 512, 1e-5)
    assert "launch_pdl" not in many.options
    assert many.arguments[-1] is False
    seen = []

    def noting(kernel):
        return {launch.grid: lambda *given, **options: seen.append((given, options))}

    monkeypatch.setattr(torch.library, "wrap_triton", noting)
    traced.traced_launch(launch)(torch.zeros(1))
    assert seen == [((torch.zeros(1), *launch.arguments[:-1], False), {"num_warps": launch.options["num_warps"]})]


def test_kernels_wait_before_they_read():
    """All that may be launched before the last kernel has ended call `wait_for_inputs` before they touch memory."""
    waiting = []
    for file in sorted(Path(dependent.__file__).parent.glob("*.py")):
        for one in ast.parse(file.read_text()).body:
            names = [argument.arg for argument in one.args.args] if isinstance(one, ast.FunctionDef) else []
            if "DEPENDENT" not in names or one.name == "wait_for_inputs":
                continue
            waiting.append(one.name)
            before = itertools.takewhile(lambda line: "wait_for_inputs" not in ast.unparse(line), one.body)
            assert not re.search(r"load|store|range", "".join(map(ast.unparse, before))), one.name
            assert "wait_for_inputs(DEPENDENT)" in map(ast.unparse, one.body), one.name
    assert "_linear_few_kernel" in waiting


@torch.no_grad()
@pytest.mark.parametrize("v2", [False, True])
def test_blocks_of_few_rows(v2, few_launches, monkeypatch):
    """The projections, and SwinV2's second product of an MLP in parts."""
    monkeypatch.setattr(kernels, "pays_in_one", lambda *sizes: False)
    block = timm_block(v2, 128).to(HALF)
    x = random(1, *SIZE, 128, dtype=HALF)
    twin = copy.deepcopy(block)
    swinaccel.accelerate(block, graphs=False)
    exact = twin.double()(x.double())
    helpers.assert_no_worse(block(x), copy.deepcopy(twin).to(HALF)(x), exact, HALF)
    assert [launch.arguments[3] for launch in few_launches] == ([1, 1, 4] if v2 else [1, 1])
    assert swinaccel.report(block).accelerated[0].fallbacks == 0


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
    model = model.to(HALF)
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
    model = timm_block(dim=DIM_IN_ONE).eval()
    exact, x = copy.deepcopy(model).double(), random(1, *SIZE, DIM_IN_ONE)
    model = model.to(HALF)
    for layer in (model.attn.proj, model.attn.qkv):
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton", graphs=False)
    helpers.assert_no_worse(twin(x), model(x), exact(x.double()), HALF)
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
