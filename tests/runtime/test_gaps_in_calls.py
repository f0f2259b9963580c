"""What deliberate faults in guards, checks, launches and switches once went unnoticed in; see mutants.py."""

from __future__ import annotations

import contextvars
import copy
import dataclasses
import gc
import os
import signal
import threading
import types
import weakref

import descendants
import helpers
import microsoft_models
import pytest
import test_timm_cr
import torch
from helpers import TRITON_DEVICE
from timm.layers import DropPath
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from verdicts import X, assert_like_the_original, block_of

import swinaccel
from swinaccel import patching
from swinaccel.backends.triton import checks
from swinaccel.backends.triton import window as window_launches
from swinaccel.backends.triton.problem import Operands
from swinaccel.bias import cache
from swinaccel.cli import factory
from swinaccel.config import AccelConfig
from swinaccel.errors import KernelError
from swinaccel.families.timm import Timm
from swinaccel.ops.failures import Failures
from swinaccel.ops.window_plain import is_readable, note_failure
from swinaccel.runtime.block import NotFusable, common_reason, does_nothing, require_no_hooks
from swinaccel.runtime.call import tokens_of
from swinaccel.runtime.guard import Guard
from swinaccel.runtime.plan import State, state_of
from swinaccel.runtime.section import TritonSection, attend_triton
from swinaccel.spec import arguments
from swinaccel.spec.window import Geometry


def test_autocast_to_another_dtype_is_another_call():
    model, x = block_of(microsoft_models.WindowAttention).to(TRITON_DEVICE), X.to(TRITON_DEVICE)
    swinaccel.accelerate(model, backend="triton")
    for dtype in (torch.float16, torch.float16, torch.bfloat16):
        with torch.autocast(TRITON_DEVICE, dtype):
            assert_like_the_original(model, x, 0.02)
    if TRITON_DEVICE == "cpu":
        assert "bfloat16" in swinaccel.report(model).entries[0].reason


@pytest.mark.parametrize("before", ["without a leaf", "without gradients"])
@pytest.mark.parametrize("fuse", ["auto", "attention"])
def test_gradients_of_the_input_alone(fuse, before):
    """After calls that recorded none, and of which no parameter tells the difference."""
    model = helpers.timm_block((8, 8), shift=2).requires_grad_(False).to(TRITON_DEVICE)
    x = X.view(2, 8, 8, 16).to(TRITON_DEVICE)
    leaf = x.clone().requires_grad_()
    swinaccel.accelerate(model, backend="triton", fuse=fuse)
    for _ in range(2):
        with torch.set_grad_enabled(before == "without a leaf"):
            model(x if before == "without a leaf" else leaf)
    (found,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    with swinaccel.disabled():
        (expected,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    helpers.assert_close(found, expected, 1e-4)


def test_shapes_that_no_kernel_takes():
    """Set through `.data`, so that the parameters are the same objects."""
    model, x = helpers.timm_block((8, 8)), X.view(2, 8, 8, 16)
    swinaccel.accelerate(model, backend="torch")
    for _ in range(2):
        assert_like_the_original(model, x)
    table = model.attn.relative_position_bias_table
    table.data = table.data[:, :1].clone()
    assert_like_the_original(model, x)
    assert "has not one column for each of 2 heads" in swinaccel.report(model).entries[0].reason
    model = swinaccel.accelerate(test_timm_cr.block((8, 8)), backend="torch")
    model.attn.logit_scale.data = model.attn.logit_scale.data[:1]
    with torch.no_grad(), pytest.raises(RuntimeError):  # as the original does
        model(x)


def test_sizes_that_are_set_before_each_call():
    """To as many tokens of another image."""
    model, x = descendants.detection((8, 4), shift=0).to(TRITON_DEVICE), X[:, :32].to(TRITON_DEVICE)
    twin = copy.deepcopy(model)
    swinaccel.accelerate(model, backend="triton")
    for size in ((8, 4), (8, 4), (4, 8)):
        for one in (model, twin):
            one.H, one.W = size
        with torch.no_grad():
            helpers.assert_close(model(x, None), twin(x, None))
    helpers.assert_accelerated(model)


class Limit(nn.Module):
    def forward(self, x):
        return x.clamp(max=1e30)


def test_layers_of_a_block_that_are_not_known():
    model, x = helpers.timm_block((8, 8), shift=2).to(TRITON_DEVICE), X.view(2, 8, 8, 16).to(TRITON_DEVICE)
    model.mlp.norm = Limit()
    swinaccel.accelerate(model, backend="triton")
    assert_like_the_original(model, x)
    assert "Limit" in state_of(model).unfused


def test_parameters_that_are_not_contiguous():
    model, x = helpers.timm_block((8, 8), shift=2).to(TRITON_DEVICE), X.view(2, 8, 8, 16).to(TRITON_DEVICE)
    for norm in (model.norm1, model.norm2):
        norm.weight = nn.Parameter(torch.randn(32, device=TRITON_DEVICE)[::2])
    swinaccel.accelerate(model, backend="triton")
    for _ in range(2):
        assert_like_the_original(model, x)


def test_bound_launches_take_what_they_were_bound_for():
    model, x = helpers.timm_block((8, 8), shift=2).to(TRITON_DEVICE), X.view(2, 8, 8, 16).to(TRITON_DEVICE)
    section = Timm().section(model, x)
    with torch.no_grad():
        attend = TritonSection(section, AccelConfig(backend="triton"), State())
        attend(x)
        bound, qkv, table = attend._bound, model.attn.qkv(x), section.table()
        runs, run = [], bound.attention.run
        counting = types.SimpleNamespace(run=lambda *given: runs.append(1) or run(*given))
        for taken in (bound, bound._replace(table=None)):
            attend._bound = taken._replace(attention=counting)
            torch.testing.assert_close(attend(x), section.output(attend_triton(section, qkv, table)))
        section.table = lambda: (2 * table).t().contiguous().t()
        torch.testing.assert_close(attend(x), section.output(attend_triton(section, qkv, 2 * table)))
        attend._bound = bound._replace(attention=counting)
        section.project, section.output = lambda x: qkv.half(), lambda y: y
        assert attend(x).dtype is torch.float16
    assert len(runs) == 2


def test_graphs_are_traced_from_the_original():
    model = swinaccel.accelerate(block_of(microsoft_models.WindowAttention), backend="torch")
    with torch.no_grad():
        make_fx(model)(X)
    assert "make_fx" in swinaccel.report(model).entries[0].reason


def test_factors_of_other_heads_are_refused():
    q = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match="q_factor must have shape"):
        arguments.check_factors(q, torch.zeros(3, 5, 1), torch.zeros(3, 5, 1))


def test_operators_ask_for_a_seed_and_for_one_device():
    qkv, bias = torch.zeros(1, 4, 4, 48, device=TRITON_DEVICE), torch.zeros(2, 16, 16, device=TRITON_DEVICE)
    numbers = [2, [4, 4], [0, 0], False, 0.0, 0.25, 0.1, False, None]
    with pytest.raises(ValueError, match="seed must be given"):
        torch.ops.swinaccel.shifted_window_attention(qkv, None, None, bias, *[None] * 5, *numbers)
    with pytest.raises(ValueError, match="k must be on q's device"):
        checks.check_dtypes(("q", "k"), (torch.zeros(1), torch.zeros(1, device="meta")))


def test_plans_hear_of_failures_that_are_forgotten_and_users_once_of_each(caplog):
    failures = Failures()
    with caplog.at_level("WARNING", logger="swinaccel"):
        for problem in range(2):
            failures.record(problem, "no room")
    assert len(caplog.records) == 1
    count = failures.count
    failures.clear()
    assert failures.count != count


def test_an_interrupt_while_a_users_file_runs_is_passed_on():
    with pytest.raises(KeyboardInterrupt), factory.blamed("net.py cannot be imported"):
        raise KeyboardInterrupt


def test_a_cache_folder_that_is_none_is_warned_of(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SWINACCEL_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="SWINACCEL_CACHE_DIR"):
        assert cache.folder_of("factors") is None


def test_no_number_is_asked_for_inside_a_transform():
    found = []
    torch.func.vmap(lambda x: found.append(arguments.can_look()) or x)(torch.ones(2))
    assert found == [False]
    assert arguments.can_look()


def test_a_guard_sees_what_is_written_to_in_place():
    module = nn.Module()
    module.tensor, module.names = torch.zeros(1), {"one"}
    for write in (lambda: module.tensor.add_(1), lambda: module.names.add("two")):
        guard = Guard([module])
        assert guard.holds()
        write()
        assert not guard.holds()
    module.config, module.H = types.SimpleNamespace(scale=1.0), 1
    guard = Guard([module], ignored=("H",))
    module.H = 2
    assert guard.holds()
    module.config.scale = 2.0
    assert not guard.holds()


class Biased(microsoft_models.WindowAttention):
    def bias(self):
        return 2 * super().bias()


def test_a_class_that_is_set_by_hand():
    model, x = helpers.randomize(microsoft_models.WindowAttention(16, (4, 4), 2)), torch.randn(3, 16, 16)
    swinaccel.accelerate(model, backend="torch")
    for _ in range(2):
        assert_like_the_original(model, x)
    helpers.assert_accelerated(model)
    model.__class__ = Biased
    assert_like_the_original(model, x)


def test_blocks_that_their_own_parts_know_are_not_kept():
    def use():
        model = helpers.timm_block((8, 8), shift=2).to(TRITON_DEVICE)
        model.mlp.owner = [model]
        swinaccel.accelerate(model, backend="triton")
        assert_like_the_original(model, X.view(2, 8, 8, 16).to(TRITON_DEVICE))
        return weakref.ref(model)

    found = use()
    gc.collect()
    assert found() is None


def test_what_failed_is_not_run_again_before_the_original(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of resource")

    monkeypatch.setattr(window_launches, "shifted_window_attention", fail)
    model = helpers.randomize(microsoft_models.WindowAttention(16, (4, 4), 2)).to(TRITON_DEVICE)
    swinaccel.accelerate(model, backend="triton")
    x = torch.randn(3, 16, 16, device=TRITON_DEVICE)
    with torch.no_grad():
        model(x)
        with torch.autograd.profiler.profile() as found:
            model(x)
        with swinaccel.disabled(), torch.autograd.profiler.profile() as expected:
            model(x)
    assert swinaccel.report(model).entries[0].fallbacks == 2
    found, expected = (sum("mm" in event.name for event in one.function_events) for one in (found, expected))
    assert found == expected


# Switches.


def test_disabled_that_another_context_closes():
    """As an async generator is closed by the loop; and another block is open elsewhere all the while."""

    def body():
        with swinaccel.disabled():
            yield

    elsewhere, first, second = contextvars.copy_context(), body(), body()
    here = contextvars.copy_context()
    elsewhere.run(next, second)
    here.run(next, first)
    assert here.run(patching._is_off, False)
    first.close()
    assert not here.run(patching._is_off, False)
    assert elsewhere.run(patching._is_off, False)
    second.close()
    assert not elsewhere.run(patching._is_off, False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_process_forked_while_another_thread_accelerates():
    held, done = threading.Event(), threading.Event()

    def hold():
        with patching._lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    child = os.fork()
    if not child:
        signal.alarm(10)  # ends a child that waits for ever
        with swinaccel.disabled():
            os._exit(0)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def sections(**changes):
    """Return a section of timm's, with changes, and an image."""
    model, x = helpers.timm_block((8, 8), shift=2).to(TRITON_DEVICE), X.view(2, 8, 8, 16).to(TRITON_DEVICE)
    return dataclasses.replace(Timm().section(model, x), **changes), x


@pytest.mark.parametrize("name", ["mask", "index"])
def test_kernels_read_tensors_without_gaps(name):
    given = {"mask": torch.randn(4, 16, 16), "index": helpers.position_index((4, 4)).long()}[name].to(TRITON_DEVICE)
    given = given.transpose(-2, -1)
    (section, x), (expected, _) = sections(**{name: given}), sections(**{name: given.contiguous()})
    with torch.no_grad():
        attend, own = (TritonSection(one, AccelConfig(backend="triton"), State()) for one in (section, expected))
        for _ in range(2):
            helpers.assert_close(attend(x), own(x))


def test_dropout_is_bound_to_no_launch():
    section, x = sections(dropout=0.5)
    with torch.no_grad():
        attend = TritonSection(section, AccelConfig(backend="triton"), State())
        _, second, third = attend(x), attend(x), attend(x)
    assert not torch.equal(second, third)


class DroppingTokens(microsoft_models.SwinTransformerBlock):
    def __init__(self, *args):
        super().__init__(*args)
        self.input_drop = nn.Dropout(0.0)

    def forward(self, x):
        return super().forward(self.input_drop(x))


def test_rates_that_no_family_reads_are_watched():
    model = helpers.randomize(DroppingTokens(16, (8, 8), 2, 4, 2)).train()
    twin = copy.deepcopy(model)
    (entry,) = swinaccel.report(swinaccel.accelerate(model, backend="torch"))
    assert entry.status == "accelerated"
    for rate in (0.0, 1.0):
        for one in (model, twin):
            one.input_drop.p = rate
        helpers.assert_close(model(X), twin(X))


def test_what_kernels_around_an_attention_do_not_take():
    class Own(torch.Tensor):
        pass

    class DropRows(nn.Module):
        def forward(self, x):
            return x[:1]

    x, part = torch.randn(2, 4), nn.GELU()
    assert common_reason(x, [torch.ones(4)]) is None
    assert common_reason(x, [torch.ones(4).as_subclass(Own)]) is not None
    assert does_nothing(DropPath())
    assert not does_nothing(DropRows())
    require_no_hooks([part])
    part.forward = torch.tanh
    with pytest.raises(NotFusable, match="was replaced"):
        require_no_hooks([part])


def test_tokens_that_kernels_find_by_their_strides():
    geometry, x = Geometry((8, 8), (4, 4)), torch.randn(2, 8, 8, 32)
    part, other = x[..., :16], torch.randn(2, 8, 8, 16)
    assert is_readable(part, part, part, geometry)
    assert not is_readable(part, other, part, geometry)
    assert not is_readable(part, part, other, geometry)
    assert not is_readable(x[..., ::2], None, None, geometry)


def test_a_failure_of_what_was_dropped_is_raised():
    error, geometry = RuntimeError("no memory"), Geometry((8, 8), (4, 4))
    call = Operands(torch.zeros(1, 8, 8, 24), *[None] * 8, 1, (4, 4), (0, 0), False, 0.0, 1.0, 0.0)
    note_failure(error, call, geometry)
    with pytest.raises(KernelError):
        note_failure(error, call._replace(dropout=0.5), geometry)


def test_calls_about_another_tensor_are_not_planned():
    x, other = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 4, 8)
    for given, tokens in ((x, (x, None)), (other, None)):
        adapter = types.SimpleNamespace(tokens=lambda module, one, given=given: (given, None))
        assert tokens_of(adapter, nn.Identity(), x, (x,), {}) == tokens
