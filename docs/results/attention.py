"""Pose the problems of attention alone to swinaccel and to its peers: eager, SDPA, compiled, and their own kernels."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swinaccel import functional, nn
from swinaccel.spec import reference
from swinaccel.spec.window import Geometry

HEAD_DIM = 32  # of every published Swin

Call = Callable[[], Tensor]  # forward, or forward and backward; returns the output
Make = Callable[[], Call]

# The peers' own repositories: modules to look for, and the function in them.
SEEDS = {
    "Flash Window Attention": (("flash_swin_attn", "flash_swin_attn_func"),),
    "Flash Window Attention V2": (
        ("fwca", "FlashWindowCosineAttention"),
        ("flash_win_attn_v2", "flash_win_attn_v2_func"),
        ("flash_win_attn_2", "FlashWindowAttention2"),
    ),
    "FlashBias, rank 16": (("flash_bias_triton", "flash_bias_func"),),
    "Bloc-Sliding-Window": (("kernel.SWBA", "attention"),),
}


@dataclass
class Setting:
    """The options of all rows; `deadline` is a time of `time.monotonic()`."""

    device: torch.device
    rounds: int
    compile: bool = False
    seed_repos: Path | None = None
    deadline: float | None = None


class Posed(NamedTuple):
    """A problem with its data.

    Attributes:
        makers: functions that make the calls, by the names of the variants.
        bytes, flops: what a forward must move and compute.
        adapt: brings swinaccel's output into the layout of the others'.
    """

    makers: dict[str, Make]
    bytes: float
    flops: float
    adapt: Callable[[Tensor], Tensor] = lambda out: out


class Windows(NamedTuple):
    """Attention within the windows of square images."""

    name: str
    batch: int
    side: int
    heads: int
    window: int
    shift: int
    cosine: bool = False

    def __str__(self) -> str:
        place = f"{self.name}, B{self.batch}, {self.side}x{self.side}"
        return f"{place}, {self.heads} heads, w{self.window} s{self.shift}"

    def pose(self, setting: Setting, dtype: torch.dtype, backward: bool) -> Posed:
        """Pose it from the qkv image to the image; peers get windows, bias and mask, which is not counted."""
        geometry = Geometry((self.side,) * 2, (self.window,) * 2, (self.shift,) * 2)
        channels, heads, device = self.heads * HEAD_DIM, self.heads, setting.device
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        def windows(image: Tensor) -> Tensor:
            return reference.split_heads(reference.cut(image, geometry), heads)

        qkv, table = draw(self.batch, self.side, self.side, 3 * channels), 0.5 * draw((2 * self.window - 1) ** 2, heads)
        index = nn.WindowAttention(channels, self.window, heads).relative_position_index.to(device)
        logit_scale = torch.full((heads, 1, 1), math.log(10.0), device=device, dtype=dtype) if self.cosine else None
        bias = reference.bias_from_table(table, index).contiguous()
        mask = reference.shift_mask(geometry, -100.0, device=device).to(dtype)
        q, k, v = (windows(part).contiguous() for part in qkv.chunk(3, -1))
        given = Cut(q, k, v, bias, mask, logit_scale)
        scales = [] if logit_scale is None else [logit_scale]
        for tensor in (qkv, table, q, k, v, bias, *scales):
            tensor.requires_grad_(backward)
        options: dict[str, Any] = {"table": table, "index": index, "logit_scale": logit_scale}
        makers: dict[str, Make] = {
            "eager": lambda: partial(eager_attention, *given),
            "SDPA + mask": lambda: _sdpa(given, backward),
        }
        if setting.compile:
            makers["torch.compile"] = lambda: partial(torch.compile(eager_attention, dynamic=False), *given)
        makers["swinaccel"] = lambda: partial(
            functional.shifted_window_attention, qkv, self.window, heads, self.shift, **options
        )
        if setting.seed_repos is not None:
            makers |= _window_seeds(setting.seed_repos, given, backward)
        if backward:
            grad = draw(*qkv.shape[:-1], channels)
            wanted = dict.fromkeys(makers, ([q, k, v, bias, *scales], windows(grad).contiguous()))
            wanted["swinaccel"] = ([qkv, table, *scales], grad)
            makers = {name: partial(_with_gradients, make, *wanted[name]) for name, make in makers.items()}
        pixels = self.batch * self.side**2
        flops = 4.0 * pixels * geometry.tokens * channels  # two products, each 2 N a channel and token
        return Posed(makers, 4 * pixels * channels * dtype.itemsize, flops, windows)


class Sequence(NamedTuple):
    """Attention with block sliding windows over one sequence."""

    tokens: int
    heads: int = 12
    head_dim: int = 64
    block: int = 256
    blocks: int = 16

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, {self.heads} heads, blocks of {self.block}, windows of {self.blocks}"

    def pose(self, setting: Setting, dtype: torch.dtype, backward: bool) -> Posed:
        """Pose it, with all gradients of q, k and v in the backward."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, self.heads, self.tokens, self.head_dim)
        q, k, v, grad = (torch.randn(*shape, generator=generator).to(setting.device, dtype) for _ in range(4))
        for tensor in (q, k, v):
            tensor.requires_grad_(backward)
        makers: dict[str, Make] = {"SDPA + mask": lambda: _sdpa_of_sequence(self, q, k, v)}
        if setting.compile:
            makers["FlexAttention, compiled"] = lambda: _flex_attention(self, q, k, v)
        makers["swinaccel"] = lambda: partial(
            functional.block_sliding_window_attention, q, k, v, self.block, self.blocks
        )
        if (repos := setting.seed_repos) is not None:
            name, rest = "Bloc-Sliding-Window", (self.block, self.blocks, self.head_dim**-0.5)
            makers[name] = lambda: partial(seed_function(repos, name), q, k, v, *rest)
        if backward:
            makers = {name: partial(_with_gradients, make, [q, k, v], grad) for name, make in makers.items()}
        pairs = self.block**2 * sum(min(n + 1, self.blocks) for n in range(self.tokens // self.block))
        return Posed(makers, 4 * q.nbytes, 4.0 * pairs * self.heads * self.head_dim)


WINDOWS = (
    Windows("Swin-B stage 1", 64, 56, 4, 7, 3),
    Windows("Swin-B stage 3", 64, 14, 16, 7, 3),
    Windows("SwinV2-B stage 1", 64, 64, 4, 8, 4, True),
    Windows("SwinV2", 16, 64, 6, 16, 8, True),
    Windows("SwinV2", 32, 48, 8, 12, 6, True),
    Windows("SwinV2", 16, 96, 4, 24, 12, True),
)
SEQUENCES = tuple(Sequence(tokens) for tokens in (4096, 16384, 65536, 131072))


def _with_gradients(make: Make, wanted: list[Tensor], grad: Tensor) -> Call:
    """Return the call that is made, followed by the gradients of `wanted`."""
    call = make()

    def step() -> Tensor:
        out = call()
        torch.autograd.grad(out, wanted, grad)
        return out.detach()

    return step


class Cut(NamedTuple):
    """Windows that are cut already, as the peers take them.

    Attributes:
        q, k, v: (W, H, N, HEAD_DIM), contiguous.
        bias: (H, N, N).
        mask: (M, N, N), 0 or -100; window w uses row w % M.
        logit_scale: (H, 1, 1), before its clamp and exponential; None for plain scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    mask: Tensor
    logit_scale: Tensor | None


def eager_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, logit_scale: Tensor | None) -> Tensor:
    """Return window attention as the models' own code has it; see `Cut`."""
    if logit_scale is None:
        scores = (q * HEAD_DIM**-0.5) @ k.transpose(-2, -1)
    else:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * logit_scale.clamp(max=math.log(100.0)).exp()
    scores = scores + bias
    scores = scores.unflatten(0, (-1, mask.shape[0])) + mask[:, None]
    return scores.flatten(0, 1).softmax(-1) @ v


def _scaled(q: Tensor, k: Tensor, logit_scale: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Return queries, keys, and the factor of their product that makes it the scores."""
    if logit_scale is None:
        return q, k, HEAD_DIM**-0.5
    return F.normalize(q, dim=-1) * logit_scale.clamp(max=math.log(100.0)).exp(), F.normalize(k, dim=-1), 1.0


def _sdpa(given: Cut, backward: bool) -> Call:
    """Return PyTorch's attention of all windows of an image at once, with the sum of bias and mask (M, H, N, N)."""
    q, k, v, bias, mask, logit_scale = given

    def sum_of_masks() -> Tensor:
        return (bias + mask[:, None]).flatten(0, 1)[None]

    prepared = None if backward else sum_of_masks()

    def call() -> Tensor:
        added = sum_of_masks() if prepared is None else prepared
        *pair, scale = _scaled(q, k, logit_scale)
        one, other, last = (t.view(-1, added.shape[1], *t.shape[2:]) for t in (*pair, v))
        added = added.expand(one.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(one, other, last, attn_mask=added, scale=scale).reshape(q.shape)

    return call


def _window_seeds(repos: Path, given: Cut, backward: bool) -> dict[str, Make]:
    """Return functions that make the calls of the peers' own kernels, by name."""
    q, k, v, bias, mask, logit_scale = given
    makers: dict[str, Make] = {}
    if logit_scale is None:
        makers["Flash Window Attention, no mask"] = lambda: partial(
            seed_function(repos, "Flash Window Attention"), q, k, v, bias, HEAD_DIM**-0.5
        )
    else:
        name = "Flash Window Attention V2"
        makers[name] = lambda: partial(seed_function(repos, name), q, k, v, logit_scale, bias, mask)
    return makers if backward else makers | {"FlashBias, rank 16": lambda: _flash_bias(repos, given)}


def _flash_bias(repos: Path, given: Cut) -> Call:
    """Return FlashBias's call, with factors of rank 16; it takes and gives (W, N, H, HEAD_DIM)."""
    run = seed_function(repos, "FlashBias, rank 16")
    factors = functional.factorize_bias(given.bias.float(), rank=16)
    q_bias, k_bias = (t.to(given.q.dtype).transpose(0, 1)[None].contiguous() for t in factors[:2])
    q, k, v = (t.transpose(1, 2).contiguous() for t in given[:3])
    mask = given.mask.repeat(q.shape[0] // given.mask.shape[0], 1, 1)[:, None]
    logit_scale = None if given.logit_scale is None else given.logit_scale.view(-1, 1)

    def call() -> Tensor:
        one, other, scale = _scaled(q, k, logit_scale)
        return run(one, other, v, q_bias, k_bias, mask, False, scale).transpose(1, 2)

    return call


def _sdpa_of_sequence(case: Sequence, q: Tensor, k: Tensor, v: Tensor) -> Call:
    size = case.tokens**2 * q.itemsize
    if q.is_cuda and size > torch.cuda.mem_get_info(q.device)[1] / 6:
        raise MemoryError(f"its mask alone is {size / 2**30:.0f} GiB")
    seen = reference.visible_keys(case.tokens // case.block, block_size=1, window_blocks=case.blocks, device=q.device)
    mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -math.inf)
    mask = mask.repeat_interleave(case.block, 0).repeat_interleave(case.block, 1)
    return partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask)


def _flex_attention(case: Sequence, q: Tensor, k: Tensor, v: Tensor) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ago = query // case.block - key // case.block
        return (ago >= 0) & (ago < case.blocks)

    mask = create_block_mask(seen, None, None, case.tokens, case.tokens, device=str(q.device), _compile=True)
    fast: Any = torch.compile(flex_attention, dynamic=False)
    return partial(fast, q, k, v, block_mask=mask)


def seed_function(repos: Path, peer: str) -> Callable[..., Any]:
    """Import a peer's function from where it lies under a folder; ImportError where there is none."""
    for module, name in SEEDS[peer]:
        path = module.replace(".", "/")
        files = [*repos.rglob(f"{path}/__init__.py"), *repos.rglob(f"{path}.py")]
        for file in sorted(files, key=lambda file: ("vision" not in str(file).lower(), str(file))):
            levels = path.count("/") + (file.name == "__init__.py")
            sys.path.insert(0, os.fspath(file.resolve().parents[levels]))
            try:
                found = getattr(importlib.import_module(module), name)
            finally:
                del sys.path[0]
            return found.apply if isinstance(found, type) and issubclass(found, torch.autograd.Function) else found
    wanted = " or ".join(module for module, _ in SEEDS[peer])
    raise ImportError(f"{wanted} was not found in {repos}")
