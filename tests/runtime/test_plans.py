"""Plans that calls with masks of one form share, and the guard that they are kept by."""

from __future__ import annotations

import collections
import copy
import functools
import weakref
from concurrent.futures import ThreadPoolExecutor

import helpers
import microsoft_models
import numpy
import pytest
import torch
from helpers import TRITON_DEVICE
from torch import nn

import swinaccel
from swinaccel.families.window_attention import WindowAttention
from swinaccel.layers import alias
from swinaccel.runtime import guard as guards
from swinaccel.runtime.guard import Guard, NotGuardable
from swinaccel.spec import reference
from swinaccel.spec.window import Geometry

# Attention that is given its mask: calls with masks of one form share a plan, which reads the mask of each.


def given_masks():
    """Return masks of one form: what a shift implies, nothing, others, and one that rules out keys."""
    generator = torch.Generator().manual_seed(1)
    shifted = reference.shift_mask(Geometry((8, 8), (4, 4), (2, 2)), -100.0)
    random = 3 * torch.randn(shifted.shape, generator=generator)
    infinite = random.masked_fill(torch.rand(shifted.shape, generator=generator) > 0.7, float("-inf"))
    infinite.diagonal(dim1=1, dim2=2).zero_()
    return [one.to(TRITON_DEVICE) for one in (shifted, torch.zeros_like(shifted), random, infinite, shifted)]


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("by_name", [False, True])
def test_masks_of_one_form(by_name, backend, read):
    attention = helpers.randomize(microsoft_models.WindowAttention(16, (4, 4), 2)).to(TRITON_DEVICE)
    model = swinaccel.accelerate(copy.deepcopy(attention), backend=backend)
    windows = torch.randn(8, 16, 16).to(TRITON_DEVICE)

    def assert_alike(mask, plans):
        expected = attention(windows, mask)
        helpers.assert_close(model(windows, mask=mask) if by_name else model(windows, mask), expected)
        assert len(read) == plans

    with torch.no_grad():
        for mask in given_masks():
            assert_alike(mask, 1)
        mask.mul_(0.5)
        assert_alike(mask, 1)
        assert_alike(given_masks()[2][:2], 2)  # of fewer windows
        assert_alike(None, 3)
        assert_alike(given_masks()[2], 3)
        assert_alike(given_masks()[2].mT, 4)  # read by other strides
        assert_alike(given_masks()[3].half().float().clamp_min(-1e4).double().float(), 4)
    helpers.assert_accelerated(model)
    gone = weakref.ref(mask)
    del mask
    assert gone() is None
    with pytest.warns(UserWarning, match="the mask records gradients"), torch.no_grad():
        assert_alike(given_masks()[2].requires_grad_(), 5)
    with torch.no_grad():
        helpers.assert_close(model(windows, given_masks()[2] > 0), attention(windows, given_masks()[2] > 0))


def test_masks_of_which_a_section_makes_others(read, monkeypatch):
    attention = helpers.randomize(microsoft_models.WindowAttention(16, (4, 4), 2)).to(TRITON_DEVICE)
    model = swinaccel.accelerate(copy.deepcopy(attention), backend="triton")
    plain, windows = WindowAttention.read, torch.randn(8, 16, 16).to(TRITON_DEVICE)
    monkeypatch.setattr(
        WindowAttention, "read", lambda self, module, geometry, mask: plain(self, module, geometry, mask + 1)
    )
    with torch.no_grad():
        for count, mask in enumerate(given_masks()[:3]):
            helpers.assert_close(model(windows, mask), attention(windows, mask))
            assert len(read) == count + 1


def test_masks_of_threads():
    """Each of which has its own at the same time."""
    attention = helpers.randomize(microsoft_models.WindowAttention(16, (4, 4), 2))
    model = swinaccel.accelerate(copy.deepcopy(attention), backend="torch")
    windows, masks = torch.randn(8, 16, 16), given_masks()[:3]
    masks = [mask.cpu() for mask in masks]

    def run(mask):
        with torch.no_grad():
            expected = attention(windows, mask)
            for _ in range(30):
                helpers.assert_close(model(windows, mask), expected)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, masks))


@pytest.mark.parametrize("version_of", [len, id, lambda space: 1 / 0, lambda space: object()])
def test_versions_of_dictionaries_are_tried_first(version_of):
    assert not guards._sees_writes(version_of)


class Config:
    scale = 1.0


class TestGuard:
    @pytest.fixture(params=[True, False], ids=["counted", "compared"], autouse=True)
    def _counts(self, request, monkeypatch):
        """Where Python counts writes to dictionaries, and where it does not."""
        assert guards._COUNTS_WRITES
        monkeypatch.setattr(guards, "_COUNTS_WRITES", request.param)

    def test_what_is_written_and_written_back(self):
        module = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
        guard = Guard(module.modules())
        for _ in range(3):
            module.eval()
            assert not guard.holds()
            module.train()
            assert guard.holds()
            assert guard.holds()

    @pytest.mark.parametrize("name", ["_forward_hooks", "_buffers", "numbers", "_parameters"])
    def test_what_takes_a_place_is_looked_into(self, name):
        """It equals what was there, and is written to later, which is no write to the module."""
        module = nn.Linear(1, 1)
        module.numbers = [1, 2]
        guard = Guard([module])
        now = copy.copy(vars(module)[name])
        setattr(module, name, now)
        assert guard.holds()
        now.append(3) if name == "numbers" else now.update(one=torch.ones(1))
        assert not guard.holds()

    def test_settings(self):
        module = nn.Module()
        module.numbers, module.pair, module.names = [1, 2], (1, 2), {"of": [1]}
        guard = Guard([module])
        assert guard.holds()
        module.numbers[0] = 3
        assert not guard.holds()
        module.numbers[0] = 1
        assert guard.holds()
        module.names["of"][0] = 2
        assert not guard.holds()
        module.names["of"][0] = 1
        module.pair = torch.ones(2)
        assert not guard.holds()

    @pytest.mark.parametrize("value", [[nn.Linear(1, 1)], {"of": nn.Linear(1, 1)}, numpy.zeros(2)])
    def test_not_guardable(self, value):
        """Modules may hold the one that is guarded, which would then never be garbage."""
        module = nn.Module()
        module.value = value
        with pytest.raises(NotGuardable):
            Guard([module])

    @pytest.mark.parametrize(
        "value", [[0] * (guards._MOST_VALUES + 1), [Config() for _ in range(guards._MOST_OBJECTS + 1)]]
    )
    def test_a_data_set_is_no_setting(self, value):
        module = nn.Module()
        module.value = value
        with pytest.raises(NotGuardable):
            Guard([module])

    @pytest.mark.parametrize("hold", [lambda one: one.extra_repr, lambda one: functools.partial(print, lambda: one)])
    def test_a_module_that_holds_itself_is_not_guardable(self, hold):
        module, part, other = nn.Module(), nn.Module(), nn.Module()
        module.part, part.value = part, hold(other)
        assert Guard([alias(module), part]).holds()
        part.value = hold(module)
        with pytest.raises(NotGuardable):
            Guard([alias(module), part])

    def test_names_that_many_share_are_not_compared_at_each_call(self):
        class Named(int):
            compared = 0

            def __eq__(self, other):
                Named.compared += 1
                return int(self) == other

            __hash__ = int.__hash__

        module = nn.Module()
        module.config, number = Config(), Named(1)
        module.config.names = {"one": number, "two": 2}
        guard = Guard([module])
        guard._settings[1]["names"]["one"] = 1
        assert guard.holds()
        Named.compared = 0
        assert guard.holds()
        assert Named.compared == (0 if guards._COUNTS_WRITES else 1)
        module.config.names["two"] = torch.tensor(2)  # which is equal for now
        assert guard.holds()
        module.config.names["two"].add_(1)
        assert not guard.holds()
        module.config.names["two"] = 2
        assert guard.holds()
        module.config.names["one"] = 3
        assert not guard.holds()

    def test_objects_are_looked_into(self):
        module = nn.Module()
        module.config = Config()
        guard = Guard([module])
        module.config.scale = 2.0
        assert not guard.holds()

    def test_equal_tensors_are_not_the_same(self):
        module = nn.Linear(1, 1)
        guard = Guard([module])
        module.weight = nn.Parameter(module.weight.detach().clone())
        assert not guard.holds()

    def test_equal_tensors_in_another_dictionary(self):
        module = nn.Linear(1, 1)
        guard = Guard([module])
        module._parameters = {name: nn.Parameter(one.detach().clone()) for name, one in module._parameters.items()}
        assert not guard.holds()

    def test_buffers_that_lie_elsewhere(self):
        module = nn.BatchNorm1d(2)
        guard = Guard([module])
        module.running_mean.add_(1)
        assert guard.holds()
        module.running_mean.data = module.running_mean.clone()
        assert not guard.holds()

    def test_names(self):
        module = nn.Module()
        module.first = nn.Parameter(torch.ones(1))
        guard = Guard([module])
        parameter = module.first
        del module.first
        module.second = parameter
        assert not guard.holds()

    @pytest.mark.parametrize("name", ["_parameters", "_buffers", "_modules", "_forward_hooks", "_backward_pre_hooks"])
    def test_what_is_empty_stays_so(self, name):
        """Whatever dictionary it is."""
        for fresh in (False, True):
            module = nn.ReLU()
            guard = Guard([module])
            if fresh:
                setattr(module, name, collections.OrderedDict())
                assert guard.holds()
            getattr(module, name)["one"] = nn.Parameter(torch.ones(1))
            assert not guard.holds()

    def test_hooks_that_are_there(self):
        module = nn.ReLU()
        handle = module.register_forward_hook(lambda *_: None)
        guard = Guard([module])
        assert guard.holds()
        handle.remove()
        assert not guard.holds()

    def test_what_lies_outside(self):
        namespace, contents = {"gain": 1.0, "other": 1}, {"of": 1}
        gain = namespace["gain"]
        guard = Guard([nn.ReLU()], [(namespace, "gain", gain)], [(contents, dict(contents))])
        namespace["other"] = 2
        assert guard.holds()
        namespace["gain"] = 2.0
        assert not guard.holds()
        namespace["gain"] = gain
        assert guard.holds()
        contents["of"] = 2
        assert not guard.holds()
        contents["of"] = 1
        del namespace["gain"]
        assert not guard.holds()

    def test_settings_of_each_call(self):
        module = nn.Module()
        module.H, module.W = 1, 2
        guard = Guard([module], ignored=("H",))
        module.H = 3
        assert guard.holds()
        module.W = 3
        assert not guard.holds()

    def test_an_alias_is_the_same(self):
        module = nn.Linear(2, 2)
        other = alias(module)
        module.weight = nn.Parameter(torch.zeros(2, 2))
        assert other.weight is module.weight
        assert type(other) is nn.Linear
