"""A stand-in on CPUs for the graphs of a call: it runs the operators that it recorded, on the memory that they used."""

from __future__ import annotations

import threading
import weakref
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Recorder(TorchDispatchMode):
    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        # A parameter's memory, and not the parameter, which may be given other memory.
        held = tree_map(lambda one: one.detach() if isinstance(one, torch.Tensor) else one, (args, kwargs or {}))
        self.steps.append((function, *held, out))
        return out


class Tape:
    """Captured functions on a CPU.

    As on a device, what a graph frees while it is captured is memory of those that are captured later.
    """

    lock = threading.RLock()
    pool: ClassVar = weakref.WeakValueDictionary()  # tapes that share their memory, in the order of their captures

    def __init__(self, device, shares_memory=True):
        self.has_started, self.replays, self.nbytes, self.made = False, 0, 0, {}
        self.place = max(Tape.pool, default=0) + 1
        if shares_memory:
            Tape.pool[self.place] = self

    def warm_up(self, run):
        run()

    def capture(self, run):
        steps = []
        with Recorder(steps):
            output = run()
        self.nbytes += 100
        given = set()
        for _, args, kwargs, out in steps:
            given |= _memory((args, kwargs)).keys() - self.made.keys()
            self.made |= {place: one for place, one in _memory(out).items() if place not in given}

        def replay():
            self.replays += 1
            for function, args, kwargs, out in steps:
                for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)
            later = [one for place, one in Tape.pool.items() if place > self.place and self.place in Tape.pool]
            for storage in [one for tape in later for one in tape.made.values()]:
                storage.fill_(255)  # which is no number

        return replay, output

    def start(self):
        assert not self.has_started
        self.has_started = True

    def finish(self):
        self.has_started = False


def _memory(tree):
    tensors = [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor) and one.numel()]
    return {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}
