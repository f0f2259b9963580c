"""Stand-ins for projects whose copy of the official attention is written in another way: BiRefNet, CLAP and others.

Written for the tests, like those of microsoft_models.py: the names of attributes and arguments and the arithmetic are
those of the projects named, since that is what they are recognised by; the code is not.
"""

from __future__ import annotations

import types

import microsoft_models as official
import torch
import torch.nn.functional as F
from descendant_models import shift_mask
from microsoft_models import from_windows, to_windows
from torch import Tensor, nn

# BiRefNet reads this at each call.
CONFIG = types.SimpleNamespace(SDPA_enabled=True, backbone="swin_v1", sizes=[1024, 1024])


class SdpaAttention(official.WindowAttention):
    """BiRefNet's: by PyTorch's function where CONFIG says so, with its default scale and a rate that is a number."""

    def __init__(self, dim, window_size, num_heads, attn_drop=0.0, **options):
        super().__init__(dim, window_size, num_heads, attn_drop=attn_drop, **options)
        self.attn_drop_prob = attn_drop

    def start(self, mask: Tensor | None) -> Tensor | None:
        """What scores start from: the bias, and the mask of every window."""
        bias = self.bias()[None]
        return bias if mask is None else bias + mask[:, None]

    def rate(self) -> float:
        return self.attn_drop_prob if self.training else 0.0

    def forward(self, x, mask=None):
        if not CONFIG.SDPA_enabled:
            return super().forward(x, mask)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = self.mixed(q, k, v, mask)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.start(mask), dropout_p=self.rate())


class OwnScaleAttention(SdpaAttention):
    """Its own scale, and the rate of the dropout that it does not call."""

    def rate(self) -> float:
        return self.attn_drop.p if self.training else 0.0

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.start(mask), self.rate(), scale=self.scale)


class BareAttention(SdpaAttention):
    """That of single-file copies: its branch scales twice, and leaves out bias and mask."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q * self.scale, k, v, dropout_p=self.rate())


class SdpaBlock(nn.Module):
    """BiRefNet's block: the detection block, which hands its attention the mask of every window of the batch."""

    def __init__(self, dim, num_heads, window_size, shift_size=0, kind=SdpaAttention, **attn):
        super().__init__()
        self.dim, self.num_heads, self.window_size, self.shift_size = dim, num_heads, window_size, shift_size
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = kind(dim, (window_size, window_size), num_heads, **attn)
        self.drop_path = nn.Identity()
        self.mlp = official.Mlp(dim, 2 * dim)
        self.H = self.W = None

    def forward(self, x, mask_matrix):
        (batch, _, channels), size, shift = x.shape, self.window_size, self.shift_size
        image = self.norm1(x).view(batch, self.H, self.W, channels)
        image = F.pad(image, (0, 0, 0, -self.W % size, 0, -self.H % size))
        mask, height, width = None, *image.shape[1:3]
        if shift:
            image = image.roll((-shift, -shift), (1, 2))
            mask = mask_matrix
            if CONFIG.SDPA_enabled:
                mask = mask_matrix.expand(batch, *mask_matrix.shape[-3:]).reshape(-1, *mask_matrix.shape[1:])
        windows = self.attn(to_windows(image, size), mask=mask)
        image = from_windows(windows, size, height, width)
        if shift:
            image = image.roll((shift, shift), (1, 2))
        x = x + self.drop_path(image[:, : self.H, : self.W].reshape(x.shape))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SdpaStage(nn.Module):
    """Two of them, and a mask of -inf. Neither train() nor eval() returns it."""

    def __init__(self, dim, num_heads, window_size, **options):
        super().__init__()
        self.window_size, self.shift_size = window_size, window_size // 2
        self.blocks = nn.ModuleList(
            SdpaBlock(dim, num_heads, window_size, shift, **options) for shift in (0, self.shift_size)
        )

    def train(self, mode=True):
        super().train(mode)

    def forward(self, x, H, W):
        size = self.window_size
        mask = shift_mask(H + -H % size, W + -W % size, size, self.shift_size).to(x)
        mask = mask.masked_fill(mask != 0, float("-inf"))
        for block in self.blocks:
            block.H, block.W = H, W
            x = block(x, mask)
        return x


class WeightsToo(official.WindowAttention):
    """The first CLAP's (HTSAT): it returns the weights as well, as they are after dropout."""

    def forward(self, x, mask=None):
        q, k, v = self.packed(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.scores(q, k)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)
        weights = self.attn_drop(self.softmax(scores))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(x.shape))), weights


class WeightsBlock(official.SwinTransformerBlock):
    """Its block, which hands them on."""

    def __init__(self, dim, input_resolution, num_heads, window_size, shift_size=0, kind=WeightsToo, **attn):
        super().__init__(dim, input_resolution, num_heads, window_size, shift_size)
        self.attn = kind(dim, (window_size, window_size), num_heads, **attn)

    def forward(self, x):
        (height, width), size, shift = self.input_resolution, self.window_size, self.shift_size
        image = self.norm1(x).view(x.shape[0], height, width, -1).roll((-shift, -shift), (1, 2))
        windows, weights = self.attn(to_windows(image, size), mask=self.attn_mask)
        image = from_windows(windows, size, height, width).roll((shift, shift), (1, 2))
        x = x + self.drop_path(image.reshape(x.shape))
        return x + self.drop_path(self.mlp(self.norm2(x))), weights


class WeightsStage(nn.Module):
    """Its layer: in evaluation the mean of all weights, in training those of the last block."""

    def __init__(self, dim, input_resolution, num_heads, window_size, **attn):
        super().__init__()
        shifts = (0, window_size // 2)
        self.blocks = nn.ModuleList(
            WeightsBlock(dim, input_resolution, num_heads, window_size, shift, **attn) for shift in shifts
        )

    def forward(self, x):
        found = []
        for block in self.blocks:
            x, weights = block(x)
            found.append(weights.unsqueeze(0))
        return x, weights if self.training else torch.cat(found, dim=0).mean(dim=0)


class Unread(nn.Module):
    """What is around it, and looks at the weights where it is asked to."""

    def __init__(self, stage, heatmap=False):
        super().__init__()
        self.stage, self.heatmap = stage, heatmap

    def forward(self, x):
        x, weights = self.stage(x)
        return (x.mean(1), weights.mean(1).mean(1)) if self.heatmap else x.mean(1)


# Blocks that are nobody's, around an attention that is known, or known but for its names.


class SeparateAttention(nn.Module):
    """Hugging Face's of the old layout, as MinerU's UniMER-Swin copies it."""

    def __init__(self, dim, window_size, num_heads, drop=0.0):
        super().__init__()
        inner = self.self = nn.Module()
        inner.num_attention_heads, inner.attention_head_size = num_heads, dim // num_heads
        inner.window_size = (window_size, window_size)
        inner.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        inner.register_buffer("relative_position_index", official.position_index(inner.window_size))
        inner.query, inner.key, inner.value = (nn.Linear(dim, dim) for _ in range(3))
        inner.dropout = nn.Dropout(drop)
        self.output = SeparateOutput(dim, drop)
        self.pruned_heads = set()

    def forward(self, hidden_states, attention_mask=None, head_mask=None, output_attentions=False):
        inner = self.self
        q, k, v = (
            one(hidden_states).unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2)
            for one in (inner.query, inner.key, inner.value)
        )
        bias = inner.relative_position_bias_table[inner.relative_position_index].permute(2, 0, 1)
        scores = q @ k.mT / inner.attention_head_size**0.5 + bias
        if attention_mask is not None:
            scores = (scores.unflatten(0, (-1, len(attention_mask))) + attention_mask[:, None]).flatten(0, 1)
        weights = inner.dropout(scores.softmax(-1))
        weights = weights if head_mask is None else weights * head_mask
        out = self.output((weights @ v).transpose(1, 2).flatten(2), hidden_states)
        return (out, weights) if output_attentions else (out,)


class SeparateOutput(nn.Module):
    def __init__(self, dim, drop):
        super().__init__()
        self.dense, self.dropout = nn.Linear(dim, dim), nn.Dropout(drop)

    def forward(self, hidden_states, input_tensor):
        return self.dropout(self.dense(hidden_states))


class UnimerLayer(nn.Module):
    """Its layer: a depthwise convolution before the attention, and one before the MLP."""

    def __init__(self, dim, num_heads, window_size, shift_size=0):
        super().__init__()
        self.window_size, self.shift_size = window_size, shift_size
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ce = nn.ModuleList(nn.Conv2d(dim, dim, 3, 1, 1, groups=dim) for _ in range(2))
        self.attention = SeparateAttention(dim, window_size, num_heads)
        self.drop_path = nn.Identity()
        self.intermediate, self.output = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def enhanced(self, place, x, size):
        image = x.mT.unflatten(-1, size)
        return x + F.gelu(self.ce[place](image)).flatten(2).mT

    def forward(self, hidden_states, input_dimensions, head_mask=None, output_attentions=False, always_partition=False):
        x, size, shift = self.enhanced(0, hidden_states, input_dimensions), self.window_size, self.shift_size
        image = self.layernorm_before(x).unflatten(1, input_dimensions)
        height, width = image.shape[1] + -image.shape[1] % size, image.shape[2] + -image.shape[2] % size
        image = F.pad(image, (0, 0, 0, width - image.shape[2], 0, height - image.shape[1]))
        mask = shift_mask(height, width, size, shift)
        windows = to_windows(image.roll((-shift, -shift), (1, 2)), size)
        windows = self.attention(windows, None if mask is None else mask.to(x), head_mask, output_attentions)[0]
        image = from_windows(windows, size, height, width).roll((shift, shift), (1, 2))
        x = x + self.drop_path(image[:, : input_dimensions[0], : input_dimensions[1]].flatten(1, 2))
        x = self.enhanced(1, x, input_dimensions)
        return (x + self.output(F.gelu(self.intermediate(self.layernorm_after(x)))),)


class First(nn.ModuleList):
    """Layers in turn, of whose outputs the first goes on."""

    def __init__(self, *layers):
        super().__init__(layers)

    def forward(self, x, *args):
        for layer in self:
            x = layer(x, *args)[0]
        return x


class QueryProjection(nn.Module):
    """Uformer's."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.to_q, self.to_kv = heads, nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)

    def forward(self, x, attn_kv=None):
        other = x if attn_kv is None else attn_kv.expand(len(x), -1, -1)
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(other).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


class UformerAttention(official.WindowAttention):
    """Uformer's: queries apart from keys and values, and a second argument that comes before the mask."""

    def __init__(self, dim, window_size, num_heads, **options):
        super().__init__(dim, window_size, num_heads, **options)
        self.win_size = self.__dict__.pop("window_size")
        self.qkv = QueryProjection(dim, num_heads)

    def forward(self, x, attn_kv=None, mask=None):
        q, k, v = self.qkv(x, attn_kv)
        scores = self.scores(q, k)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        mixed = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


class VrtAttention(official.WindowAttention):
    """VRT's, of its blocks without mutual attention: another name, and no dropouts."""

    def __init__(self, dim, window_size, num_heads, **options):
        super().__init__(dim, window_size, num_heads, **options)
        self.qkv_self = self.qkv
        del self.qkv, self.attn_drop, self.proj_drop

    def forward(self, x, mask=None):
        q, k, v = self.qkv_self(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.scores(q, k)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return self.proj((self.softmax(scores) @ v).transpose(1, 2).flatten(2))


class MutualAttention(VrtAttention):
    """VRT's of its other blocks: each of two frames also asks the other one, where a bias would know no positions."""

    def __init__(self, dim, window_size, num_heads, **options):
        super().__init__(dim, window_size, num_heads, **options)
        _, rows, cols = window_size
        self.register_buffer("position_bias", torch.randn(1, rows * cols, dim))
        self.qkv_mut, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(2 * dim, dim)

    def attention(self, qkv: Tensor, mask: Tensor | None, biased: bool) -> Tensor:
        q, k, v = qkv
        scores = self.scores(q, k) if biased else q * self.scale @ k.mT
        if mask is not None:
            mask = mask[:, : q.shape[2], : q.shape[2]]
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return (self.softmax(scores) @ v).transpose(1, 2).flatten(2)

    def forward(self, x, mask=None):
        packed = [
            one.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            for one in (self.qkv_self(x), self.qkv_mut(x + self.position_bias.repeat(1, 2, 1)))
        ]
        (q1, q2), (k1, k2), (v1, v2) = (one.chunk(2, dim=2) for one in packed[1])
        aligned = [self.attention(one, mask, False) for one in ((q2, k1, v1), (q1, k2, v2))]
        both = torch.cat(aligned, 1), self.attention(packed[0], mask, True)
        return self.proj(torch.cat(both, 2))


class WideLinear(nn.Linear):
    """Of float32, whatever it is given."""

    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class FirstV2Attention(official.WindowAttentionV2):
    """V2's first version (Feature-Distillation, AiT): scores and biases in float32, cosine or not, squashed or not."""

    def __init__(self, dim, window_size, num_heads, cosine=True, squashed=True):
        super().__init__(dim, window_size, num_heads)
        self.rpe_output_type, self.rpe_mlp = "sigmoid" if squashed else "normal", self.cpb_mlp
        self.rpe_mlp[2] = WideLinear(512, num_heads, bias=False)
        del self.cpb_mlp
        if not cosine:
            del self.logit_scale
            self.scale = (dim // num_heads) ** -0.5

    def forward(self, x, mask=None, relative_position_bias=None):
        q, k, v = self.packed(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if hasattr(self, "logit_scale"):
            cosine = F.normalize(q.float(), dim=-1) @ F.normalize(k.float(), dim=-1).mT
            scores = cosine * self.logit_scale.clamp(max=4.605170185988092).exp().float()
        else:
            scores = (q * self.scale).float() @ k.float().mT
        bias = self.rpe_mlp(self.relative_coords_table).view(-1, self.num_heads)[self.relative_position_index]
        bias = bias.permute(2, 0, 1)
        scores = scores + (16 * bias.sigmoid() if self.rpe_output_type == "sigmoid" else bias)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        mixed = self.attn_drop(self.softmax(scores).type_as(x)) @ v
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


class RollingAttention(official.WindowAttention):
    """GRL's: told the size, it rolls and cuts for itself, and keeps the mask of the size it was made for."""

    def __init__(self, dim, input_resolution, num_heads, window_size, shift_size=0):
        super().__init__(dim, (window_size, window_size), num_heads)
        self.input_resolution, self.shift_size = input_resolution, shift_size
        self.register_buffer("attn_mask", shift_mask(*input_resolution, window_size, shift_size))

    def forward(self, x, x_size):
        size, shift = self.window_size[0], self.shift_size
        mask = self.attn_mask if self.input_resolution == x_size else shift_mask(*x_size, size, shift)
        mask = None if mask is None else mask.to(x)
        windows = to_windows(x.unflatten(1, x_size).roll((-shift, -shift), (1, 2)), size)
        image = from_windows(super().forward(windows, mask=mask), size, *x_size)
        return image.roll((shift, shift), (1, 2)).reshape(x.shape)
