"""The oracle against each library's own attention, in fp64, with facts read off the modules by hand."""

from __future__ import annotations

import itertools
import math

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swinaccel.spec import reference
from swinaccel.spec.window import Geometry

EXACT = 1e-12


def oracle(image, geometry, weight, bias, proj, heads, **options):
    """The section around the oracle: packed projection, attention, output projection."""
    q, k, v = F.linear(image, weight, bias).chunk(3, dim=-1)
    padding = bias if bias is not None else None
    return proj(reference.shifted_window_attention(q, k, v, geometry, num_heads=heads, padding=padding, **options))


def position_options(attn, heads):
    """Bias and scale of a V1 or V2 attention of timm, torchvision or the official code."""
    index = attn.relative_position_index
    tokens = math.isqrt(index.numel())
    options = {"index": index.view(tokens, tokens)}
    if hasattr(attn, "logit_scale"):
        table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, heads))
        return {**options, "table": table, "logit_scale": attn.logit_scale}
    return {**options, "table": attn.relative_position_bias_table}


def close(found, expected):
    helpers.assert_close(found, expected, EXACT)


SIZES = [(8, 8), (4, 8), (9, 9), (9, 11), (10, 10), (3, 8), (8, 3), (3, 3), (16, 4)]


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("always_partition", [False, True], ids=["clamped", "always"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_timm(size, always_partition, v2):
    """Rolls before it pads; window and shift are clamped axis by axis."""
    block = helpers.timm_block(size, shift=2, v2=v2, always_partition=always_partition).double()
    window = tuple(4 if always_partition else min(4, axis) for axis in size)
    shift = tuple(2 if always_partition or axis > 4 else 0 for axis in size)
    attn = block.attn
    bias = attn.qkv.bias if not v2 else torch.cat((attn.q_bias, 0 * attn.q_bias, attn.v_bias))
    options = position_options(attn, 2) | ({} if v2 else {"scale": 8**-0.5})
    image = torch.randn(2, *size, 16, dtype=torch.float64)
    geometry = Geometry(size, window, shift, roll_first=True)
    close(oracle(image, geometry, attn.qkv.weight, bias, attn.proj, 2, **options), block._attn(image))


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_torchvision(size, v2):
    """Pads before it rolls; only the shift is clamped."""
    attn = helpers.torchvision_attention(shift=(2, 1), v2=v2).double()
    shift = tuple(0 if axis <= 4 else amount for axis, amount in zip(size, (2, 1), strict=True))
    bias = attn.qkv.bias.clone()
    if v2:
        bias[16:32] = 0
    options = position_options(attn, 2) | ({} if v2 else {"scale": 8**-0.5})
    image = torch.randn(2, *size, 16, dtype=torch.float64)
    close(
        oracle(image, Geometry(size, (4, 4), shift), attn.qkv.weight, bias, attn.proj, 2, **options),
        attn(image),
    )


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("size", [(8, 8), (4, 8), (8, 4), (12, 8)], ids=str)
@torch.no_grad()
def test_microsoft(size, v2):
    """Never pads; at a side of one window the whole block stands still."""
    block = helpers.microsoft_block(size, shift=2, v2=v2).double()
    shift = 0 if min(size) <= 4 else 2
    attn = block.attn
    bias = attn.qkv.bias if not v2 else torch.cat((attn.q_bias, 0 * attn.q_bias, attn.v_bias))
    options = position_options(attn, 2) | ({} if v2 else {"scale": attn.scale})
    image = torch.randn(2, *size, 16, dtype=torch.float64)
    found = oracle(image, Geometry(size, (4, 4), (shift, shift)), attn.qkv.weight, bias, attn.proj, 2, **options)
    close(found.flatten(1, 2), block.attend(image.flatten(1, 2)))


@pytest.mark.parametrize("size", [(5, 9, 6), (2, 3, 9), (4, 8, 8), (1, 4, 5)], ids=str)
@torch.no_grad()
def test_torchvision_3d(size):
    """Window and shift are clamped axis by axis; the bias of a smaller window is the first of the larger one's."""
    from torchvision.models.video import swin_transformer as library

    attn = helpers.randomize(library.ShiftedWindowAttention3d(16, [2, 4, 4], [1, 2, 2], 2)).double()
    window = tuple(min(side, axis) for side, axis in zip((2, 4, 4), size, strict=True))
    shift = tuple(step if axis > side else 0 for step, side, axis in zip((1, 2, 2), (2, 4, 4), size, strict=True))
    image = torch.randn(2, *size, 16, dtype=torch.float64)
    tokens = math.prod(window)
    options = {
        "table": attn.relative_position_bias_table,
        "index": attn.relative_position_index[:tokens, :tokens],
        "scale": 8**-0.5,
    }
    found = oracle(image, Geometry(size, window, shift), attn.qkv.weight, attn.qkv.bias, attn.proj, 2, **options)
    close(found, attn(image))


def packed(q, k, v):
    biases = [torch.zeros(part.out_features).to(q.weight) if part.bias is None else part.bias for part in (q, k, v)]
    return torch.cat([part.weight for part in (q, k, v)]), torch.cat(biases)


def attention_of(layer, x, size, **arguments):
    """What a Hugging Face layer adds in its attention branch, before its drop-path: the MLP branch is silenced."""
    for linear in (part for part in layer.modules() if isinstance(part, nn.Linear)):
        if linear.in_features == 4 * linear.out_features:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    return layer(x, size, **arguments)[0] - x


@pytest.mark.parametrize("always_partition", [False, True], ids=["clamped", "always"])
@pytest.mark.parametrize("kind", ["Swin", "DonutSwin"])
@pytest.mark.parametrize("size", [(8, 8), (4, 8), (8, 4), (9, 11)], ids=str)
@torch.no_grad()
def test_hugging_face_swin(size, kind, always_partition):
    layer = helpers.huggingface_layer(kind, shift=2).double()
    outer = layer.attention
    if hasattr(outer, "o_proj"):
        parts, proj, position = (
            (outer.q_proj, outer.k_proj, outer.v_proj),
            outer.o_proj,
            outer.relative_position_bias,
        )
    else:
        position = outer.self
        parts, proj = (position.query, position.key, position.value), outer.output.dense
    shift = 0 if min(size) <= 4 and not always_partition else 2
    x = torch.randn(2, size[0] * size[1], 16, dtype=torch.float64)
    found = oracle(
        layer.layernorm_before(x).view(2, *size, 16),
        Geometry(size, (4, 4), (shift, shift)),
        *packed(*parts),
        proj,
        2,
        table=position.relative_position_bias_table,
        index=position.relative_position_index.view(16, 16),
        scale=8**-0.5,
    )
    expected = attention_of(layer, x, size, always_partition=always_partition)
    helpers.assert_close(found.flatten(1, 2), expected, 1e-11)


@pytest.mark.parametrize("size", [(8, 8), (4, 4), (9, 11)], ids=str)
@torch.no_grad()
def test_hugging_face_swinv2(size):
    """Adds its mask twice, never looks at the size, and normalises afterwards."""
    layer = helpers.huggingface_layer("Swinv2", shift=2).double()
    attn = layer.attention.self
    table = 16 * torch.sigmoid(attn.continuous_position_bias_mlp(attn.relative_coords_table).view(-1, 2))
    attn.logit_scale.fill_(10.0)
    x = torch.randn(2, size[0] * size[1], 16, dtype=torch.float64)
    found = oracle(
        x.view(2, *size, 16),
        Geometry(size, (4, 4), (2, 2)),
        *packed(attn.query, attn.key, attn.value),
        layer.attention.output.dense,
        2,
        table=table,
        index=attn.relative_position_index,
        logit_scale=attn.logit_scale,
        mask_value=-200.0,
    )
    nn.init.zeros_(layer.layernorm_after.weight)
    nn.init.zeros_(layer.layernorm_after.bias)
    expected = layer(x, size)[0] - x
    # transformers builds its fp32 clamp limit on the way, which rounds the scale of 100.
    helpers.assert_close(layer.layernorm_before(found.flatten(1, 2)), expected, 1e-5)


# Parts.


SHIFTED = [
    *itertools.product([(8, 8), (9, 5), (4, 4)], [(0, 0), (2, 2), (0, 3), (1, 0)]),
    *itertools.product([(8, 9, 5), (4, 4, 8), (4, 4, 4)], [(2, 1, 3), (0, 2, 0), (0, 0, 0)]),
]


@pytest.mark.parametrize(("size", "shift"), SHIFTED, ids=str)
def test_mask_separates_what_the_roll_brought_together(size, shift):
    """From the definition: two tokens of a window belong together where they are neighbours without the roll, too."""
    geometry = Geometry(size, (4,) * len(size), shift)
    padded = geometry.padded
    places = torch.stack(torch.meshgrid(*map(torch.arange, padded), indexing="ij"), -1)
    rolled = torch.roll(places, [-step for step in shift], tuple(range(len(size))))
    windows = reference.partition(rolled[None].double(), geometry)
    near = (windows[:, :, None] - windows[:, None, :]).abs() < 4
    together = near.all(-1)
    if min(padded) > 4:
        assert torch.equal(reference.shift_mask(geometry, -100.0) == 0, together)
    mask = reference.shift_mask(geometry, -100.0)
    assert set(mask.unique().tolist()) <= {0.0, -100.0}
    assert torch.equal(mask, mask.mT)
    assert not mask.diagonal(dim1=1, dim2=2).any()


@pytest.mark.parametrize("roll_first", [False, True], ids=["pad-roll", "roll-pad"])
@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 2, 1), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (9, 11), (3, 5), (1, 1), (5, 8, 6), (1, 3, 9)], ids=str)
def test_join_undoes_cut(size, shift, roll_first):
    geometry = Geometry(size, (4,) * len(size), shift[: len(size)], roll_first)
    image = torch.randn(2, *size, 3)
    assert torch.equal(reference.join(reference.cut(image, geometry, torch.ones(3)), geometry), image)


def test_cut_takes_windows_row_by_row():
    """Token by token, from the definition."""
    geometry = Geometry((4, 4, 6), (2, 2, 3))
    image = torch.randn(2, 4, 4, 6, 3)
    windows = reference.cut(image, geometry).view(2, 2, 2, 2, 2, 2, 3, 3)
    assert torch.equal(windows[1, 1, 0, 1, 0, 1, 2], image[1, 2, 1, 5])
    assert torch.equal(windows[0, 0, 1, 0, 1, 0, 1], image[0, 1, 2, 1])


def test_cut_marks_padding():
    geometry = Geometry((5, 6), (4, 4), (1, 1))
    windows = reference.cut(torch.zeros(1, 5, 6, 1), geometry, torch.ones(1))
    assert windows.sum() == 64 - 30


def test_geometry():
    geometry = Geometry((9, 16), (4, 8), (2, 0))
    assert (geometry.grid, geometry.padded, geometry.num_windows, geometry.tokens) == (
        (3, 2),
        (12, 16),
        6,
        32,
    )
    assert geometry.is_padded
    assert geometry.is_shifted
    assert geometry.roll == (2, 0)
    assert Geometry((3, 3), (4, 4), (3, 3), True).roll == (0, 0)
    assert hash(geometry) == hash(Geometry((9, 16), (4, 8), (2, 0)))


def test_attention_uses_mask_rows_in_turn():
    q, k, v = torch.randn(3, 4, 1, 2, 8, dtype=torch.float64)
    mask = torch.randn(2, 2, 2, dtype=torch.float64)
    together = reference.attention(q, k, v, mask=mask)
    alone = [reference.attention(*(part[i : i + 1] for part in (q, k, v)), mask=mask[i % 2][None]) for i in range(4)]
    close(together, torch.cat(alone))


def test_gradients_of_the_oracle():
    geometry = Geometry((3, 4), (2, 2), (1, 1))
    inputs = [torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    table = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(2, dtype=torch.float64, requires_grad=True)
    index = helpers.position_index((2, 2))

    def run(q, k, v, table, scale):
        return reference.shifted_window_attention(
            q, k, v, geometry, num_heads=2, table=table, index=index, logit_scale=scale
        )

    assert torch.autograd.gradcheck(run, (*inputs, table, scale))
