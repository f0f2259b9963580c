"""One table of what users do to a model after `accelerate()`: edits of a part, seen by calls of every mode.

After an edit, an accelerated model gives what an untouched twin gives that was edited alike, by the part's kernels
where these can follow, else by the part's own code. `edits.EDITS` are edits of whole models, at random places.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import block_gradients as training
import embeddings
import helpers
import pytest
import test_switches as switches
import torch
from attention_edits import ATTENTION, ATTENTION_V2, TORCHVISION_ATTENTION, UNKNOWN_ATTENTION
from helpers import TRITON_DEVICE
from layer_edits import BLOCK, BLOCK_V2, EMBEDDING, EMBEDDING_AND_NORM, MERGING, TRAINING, TRAINING_V2
from part_edits import Doubled, Edit
from timm.models import swin_transformer
from torch import nn

import swinaccel
from swinaccel import ops
from swinaccel.backends.triton import block as kernels
from swinaccel.backends.triton import devices, launches
from swinaccel.runtime import traced

KEEPS_VERDICTS = True

HALF = torch.float16


class Part(NamedTuple):
    """A module that is accelerated, the shape of its input, and the kernels that are its own, also when compiled."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kernels: tuple[str, ...]
    fuse: str = "auto"
    backend: str = "triton"
    compiled: bool = True


ATTENDING = ("_window_attention_fwd_small_kernel", "_window_attention_fwd_kernel")
AROUND = ("_norm_kernel", "_merge_kernel", "_gelu_kernel", "_mlp_kernel")


def timm_block(**options: Any) -> nn.Module:
    block = helpers.timm_block((8, 8), shift=2, **options)
    block.attn.fused_attn = False  # its softmax is called
    return block


def merging() -> nn.Module:
    return embeddings.Model(swin_transformer.PatchMerging(16))


PARTS = {
    "attention": (Part(timm_block, (2, 8, 8, 16), ATTENDING, "attention"), ATTENTION),
    "attention-torch": (Part(timm_block, (2, 8, 8, 16), ATTENDING, "attention", "torch"), ATTENTION),
    "attention-v2": (Part(lambda: timm_block(v2=True), (2, 8, 8, 16), ATTENDING, "attention"), ATTENTION_V2),
    "attention-torchvision": (
        Part(lambda: helpers.torchvision_attention(shift=(2, 2)), (2, 8, 8, 16), ATTENDING),
        TORCHVISION_ATTENTION,
    ),
    "attention-unknown": (Part(switches.block, (2, 64, 16), ATTENDING, "attention"), UNKNOWN_ATTENTION),
    "attention-unknown-torch": (Part(switches.block, (2, 64, 16), ATTENDING, "attention", "torch"), UNKNOWN_ATTENTION),
    "block": (Part(lambda: training.drop_paths(timm_block()), (2, 8, 8, 16), AROUND), BLOCK | TRAINING),
    "block-v2": (Part(lambda: training.drop_paths(timm_block(v2=True)), (2, 8, 8, 16), AROUND), BLOCK_V2 | TRAINING_V2),
    "merging": (Part(merging, (2, 8, 8, 16), AROUND, compiled=False), MERGING),
    "embedding": (
        Part(lambda: embeddings.Model(embeddings.timm()), (2, 3, 24, 24), ("embed", "embed and norm", "product")),
        EMBEDDING,
    ),
    "embedding-and-norm": (
        Part(
            lambda: embeddings.Model(embeddings.huggingface("Swinv2", "Embeddings")),
            (2, 3, 24, 24),
            ("embed and norm",),
        ),
        EMBEDDING_AND_NORM,
    ),
}
# Of each kind of edit one, and what compilers need their own eyes for.
COMPILED = {
    "attention": {
        "parameter", "data", "buffer", "scale", "forward-attn.qkv", "method", "forward-projection", "class",
        "class-attention", "class-projection", "softmax-axis",
    },
    "attention-torchvision": {"shift", "method"},
    "attention-unknown": UNKNOWN_ATTENTION.keys(),
    "block": {
        "parameters", "eps", "child", "hook-norm", "hook-fc2", "all-hooks-norm", "all-hooks-linear", "norm",
        "activation", "tanh", "mlp-norm", "drop-path", "forward", "dropout", "class-norm1", "class-mlp.act",
    },
    "block-v2": {"norm", "activation", "drop-path"},
    "merging": {"parameter", "hook-norm", "forward-reduction", "class-reduction"},
    "embedding": {
        "parameter", "dtype", "bias-size", "hook-projection", "hook-norm", "forward-projection", "forward", "padding",
        "weight-class", "bias-class", "class", "class-convolution", "class-projection", "identity-class",
        "norm-of-groups", "norm-of-more-axes", "channels-first",
    },
}  # fmt: skip


def modes(place: str, name: str, edit: Edit) -> list[str]:
    first = ["first"] if "embedding" in place else []
    return [*edit.modes, *first, *(["compiled"] if name in COMPILED.get(place, ()) else [])]


CASES = [
    pytest.param(part, edit, mode, id=f"{place}-{name}-{mode}")
    for place, (part, edits) in PARTS.items()
    for name, edit in edits.items()
    for mode in modes(place, name, edit)
    if mode == "eager" or part.backend == "triton"
]


@pytest.fixture
def ran(monkeypatch):
    """Names of the kernels that ran, and of what stands for one where there is none."""
    names = []
    monkeypatch.setattr(devices, "multiprocessors", lambda device: 0)  # any number of rows keeps it busy

    def spy(owner, attribute, name_of):
        plain = getattr(owner, attribute)

        def call(*args):
            names.append(name_of(*args))
            return plain(*args)

        monkeypatch.setattr(owner, attribute, call)

    spy(launches.BoundLaunch, "__call__", lambda bound, *_: bound._launch.kernel.__name__)
    spy(launches.Launch, "__call__", lambda launch, *_: launch.kernel.__name__)
    spy(kernels, "embed", lambda x, weight, bias, norm: "embed" if norm is None else "embed and norm")
    spy(traced, "embedding_of", lambda *_: "product")
    yield names
    assert not ops.has_failures()


def call(model, part, mode):
    """Return what a call gives, with gradients in training, or the exception that it raises."""
    model_dtype = next(model.parameters()).dtype
    x = torch.randn(part.shape, generator=torch.Generator().manual_seed(3)).to(TRITON_DEVICE, model_dtype)
    torch.manual_seed(0)
    try:
        if mode == "training":
            return training.gradients(model, x)
        with torch.no_grad():
            return model(x)
    except Exception as error:
        return error


def assert_alike(found, expected, mode, tolerance):
    if isinstance(expected, Exception):
        assert isinstance(found, Exception if mode == "compiled" else type(expected)), found
        return
    if isinstance(found, Exception):
        raise found
    if isinstance(expected, dict):
        assert {name for name, one in found.items() if one is None} == {n for n, one in expected.items() if one is None}
        found, expected = ({name: one for name, one in each.items() if one is not None} for each in (found, expected))
    for one, another in zip(helpers.tensors(found), helpers.tensors(expected), strict=True):
        if another.isfinite().all():
            helpers.assert_close(one, another, tolerance)
        else:
            torch.testing.assert_close(one, another, rtol=tolerance, atol=tolerance, equal_nan=True)


@functools.cache
def are_classes_guarded():
    """Return True if compiled code of PyTorch itself sees a module's new class; that of torch 2.11 does not."""
    module, x = nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        compiled(x)
        module[0].__class__ = Doubled
        return torch.equal(compiled(x), module(x))


@pytest.mark.parametrize(("part", "edit", "mode"), CASES)
def test_edits(part, edit, mode, ran, monkeypatch, request):
    if re.fullmatch(r"\w+-class-compiled", request.node.callspec.id) and not are_classes_guarded():
        pytest.skip("compiled code of this PyTorch does not see that a module is of another class")
    halves = mode == "compiled" or (TRITON_DEVICE == "cuda" and "embed and norm" in part.kernels)
    twin = helpers.randomize(part.make()).to(TRITON_DEVICE, HALF if halves else torch.float32)
    twin.train(mode == "training")
    model = swinaccel.accelerate(copy.deepcopy(twin), backend=part.backend, fuse=part.fuse)
    run = torch.compile(model, backend="eager") if mode == "compiled" else model

    def is_accelerated():
        ran.clear()
        tolerance = 1e-2 if next(twin.parameters()).dtype is HALF else 1e-4
        fallbacks = sum(entry.fallbacks for entry in swinaccel.report(model))
        assert_alike(call(run, part, mode), call(twin, part, mode), mode, tolerance)
        if part.backend == "torch":
            return sum(entry.fallbacks for entry in swinaccel.report(model)) == fallbacks
        return any(name in part.kernels for name in ran)

    by_compiler = mode == "compiled" and not part.compiled
    if mode != "first" and not (mode == "compiled" and hasattr(edit.change, "is_unguarded")):
        assert is_accelerated() is not by_compiler
    undone = [edit.change(one, monkeypatch) for one in (model, twin)]
    handles = [one for one in undone if one is not None]
    try:
        for _ in range(2 if mode == "eager" else 1):
            assert is_accelerated() is (edit.kept and not by_compiler) or edit.kept is None
        if edit.reason and mode == "eager":
            assert any(edit.reason in (entry.reason or "") for entry in swinaccel.report(model)), swinaccel.report(
                model
            )
    finally:
        for handle in handles:
            handle.remove()
    if handles and not (mode == "compiled" and hasattr(edit.change, "is_unguarded")):
        assert is_accelerated()
