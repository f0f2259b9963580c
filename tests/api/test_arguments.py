"""Tensors that do not fit: whoever gives one is told, and no kernel reads beyond it.

What the functions say of each argument is in test_functional_calls and test_sequence_functions.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from gradients import gradients
from helpers import TRITON_DEVICE
from kernel_problems import SMALL_AND_LARGE, Case
from torch import Tensor, nn

import swinaccel
from swinaccel import functional, ops
from swinaccel.backends.triton.sequence import Problem
from swinaccel.ops import window as window_ops
from swinaccel.ops.failures import failures

KEEPS_VERDICTS = True

pytestmark = pytest.mark.usefixtures("strict_kernels")


def others(tensor: Tensor) -> dict[str, Tensor]:
    """The same with an axis of another size, with fewer axes, or of another kind."""
    found = {
        "wider": torch.cat((tensor, tensor), -1),
        "flat": tensor.flatten()[:1],
        "more": torch.cat((tensor, tensor)),
        "no": tensor[:0],
        "other kind": tensor.float() if tensor.dtype == torch.int64 else tensor.to(torch.int32),
    }
    if tensor.dim() > 1:
        found["one"] = tensor[..., :1]
    return found


# The operators, which anyone may call.


@SMALL_AND_LARGE
def test_operators_of_windows(window):
    """Every tensor, in forward and backward, of another shape or kind than the problem asks for."""
    case = Case(window, (window[0] + 1, window[1]), (1, 2), cosine=True)
    qkv, options = case.make(torch.float32)
    mask = torch.zeros(2, case.geometry.tokens, case.geometry.tokens).to(qkv)
    seed = torch.zeros(1, dtype=torch.int64, device=qkv.device)
    tensors = [
        qkv, None, None, options["table"], options["index"], options["padding"], mask, options["logit_scale"], seed,
    ]  # fmt: skip
    numbers = [2, list(window), [1, 2], False, -100.0, 0.25, 0.1]
    forward, backward = (
        getattr(torch.ops.swinaccel, f"shifted_window_attention{name}").default for name in ("", "_backward")
    )
    out, lse = forward(*tensors, *numbers, True, None)
    names = ["qkv", "k", "v", "table", "index", "padding", "mask", "logit_scale", "seed"]
    for place, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
        for kind, other in ({} if tensor is None else others(tensor)).items():
            if (name, kind) in (("qkv", "more"), ("qkv", "no"), ("table", "more"), ("table", "no"), ("seed", "flat")):
                continue  # another batch, rows that the index does not name, or that are all missing, and the same
            changed = [*tensors[:place], other, *tensors[place + 1 :]]
            words = f"{name} must" if place else "must"  # what is wrong with the one beside others is for these to say
            with pytest.raises(ValueError, match=words):
                forward(*changed, *numbers, True, None)
            with pytest.raises(ValueError, match=words):
                backward(torch.ones_like(out), out, lse, *changed, *numbers, True)
    for place, kept in enumerate((torch.ones_like(out), out, lse)):
        if place == 0 or case.geometry.tokens > 64:
            for other in others(kept).values():
                given = [torch.ones_like(out), out, lse]
                given[place] = other
                with pytest.raises(ValueError, match=("grad", "out", "lse")[place]):
                    backward(*given, *tensors, *numbers, True)
    for place, wrong in ((0, 3), (0, 0), (1, [0, 4]), (1, [4]), (2, [-1, 0]), (2, [0, window[1]])):
        with pytest.raises(ValueError, match="got"):
            forward(*tensors, *numbers[:place], wrong, *numbers[place + 1 :], True, None)
    assert not failures


def test_operators_of_parts_and_dense_biases():
    q = torch.randn(1, 4, 4, 32, device=TRITON_DEVICE)
    bias = torch.randn(2, 16, 16, device=TRITON_DEVICE)
    numbers = [2, [4, 4], [0, 0], False, 0.0, 0.25, 0.0, False, None]

    def run(k: Any, v: Any, bias: Any) -> None:
        torch.ops.swinaccel.shifted_window_attention(q, k, v, bias, *[None] * 5, *numbers)

    run(q, q, bias)
    for k, v in ((q[..., :16], q), (q, q[:, :3]), (q, q.half()), (q.half(), q)):
        with pytest.raises(ValueError, match="must"):
            run(k, v, bias)
    for wrong in (bias[:1], bias[:, :9], bias[..., :9], bias[:, :9, :9], bias[0], bias.flatten()):
        with pytest.raises(ValueError, match="bias"):
            run(q, q, wrong)


def test_operators_of_sequences():
    q, factor = torch.randn(2, 3, 20, 8, device=TRITON_DEVICE), torch.randn(3, 20, 2, device=TRITON_DEVICE)
    mask = torch.zeros(1, 20, 20, device=TRITON_DEVICE)
    tensors, problem = [q, q, q, factor, factor, mask], Problem(False, 0, 0, 0.3)
    out, lse = torch.ops.swinaccel.sequence_attention(*tensors, *problem)
    for place, name in enumerate(("q", "k", "v", "q_factor", "k_factor", "mask")):
        for kind, other in others(tensors[place]).items():
            if (name, kind) in (("q", "other kind"), ("q", "no"), ("mask", "more")):
                continue
            changed = [*tensors[:place], other, *tensors[place + 1 :]]
            with pytest.raises(ValueError, match="got"):
                torch.ops.swinaccel.sequence_attention(*changed, *problem)
            with pytest.raises(ValueError, match="got"):
                torch.ops.swinaccel.sequence_attention_backward(
                    torch.ones_like(out), *changed, out, lse, *problem, True
                )
    for place, kept in enumerate((torch.ones_like(out), out, lse)):
        for other in others(kept).values():
            grad, *rest = [other if at == place else t for at, t in enumerate((torch.ones_like(out), out, lse))]
            with pytest.raises(ValueError, match="got"):
                torch.ops.swinaccel.sequence_attention_backward(grad, *tensors, *rest, *problem, True)
    for wrong in ((False, 0, 0, 0.0), (False, -1, 1, 1.0), (False, 4, 0, 1.0), (True, 4, 1, 1.0)):
        with pytest.raises(ValueError, match="got"):
            torch.ops.swinaccel.sequence_attention(q, q, q, None, None, None, *wrong)
    assert not failures


def test_operator_of_position_tables():
    good = [torch.randn(shape, device=TRITON_DEVICE) for shape in ((1, 7, 7, 2), (20, 2), (20,), (3, 20))]
    assert torch.ops.swinaccel.position_table(*good).shape == (49, 3)
    for place in range(4):
        for kind, other in others(good[place]).items():
            if (place, kind) not in ((0, "more"), (3, "more")):
                with pytest.raises(ValueError, match="must"):
                    torch.ops.swinaccel.position_table(*good[:place], other, *good[place + 1 :])


def test_operator_of_blocks():
    """All that follows a block's attention."""
    x = torch.randn(1, 8, 32, device=TRITON_DEVICE, dtype=torch.float16)
    vector, wide = torch.ones_like(x[0, 0]), torch.ones_like(x[0, :2].flatten())
    weights = torch.randn(64, 32).to(x), torch.randn(32, 64).to(x)
    good = [x, x, vector, vector, 1e-5, vector, vector, 1e-5, weights[0], wide, weights[1], vector]
    assert torch.ops.swinaccel.after_attention(*good, False).shape == x.shape
    for place, tensor in enumerate(good):
        for kind, other in others(tensor).items() if isinstance(tensor, Tensor) else ():
            if place == 0 and kind in ("no", "more"):
                continue
            for post_norm in (False, True):
                with pytest.raises(ValueError, match="must"):
                    torch.ops.swinaccel.after_attention(*good[:place], other, *good[place + 1 :], post_norm)


# The index, whose entries are read on the device alone.


@SMALL_AND_LARGE
@pytest.mark.parametrize("entry", [-1, "rows", 2**31 - 1])
def test_entries_beyond_the_table(window, entry):
    """The kernels give NaN where there is no row, and read and write nothing beyond the table."""
    case = Case(window, window, heads=2)
    qkv, options = case.make(torch.float32)
    rows = len(options["table"])
    whole = torch.full((rows + 2, 2), 1e4, device=qkv.device)  # what lies around it would show
    whole[1:-1] = options["table"]
    options["table"] = whole[1:-1]
    options["index"] = options["index"].clone()
    options["index"][2, 5] = rows if entry == "rows" else entry
    out, found = gradients(qkv, case.geometry, torch.ones(1, *window, 32, device=qkv.device), **options)
    place = divmod(2, window[1])
    assert bool(out[0, place[0], place[1]].isnan().all())
    assert int(out.isnan().sum()) == 32
    assert found["table"].shape == (rows, 2)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_entries_of_an_index(backend, monkeypatch):
    """Functions say what is wrong with it, also when it was written to since; a table may be cut below it."""
    if backend == "torch":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    case = Case((4, 4), (8, 8))
    qkv, options = case.make(torch.float32, device)
    table, index = options["table"], options["index"].clone()

    def attend(table: Tensor, index: Tensor) -> Tensor:
        return functional.shifted_window_attention(qkv, 4, 2, table=table, index=index)

    attend(table, index)
    with pytest.raises(ValueError, match=r"index must hold rows of the table, 0 to 39; got 0 to 48"):
        attend(table[:40], index)
    index[3, 4] = 49
    for _ in range(2):
        with pytest.raises(ValueError, match="0 to 48; got 0 to 49"):
            attend(table, index)
    index[3, 4] = -1
    with pytest.raises(ValueError, match="0 to 48; got -1 to 48"):
        attend(table, index)
    index[3, 4] = 48
    attend(table, index)


# Images of nothing.


@pytest.mark.parametrize("shape", [(0, 7, 8, 48), (1, 0, 8, 48), (1, 7, 0, 48), (1, 0, 3, 4, 48)], ids=str)
def test_images_of_nothing(shape):
    window = (2, 4, 4) if len(shape) == 5 else (4, 4)
    leaves = {
        "qkv": torch.zeros(shape), "bias": torch.randn(2, math.prod(window), math.prod(window)),
        "padding": torch.randn(48), "logit_scale": torch.randn(2),
    }  # fmt: skip
    leaves = {name: one.to(TRITON_DEVICE).requires_grad_() for name, one in leaves.items()}
    out = functional.shifted_window_attention(**leaves, window_size=window, num_heads=2, shift_size=1)
    assert out.shape == (*shape[:-1], 16)
    found = torch.autograd.grad(out.sum(), tuple(leaves.values()))
    assert not any(bool(one.any()) for one in found)


# Modules whose parameters were replaced.


def replace(module: nn.Module, path: str, value: Any) -> nn.Module:
    module = copy.deepcopy(module)
    *parents, name = path.split(".")
    owner = module.get_submodule(".".join(parents))
    owner.__dict__.get("_parameters").pop(name, None)
    if isinstance(value, Tensor) and name not in owner._buffers:
        value = nn.Parameter(value, requires_grad=False)
    setattr(owner, name, value)
    return module


@pytest.mark.parametrize(
    ("kind", "path", "value", "words"),
    [
        ("S", "relative_position_bias_table", torch.zeros(49, 1), "table must have shape (rows, heads), 2 heads"),
        ("S", "relative_position_bias_table", torch.zeros(48, 2), "index must hold rows of the table, 0 to 47"),
        ("S", "relative_position_index", torch.zeros(9, 9).long(), "index must have shape (16, 16)"),
        ("S", "qkv.weight", torch.zeros(96, 16), "qkv.weight must have shape (48, 16); got (96, 16)"),
        ("S", "qkv.bias", torch.zeros(1), "qkv.bias must have shape (48,); got (1,)"),
        ("S", "qkv.bias", torch.zeros(48).half(), "qkv.bias must have x's dtype, torch.float32; got torch.float16"),
        ("S", "qkv", nn.Sequential(nn.Linear(16, 96)), "qkv must give shape (1, 7, 8, 48); got (1, 7, 8, 96)"),
        ("S", "proj", nn.Linear(16, 24), "proj.weight must have shape (16, 16); got (24, 16)"),
        ("S", "window_size", (0, 4), "window_size must be 2 integers of 1 or more; got (0, 4)"),
        ("S", "num_heads", 3, "num_heads 3"),
        ("V2", "logit_scale", torch.zeros(1, 1, 1), "logit_scale must have shape (2,) or (2, 1, 1)"),
        ("V2", "logit_scale", None, "logit_scale must be a tensor; got NoneType"),
        ("V2", "cpb_mlp.2", nn.Linear(512, 4, bias=False), "cpb_mlp.2.weight must have shape (2, 512); got (4, 512)"),
        ("V2", "cpb_mlp", nn.Linear(2, 1), "cpb_mlp must give shape (1, 7, 7, 2); got (1, 7, 7, 1)"),
        ("V2", "relative_coords_table", torch.zeros(1, 5, 5, 2), "index must hold rows of the table, 0 to 24"),
        ("V2", "relative_coords_table", torch.zeros(49, 3), "relative_coords_table must have shape (..., 2)"),
        ("V2", "q_bias", torch.zeros(18), "q_bias must have shape (16,); got (18,)"),
        ("V2", "v_bias", None, "v_bias must be a tensor; got NoneType"),
        ("W", "relative_position_bias_table", torch.zeros(49, 4), "table must have shape (rows, heads), 2 heads"),
        ("W", "qkv", nn.Sequential(nn.Linear(16, 96)), "qkv must give shape (4, 16, 48); got (4, 16, 96)"),
        ("W", "attn_drop", nn.Linear(1, 1), "attn_drop must be nn.Dropout or nn.Identity; got Linear"),
    ],
)
def test_replaced_parameters(kind, path, value, words):
    kinds = {
        "W": (swinaccel.nn.WindowAttention(16, 4, 2), (4, 16, 16)),
        "S": (swinaccel.nn.ShiftedWindowAttention(16, 4, 2, 2), (1, 7, 8, 16)),
        "V2": (swinaccel.nn.ShiftedWindowAttentionV2(16, 4, 2, 2), (1, 7, 8, 16)),
    }
    module, shape = kinds[kind]
    x = torch.randn(shape, device=TRITON_DEVICE)
    module = module.to(TRITON_DEVICE)
    module(x)
    with pytest.raises((ValueError, TypeError)) as caught:
        replace(module, path, value).to(TRITON_DEVICE)(x)
    assert words in str(caught.value)


def test_inputs_of_another_kind():
    module = swinaccel.nn.ShiftedWindowAttention(16, 4, 2, 2)
    for x, words in (
        (torch.zeros(1, 8, 8, 16).half(), "qkv.weight must have x's dtype, torch.float16; got torch.float32"),
        (torch.zeros(1, 8, 8, 16, device="meta"), "qkv.weight must be on x's device, meta; got cpu"),
        (torch.zeros(1, 8, 8, 16).long(), "x must be floating point; got torch.int64"),
        (torch.zeros(1, 8, 8, 16).to_sparse(), "x must be a dense tensor; got one of layout torch.sparse_coo"),
        (torch.zeros(1, 8, 8, 16).to(torch.float8_e5m2), "x must be fp16, bf16, fp32 or fp64; got torch.float8_e5m2"),
        (None, "x must be a tensor; got NoneType"),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            module(x)
        assert words in str(caught.value)


def test_dropout_that_was_taken_out():
    module = swinaccel.nn.WindowAttention(16, 4, 2, attn_drop=0.5).train().to(TRITON_DEVICE)
    x = torch.randn(4, 16, 16, device=TRITON_DEVICE)
    module.attn_drop = nn.Identity()
    assert torch.equal(module(x), module(x))


def test_a_problem_that_was_refused_is_not_given_up():
    """What one tensor was wrong with says nothing of the kernels."""
    case = Case((4, 4), (8, 8))
    qkv, options = case.make(torch.float32)
    with pytest.raises(ValueError, match="table must have shape"):
        window_ops.shifted_window_attention(qkv, case.geometry, **{**options, "table": options["table"][:, :1]})
    assert window_ops.shifted_window_attention(qkv, case.geometry, **options).shape == (1, 8, 8, 32)
    assert not ops.has_failures()
