"""A verdict is about exactly what was run: no instance, setting or earlier model speaks for another."""

from __future__ import annotations

import copy
import functools
import pathlib
import sysconfig
import types

import helpers
import microsoft_models
import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, DEVICES
from timm.layers import DropPath
from torch import nn

import swinaccel

GAIN = 1.0
CONFIG = types.SimpleNamespace(gain=1.0, fused=False)


class ByClass(microsoft_models.WindowAttention):
    gain = 1.0

    def forward(self, x, mask=None):
        return super().forward(x, mask) * self.gain


class ByGlobal(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * GAIN


class ByConfig(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * CONFIG.gain


def block_of(kind, **options):
    block = helpers.microsoft_block((8, 8), shift=2)
    block.attn = kind(16, (4, 4), 2, **options)
    return helpers.randomize(block)


def statuses(model):
    return [entry.status for entry in swinaccel.report(model)]


def assert_like_the_original(model, x, tolerance=helpers.FP32):
    with torch.no_grad():
        found = model(x)
        with swinaccel.disabled():
            expected = model(x)
    helpers.assert_close(found, expected, tolerance)


CHANGES = {
    "class": (ByClass, lambda patch, gain: patch.setattr(ByClass, "gain", gain)),
    "global": (ByGlobal, lambda patch, gain: patch.setitem(globals(), "GAIN", gain)),
    "object": (ByConfig, lambda patch, gain: patch.setattr(CONFIG, "gain", gain)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES)
def test_settings_outside_of_the_module(change, backend, monkeypatch):
    """Changed after one model was accelerated, before another of the kind is; and for the first at once."""
    kind, set_gain = CHANGES[change]
    x = torch.randn(2, 64, 16).to(DEVICES[backend])
    first, second = (block_of(kind).to(DEVICES[backend]) for _ in range(2))
    swinaccel.accelerate(first, backend=backend)
    for _ in range(2):
        assert_like_the_original(first, x)
    helpers.assert_accelerated(first)
    set_gain(monkeypatch, 3.0)
    swinaccel.accelerate(second, backend=backend)
    assert statuses(second) == ["original"]
    for model in (first, second):
        assert_like_the_original(model, x)
    (entry,) = swinaccel.report(first)
    assert entry.fallbacks == 1
    assert "changed after accelerate()" in entry.reason
    set_gain(monkeypatch, 1.0)
    assert_like_the_original(first, x)
    assert [entry.fallbacks for entry in swinaccel.report(first)] == [1]
    swinaccel.accelerate(second, backend=backend)
    assert statuses(second) == ["accelerated"]


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


def huggingface(kind="Swin"):
    return helpers.huggingface_layer(kind, shift=2), (torch.randn(2, 64, 16), (8, 8))


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


class Odd(microsoft_models.WindowAttention):
    """Limits what is not finite, as code for half precision does."""

    def forward(self, x, mask=None):
        return torch.nan_to_num(super().forward(x, mask))


class Casting(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        out = super().forward(x, mask)
        return out.float() if out.dtype == torch.float16 else out


class HalfOnly(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        out = super().forward(x, mask)
        return out.clamp(-0.01, 0.01) if out.dtype == torch.bfloat16 else out


@pytest.mark.parametrize(("kind", "words"), [(Odd, "NaN"), (Casting, "gives torch.float32"), (HalfOnly, "bfloat16")])
def test_what_code_does_in_other_dtypes(kind, words):
    """By running it there, and not by what it is called."""
    (entry,) = swinaccel.plan(helpers.randomize(kind(16, (4, 4), 2)))
    assert entry.status == "original"
    assert words in entry.reason


class Autocasting(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        with torch.autocast("cuda", enabled=False):
            return super().forward(x, mask)


HALVED = {"xpu", "mps"}


def is_halved(x):
    return x.is_cuda


class ByDeviceType(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * (0.5 if x.device.type in HALVED else 1.0)


class ByDevice(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * (1.0 if x.device == torch.device("cpu") else 0.5)


class ByAFunction(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * (0.5 if is_halved(x) else 1.0)


class Moving(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        if type(self) is Moving and x.device != self.relative_position_index.device:
            self.relative_position_index = self.relative_position_index.to(x.device)
        return super().forward(x, mask) + torch.zeros(1, device=x.device)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Autocasting, "has to do with"),
        (ByDeviceType, "ByDeviceType.forward has to do with device.type, "),
        (ByDevice, "ByDevice.forward has to do with cpu, "),
        (ByAFunction, "test_verdicts.is_halved has to do with is_cuda, "),
    ],
)
def test_what_a_cpu_does_not_show(kind, words):
    (entry,) = swinaccel.plan(block_of(kind))
    assert words in entry.reason
    assert "which no run of a copy shows" in entry.reason


def test_tensors_that_go_where_the_input_is():
    (entry,) = swinaccel.plan(block_of(Moving))
    assert entry.status == "accelerated", entry.reason


class Proxy(nn.Module):
    """Passes on what it does not have."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args):
        self.calls += 1
        return self.module(*args)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


MODELS = {
    "timm": lambda: (helpers.timm_block((8, 8), shift=2), (torch.randn(2, 8, 8, 16),)),
    "timm-v2": lambda: (helpers.timm_block((8, 8), shift=2, v2=True), (torch.randn(2, 8, 8, 16),)),
    "torchvision": lambda: (helpers.torchvision_attention(shift=(2, 2)), (torch.randn(2, 8, 8, 16),)),
    "hf": huggingface,
    "official": lambda: (helpers.microsoft_block((8, 8), shift=2), (torch.randn(2, 64, 16),)),
}


@pytest.mark.parametrize("first", ["wrap", "accelerate"])
@pytest.mark.parametrize("name", MODELS)
def test_proxies_are_not_what_they_stand_for(name, first):
    module, inputs = MODELS[name]()
    if first == "wrap":
        model = swinaccel.accelerate(Proxy(module), backend="torch")
    else:
        model = Proxy(swinaccel.accelerate(module, backend="torch"))
    with torch.no_grad():
        found = helpers.tensors(model(*inputs))[0]
        with swinaccel.disabled():
            expected = helpers.tensors(module(*inputs))[0]
    helpers.assert_close(found, expected)
    assert model.calls == 1
    assert [entry.name for entry in swinaccel.report(model)] == ["module"]
    helpers.assert_accelerated(model, 1)
    assert [entry.name for entry in swinaccel.plan(model)] == ["module"]
    swinaccel.restore(model)
    assert statuses(model) == ["original"]


class Callable:
    def __init__(self, module):
        self.module, self.plain = module, module.forward

    def __call__(self, x):
        return 2 * self.plain(x)


REPLACED = {
    "partial": lambda part: helpers.doubled(part),
    "object": Callable,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", REPLACED)
@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "attn.softmax", "mlp.fc1", "norm1"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forwards_replaced_by_no_plain_function(backend, part, kind, when):
    model = helpers.timm_block((8, 8), shift=2).to(DEVICES[backend])
    x = torch.randn(2, 8, 8, 16).to(DEVICES[backend])

    def replace():
        module = model.get_submodule(part)
        module.forward = REPLACED[kind](module)

    if when == "before":
        replace()
    swinaccel.accelerate(model, backend=backend)
    if when == "after":
        assert_like_the_original(model, x)
        replace()
    for _ in range(2):
        assert_like_the_original(model, x)


@pytest.mark.parametrize("name", ["torchvision", "official"])
def test_a_forward_that_was_replaced_before_is_not_said_to_be_accelerated(name):
    model, inputs = MODELS[name]()
    model.forward = functools.partial(lambda own, *args: 2 * own(*args), model.forward)
    with torch.no_grad():
        expected = model(*inputs)
        swinaccel.accelerate(model, backend="torch")
        helpers.assert_close(model(*inputs), expected)
    entry = swinaccel.report(model).entries[0]
    assert (entry.name, entry.status) == ("", "original")
    assert "forward was replaced on this instance" in entry.reason


ADAPTER = """
class Adapter(Linear):
    def forward(self, x):
        return super().forward(x)

    def get_delta_weight(self):
        return self.weight.float() if self.weight.device.type == "cpu" else self.weight
"""


@pytest.mark.parametrize("folder", [sysconfig.get_paths()["purelib"], "/project"])
def test_layers_of_packages_may_merge_otherwise_on_cpus(folder):
    """As peft's do; in code of a project's own the word is enough to leave it alone."""
    path = pathlib.Path(folder, "adapters", "layer.py")
    space = {"Linear": nn.Linear, "__name__": "adapters.layer"}
    exec(compile(ADAPTER, str(path), "exec"), space)
    model = helpers.randomize(microsoft_models.WindowAttentionV2(16, (4, 4), 2))
    model.qkv.__class__ = space["Adapter"]
    (entry,) = swinaccel.plan(model)
    assert (entry.status == "accelerated") == (folder != "/project"), entry.reason
