"""Launches that are bound before their tensors are known give what the operators give, to the last bit."""

from __future__ import annotations

import helpers
import pytest
import torch
from helpers import TRITON_DEVICE

from swinaccel import ops
from swinaccel.backends.triton import block as kernels
from swinaccel.backends.triton import launches
from swinaccel.backends.triton import window as window_launches
from swinaccel.errors import ArgumentError
from swinaccel.ops import block as block_ops
from swinaccel.ops import position
from swinaccel.ops import window as window_ops
from swinaccel.spec.window import Geometry

HEADS, DIM = 2, 8
CHANNELS = HEADS * DIM


def tensors(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).to(TRITON_DEVICE) for shape in shapes]


def problem(window, shift, packed=True, form="", dtype=torch.float32):
    """Return a geometry, the tensors that `run` takes, and those that `bind` and the operator take by name."""
    geometry = Geometry(tuple(2 * side - 1 for side in window), window, shift)
    tokens, width = geometry.tokens, 3 * CHANNELS if packed else CHANNELS
    q, k, v = tensors(*[(3, *geometry.size, width)] * 3, dtype=dtype)
    rows = helpers.table_rows(window)
    table, padding, mask, logit_scale = tensors(
        (HEADS, rows), (3 * CHANNELS,), (geometry.num_windows, tokens, tokens), (HEADS,), dtype=dtype
    )
    given = {
        "table": table.t(),
        "index": helpers.position_index(window).to(TRITON_DEVICE),
        "padding": padding,
        "mask": mask if form == "mask" else None,
        "logit_scale": logit_scale if form == "cosine" else None,
    }
    return geometry, (q, None, None) if packed else (q, k, v), given


def bind(geometry, qkv, given, **options):
    return window_ops.bind(qkv[0] if qkv[1] is None else qkv, geometry, num_heads=HEADS, **given, **options)


def attend(geometry, qkv, given, **options):
    tokens = qkv[0] if qkv[1] is None else qkv
    return window_ops.shifted_window_attention(tokens, geometry, num_heads=HEADS, **given, **options)


PROBLEMS = [
    problem((3, 3), (1, 1)),
    problem((3, 3), (0, 0), packed=False, form="mask", dtype=torch.float16),
    problem((2, 2, 3), (1, 1, 1), form="cosine"),
    problem((6, 11), (3, 5), form="mask"),
    problem((6, 11), (0, 0), packed=False, form="cosine"),
]


@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: str(case[0].window))
def test_bound_attention(case, strict_kernels):
    geometry, qkv, given = case
    bound, expected = bind(*case, scale=0.3), attend(*case, scale=0.3)
    assert torch.equal(bound.run(*qkv, **given), expected)
    given = {**given, "table": given["table"] * 2}
    assert torch.equal(bound.run(*qkv, **given), attend(geometry, qkv, given, scale=0.3))


def test_nothing_is_planned_again(strict_kernels):
    """The launch of a binding is the one that the operator has, so that both are compiled once."""
    launches.launches.clear()
    bind(*PROBLEMS[3], scale=0.3)
    count = len(launches.launches)
    attend(*PROBLEMS[3], scale=0.3)
    assert len(launches.launches) == count


def test_a_problem_that_does_not_fit():
    geometry, qkv, given = PROBLEMS[0]
    with pytest.raises(ArgumentError, match="table"):
        bind(geometry, qkv, {**given, "table": given["table"][:, :1]})


def test_a_bound_kernel_that_fails(monkeypatch, caplog):
    geometry, qkv, given = PROBLEMS[0]
    bound = bind(geometry, qkv, given, scale=0.3)
    expected = attend(geometry, qkv, given, scale=0.3)

    def broken(*_):
        raise RuntimeError("out of resource")

    monkeypatch.setattr(window_launches.Launch, "__call__", broken)
    helpers.assert_close(bound.run(*qkv, **given), expected)
    assert ops.has_failures()
    assert len(caplog.records) == 1


def test_bound_attention_follows_the_precision_of_products(monkeypatch):
    geometry, qkv, given = PROBLEMS[0]
    bound, seen = bind(geometry, qkv, given), []
    monkeypatch.setattr(window_ops, "_setting", lambda: "another")
    monkeypatch.setattr(window_ops, "shifted_window_attention", lambda *args, **kwargs: seen.append(1))
    bound.run(*qkv, **given)
    assert seen


def test_observers_see_the_operator():
    geometry, qkv, given = PROBLEMS[0]
    bound = bind(geometry, qkv, given)
    with torch.profiler.profile() as profile:
        bound.run(*qkv, **given)
    assert any(event.key == "swinaccel::shifted_window_attention" for event in profile.key_averages())


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize(("dtype", "in_one"), [(torch.float16, False), (torch.float16, True), (torch.float32, False)])
def test_bound_rest_of_a_block(dtype, in_one, post_norm, strict_kernels):
    rows = (70, 2) if in_one else (3, 7)
    x, branch, *norms = tensors(*[(*rows, 32)] * 2, *[(32,)] * 4, dtype=dtype)
    weight1, bias1, weight2, bias2 = tensors((64, 32), (64,), (32, 64), (32,), dtype=dtype)
    affine, linears = ((*norms[:2], 1e-5), (*norms[2:], 1e-2)), ((weight1, bias1), (weight2, bias2))
    bound = block_ops.BoundRest(x.shape, dtype, x.device, 64, (1e-5, 1e-2), post_norm)
    found = bound.run(x, branch, affine, linears)
    assert TRITON_DEVICE != "cpu" or (bound._in_one is not None) == in_one
    flat = (*affine[0], *affine[1], *linears[0], *linears[1])
    assert torch.equal(found, torch.ops.swinaccel.after_attention(x, branch, *flat, post_norm))
    plain = block_ops._plain(x.double(), branch.double(), *exact((affine, linears)), post_norm)
    helpers.assert_close(found.double(), plain, 1e-2 if dtype == torch.float16 else 2e-5)


def exact(value):
    if isinstance(value, tuple):
        return tuple(map(exact, value))
    return value.double() if isinstance(value, torch.Tensor) else value


def test_bound_norm(strict_kernels):
    x, weight, bias = tensors((3, 5, 24), (24,), (24,))
    bound = launches.BoundLaunch(kernels.norm_launch(kernels.NORM, x.device, 15, 24, 1e-5))
    for _ in range(2):
        out = torch.empty_like(x)
        bound(x, out, None, None, None, None, weight, bias, None)
        helpers.assert_close(out, torch.nn.functional.layer_norm(x, (24,), weight, bias))
        assert torch.equal(out, kernels.norm(x, (weight, bias, 1e-5)))


def test_bound_position_table(strict_kernels):
    given = tensors((3, 5, 2), (12, 2), (12,), (HEADS, 12))
    bound = position.bind(*given)
    assert torch.equal(bound(*given), position.position_table(*given))


def test_only_aligned_tensors_are_passed_on_unseen(monkeypatch):
    """A tensor that is not aligned is for the launch to look at."""
    compiled, ran = [], []

    def compile_nothing(self, index, tensors, signature):
        compiled.append(signature)
        self.runners[signature] = (lambda pointers: ran.append(list(pointers))), True
        self.latest = list(signature), self.runners[signature]

    monkeypatch.setattr(launches.Launch, "_compile", compile_nothing)
    bound = launches.BoundLaunch(launches.Launch(None, (1,), ()))
    looked, look = [], launches.Launch.__call__
    monkeypatch.setattr(launches.Launch, "__call__", lambda self, *given: looked.append(1) or look(self, *given))
    x, y = torch.zeros(64), torch.zeros(64)
    for _ in range(3):
        bound(x, None, y)
    assert (len(compiled), len(looked)) == (1, 1)
    assert ran == [[x.data_ptr(), None, y.data_ptr()]] * 2
    bound(x[1:], None, y)
    assert (len(compiled), len(looked)) == (2, 2)
    bound(x, None, y)
    assert (len(compiled), len(looked), len(ran)) == (2, 2, 3)
