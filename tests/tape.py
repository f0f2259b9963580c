"""A stand-in on CPUs for the graphs of a call: it runs the operators that it recorded, on the memory that they used."""

from __future__ import annotations

import threading

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
    """Captured functions on a CPU."""

    lock = threading.RLock()

    def __init__(self, device):
        self.has_started, self.replays, self.nbytes = False, 0, 0

    def warm_up(self, run):
        run()

    def capture(self, run):
        steps = []
        with Recorder(steps):
            output = run()
        self.nbytes += 100

        def replay():
            self.replays += 1
            for function, args, kwargs, out in steps:
                for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)

        return replay, output

    def start(self):
        assert not self.has_started
        self.has_started = True

    def finish(self):
        self.has_started = False
