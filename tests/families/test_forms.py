"""Forms of the official attention that people write: how they call PyTorch's function, what else a forward takes."""

from __future__ import annotations

import copy

import descendant_models as descendants
import microsoft_models as official
import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, DEVICES, assert_close, check, check_fallback, check_gradients, randomize, timm_block
from torch import nn

import swinaccel

KEEPS_VERDICTS = True


class Sdpa(official.WindowAttention):
    """By PyTorch's function. Subclasses say what it is told; `fused_attn` is timm's name for that."""

    fused_attn = True

    def start(self, x, mask):
        """Bias and mask, (windows or 1, heads, N, N), whether the mask is an image's or the whole batch's."""
        bias = self.bias()[None]
        return bias if mask is None else bias + mask.repeat(len(x) // len(mask), 1, 1)[:, None]

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = self.mixed(q, k, v, self.start(x, mask))
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))


class OwnScale(Sdpa):
    def mixed(self, q, k, v, start):
        return F.scaled_dot_product_attention(q, k, v, start, scale=self.scale, is_causal=False, enable_gqa=False)


class DefaultScale(Sdpa):
    def mixed(self, q, k, v, start):
        return F.scaled_dot_product_attention(q.contiguous(), k, v, attn_mask=start.contiguous(), dropout_p=0.0)


class ScaledBefore(Sdpa):
    """As timm's copies do whose PyTorch has no argument for the scale."""

    fused_attn = False

    def mixed(self, q, k, v, start):
        return F.scaled_dot_product_attention(q * self.scale, k, v, attn_mask=start.to(q.dtype), scale=1.0)


class FiveAxes(Sdpa):
    """The windows of an image apart, so that no mask is written for each image."""

    def start(self, x, mask):
        return self.bias() if mask is None else self.bias() + mask[:, None]

    def mixed(self, q, k, v, start):
        if start.dim() > 3:
            q, k, v = (one.unflatten(0, (-1, len(start))) for one in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, start, scale=self.scale)
        return out.flatten(0, -4)


class Switched(Sdpa):
    """MONAI's and timm's way: a setting chooses."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.fused_attn, self.use_flash_attention = True, True

    def mixed(self, q, k, v, start):
        rate = self.attn_drop.p if self.training else 0.0
        if self.fused_attn and self.use_flash_attention:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=start, dropout_p=rate, scale=self.scale)
        return self.attn_drop((q * self.scale @ k.mT + start).softmax(-1)) @ v


def windows(count=4):
    return torch.randn(count, 4, 16), -100.0 * (torch.rand(count, 4, 4) < 0.3)


@pytest.mark.parametrize("kind", [OwnScale, DefaultScale, ScaledBefore, FiveAxes, Switched])
def test_scaled_dot_product_attention_however_it_is_called(kind):
    model = randomize(kind(16, (2, 2), 2, qk_scale=0.9))
    x, mask = windows()
    for backend in BACKENDS:
        for given in ((x, mask), (x, mask[:2]), (x,)):
            check(model, *given, backend=backend, count=1)
    check_gradients(model, x, mask[:2].to(DEVICES["triton"]), backend="triton", count=1)


@pytest.mark.parametrize("library", [False, True])
def test_a_scale_that_a_compiler_is_not_told(library):
    """timm's fused path takes PyTorch's, and copies of it their own."""
    model, inputs = randomize(OwnScale(16, (2, 2), 2)), windows()
    if library:
        model, inputs = timm_block((8, 8)), (torch.randn(2, 8, 8, 16),)
        model.attn.fused_attn = True
    (model.attn if library else model).scale = 0.9
    model, inputs = model.to(DEVICES["triton"]), [one.to(DEVICES["triton"]) for one in inputs]
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    with torch.no_grad():
        assert_close(torch.compile(twin, backend="eager")(*inputs), model(*inputs))


class Bare(Sdpa):
    def mixed(self, q, k, v, start):
        return F.scaled_dot_product_attention(q, k, v)


class Unmasked(Sdpa):
    def start(self, x, mask):
        return self.bias()[None]

    mixed = DefaultScale.mixed


class Unbiased(Sdpa):
    def start(self, x, mask):
        return None if mask is None else super().start(x, mask) - self.bias()

    mixed = OwnScale.mixed


@pytest.mark.parametrize(
    ("kind", "without"), [(Bare, "position bias and the mask"), (Unmasked, "mask"), (Unbiased, "position bias")]
)
def test_what_such_a_call_leaves_out_is_named(kind, without):
    model = randomize(kind(16, (2, 2), 2))
    check_fallback(model, *windows(), reason=f"its forward leaves out the {without}, as some code")


class Dropping(Sdpa):
    """A slip that many make: PyTorch's function drops in evaluation, too."""

    def mixed(self, q, k, v, start):
        return F.scaled_dot_product_attention(q, k, v, start, self.attn_drop.p, scale=self.scale)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_dropout_that_drops_in_evaluation(compiled):
    model = randomize(Dropping(16, (2, 2), 2)).to(DEVICES["triton"])
    x, mask = (one.to(DEVICES["triton"]) for one in windows())
    twin = swinaccel.accelerate(model, backend="triton")
    run = torch.compile(twin, backend="eager") if compiled else twin
    with torch.no_grad():
        plain = run(x, mask)
        assert_close(run(x, mask), plain)
        model.attn_drop.p = 0.999
        assert torch.equal(run(x, mask)[0, 0], model.proj.bias)


class Around(official.SwinTransformerBlock):
    """It drops around its attention by a number of its own, and by a dropout that it does not call."""

    def __init__(self, *args, always=False, **options):
        super().__init__(*args, **options)
        self.always, self.drop_rate, self.spare = always, 0.0, nn.Dropout(0.0)

    def forward(self, x):
        drops = self.training or self.always
        x = x + F.dropout(self.attend(self.norm1(x)), self.spare.p, drops)
        return x + F.dropout(self.mlp(self.norm2(x)), self.drop_rate, drops)


class DroppingMlp(official.Mlp):
    always, drop_rate = False, 0.0

    def __init__(self, *args, always=False):
        super().__init__(*args)
        self.always, self.drop_rate = always, 0.0

    def forward(self, x):
        return self.fc2(F.dropout(self.act(self.fc1(x)), self.drop_rate, self.training or self.always))


def dropping_block(name, always):
    if name != "mlp.drop_rate":
        return Around(16, (4, 4), 2, 2, 1, always=always)
    block = official.SwinTransformerBlock(16, (4, 4), 2, 2, 1)
    block.mlp = DroppingMlp(16, 32, always=always)
    return block


@pytest.mark.parametrize(("always", "compiled"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", ["drop_rate", "spare.p", "mlp.drop_rate"])
def test_rates_around_an_attention(name, always, compiled):
    x = torch.randn(2, 16, 16).to(DEVICES["triton"])
    model = swinaccel.accelerate(randomize(dropping_block(name, always)).to(x.device), backend="triton")
    run = torch.compile(model, backend="eager") if compiled else model
    path, _, last = name.rpartition(".")

    def drops(rate, training):
        setattr(model.get_submodule(path), last, rate)
        model.train(training)
        with torch.no_grad():
            return not torch.equal(run(x), run(x))

    assert [drops(*case) for case in ((0.0, False), (0.0, True), (0.5, True), (0.5, False))] == [0, 0, 1, always]
    calls = sum(entry.calls - entry.fallbacks for entry in swinaccel.report(model))
    assert calls or compiled


# Other arguments.


class Further(official.WindowAttention):
    def forward(self, x, mask=None, need_weights=True, *, temperature=1.0, **others):
        out = super().forward(x, mask)
        out = out if need_weights else -out
        return out / temperature if temperature != 1.0 else out


class Named(official.WindowAttention):
    def forward(self, x, pos_embed=None, attn_mask=None, return_attention=False):
        out = super().forward(x, attn_mask)
        out = out if pos_embed is None else out + pos_embed
        return out if return_attention is not None else -out


class Unshifted(official.WindowAttention):
    def forward(self, x, return_attention=False):
        return super().forward(x) * (1 - return_attention)


class Alone(official.WindowAttention):
    def forward(self, x):
        return super().forward(x)


class Needed(official.WindowAttention):
    def forward(self, x, mask):
        return super().forward(x, mask)


class Ratio(official.WindowAttention):
    """What is called a mask, and is none."""

    def forward(self, x, mask_ratio=0.0, shift_mask=None):
        return super().forward(x, shift_mask) * (2 if mask_ratio is None else 1)


X, MASK = windows()
GIVEN = {
    Further: [(X,), (X, MASK), (X, MASK, True), {"mask": MASK, "temperature": 1.0}],
    Named: [(X,), (X, None, MASK), (X, None, MASK, False), {"attn_mask": MASK}, {"pos_embed": None}],
    Unshifted: [(X,), (X, False), {"return_attention": False}],
    Alone: [(X,), {}],
    Needed: [(X, MASK), (X, None)],
    Ratio: [(X,), (X, 0.0, MASK), {"shift_mask": MASK}],
}
OTHERS = {
    Further: [(X, MASK, False), (X, MASK, 1), {"temperature": 2.0}, {"temperature": 1}, {"bias": None}],
    Named: [(X, X), (X, X, MASK), (X, None, None, True), {"return_attention": None}],
    Unshifted: [(X, True), (X, None), {"return_attention": 1}],
    Ratio: [(X, None), (X, None, MASK)],
}


def split(given):
    return ((X,), given) if isinstance(given, dict) else (given, {})


@pytest.mark.parametrize("kind", GIVEN)
def test_further_arguments_as_they_are_by_default(kind):
    model = randomize(kind(16, (2, 2), 2))
    for args, named in map(split, GIVEN[kind]):
        check(model, *args, arguments=named, count=1)
    mask = [] if kind in (Unshifted, Alone) else [0.0, MASK] if kind is Ratio else [MASK]
    mask = [None, MASK] if kind is Named else mask
    check_gradients(model, X, *mask, backend="torch", count=1)


@pytest.mark.parametrize("kind", OTHERS)
def test_further_arguments_of_other_values_run_the_original(kind):
    model = randomize(kind(16, (2, 2), 2))
    for args, named in map(split, OTHERS[kind]):
        if kind is Unshifted and args[1:] == (None,):
            with pytest.raises(TypeError):
                swinaccel.accelerate(model)(*args)
            continue
        check_fallback(model, *args, arguments=named, reason="the call is not one that")


@pytest.mark.parametrize(("args", "named"), [((X,), {}), ((X, MASK), {"mask": MASK}), ((X, MASK, 1), {})])
def test_calls_that_nobody_takes(args, named):
    model = swinaccel.accelerate(Needed(16, (2, 2), 2), backend="torch")
    with pytest.raises(TypeError):
        model(*args, **named)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_by_name_in_any_order(backend):
    """The first of them is not always the input."""
    model = randomize(official.WindowAttention(16, (2, 2), 2))
    for mask in (MASK, None):
        mask = mask if mask is None else mask.to(DEVICES[backend])
        check(model, arguments={"mask": mask, "x": X.to(DEVICES[backend])}, backend=backend, count=1)
    block, size = randomize(descendants.SwinIRBlock(16, (4, 4), 2, 2, 1, 2)), (4, 4)
    check(block, arguments={"x_size": size, "x": torch.randn(2, 16, 16)}, count=1)
