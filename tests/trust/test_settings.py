"""Settings that a forward reads may lie anywhere; changed before accelerate() or after, the original's answer comes."""

from __future__ import annotations

import collections
import contextvars
import copy
import enum
import threading
import types

import helpers
import microsoft_models
import pytest
import torch
from verdicts import assert_like_the_original, block_of

import swinaccel

PLACES = {}


def place(setter):
    """Register a kind of attention, with the function that sets its gain."""

    def register(kind):
        PLACES[kind.__name__] = (kind, setter)
        return kind

    return register


class Scaled(microsoft_models.WindowAttention):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * self.gain()


class Level(enum.Enum):
    LOW = 1


Level.LOW.gain = 1.0


@place(lambda gain: setattr(Level.LOW, "gain", gain))
class OfAnEnum(Scaled):
    def gain(self):
        return Level.LOW.gain


class Meta(type):
    level = 1.0

    @property
    def gain_of_all(cls):
        return Meta.level


@place(lambda gain: setattr(Meta, "level", gain))
class OfAMetaclass(Scaled, metaclass=Meta):
    def gain(self):
        return type(self).gain_of_all


QUEUE = collections.deque([1.0], maxlen=1)


@place(QUEUE.append)
class OfADeque(Scaled):
    def gain(self):
        return QUEUE[0]


NESTED = {"scales": {"attention": [1.0]}}


@place(lambda gain: NESTED["scales"]["attention"].__setitem__(0, gain))
class OfNestedContainers(Scaled):
    def gain(self):
        return NESTED["scales"]["attention"][0]


def make_cell():
    kept = 1.0

    def read():
        return kept

    def write(gain):
        nonlocal kept
        kept = gain

    return read, write


read_cell, write_cell = make_cell()


@place(write_cell)
class OfAClosure(Scaled):
    def gain(self):
        return read_cell()


def holder():
    return holder.gain


holder.gain = 1.0


@place(lambda gain: setattr(holder, "gain", gain))
class OfAFunction(Scaled):
    def gain(self):
        return holder()


class Slotted:
    __slots__ = ("gain",)


SLOTTED = Slotted()
SLOTTED.gain = 1.0


@place(lambda gain: setattr(SLOTTED, "gain", gain))
class OfSlots(Scaled):
    def gain(self):
        return SLOTTED.gain


class SlottedAndMore(Slotted):
    """Its instances have attributes as well."""


class Hidden:
    __slots__ = "__gain"  # a string, and a name that Python changes

    def __init__(self, gain):
        self.set(gain)

    def set(self, gain):
        self.__gain = gain

    def get(self):
        return self.__gain


MORE, HIDDEN = SlottedAndMore(), Hidden(1.0)
MORE.gain = 1.0


@place(lambda gain: setattr(MORE, "gain", gain))
class OfSlotsBesideAttributes(Scaled):
    def gain(self):
        return MORE.gain


@place(HIDDEN.set)
class OfAHiddenSlot(Scaled):
    def gain(self):
        return HIDDEN.get()


class Listed(list):
    gain = 1.0


LISTED = Listed()


@place(lambda gain: setattr(LISTED, "gain", gain))
class OfAListsAttribute(Scaled):
    def gain(self):
        return LISTED.gain


def one():
    return 1.0


def three():
    return 3.0


ONE = one.__code__


@place(lambda gain: setattr(one, "__code__", ONE if gain == 1 else three.__code__))
class OfCodeThatIsReloaded(Scaled):
    def gain(self):
        return one()


def default(gain=1.0, *, other=1.0):
    return gain * other


@place(lambda gain: setattr(default, "__defaults__", (gain,)))
class OfADefault(Scaled):
    def gain(self):
        return default()


@place(lambda gain: default.__kwdefaults__.__setitem__("other", gain))
class OfADefaultByName(OfADefault):
    pass


DROPOUT = torch.nn.Dropout(0.0)


@place(lambda gain: setattr(DROPOUT, "p", float(gain != 1)))
class OfALayerElsewhere(Scaled):
    def gain(self):
        return DROPOUT(torch.ones(()))


LOCAL, CONTEXT = threading.local(), contextvars.ContextVar("gain", default=1.0)
LOCAL.gain = 1.0


@place(lambda gain: setattr(LOCAL, "gain", gain))
class OfAThread(Scaled):
    def gain(self):
        return LOCAL.gain


@place(CONTEXT.set)
class OfAContext(Scaled):
    def gain(self):
        return CONTEXT.get()


TENSOR = torch.ones(())


@place(TENSOR.fill_)
class OfATensor(Scaled):
    def gain(self):
        return TENSOR


@place(TENSOR.data.fill_)
class OfATensorsData(OfATensor):
    pass


@place(lambda gain: torch.use_deterministic_algorithms(gain != 1))
class OfPyTorch(Scaled):
    def gain(self):
        return 3.0 if torch.are_deterministic_algorithms_enabled() else 1.0


MODULE = types.ModuleType("settings")
MODULE.GAIN = 1.0


@place(lambda gain: setattr(MODULE, "GAIN", gain))
class OfAModule(Scaled):
    def gain(self):
        return MODULE.GAIN


@pytest.mark.parametrize("name", PLACES)
def test_settings_anywhere(name):
    kind, set_gain = PLACES[name]
    x = torch.randn(2, 64, 16)
    early = block_of(kind)
    late = copy.deepcopy(early)
    try:
        swinaccel.accelerate(early, backend="torch")
        assert_like_the_original(early, x)
        set_gain(3.0)
        with torch.no_grad():
            expected = late(x)
        swinaccel.accelerate(late, backend="torch")
        for model in (early, late):
            with torch.no_grad():
                helpers.assert_close(model(x), expected)
    finally:
        set_gain(1.0)
    assert_like_the_original(swinaccel.accelerate(early, backend="torch"), x)
