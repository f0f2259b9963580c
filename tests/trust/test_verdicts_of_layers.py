"""A verdict is about exactly what was run: no scale, mode, rate or layer of a model speaks for another."""

from __future__ import annotations

import copy

import helpers
import microsoft_models
import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, DEVICES
from timm.layers import DropPath
from torch import nn
from verdicts import assert_like_the_original, block_of, huggingface, statuses

import swinaccel


class Sdpa(microsoft_models.WindowAttention):
    """The official attention by PyTorch's function, which scales by itself unless it is told not to."""

    scaled = False

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.view(*self.relative_position_index.shape, -1).permute(2, 0, 1)
        start = bias if mask is None else (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        scale = self.scale if self.scaled else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=start, scale=scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_scale_that_the_code_takes(scaled, backend, monkeypatch):
    """Whatever scale the module holds, then and later."""
    monkeypatch.setattr(Sdpa, "scaled", scaled)
    model = swinaccel.accelerate(block_of(Sdpa).to(DEVICES[backend]), backend=backend)
    x = torch.randn(2, 64, 16).to(DEVICES[backend])
    for scale in (0.1, 2.0):
        model.attn.scale = scale
        assert_like_the_original(model, x)
    helpers.assert_accelerated(model)


records = torch.is_grad_enabled


class OfEvalWithGradients(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * (2.0 if records() and not self.training else 1.0)


class OfTrainingWithout(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * (2.0 if self.training and not records() else 1.0)


class OfFrozenWeights(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * (1.0 if self.qkv.weight.requires_grad else 2.0)


class OfLiveWeights(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        live = self.qkv.weight.requires_grad and not (self.training or records())
        return super().forward(x, mask) * (2.0 if live else 1.0)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (OfEvalWithGradients, "in eval mode with gradients, its forward"),
        (OfTrainingWithout, "in training mode without gradients, its forward"),
        (OfFrozenWeights, "in float32"),
        (OfLiveWeights, "its forward"),
    ],
)
def test_modes_of_calls(kind, words):
    """Told apart by a function under another name, which no look at the code finds."""
    (entry,) = swinaccel.plan(block_of(kind))
    assert entry.status == "original"
    assert words in entry.reason
    assert "differ by" in entry.reason


class SdpaByWindow(Sdpa):
    @property
    def scaled(self):
        return self.window_size[0] > 2


@pytest.mark.parametrize("windows", [(2, 4), (4, 2)])
def test_two_scales_that_one_code_takes(windows):
    """Neither of two proofs of one fingerprint speaks for the other's module."""
    model = nn.ModuleList(helpers.randomize(SdpaByWindow(16, (side, side), 2)) for side in windows)
    swinaccel.accelerate(model, backend="torch")
    for side, part in zip(windows, model, strict=True):
        part.scale = 2.0
        assert_like_the_original(part, torch.randn(8, side**2, 16))
    for entry in swinaccel.report(model):
        assert entry.fallbacks == entry.calls == 1
        assert "scale or drop in two ways" in entry.reason


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fused", [False, True])
def test_timms_fused_attention(fused, backend):
    """Both paths are Swin's; one takes the scale that the module holds. Which it is may change."""
    x = torch.randn(2, 8, 8, 16).to(DEVICES[backend])
    model = helpers.timm_block((8, 8), shift=2).to(DEVICES[backend])
    for later in (fused, not fused):
        model.attn.fused_attn = later
        swinaccel.accelerate(model, backend=backend)
        for scale in (0.1, 2.0):
            model.attn.scale = scale
            assert_like_the_original(model, x)
    helpers.assert_accelerated(model)
    model.attn.fused_attn = fused
    assert_like_the_original(model, x)


class Dropping(microsoft_models.WindowAttention):
    """Drops by a number of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.attn_drop_prob = 0.0

    def forward(self, x, mask=None):
        return F.dropout(super().forward(x, mask), self.attn_drop_prob, self.training)


def test_rates_that_no_family_reads():
    model = swinaccel.accelerate(block_of(Dropping), backend="torch")
    x = torch.randn(2, 64, 16)
    assert_like_the_original(model, x)
    helpers.assert_accelerated(model)
    model.attn.attn_drop_prob = 0.5
    assert_like_the_original(model, x)
    assert "attn_drop_prob" in swinaccel.report(model).entries[0].reason


class DropsSums(microsoft_models.SwinTransformerBlock):
    """Its drop-path drops sums, and not branches."""

    def forward(self, x):
        x = self.drop_path(x + self.attend(self.norm1(x)))
        return self.drop_path(x + self.mlp(self.norm2(x)))


@pytest.mark.parametrize("when", ["before", "after"])
def test_drop_paths_elsewhere(when):
    """The first block of each Swin has a rate of 0, where nothing can be told apart."""
    model = nn.Sequential(*(DropsSums(16, (8, 8), 2, 4) for _ in range(2)))
    for block in model:
        block.drop_path = DropPath(0.0)
    helpers.randomize(model).train()
    x = torch.randn(8, 64, 16)
    if when == "after":
        swinaccel.accelerate(model, backend="torch")
        model(x)
    model[1].drop_path.drop_prob = 0.3
    swinaccel.accelerate(model, backend="torch")
    torch.manual_seed(0)
    found = model(x)
    with swinaccel.disabled():
        torch.manual_seed(0)
        helpers.assert_close(found, model(x))


def test_one_eager_layer_says_nothing_of_others():
    layer, inputs = huggingface()
    if not hasattr(layer.attention, "config"):
        pytest.skip("layers of transformers 4 ask no configuration")
    layer.attention.config._attn_implementation = "eager"
    swinaccel.accelerate(layer, backend="torch")
    assert statuses(layer) == ["original"]
    layer.attention.config._attn_implementation = "sdpa"
    for model in (layer, huggingface()[0]):
        swinaccel.accelerate(model, backend="torch")
        with torch.no_grad():
            model(*inputs)
        helpers.assert_accelerated(model)


def test_one_shrunk_layer_says_nothing_of_others():
    """The layer has taken its window from a small image, for good, and its table is of the larger one."""
    layer, inputs = huggingface()
    layer.window_size = 3
    swinaccel.accelerate(layer, backend="torch")
    with torch.no_grad(), pytest.raises(RuntimeError):  # its own
        layer(*inputs)
    (entry,) = swinaccel.report(layer)
    assert "window of 4" in entry.reason or "windows of 16 tokens" in entry.reason
    other, _ = huggingface()
    swinaccel.accelerate(other, backend="torch")
    with torch.no_grad():
        other(*inputs)
    helpers.assert_accelerated(other)


def test_the_function_behind_a_registered_name(monkeypatch):
    """Before a model is accelerated, and after."""
    modeling = pytest.importorskip("transformers.modeling_utils")
    layer, inputs = huggingface()
    if not hasattr(layer.attention, "config"):
        pytest.skip("layers of transformers 4 ask no interface")
    mapping = modeling.AttentionInterface._global_mapping
    plain = mapping["sdpa"]

    def doubled(*args, **kwargs):
        out, weights = plain(*args, **kwargs)
        return 2 * out, weights

    early = swinaccel.accelerate(copy.deepcopy(layer), backend="torch")
    with torch.no_grad():
        early(*inputs)
        helpers.assert_accelerated(early)
        monkeypatch.setitem(mapping, "sdpa", doubled)
        expected = layer(*inputs)[0]
        late = swinaccel.accelerate(copy.deepcopy(layer), backend="torch")
        for model in (early, late):
            helpers.assert_close(model(*inputs)[0], expected)
        monkeypatch.undo()
        for model in (early, swinaccel.accelerate(late, backend="torch")):
            helpers.assert_close(model(*inputs)[0], layer(*inputs)[0])
    assert statuses(late) == ["accelerated"]
    assert [entry.fallbacks for entry in swinaccel.report(early)] == [1]
