"""Graphs are not stale where a change is deep inside of a setting, in a tensor's layout, or in how a call is given."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from types import SimpleNamespace

import graphed
import helpers
import pytest
import torch
from graphed import assert_alike, call, captured, replays
from test_states import MODELS
from torch import nn
from torch.nn.utils import parametrize

import swinaccel
from swinaccel.config import CAPTURED_CALL
from swinaccel.runtime.graphs.rehearsal import trace_of
from swinaccel.runtime.plan import state_of

pytestmark = pytest.mark.usefixtures("device")


class Entries(dict):
    """A configuration whose entries are no attributes."""


class Following(nn.Module):
    """A model that does what it is given, with a configuration."""

    def __init__(self, config, apply):
        super().__init__()
        self.body, self.config, self.apply_to = MODELS["timm"][0](), config, apply

    def forward(self, x, *args):
        return self.apply_to(self, self.body(x), *args)


def pair(config, apply):
    twin = helpers.randomize(Following(config, apply)).eval().to(graphed.DEVICE)
    model, x = graphed.accelerate(copy.deepcopy(twin), graphs=True), torch.randn(2, 3, 32, 32, device=graphed.DEVICE)
    for _ in range(CAPTURED_CALL):
        call(model, x)
    return model, twin, x


def times(model, y):
    one = model.config
    while not isinstance(one, (float, torch.Tensor)):
        one = next(
            iter(one.values() if isinstance(one, dict) else one if isinstance(one, list) else vars(one).values())
        )
    return y * one


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (lambda: SimpleNamespace(deep=SimpleNamespace(gain=1.0)), lambda one: setattr(one.deep, "gain", 2.0)),
        (lambda: [SimpleNamespace(gain=1.0)], lambda one: setattr(one[0], "gain", 2.0)),
        (lambda: {"deep": SimpleNamespace(gain=1.0)}, lambda one: setattr(one["deep"], "gain", 2.0)),
        (lambda: OrderedDict(gain=1.0), lambda one: one.update(gain=2.0)),
        (lambda: Entries(gain=1.0), lambda one: one.update(gain=2.0)),
        (lambda: SimpleNamespace(deep=Entries(gain=1.0)), lambda one: one.deep.update(gain=2.0)),
    ],
    ids=["object", "list", "dictionary", "ordered", "subclass", "subclass in an object"],
)
def test_settings_that_are_deep(config, change):
    model, twin, x = pair(config(), times)
    assert replays(model)
    for every in (model, twin):
        change(every.config)
    assert_alike(model, twin, x, x + 1)


def first_of(model, y):
    return y * next(iter(model.config.values()))


def test_the_order_of_settings():
    model, twin, x = pair(OrderedDict(one=1.0, two=2.0), first_of)
    assert replays(model)
    for every in (model, twin):
        every.config.move_to_end("one")
    assert_alike(model, twin, x, x + 1)


def whole_times(model, y):
    return y.round().long() * model.config


@pytest.mark.parametrize("value", [1.0, torch.ones(1)], ids=["number", "tensor"])
def test_a_setting_is_another_kind_of_the_same_number(value):
    model, twin, x = pair(1, whole_times)
    assert replays(model)
    for every in (model, twin):
        every.config = value.clone().to(graphed.DEVICE) if isinstance(value, torch.Tensor) else value
    assert call(model, x).dtype == call(twin, x).dtype == torch.float32


def test_a_tensor_is_another_though_its_number_is_the_same():
    model, twin, x = pair(torch.ones(1, device=graphed.DEVICE), times)
    for every in (model, twin):
        every.config = torch.ones(1, device=graphed.DEVICE, dtype=torch.float64)
    assert call(model, x).dtype == call(twin, x).dtype == torch.float64


GAINS = {"tensor": torch.ones(()), "number": 1.0}


def times_all(model, y):
    return y * GAINS["tensor"].item() * GAINS["number"]


def test_code_that_cannot_be_followed_has_no_graph():
    model, twin, x = pair(None, times_all)
    try:
        GAINS["number"] = 2.0
        assert_alike(model, twin, x, x + 1)
    finally:
        GAINS["number"] = 1.0
    assert "reads a tensor" in swinaccel.report(model).graphs[0].reason


@pytest.mark.parametrize("name", MODELS)
def test_code_of_libraries_can_be_followed(name):
    assert trace_of(list(MODELS[name][0]().modules())) is not None


def times_gain_of_weight(model, y):
    return y * model.body.head.fc.weight.gain


def test_attributes_of_parameters():
    twin = helpers.randomize(Following(None, times_gain_of_weight)).eval().to(graphed.DEVICE)
    model = graphed.accelerate(copy.deepcopy(twin), graphs=True)
    x = torch.randn(2, 3, 32, 32, device=graphed.DEVICE)
    for gain in (1.0, 2.0):
        for every in (model, twin):
            every.body.head.fc.weight.gain = gain
        for _ in range(CAPTURED_CALL):
            assert_alike(model, twin, x)
        assert replays(model)


class Steered(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = MODELS["timm"][0]()

    def forward(self, x):
        return self.body(x) * self.body.head.fc.weight.grad.mean()


def test_gradients_are_other_tensors():
    twin = helpers.randomize(Steered()).eval().to(graphed.DEVICE)
    model = graphed.accelerate(copy.deepcopy(twin), graphs=True)
    x = torch.randn(2, 3, 32, 32, device=graphed.DEVICE)
    for gain in (1, 2):
        for every in (model, twin):
            weight = every.body.head.fc.weight
            weight.grad = torch.full_like(weight, gain)
        for _ in range(CAPTURED_CALL):
            assert_alike(model, twin, x)
    assert "reads gradients" in swinaccel.report(model).graphs[0].reason


HOLDER = SimpleNamespace(generator=torch.Generator())


def drawn(model, y):
    return y * torch.rand((), generator=HOLDER.generator)


def test_what_draws_from_a_generator_of_the_host_has_no_graph():
    model, _, x = pair(None, drawn)
    before = HOLDER.generator.get_state()
    call(model, x)
    assert not torch.equal(before, HOLDER.generator.get_state())
    assert "draws random numbers" in swinaccel.report(model).graphs[0].reason


@functools.lru_cache(maxsize=1)
def mask_of(size):
    return torch.linspace(0, 1, size, device=graphed.DEVICE)


def masked(model, y):
    return y * mask_of(y.shape[-1])


def test_what_a_cached_function_may_let_go_of_is_kept():
    mask_of.cache_clear()
    model, twin, x = pair(None, masked)
    assert replays(model)
    (one,) = state_of(model).graphs.captures.values()
    assert mask_of(5).data_ptr() in [held.data_ptr() for held in one._held]
    mask_of(7)
    assert_alike(model, twin, x, x + 1)


def filled(model, y, values):
    return torch.ones_like(y, dtype=torch.long) * values[0]


def over(model, y, value):
    return y.abs() / torch.full_like(y, value)


@pytest.mark.parametrize(
    ("apply", "values"), [(filled, [(1,), (1.0,), (True,)]), (over, [0.0, -0.0])], ids=["kinds", "signs"]
)
def test_arguments_that_are_equal_and_not_the_same(apply, values):
    model, twin, x = pair(None, lambda model, y, *args: apply(model, y, *args) if args else y)
    with torch.no_grad():
        for value in values:
            for _ in range(CAPTURED_CALL):
                found, expected = model(x, value), twin(x, value)
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected)


def transposed(model):
    weight = model.layers[0].blocks[0].attn.proj.weight
    weight.data = weight.data.t()


def shortened(model):
    for one in model.head.fc.parameters():
        one.data = one.data[:3]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("change", [transposed, shortened])
def test_parameters_that_are_laid_out_anew_where_they_lie(change, trained):
    model, twin, x = captured()
    with torch.set_grad_enabled(trained):
        for _ in range(2):
            model(x)
        before = replays(model)
        for every in (model, twin):
            change(every)
        for one in (x, x + 1):
            helpers.assert_close(model(one).detach(), twin(one).detach())
    assert before > 1


def test_frozen_parameters_leave_graphs_of_inference():
    model, twin, x = captured()
    for is_wanted in (False, True):
        model.requires_grad_(is_wanted)
        assert_alike(model, twin, x, x + 1)
    assert replays(model) == 5


def recorded(model, y):
    with torch.enable_grad():
        return y * model.body.head.fc.weight.sum()


def test_gradients_that_a_model_records_by_itself():
    model, twin, x = pair(None, recorded)
    assert call(model, x).requires_grad == call(twin, x).requires_grad
    assert "gradients of its own" in swinaccel.report(model).graphs[0].reason


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrizations_whose_results_are_cached():
    twin = helpers.randomize(MODELS["timm"][0]()).eval().to(graphed.DEVICE)
    parametrize.register_parametrization(twin.head.fc, "weight", Doubled())
    model = graphed.accelerate(copy.deepcopy(twin).eval(), graphs=True)
    x = torch.randn(2, 3, 32, 32, device=graphed.DEVICE)
    with parametrize.cached():
        for _ in range(CAPTURED_CALL + 1):
            assert_alike(model, twin, x)
    for _ in range(2):
        for every in (model, twin):
            every.head.fc.parametrizations.weight.original.data.mul_(3)
        for _ in range(CAPTURED_CALL):
            assert_alike(model, twin, x)
    assert replays(model)


def switch_products(name):
    setattr(torch.backends.cuda.matmul, name, not getattr(torch.backends.cuda.matmul, name))


def switch_attention():
    torch.backends.cuda.enable_cudnn_sdp(not torch.backends.cuda.cudnn_sdp_enabled())


@pytest.mark.parametrize(
    "switch",
    [
        functools.partial(switch_products, "allow_fp16_accumulation"),
        functools.partial(switch_products, "allow_fp16_reduced_precision_reduction"),
        switch_attention,
    ],
    ids=["accumulation", "reduction", "attention"],
)
def test_settings_of_kernels_decide(switch):
    model, _, x = captured()
    before = replays(model)
    switch()
    try:
        call(model, x)
    finally:
        switch()
    assert replays(model) == before


def test_graphs_of_what_is_only_warned_of_are_no_graphs_of_what_is_an_error():
    model, _, x = captured()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for _ in range(CAPTURED_CALL):
            call(model, x)
        before = replays(model)
        torch.use_deterministic_algorithms(True)
        call(model, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert replays(model) == before


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = MODELS["timm"][0]()

    def forward(self, x):
        return self.body(x) * getattr(x, "weight", 1.0)


def test_attributes_of_an_input_are_seen():
    twin = helpers.randomize(Weighted()).eval().to(graphed.DEVICE)
    model, x = graphed.accelerate(copy.deepcopy(twin), graphs=True), torch.randn(2, 3, 32, 32, device=graphed.DEVICE)
    for weight in (None, 2.0, 3.0):
        for _ in range(CAPTURED_CALL):
            given = x.clone()
            if weight is not None:
                given.weight = weight
            assert_alike(model, twin, given)
    assert replays(model) == 2
