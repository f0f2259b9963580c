"""Modules for one's own model: state dicts, outputs and gradients of the official ones and of torchvision's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import helpers
import microsoft_models
import pytest
import torch
from helpers import TRITON_DEVICE, randomize
from torch import Tensor, nn

import swinaccel
from swinaccel.backends.torch import windows as torch_windows
from swinaccel.ops import window as window_ops

BOTH = pytest.mark.parametrize("device", ["triton", "torch"], indirect=True)


@pytest.fixture
def device(request, monkeypatch):
    """Where the modules run; no kernel fails unseen, and none is passed by."""
    monkeypatch.setenv("SWINACCEL_STRICT", "1")
    calls: list[str] = []

    def count(owner: Any, name: str, key: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: calls.append(key) or original(*args, **options))

    count(window_ops, "shifted_window_attention", "triton")
    count(torch_windows, "attention", "torch")
    if request.param == "torch":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with helpers.poisoned_empty(monkeypatch):
        yield helpers.DEVICES[request.param]
    assert set(calls) == {request.param}


def loaded(module: nn.Module, like: nn.Module) -> nn.Module:
    """The module with the other's state, in its mode; nothing is missing and nothing left over."""
    module.load_state_dict(like.state_dict())
    return module.train(like.training)


def renamed(name: str, gradient: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """torchvision's name of a V2 gradient as the official one's."""
    if name == "qkv.bias" and hasattr(module, "q_bias"):
        q, _, v = gradient.chunk(3)
        return {"q_bias": q, "v_bias": v}
    return {name: gradient}


def compare(ours: nn.Module, theirs: nn.Module, *inputs: Tensor | None, tolerance: float = 2e-5) -> None:
    """Output, and gradients of the input and of every parameter; the other in fp64."""
    results = []
    for module, wide in ((ours, False), (copy.deepcopy(theirs).double(), True)):
        x, *rest = (t.double() if wide and t is not None else t for t in inputs)
        x = x.clone().requires_grad_()
        out = module(x, *rest)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
        names = [name for name, p in module.named_parameters() if p.requires_grad]
        wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(out, wanted, grad, allow_unused=True)
        found = {"out": out.detach(), "x": gradients[0]}
        for name, gradient in zip(names, gradients[1:], strict=True):
            found |= renamed(name, gradient, ours)
        results.append(found)
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        helpers.assert_close(results[0][name].double().cpu(), expected.cpu(), tolerance)


def tokens(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


# The official window attention.


@BOTH
@pytest.mark.parametrize("masks", [0, 1, 2], ids=["no-mask", "mask", "masks"])
@pytest.mark.parametrize(
    ("window", "options"),
    [((4, 4), {}), ((3, 5), {"qk_scale": 0.3}), ((9, 8), {"qkv_bias": False})],
    ids=["4x4", "3x5-scale", "9x8-no-bias"],
)
def test_window_attention(window, options, masks, device):
    theirs = randomize(microsoft_models.WindowAttention(16, window, 2, **options)).to(device)
    ours = loaded(swinaccel.nn.WindowAttention(16, window, 2, **options).to(device), theirs)
    count = window[0] * window[1]
    x = tokens(4 if count < 64 else 2, count, 16, device=device)
    mask = None
    if masks:
        mask = -100.0 * (tokens(masks, count, count, device=device, seed=1) > 1).float()
    compare(ours, theirs, x, mask)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_window_attention_starts_as_the_official_one():
    module = swinaccel.nn.WindowAttention(24, (7, 7), 3)
    assert module.scale == 8**-0.5
    assert torch.equal(module.relative_position_index, microsoft_models.position_index((7, 7)))
    assert 0.015 < module.relative_position_bias_table.std() < 0.025
    assert swinaccel.nn.WindowAttention(24, 7, 3).window_size == (7, 7)


# From image to image.


SIZES = [((8, 8), (4, 4), (2, 2)), ((9, 11), (4, 4), (1, 3)), ((3, 9), (4, 3), (2, 1)), ((4, 8), (4, 4), (2, 2))]


@BOTH
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize(("size", "window", "shift"), [*SIZES, ((5, 17), (9, 8), (4, 4))], ids=str)
def test_torchvision(size, window, shift, v2, device):
    heads = 1 if window == (9, 8) else 2
    theirs = helpers.torchvision_attention(window, shift, v2, heads=heads).to(device)
    kind = swinaccel.nn.ShiftedWindowAttentionV2 if v2 else swinaccel.nn.ShiftedWindowAttention
    ours = loaded(kind(16, list(window), list(shift), heads).to(device), theirs)
    compare(ours, theirs, tokens(heads, *size, 16, device=device))


@BOTH
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_without_biases_of_the_projections(v2, device):
    options = {"qkv_bias": False, "proj_bias": False}
    if v2:  # torchvision's own cannot be built so
        theirs = helpers.torchvision_attention((4, 4), (2, 1), v2)
        theirs.qkv.bias = None
        theirs.proj.bias = None
    else:
        theirs = helpers.torchvision_attention((4, 4), (2, 1), **options)
    kind = swinaccel.nn.ShiftedWindowAttentionV2 if v2 else swinaccel.nn.ShiftedWindowAttention
    ours = loaded(kind(16, 4, (2, 1), 2, **options).to(device), theirs)
    compare(ours, theirs.to(device), tokens(2, 7, 9, 16, device=device))


class Block(nn.Module):
    """What an official block does around its attention, (B, H, W, C) in and out."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block.attend(x.flatten(1, 2)).view(x.shape)


@BOTH
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("shift", [0, 2])
def test_official_blocks(v2, shift, device):
    block = helpers.microsoft_block((8, 12), 4, shift, v2=v2).to(device)
    kind = swinaccel.nn.ShiftedWindowAttentionV2 if v2 else swinaccel.nn.ShiftedWindowAttention
    ours = loaded(kind(16, 4, shift, 2).to(device), block.attn)
    x = tokens(2, 8, 12, 16, device=device)
    helpers.assert_close(ours(x), Block(block)(x))
    grad = tokens(2, 8, 12, 16, device=device, seed=1)
    found = torch.autograd.grad(ours(x), tuple(ours.parameters()), grad)
    parameters = dict(block.attn.named_parameters())
    gradients = torch.autograd.grad(Block(block)(x), tuple(parameters.values()), grad)
    expected = dict(zip(parameters, gradients, strict=True))
    for (name, _), gradient in zip(ours.named_parameters(), found, strict=True):
        helpers.assert_close(gradient, expected[name], 1e-4)
    assert sorted(ours.state_dict()) == sorted(block.attn.state_dict())


@pytest.mark.parametrize("window", [(8, 8), (3, 5)], ids=str)
@pytest.mark.parametrize("pretrained", [(0, 0), (6, 6)], ids=str)
def test_coordinates_of_v2(window, pretrained):
    official = microsoft_models.WindowAttentionV2(16, window, 2, pretrained_window_size=pretrained)
    ours = swinaccel.nn.ShiftedWindowAttentionV2(16, window, 0, 2, pretrained_window_size=pretrained)
    assert torch.allclose(ours.relative_coords_table, official.relative_coords_table, atol=1e-6)
    assert torch.allclose(ours.logit_scale, official.logit_scale)


def test_windows_of_one_row():
    """Offsets along an axis of one token are zero, and not zero by zero."""
    module = randomize(swinaccel.nn.ShiftedWindowAttentionV2(16, (1, 4), (0, 2), 2))
    assert bool(torch.isfinite(module.relative_coords_table).all())
    assert bool(torch.isfinite(module(torch.randn(1, 3, 8, 16))).all())


# State dicts.


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_buffers_may_be_missing(v2):
    kind = swinaccel.nn.ShiftedWindowAttentionV2 if v2 else swinaccel.nn.ShiftedWindowAttention
    model = nn.Sequential(kind(16, 4, 2, 2))
    stored = {name: t for name, t in model.state_dict().items() if "relative_position_index" not in name}
    stored = {name: t for name, t in stored.items() if "relative_coords_table" not in name}
    names = list(stored)
    assert not model.load_state_dict(stored).missing_keys
    assert list(stored) == names  # the caller's is not touched
    del stored["0.proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.proj\.weight"):
        model.load_state_dict(stored)


def test_state_of_another_window_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for relative_position_bias_table"):
        swinaccel.nn.WindowAttention(16, 4, 2).load_state_dict(swinaccel.nn.WindowAttention(16, 5, 2).state_dict())
    plain = swinaccel.nn.ShiftedWindowAttentionV2(16, 4, 2, 2, qkv_bias=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*qkv\.bias"):
        plain.load_state_dict(helpers.torchvision_attention((4, 4), (2, 2), True).state_dict())


def test_state_inside_a_model():
    """torchvision's V2 bias is split also where the module is one of many."""
    theirs = nn.ModuleDict({"a": nn.Sequential(helpers.torchvision_attention((4, 4), (2, 2), True))})
    ours = nn.ModuleDict({"a": nn.Sequential(swinaccel.nn.ShiftedWindowAttentionV2(16, 4, 2, 2))})
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 8, 8, 16)
    helpers.assert_close(ours["a"](x), theirs["a"](x))
    assert torch.equal(ours["a"][0].v_bias, theirs["a"][0].qkv.bias[32:])


# As other modules.


class Adapted(nn.Linear):
    """A projection that is more than its weight, as with low-rank adapters."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5


@BOTH
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("change", ["none", "adapter", "hook"])
def test_projections_are_called(change, v2, device):
    """Adapters and hooks act on every token; padding tokens are what zeros become, whatever projects them."""
    kind = swinaccel.nn.ShiftedWindowAttentionV2 if v2 else swinaccel.nn.ShiftedWindowAttention
    module = randomize(kind(16, 4, (2, 1), 2)).to(device)
    x = tokens(1, 7, 9, 16, device=device)
    before = module(x)
    if change == "adapter":
        adapted = Adapted(16, 48, bias=not v2).to(device)
        adapted.load_state_dict(module.qkv.state_dict())
        module.qkv = adapted
    elif change == "hook":
        module.qkv.register_forward_hook(lambda module, args, out: out + 0.5)
    found = module(x)
    helpers.assert_close(found, module(nn.functional.pad(x, (0, 0, 0, 3, 0, 1)))[:, :7, :9])
    assert torch.equal(found, before) == (change == "none")


@BOTH
def test_dropout_is_for_training(device):
    x = tokens(1, 8, 8, 16, device=device)
    for name in ("attention_dropout", "dropout"):
        module = randomize(swinaccel.nn.ShiftedWindowAttention(16, 4, 2, 2, **{name: 0.5})).to(device)
        assert torch.equal(module(x), module(x))
        module.train()
        assert not torch.equal(module(x), module(x))
    windows = x.view(4, 16, 16)
    for name in ("attn_drop", "proj_drop"):
        module = randomize(swinaccel.nn.WindowAttention(16, 4, 2, **{name: 0.5})).to(device)
        assert torch.equal(module(windows), module(windows))
        getattr(module, name).train()  # by itself, as Monte Carlo dropout does
        assert not torch.equal(module(windows), module(windows))


@BOTH
def test_compiles_into_one_graph(device):
    model = nn.Sequential(
        randomize(swinaccel.nn.ShiftedWindowAttention(16, 4, 2, 2)),
        randomize(swinaccel.nn.ShiftedWindowAttentionV2(16, 4, 2, 2)),
    ).to(device)
    x = tokens(1, 7, 8, 16, device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).square().sum(), tuple(model.parameters()))
    expected = torch.autograd.grad(model(x).square().sum(), tuple(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        helpers.assert_close(one, other, 1e-4)


def test_copies_and_pickles():
    x = tokens(1, 7, 8, 16, device=TRITON_DEVICE)
    for kind in (swinaccel.nn.ShiftedWindowAttention, swinaccel.nn.ShiftedWindowAttentionV2):
        module = randomize(kind(16, 4, 2, 2)).to(TRITON_DEVICE)
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(copied(x), module(x))
        assert "window_size=(4, 4), num_heads=2, shift_size=(2, 2)" in repr(module)


def test_accelerate_leaves_nothing_to_do():
    """A model of these modules gives the same after `accelerate`, whatever that finds in it."""
    model = nn.Sequential(randomize(swinaccel.nn.ShiftedWindowAttention(16, 4, 2, 2))).to(TRITON_DEVICE)
    x = tokens(1, 7, 8, 16, device=TRITON_DEVICE)
    expected = model(x)
    helpers.assert_close(swinaccel.accelerate(model)(x), expected)
    swinaccel.restore(model)


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "words"),
    [
        ("WindowAttention", (16, 4, 3), ValueError, "dim must be divisible by num_heads, 3; got 16"),
        ("WindowAttention", (16.0, 4, 2), TypeError, "dim must be an integer; got 16.0"),
        ("WindowAttention", (16, "7", 2), TypeError, "window_size must be an integer or 2 of them; got '7'"),
        ("ShiftedWindowAttention", (16, 4, 4, 2), ValueError,
         "shift_size must be less than window_size, (4, 4); got 4"),
        ("ShiftedWindowAttention", (16, (4,), 2, 2), ValueError,
         "window_size must be 2 integers of 1 or more; got (4,)"),
        ("ShiftedWindowAttention", (16, 4, 2, 2, True, True, 1.5), ValueError,
         "attention_dropout must lie in [0, 1); got 1.5"),
    ],
)  # fmt: skip
def test_bad_arguments(kind, arguments, error, words):
    with pytest.raises(error) as caught:
        getattr(swinaccel.nn, kind)(*arguments)
    assert words in str(caught.value)


def test_bad_inputs():
    with pytest.raises(ValueError, match=r"x must have shape \(B, H, W, 16\); got \(8, 8, 16\)"):
        swinaccel.nn.ShiftedWindowAttention(16, 4, 2, 2)(torch.zeros(8, 8, 16))
    module = swinaccel.nn.WindowAttention(16, 4, 2)
    with pytest.raises(ValueError, match=r"x must have shape \(windows, 16, 16\); got \(4, 15, 16\)"):
        module(torch.zeros(4, 15, 16))
    with pytest.raises(ValueError, match=r"mask must have a number of rows that divides the 4 windows; got 3"):
        module(torch.zeros(4, 16, 16), torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=r"mask must have shape \(masks, 16, 16\)"):
        module(torch.zeros(4, 16, 16), torch.zeros(16, 16))


def test_public_names():
    assert all(getattr(swinaccel.nn, name).__doc__ for name in swinaccel.nn.__all__)
