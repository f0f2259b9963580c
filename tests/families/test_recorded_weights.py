"""Attention weights that are returned while gradients are recorded: past them, or through them where somebody asks."""

from __future__ import annotations

import copy
import dataclasses
import gc

import changed_models as models
import helpers
import pytest
import torch
from helpers import randomize
from tape import Tape
from test_captured_weights import Streams
from torch.utils.checkpoint import checkpoint

import swinaccel
from swinaccel.config import AccelConfig
from swinaccel.runtime import recorded_weights, weights
from swinaccel.runtime.graphs import capture
from swinaccel.runtime.plan import State
from swinaccel.runtime.section import TritonSection
from swinaccel.spec import reference
from swinaccel.spec.window import Geometry, Section

KEEPS_VERDICTS = True
DEVICE = helpers.TRITON_DEVICE


def htsat(**options):
    return randomize(models.WeightsStage(16, (8, 8), 2, 4, **options)).to(DEVICE)


def total(out):
    return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)).sum()


def scaled(grad):
    return 3 * grad


def hooked(model, x):
    out, found = model(x)
    found.register_hook(scaled)
    (total(out) + total(found**2)).backward()
    return []


def hooked_and_left(model, x):
    out, found = model.blocks[0](x)
    found.register_hook(scaled)
    del found
    total(out).backward()
    return []


def retained(model, x):
    out, found = model.blocks[0](x)
    found.retain_grad()
    total(out).backward()
    return [found.grad]


def asked_for(model, x):
    out, found = model.blocks[0](x)
    return list(torch.autograd.grad(total(out), [found, x]))


def asked_for_unseen(model, x):
    out, found = model.blocks[0](x)
    other = model.blocks[1](out)[0]
    (total(other) + total(out)).backward(inputs=[x, found])
    return [found.grad]


def from_them(model, x):
    found = model.blocks[0](x)[1]
    return list(torch.autograd.grad(found, [x], torch.ones_like(found) * found.detach()))


def twice(model, x):
    out, found = model.blocks[0](x)
    (grad,) = torch.autograd.grad(total(out) + total(found**2), x, create_graph=True)
    total(grad**2).backward()
    return [grad.detach()]


def twice_unread(model, x):
    out = model.blocks[0](x)[0]
    (grad,) = torch.autograd.grad(total(out), x, create_graph=True)
    total(grad**2).backward()
    return [grad.detach()]


def twice_asked_for(model, x):
    out, found = model.blocks[0](x)
    (grad,) = torch.autograd.grad(total(out) + total(found**3), x, create_graph=True)
    return list(torch.autograd.grad(total(grad**2), [found, x]))


def twice_hooked_and_left(model, x):
    out, found = model.blocks[0](x)
    found.register_hook(scaled)
    del found
    (grad,) = torch.autograd.grad(total(out), x, create_graph=True)
    total(grad**2).backward()
    return [grad.detach()]


def read_between(model, x):
    out, found = model.blocks[0](x)
    one = list(torch.autograd.grad(total(out), [x], retain_graph=True))
    return one + list(torch.autograd.grad(total(out) + total(found * 2), [x]))


def read_without(model, x):
    out, found = model(x)
    with torch.no_grad():
        kept = found * 2
    total(out).backward()
    return [kept, found.detach()]


def derived_is_retained(model, x):
    out, mean = model(x)
    mean.retain_grad()
    (total(out) + total(mean**3)).backward()
    return [mean.grad]


def written(model, x):
    out, mean = model(x)
    mean = mean.mul_(2)
    (total(out) + total(mean**2)).backward()
    return []


def checkpointed(reentrant):
    def way(model, x):
        out, found = checkpoint(model.blocks[0], x, use_reentrant=reentrant)
        (total(out) + total(found**2)).backward()
        return []

    return way


def frozen(model, x):
    for name, one in model.named_parameters():
        one.requires_grad_(name.endswith("bias_table"))
    x.requires_grad_(False)
    out, found = model(x)
    (total(out) + total(found**2)).backward()
    return []


WAYS = {
    "in the loss": lambda model, x: [(total(out := model(x)[0]) + total(model(x)[1] ** 2)).backward()] and [out],
    "both in the loss": lambda model, x: [sum(map(total, model(x))).backward()][:0],
    "hook": hooked,
    "hook, and left": hooked_and_left,
    "retained": retained,
    "asked for": asked_for,
    "asked for, unseen": asked_for_unseen,
    "from them": from_them,
    "twice": twice,
    "twice, unread": twice_unread,
    "twice, asked for": twice_asked_for,
    "twice, hook, and left": twice_hooked_and_left,
    "read between": read_between,
    "read without": read_without,
    "derived": derived_is_retained,
    "written": written,
    "checkpoint": checkpointed(False),
    "reentrant checkpoint": checkpointed(True),
    "frozen": frozen,
}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_the_originals(way):
    model, found = htsat(), []
    x = torch.randn(2, 64, 16, device=DEVICE)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    for one in (copy.deepcopy(model).double(), model, twin):
        given = x.to(next(one.parameters()).dtype, copy=True).requires_grad_()
        outs = WAYS[way](one, given)
        found.append([*outs, given.grad, *(parameter.grad for parameter in one.parameters())])
    largest = max(one.abs().max() for one in found[0] if one is not None)
    for exact, own, ours in zip(*found, strict=True):
        assert (exact is None) == (ours is None)
        if exact is not None:
            errors = [(one - exact).abs().max() for one in (own, ours)]
            assert errors[1] <= max(3 * errors[0], 5e-6 * exact.abs().max(), 1e-6 * largest), errors
    assert all(entry.fallbacks == 0 for entry in swinaccel.report(twin))


def counted(monkeypatch):
    calls = []
    for one in (weights, recorded_weights):
        monkeypatch.setattr(one, "section_weights", lambda *args: calls.append(1) or reference.section_weights(*args))
    scores = reference.section_scores
    monkeypatch.setattr(recorded_weights, "section_scores", lambda *args: calls.append(1) or scores(*args))
    return calls


@pytest.mark.parametrize("training", [False, True])
def test_gradients_go_past_weights_that_nobody_holds(training, monkeypatch):
    calls = counted(monkeypatch)
    model, x = models.Unread(htsat()).train(training), torch.randn(2, 64, 16)
    helpers.check_gradients(model, x, backend="triton", count=2)
    assert not calls


def test_weights_that_somebody_holds_are_gone_through(monkeypatch):
    """He may still ask for their gradient, in ways that are not seen."""
    calls = counted(monkeypatch)
    model, x = htsat().blocks[0], torch.randn(2, 64, 16, device=DEVICE)
    swinaccel.accelerate(model, backend="triton")
    out, found = model(x)
    assert (found.requires_grad, found.shape, found.dtype) == (True, (8, 2, 16, 16), torch.float32)
    total(out).backward(retain_graph=True)
    assert calls
    calls.clear()
    del found
    gc.collect()
    total(out).backward()
    assert not calls


def test_weights_of_before_the_step():
    model, x = htsat().blocks[0], torch.randn(2, 64, 16, device=DEVICE)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    expected, found = model(x)[1], twin(x)[1]
    with torch.no_grad():
        for one in (*twin.parameters(), twin.attn.relative_position_index, x):
            one.zero_()
    helpers.assert_close((found + 0).detach(), expected.detach())


@pytest.mark.parametrize("returned", [False, True])
def test_calls_that_record_gradients_inside_a_capture(returned, monkeypatch):
    streams = Streams(monkeypatch)
    calls = counted(monkeypatch)
    model = htsat() if returned else models.Unread(htsat())
    x = torch.randn(2, 64, 16, device=DEVICE)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    twin(x)
    calls.clear()
    found = streams.captured(twin, x)
    assert len(calls) == (2 if returned else 0)
    for one, other in zip(helpers.tensors(found), helpers.tensors(model(x)), strict=True):
        helpers.assert_close((one + 0).detach(), other.detach())


def test_a_part_of_a_model_that_is_captured_computes_them_at_once(monkeypatch):
    streams = Streams(monkeypatch)
    model, x = models.Unread(htsat()), torch.randn(2, 64, 16, device=DEVICE)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton").stage.blocks[1]
    twin(x)
    found = streams.captured(twin, x)
    assert type(found[1]) is torch.Tensor
    helpers.assert_close(found[1].detach(), model.stage.blocks[1](x)[1].detach())


def test_graphs_of_training_steps(monkeypatch):
    """Weights that a model returns are computed by every replay, with their gradients."""
    monkeypatch.setitem(capture.ENGINES, "cpu", Tape)
    monkeypatch.setattr(weights, "count_modes", lambda: 0)  # the stand-in is one
    model, x = htsat(), torch.randn(2, 64, 16, device=DEVICE)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton", graphs=True)
    for _ in range(3):
        for one in (model, twin):
            one.zero_grad()
            out, found = one(x)
            (total(out) + total(found**2)).backward()
        for one, other in zip(twin.parameters(), model.parameters(), strict=True):
            helpers.assert_close(one.grad, other.grad, 2e-4)
    (graph,) = swinaccel.report(twin).graphs
    assert (graph.captured, graph.reason) == (1, None)
    assert all(entry.fallbacks == 0 for entry in swinaccel.report(twin))


FORMS = {
    "padded": ({"size": (5, 6)}, {}),
    "shifted": ({"size": (8, 8), "shift": (2, 1)}, {}),
    "apart": ({"size": (8, 8)}, {"apart": True}),
    "cosine": ({"size": (8, 8)}, {"cosine": True}),
    "volume": ({"size": (2, 4, 8), "window": (2, 2, 4)}, {}),
    "without a bias": ({"size": (8, 8)}, {"biased": False}),
    "masked": ({"size": (8, 8)}, {"masked": True}),
}


def sections(geometry, apart=False, cosine=False, biased=True, masked=False):
    """Return a section, and its twin in fp64, and the leaves of both."""
    heads, dim, tokens = 2, 8, geometry.tokens
    leaves = {"weight": torch.randn(48, 16) / 4, "bias": torch.randn(48)}
    if biased:
        leaves["table"] = torch.randn(20, heads)
    if cosine:
        leaves["logit_scale"] = torch.rand(heads) + 1
    index = torch.randint(20, (tokens, tokens)) if biased else None
    mask = torch.randn(geometry.num_windows, tokens, tokens) if masked else None

    def made(dtype, device):
        own = {name: one.to(device, dtype, copy=True).requires_grad_() for name, one in leaves.items()}

        def project(x):
            packed = torch.nn.functional.linear(x, own["weight"], own["bias"])
            return packed.chunk(3, -1) if apart else packed

        table = own.get("table")
        return own, Section(
            geometry, heads, dim, project, lambda y: 2 * y, lambda: own["bias"],
            table=(lambda: table) if biased else None, index=None if index is None else index.to(device),
            sources=(table,) if biased else (), scale=0.3, logit_scale=own.get("logit_scale"),
            mask=None if mask is None else mask.to(device, dtype),
        )  # fmt: skip

    return made(torch.float32, DEVICE), made(torch.float64, DEVICE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("read", [False, True])
def test_forms(form, read):
    given, options = FORMS[form]
    geometry = Geometry(**{"window": (4, 4), "shift": (0,) * len(given["size"]), **given})
    (own, section), (exact, twin) = sections(geometry, **options)
    x = torch.randn(2, *geometry.size, 16, device=DEVICE)
    qkv = twin.project(x.double())
    _, _, v = reference.windows_of(
        qkv if isinstance(qkv, tuple) else qkv.chunk(3, -1), geometry, 2, exact["bias"] if geometry.is_padded else None
    )
    wanted = reference.section_weights(dataclasses.replace(twin, project=lambda _: qkv), x)
    out = 2 * reference.join((wanted @ v).transpose(1, 2).flatten(2), geometry)
    run = TritonSection(section, AccelConfig(backend="triton"), State())
    ours, found = recorded_weights.attend_recorded(run, x, None)
    helpers.assert_close(ours.detach().double(), out.detach())
    if read:
        found.register_hook(lambda grad: 1.5 * grad)
        wanted.register_hook(lambda grad: 1.5 * grad)
        helpers.assert_close(found.detach().double(), wanted.detach())
        losses = total(ours) + total(found**2), total(out) + total(wanted**2)
    else:
        del found
        losses = total(ours), total(out)
    for loss in losses:
        loss.backward()
    for name, one in exact.items():
        helpers.assert_close(own[name].grad.double(), one.grad)
