"""What deliberate faults once went unnoticed in; see mutants.py. Each test is about what a user sees."""

from __future__ import annotations

import copy
import dataclasses
import gc

import helpers
import microsoft_models
import pytest
import torch
import window_problems
from helpers import BACKENDS, TRITON_DEVICE
from swinaccel.kernels import launch
from test_switches import Counting
from timm.layers import DropPath
from torch import nn
from verdicts import X

import swinaccel
from swinaccel import functional
from swinaccel.backends.triton import launches
from swinaccel.spec import reference, window


def run(model, x=X):
    with torch.no_grad():
        return model(x)


def entry(model):
    (one,) = swinaccel.report(model)
    return one


# What a probe must see. Attention of unknown code, which is the official one but for something.


class Limited(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask).clamp(-1e4, 1e4)


class Offset(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) + 1e-7


class Excluding(microsoft_models.WindowAttention):
    """Its mask rules out what -100 makes unlikely."""

    def forward(self, x, mask=None):
        return super().forward(x, None if mask is None else mask.masked_fill(mask < -50, float("-inf")))


class Unclamped(microsoft_models.WindowAttentionV2):
    def scores(self, q, k):
        return nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).mT * self.logit_scale.exp() + (
            self.bias()
        )


class Scaled(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return 1.01 * super().forward(x, mask)


class Detached(microsoft_models.WindowAttention):
    def scores(self, q, k):
        return super().scores(q.detach(), k)


class Numbered(microsoft_models.WindowAttention):
    gain = 1.0

    def __init__(self, *args):
        super().__init__(*args)
        self.gain = 1.0

    def forward(self, x, mask=None):
        return super().forward(x, mask) * self.gain


class Gated(microsoft_models.WindowAttention):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("gate", torch.ones(()))

    def forward(self, x, mask=None):
        return super().forward(x, mask) * self.gate


UNKNOWN = [Limited, Offset, Excluding, Unclamped, Counting, Scaled, Detached, Numbered, Gated]


@pytest.mark.parametrize("kind", UNKNOWN, ids=lambda kind: kind.__name__)
def test_what_is_not_the_official_attention_is_refused(kind):
    model = helpers.microsoft_block((8, 8), shift=2, v2=issubclass(kind, microsoft_models.WindowAttentionV2))
    model.attn = kind(16, (4, 4), 2)
    helpers.randomize(model)
    twin = copy.deepcopy(model)
    swinaccel.accelerate(model, backend="torch")
    assert entry(model).status == "original", kind.__name__
    assert torch.equal(run(model), run(twin))


def test_the_official_attention_is_not_refused():
    model = helpers.microsoft_block((8, 8), shift=2)
    assert entry(swinaccel.accelerate(model, backend="torch")).status == "accelerated"


def test_a_probe_calls_nobodys_hooks():
    model, calls = helpers.microsoft_block((8, 8), shift=2), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: calls.append(1))
        module.register_forward_hook(lambda *_: calls.append(1))
    swinaccel.accelerate(model, backend="torch")
    assert not calls


class DroppingSums(microsoft_models.SwinTransformerBlock):
    """Drops the sums, and not the branches."""

    def forward(self, x):
        x = self.drop_path(x + self.attend(self.norm1(x)))
        return self.drop_path(x + self.mlp(self.norm2(x)))


def test_drop_paths_in_another_place():
    model = DroppingSums(16, (8, 8), 2, 4, 2)
    model.drop_path = DropPath(0.0)
    helpers.randomize(model)
    twin = copy.deepcopy(model)
    swinaccel.accelerate(model, backend="triton")
    x = torch.cat([X] * 4)
    for one in (model, twin):
        one.train().drop_path.drop_prob = 0.5
    torch.manual_seed(0)
    expected = twin(x)
    torch.manual_seed(0)
    helpers.assert_close(model(x), expected)


class DroppingInput(microsoft_models.WindowAttention):
    def __init__(self, *args):
        super().__init__(*args)
        self.input_drop = nn.Dropout(1.0)

    def forward(self, x, mask=None):
        return super().forward(self.input_drop(x), mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropouts_in_another_place(backend):
    model = helpers.microsoft_block((8, 8), shift=2)
    model.attn = DroppingInput(16, (4, 4), 2)
    helpers.randomize(model).train()
    twin = copy.deepcopy(model)
    helpers.assert_close(swinaccel.accelerate(model, backend=backend)(X), twin(X))


# What is decided at a call.


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_index_of_exactly_as_many_as_there_are_rows(backend):
    model = helpers.microsoft_block((8, 8), shift=2)
    swinaccel.accelerate(model, backend=backend)
    run(model)
    model.attn.relative_position_index[3, 5] = len(model.attn.relative_position_bias_table)
    with pytest.raises((IndexError, RuntimeError)):  # PyTorch's own two
        run(model)


def test_sizes_that_never_come_back_are_forgotten():
    model = helpers.torchvision_attention((2, 2), (1, 1), dim=8, heads=1)
    swinaccel.accelerate(model, backend="triton")

    def kept():
        gc.collect()
        return sum(isinstance(one, window.Section) for one in gc.get_objects())

    before = kept()
    for height in range(1, 6):
        for width in range(1, 6):
            run(model, torch.randn(1, height, width, 8))
    assert kept() - before <= 20
    assert entry(model).fallbacks == 0


def test_gradients_of_a_table_alone(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = swinaccel.accelerate(helpers.microsoft_block((8, 8)).requires_grad_(False))
    model(X)
    assert entry(model).fallbacks == 0
    model.attn.relative_position_bias_table.requires_grad_()
    model(X)
    assert "gradients" in entry(model).reason


def test_calls_of_all_modules_are_patched(monkeypatch):
    model = helpers.timm_block((8, 8), shift=2)
    x, call = X.view(2, 8, 8, 16), nn.Module.__call__
    swinaccel.accelerate(model, backend="triton", fuse="attention")
    run(model, x)
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *a, **k: _twice(self, call(self, *a, **k)))
    found = run(model, x)
    with swinaccel.disabled():
        expected = run(model, x)
    helpers.assert_close(found, expected)


def _twice(module, out):
    return 2 * out if isinstance(module, nn.Linear) else out


def test_counts_begin_anew():
    model = swinaccel.accelerate(helpers.microsoft_block((8, 8)), backend="torch")
    run(model)
    assert entry(model).calls == 1
    swinaccel.accelerate(swinaccel.restore(model), backend="torch")
    assert entry(model).calls == 0


def test_factors_follow_a_table_that_is_written_to():
    model = helpers.timm_block((9, 9), window=9)
    swinaccel.accelerate(model, backend="triton", bias="factors", bias_energy=0.9)
    x = torch.randn(1, 9, 9, 16)
    run(model, x)
    before = entry(model).bias
    assert before.startswith("factors")
    with torch.no_grad():
        model.attn.relative_position_bias_table.mul_(100)
    run(model, x)
    assert entry(model).bias.startswith("factors")
    assert entry(model).bias != before


# What families read.


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shift_without_its_mask(backend):
    model = helpers.timm_block((8, 8), shift=2)
    twin = copy.deepcopy(model)
    swinaccel.accelerate(model, backend=backend)
    model.attn_mask = twin.attn_mask = None
    x = X.view(2, 8, 8, 16)
    helpers.assert_close(run(model, x), run(twin, x))


def test_the_mode_of_fused_attention_decides_about_its_dropout():
    model = helpers.timm_block((8, 8), shift=2, attn_drop=0.5)
    model.attn.fused_attn = False
    twin = copy.deepcopy(model)
    swinaccel.accelerate(model, backend="triton")
    for one in (model, twin):
        one.attn.fused_attn = True
        one.attn.attn_drop.train()
    x = X.view(2, 8, 8, 16)
    helpers.assert_close(run(model, x), run(twin, x))


# Kernels.


@pytest.fixture
def pairs(monkeypatch):
    """Programs of large windows take two images each, as on GPUs in half precision."""
    large, made = launch.large, []

    def paired(**problem):
        made.append(problem)
        return dataclasses.replace(large(**problem), images=2)

    launches.launches.clear()
    monkeypatch.setattr(launch, "large", paired)
    yield
    launches.launches.clear()
    assert made


def image_problem(window, batch, shift, dim=12, heads=1, **options):
    torch.manual_seed(0)
    size = tuple(2 * side - 2 for side in window)
    tokens = window[0] * window[1]
    return {
        "qkv": torch.randn(batch, *size, 3 * heads * dim),
        "window_size": window,
        "num_heads": heads,
        "shift_size": shift,
        "bias": torch.randn(heads, tokens, tokens),
        "padding": torch.randn(3 * heads * dim),
        "mask": None,
        **options,
    }


def exact_images(qkv, window_size, num_heads, shift_size, bias, padding, mask, logit_scale=None):
    geometry = window.Geometry(tuple(qkv.shape[1:3]), window_size, shift_size)
    head_dim = qkv.shape[-1] // 3 // num_heads
    return reference.shifted_window_attention(
        *qkv.chunk(3, -1), geometry, num_heads=num_heads, table=bias, padding=padding, mask=mask,
        scale=head_dim**-0.5, logit_scale=logit_scale,
    )  # fmt: skip


def compare_images(problem, names=("qkv", "bias", "padding")):
    problem = {name: one.to(TRITON_DEVICE) if isinstance(one, torch.Tensor) else one for name, one in problem.items()}
    window_problems.compare(problem, functional.shifted_window_attention, exact_images, names)


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("form", ["shifted", "masked", "cosine"])
def test_two_images_in_one_program(batch, form, pairs, strict_kernels):
    options = {}
    if form == "masked":
        options["mask"] = -5.0 * (torch.rand(4, 66, 66, generator=torch.Generator().manual_seed(1)) < 0.4)
    elif form == "cosine":
        options["logit_scale"] = torch.tensor([1.5])
    compare_images(image_problem((6, 11), batch, (3, 4) if form != "masked" else (0, 0), **options))


def test_two_images_drop_weights_of_their_own(pairs, strict_kernels):
    problem = image_problem((6, 11), 3, (0, 0), dim=16)
    problem["qkv"] = problem["qkv"][:1].expand(3, -1, -1, -1).to(TRITON_DEVICE)
    out = functional.shifted_window_attention(problem["qkv"], (6, 11), 1, dropout=0.5)
    assert all(not torch.equal(out[one], out[other]) for one, other in ((0, 1), (1, 2), (0, 2)))
    mean = torch.stack(
        [functional.shifted_window_attention(problem["qkv"], (6, 11), 1, dropout=0.2).mean(0) for _ in range(4)]
    ).mean(0)
    plain = functional.shifted_window_attention(problem["qkv"][:1], (6, 11), 1)[0]
    assert (mean - plain).abs().mean() < 0.5 * plain.abs().mean()


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (1, 1)], ids=str)
def test_large_windows_shifted_by_one(shift, strict_kernels):
    compare_images(image_problem((6, 11), 1, shift))


@pytest.mark.parametrize("tokens", [9, 66])
def test_rows_of_the_lowest_numbers_are_means(tokens, strict_kernels):
    q, k, v = (torch.randn(2, 1, tokens, 12, device=TRITON_DEVICE).requires_grad_() for _ in range(3))
    mask = torch.zeros(1, tokens, tokens, device=TRITON_DEVICE)
    mask[0, 5] = torch.finfo(torch.float32).min
    out, grad = functional.window_attention(q, k, v, mask=mask)[:, :, 5], torch.randn(2, 1, 12, device=TRITON_DEVICE)
    found = torch.autograd.grad(out, (q, v), grad)
    helpers.assert_close(out, v.mean(2), 1e-4)
    scores = (v @ grad[..., None]).squeeze(-1)  # gradients of the weights, which are all alike
    scores = (scores - scores.mean(-1, keepdim=True)) / tokens
    helpers.assert_close(found[0][:, :, 5], (scores[..., None, :] @ k).squeeze(-2) / 12**0.5, 1e-4)
    helpers.assert_close(found[1], (grad / tokens)[:, :, None].expand_as(v), 1e-4)


def test_gradients_of_large_scores_are_finite(strict_kernels):
    """Queries beyond the window weigh nothing, and not infinity times nothing."""
    q, k, v = (torch.full((1, 1, 66, 16), 8.0, device=TRITON_DEVICE).requires_grad_() for _ in range(3))
    functional.window_attention(q, k, v, scale=1.0).sum().backward()
    assert all(bool(one.grad.isfinite().all()) for one in (q, k, v))


@pytest.mark.parametrize("tokens", [9, 66])
def test_gradients_of_vectors_of_no_length(tokens, strict_kernels):
    case = window_problems.Case(tokens, cosine=True)
    inputs = case.make()
    for name in ("q", "k"):
        inputs[name][:, :, ::3] = 0
    window_problems.compare(inputs)
