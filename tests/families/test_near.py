"""Near misses: window attention that no family recognises is listed with what is missing, and nothing else is."""

from __future__ import annotations

import copy
import importlib

import changed_models
import descendant_models as descendants
import helpers
import microsoft_models as official
import pytest
import torch
import zoo
from torch import nn

import swinaccel
from swinaccel import FallbackError

SIDE, HEADS, ROWS = 4, 2, 49


def attention(kind=official.WindowAttention, window=(SIDE, SIDE)):
    return kind(16, window, HEADS)


def renamed(old, new, kind=official.WindowAttention):
    """An attention whose attribute of one name has another."""

    def make():
        module = attention(kind)
        for values in (module.__dict__, module._parameters, module._buffers, module._modules):
            if old in values:
                values[new] = values.pop(old)
        return module

    return make


def changed(**changes):
    """An attention with other attributes; None takes one away."""

    def make():
        module = attention()
        for name, value in changes.items():
            delattr(module, name) if hasattr(module, name) else None
            if value is not None:
                setattr(module, name, value() if callable(value) else value)
        return module

    return make


def table(*shape):
    return lambda: nn.Parameter(torch.zeros(shape))


class Further(official.WindowAttention):
    def forward(self, x, mask, prev_k, gain):
        return super().forward(x, mask)


class Whole(official.WindowAttention):
    """Shifts and cuts for itself."""

    def __init__(self, *args):
        super().__init__(*args)
        self.shift_size = 2

    def forward(self, x, x_size):
        return x


class Separate(official.WindowAttention):
    def __init__(self, *args):
        super().__init__(*args)
        del self.qkv
        self.to_q, self.to_kv = nn.Linear(16, 16), nn.Linear(16, 32)


class Embedded(official.WindowAttention):
    """Keeps its biases as an embedding."""

    def __init__(self, *args):
        super().__init__(*args)
        del self.relative_position_bias_table
        self.relative_position_bias = nn.Embedding(ROWS, HEADS)


class Unbiased(nn.Module):
    """Windows and shifts without positions; the block knows both."""

    def __init__(self, shift=2):
        super().__init__()
        self.win, self.shift_size = SIDE, shift
        self.attn = changed(relative_position_bias_table=None, relative_position_index=None, window_size=None)()


OWN, VOLUME = "(a relative position bias table of 49 rows", "relative position bias table of 105 rows"
KINDS = {
    "projection": (renamed("qkv", "qkv_proj"), OWN, "its projection is called qkv_proj, which no family reads"),
    "separate": (lambda: attention(Separate), OWN, "its projection is called to_"),
    "no-projection": (renamed("qkv", "features"), OWN, "it has no qkv"),
    "parts": (changed(proj=None, proj_drop=None), OWN, "it has no proj and no proj_drop"),
    "window": (renamed("window_size", "win"), OWN, "its window is called win"),
    "unheard-of-window": (renamed("window_size", "tile"), OWN, "it has no window_size"),
    "one-number": (changed(window_size=None, tile=SIDE), OWN, "it has no window_size"),
    "heads": (renamed("num_heads", "n_heads"), OWN, "its number of heads is not called num_heads"),
    "unheard-of-heads": (renamed("num_heads", "groups"), OWN, "its number of heads is not called num_heads"),
    "table": (renamed("relative_position_bias_table", "rel_pos_bias"), OWN, "is called rel_pos_bias"),
    "unheard-of-table": (renamed("relative_position_bias_table", "numbers"), OWN, "is called numbers"),
    "embedding": (lambda: attention(Embedded), OWN, "is called relative_position_bias.weight"),
    "turned": (changed(relative_position_bias_table=table(HEADS, ROWS)), OWN, "has the shape (2, 49)"),
    "square": (changed(relative_position_bias_table=table(HEADS, 7, 7)), OWN, "has the shape (2, 7, 7)"),
    "with-one": (changed(relative_position_bias_table=table(1, HEADS, 7, 7)), OWN, "has the shape (1, 2, 7, 7)"),
    "overlapping": (changed(relative_position_bias_table=table(81, HEADS)), "", "81 rows, where its windows have 49"),
    "no-table": (changed(relative_position_bias_table=None), "relative_position_index", "no relative position bias"),
    "no-index": (changed(relative_position_index=None), OWN, "it has no relative_position_index"),
    "arguments": (lambda: attention(Further), OWN, "its forward takes (x, mask, prev_k, gain), and"),
    "shifts-itself": (lambda: attention(Whole), OWN, "it shifts and cuts its windows by itself"),
    "volume": (lambda: attention(Further, (2, 3, 4)), VOLUME, "its forward takes (x, mask"),
    "volume-by-value": (changed(window_size=None, tile=(2, 3, 4), relative_position_bias_table=table(105, HEADS)),
                        VOLUME, "it has no window_size"),
    "cosine": (renamed("qkv", "qkv_own", official.WindowAttentionV2), "relative positions, cpb_mlp", "called qkv_own"),
    "unfolded": (lambda: descendants.OCAB(16, (8, 8), SIDE, 0.5, HEADS), "", "its keys come from larger windows"),
    "no-positions": (Unbiased, "windows and shifts", "it has no window_size of its own"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_near_misses_are_listed_with_what_is_missing(kind):
    make, seen, reason = KINDS[kind]
    model = nn.Sequential(nn.Linear(16, 16), make())
    inner = "1.attn" if kind == "no-positions" else "1"
    for report in (swinaccel.plan(model), swinaccel.report(swinaccel.accelerate(model))):
        (entry,) = report
        assert (entry.name, entry.family, entry.status) == (inner, "unknown", "original")
        assert entry.window == ((2, 3, 4) if "volume" in kind else (SIDE, SIDE))
        assert entry.shift == ((2, 2) if kind in ("shifts-itself", "no-positions") else (0,) * len(entry.window))
        assert entry.num_heads == (0 if kind == "unheard-of-heads" else HEADS)
        assert entry.head_dim == (0 if kind in ("unheard-of-heads", "parts") else 8)
        assert (entry.bias, entry.calls, entry.fallbacks) == (None, 0, 0)
        assert entry.reason.startswith("looks like window attention (")
        assert seen in entry.reason
        assert reason in entry.reason
        assert "its own forward runs and its results are right" in entry.reason
        assert entry.reason in str(report.to_dict())
        assert "no window attention" not in report.summary()
        assert "Originals are the model's own code: results are right" in str(report)
    with pytest.raises(FallbackError, match="stays original: it looks like window attention"):
        swinaccel.accelerate(model, strict=True)


def test_a_block_and_its_attention_are_listed_once():
    class Outer(official.SwinTransformerBlock):
        def forward(self, x, size, mask):
            return x

    model = nn.ModuleList(Outer(16, (8, 8), HEADS, SIDE, shift) for shift in (0, 2))
    for block in model:
        block.attn = renamed("qkv", "qkv_proj")()
    assert [(entry.name, entry.shift) for entry in swinaccel.plan(model)] == [("0.attn", (0, 0)), ("1.attn", (2, 2))]


def test_near_misses_beside_what_is_accelerated():
    """They come last, and strict is about what a family knows."""
    model = nn.ModuleList([renamed("qkv", "qkv_proj")(), helpers.timm_block((8, 8), shift=2), attention()])
    assert "Originals" not in str(swinaccel.plan(model[1]))
    swinaccel.accelerate(model, strict=True)
    report = swinaccel.report(model)
    statuses = [(entry.name, entry.status) for entry in report]
    assert statuses == [("1", "accelerated"), ("2", "accelerated"), ("0", "original")]
    assert "2 of 3 window attentions accelerated" in report.summary()


def test_parts_of_what_a_family_knows_are_none():
    """Accelerated, left out by a filter, refused, or marked and changed beyond recognition."""
    model = helpers.timm_block((8, 8), shift=2)
    assert [entry.family for entry in swinaccel.plan(model, filter=lambda *_: False)] == ["timm"]
    assert [entry.family for entry in swinaccel.plan(changed_models.WeightsToo(16, (4, 4), 2))] == ["window_attention"]
    swinaccel.accelerate(model)
    model.attn.qkv_proj = model.attn.qkv
    del model.attn.qkv
    assert [entry.family for entry in swinaccel.report(model)] == ["timm"]


@pytest.mark.filterwarnings("ignore")
def test_models_that_were_compiled_before():
    """torch.jit and torch.fx leave parameters and take the code."""

    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.relative_position_bias_table = nn.Linear(16, 48), nn.Parameter(torch.zeros(ROWS, HEADS))

        def forward(self, x):
            return self.qkv(x) + self.relative_position_bias_table.sum()

    block = official.SwinTransformerBlock(16, (8, 8), HEADS, SIDE, 2).eval()
    traced = torch.jit.trace(block, torch.randn(1, 64, 16), check_trace=False)
    husk = nn.Module()
    husk.qkv, husk.proj = nn.Linear(16, 48), nn.Linear(16, 16)
    husk.relative_position_bias_table = nn.Parameter(torch.zeros(ROWS, HEADS))
    for model, name in ((traced, "attn"), (torch.jit.script(Scripted()), ""), (nn.Sequential(husk), "0")):
        (entry,) = swinaccel.plan(model)
        assert (entry.name, entry.window) == (name, (SIDE, SIDE))
        assert "has taken its code, which goes after accelerate() and not before" in entry.reason


class Beit(official.WindowAttention):
    """BEiT's over the whole image: its table has rows for the class token, its index is one longer."""

    def __init__(self):
        super().__init__(16, (SIDE, SIDE), HEADS)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(ROWS + 3, HEADS))
        self.relative_position_index = torch.zeros(17, 17, dtype=torch.long)

    def forward(self, x):
        return x


class Positions(nn.Module):
    """The bias of a whole image, in a module of its own."""

    def __init__(self):
        super().__init__()
        self.window_size, self.num_heads = (SIDE, SIDE), HEADS
        self.relative_position_bias_table = nn.Parameter(torch.zeros(ROWS, HEADS))
        self.register_buffer("relative_position_index", official.position_index((SIDE, SIDE)))


class Global(nn.Module):
    """Attention over a whole image, and in its positions an MLP as well as a table."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = HEADS, nn.Linear(16, 48), nn.Linear(16, 16)
        self.rel_pos = Positions()
        self.rel_pos.fc1 = nn.Linear(2, 4)


class Levit(nn.Module):
    """49 distances between 49 tokens, which would be those of windows of 4."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.attn_ratio, self.qkv, self.proj = HEADS, SIDE, nn.Linear(16, 48), nn.Linear(16, 16)
        self.attention_biases = nn.Parameter(torch.zeros(HEADS, ROWS))
        self.register_buffer("attention_bias_idxs", torch.zeros(ROWS, ROWS, dtype=torch.long))


class Local(nn.Module):
    """Windows, and nothing of positions or shifts."""

    def __init__(self):
        super().__init__()
        self.window_size, self.num_heads = (SIDE, SIDE), HEADS
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * SIDE - 1, 8))


@pytest.mark.parametrize("kind", [Beit, Global, Levit, Local, Positions])
def test_attention_of_other_kinds_is_not_listed(kind):
    assert len(swinaccel.plan(nn.Sequential(kind()))) == 0


NONE = {
    "timm": (
        "resnet18", "vit_tiny_patch16_224", "vit_relpos_small_patch16_224", "beit_base_patch16_224", "convnext_atto",
        "vit_small_patch14_dinov2", "coatnet_rmlp_nano_rw_224", "levit_128s", "hiera_tiny_224", "davit_tiny",
        "edgenext_xx_small", "efficientformer_l1", "twins_svt_small", "samvit_base_patch16", "xcit_nano_12_p16_224",
    ),
    "torchvision": ("resnet18", "vit_b_32", "video.mvit_v1_b", "detection.fcos_resnet50_fpn"),
    "transformers": ("BeitModel", "DetrModel", "Dinov2Model", "BertModel", "T5EncoderModel", "SamVisionModel"),
}  # fmt: skip


@pytest.mark.parametrize("library", NONE)
def test_models_without_window_attention_have_no_false_alarms(library):
    """As they come, without memory: shapes are all that is looked at."""
    known = importlib.import_module(library)
    for name in NONE[library]:
        with helpers.on_meta():
            if library == "timm":
                model = known.create_model(name)
            elif library == "torchvision":
                make = known.models.get_model_builder(name.rpartition(".")[2])
                model = make(**({"weights_backbone": None} if "detection" in name else {}))
            else:
                kind = getattr(known, name)
                model = kind(kind.config_class(**({"use_relative_position_bias": True} if "Beit" in name else {})))
        assert len(swinaccel.plan(model)) == 0, name


@pytest.mark.parametrize("name", ["maxvit_nano_rw_256", "gcvit_xxtiny", "tiny_vit_5m_224"])
def test_windows_of_other_libraries_have_a_reason(name):
    with helpers.on_meta():
        model = importlib.import_module("timm").create_model(name)
    report = swinaccel.plan(model)
    assert len(report) > 5
    assert {entry.family for entry in report} == {"unknown"}


@pytest.mark.parametrize("entry", [one for one in zoo.ENTRIES if one.library != "timm"][::6], ids=lambda e: e.name)
def test_accelerated_models_have_no_false_alarms(entry):
    try:
        model = entry.make(False, 1).model
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    assert "unknown" not in {line.family for line in swinaccel.plan(model)}


class Anything(nn.Module):
    """Answers every question."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return lambda *args, **kwargs: self


class Nothing(official.WindowAttention):
    """Has no method, and answers no question once it is made."""

    forward = property(lambda self: 1 / 0)
    is_made = False

    def __init__(self, *args):
        super().__init__(*args)
        self.is_made = True

    def __getattr__(self, name):
        if not self.is_made or name in ("qkv", "proj"):
            return super().__getattr__(name)
        raise RuntimeError("not now")


class Unmade(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.none, self.window_size, self.shift_size = nn.LazyLinear(8), None, (SIDE, SIDE), [None, {}]
        self.relative_position_bias_table = nn.UninitializedParameter()
        self.register_buffer("relative_position_index", None)
        self.rel_pos, self.bias_table, self.shift = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(3)), 2


class Closed(torch.Tensor):
    """Answers no question."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("not now")


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.rel_pos = nn.Linear(2, 6), torch.zeros(2, 2).as_subclass(Closed)


ODD = {
    "anything": (Anything, False),
    "lazy": (lambda: nn.LazyLinear(4), False),
    "hidden": (Hidden, False),
    "nothing": (lambda: attention(Nothing), True),
    "unmade": (Unmade, True),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_modules_do_no_harm(kind):
    make, is_listed = ODD[kind]
    report = swinaccel.plan(nn.ModuleList([make(), renamed("qkv", "qkv_proj")()]))
    assert [entry.name for entry in report] == (["0", "1"] if is_listed else ["1"])


class Around(nn.Module):
    """Has queries, windows, shifts and positions, and an attention besides."""

    def __init__(self, inner):
        super().__init__()
        self.q_inner, self.window_size, self.shift_size, self.num_heads = inner, SIDE, 2, HEADS
        self.relative_position_bias_table = nn.Parameter(torch.zeros(ROWS, HEADS))


def test_modules_around_one_another_are_listed_once():
    assert [entry.name for entry in swinaccel.plan(Around(renamed("qkv", "qkv_proj")()))] == [""]
    assert [entry.name for entry in swinaccel.plan(Around(attention()))] == ["q_inner"]


def test_no_numbers_are_read():
    """Tensors on the meta device have none."""
    assert len(swinaccel.plan(renamed("qkv", "qkv_proj")().to("meta"))) == 1


def test_a_module_that_is_shared_is_listed_once():
    shared = renamed("qkv", "qkv_proj")()
    assert len(swinaccel.plan(nn.Sequential(shared, nn.Sequential(shared), copy.deepcopy(shared)))) == 2
