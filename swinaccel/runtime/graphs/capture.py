"""Capture one call of a module as a graph, and replay it while all that it was captured from is as it was."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ...layers import PLAIN_TENSORS, alias, has_hooks
from ...ops.failures import failures
from ...trust.fingerprint import Untraceable
from ...trust.libraries import is_of_library, unsharded_class
from ...trust.names import reachable
from ..guard import Guard, NotGuardable, same_tensors
from ..plan import State, known_states
from ..weights import settled, with_numbers
from .cuda_graph import CudaGraphs
from .rehearsal import (
    Contents,
    drawing_apart,
    has_generators,
    host_state,
    is_finalized,
    random_state,
    set_random_state,
    trace_of,
)

Run = Callable[[nn.Module, list[Tensor]], Any]

ENGINES: dict[str, Any] = {"cuda": CudaGraphs}  # by type of device
CHANGES = "its forward changes settings of its own"
DRAWS = "it draws random numbers on the host, which a graph would not draw anew"
RUNS = 2  # of a call, to capture it: libraries set themselves up in the first


class NotCapturable(Exception):
    """A call cannot be a graph; the message says why."""


class NotNow(NotCapturable):
    """It cannot be one until its user changes what the message names."""


class Capture:
    """One kind of call of a module, captured without gradients.

    Args:
        module: whose call it is.
        run: the call, of a module that is as this one, and of other tensors.
        inputs: all tensors that the call was given.

    Attributes:
        nbytes: device memory that the graphs take.
        replays: calls that were replays.
        fits: tells if the only input of a call looks like the one that was captured.
        read_by_backward: tensors of the module, but for parameters that want gradients, that a backward reads.
        looks_after: a replay of what does not hold any more does no harm but to its own result, so that the module may
            be looked at while the device works.
    """

    _shares_memory = True  # with graphs of other calls

    def __init__(self, module: nn.Module, run: Run, inputs: list[Tensor]) -> None:
        if any(map(is_finalized, module.modules())):
            raise NotCapturable("a module in it has a method __del__, which copies of it would run")
        root = alias(module)
        self._modules = [root, *(part for part in module.modules() if part is not module)]
        self._device, self.replays, self.looks_after = inputs[0].device, 0, not _may_be_sharded()
        self.fits = same_tensors(inputs) if len(inputs) == 1 else lambda *_: False
        if any(unsharded_class(type(one)) is not type(one) for one in self._modules):
            # What it gathers for a call it frees after it, whoever holds on to it, and may gather elsewhere.
            raise NotCapturable("FSDP2 shards it, and gathers its parameters anew for each call")
        if any(map(has_hooks, self._modules[1:])):  # those of the root run outside of its forward
            raise NotNow("a module in it has hooks, which a graph does not call; remove them")
        classes = {type(one) for one in self._modules if not is_of_library(one)}
        if any("grad" in reachable(cls, ("forward",))[1] for cls in classes):
            raise NotCapturable("its code reads gradients, which are another tensor after each step")
        self._check()
        try:
            trace = trace_of(self._modules)
            cells, outside = ([], []) if trace is None else (trace.cells, trace.contents)
            if classes:  # code that may read what is put on parameters
                outside = [*outside, *((vars(one), dict(vars(one))) for one in module.parameters() if vars(one))]
            self._guard = Guard(self._modules, cells, outside)
        except NotGuardable:
            raise NotCapturable(
                "a module in it holds a setting that cannot be compared, or that holds the module"
            ) from None
        except Untraceable as error:
            raise NotCapturable(str(error)) from None
        outside_values = [value for _, _, value in cells]
        if any(isinstance(one, random.Random) for one in self._guard.owners) or (trace and has_generators(trace)):
            raise NotCapturable(DRAWS)
        self._tensors = self._guard.tensors() + self._guard.values
        self._counted = [one for one in self._tensors if not one.is_floating_point() and not one.is_inference()]
        self._held = [one.detach() for one in self._tensors]  # what a graph reads must stay where it is
        self.read_by_backward: list[Tensor] = []
        self._places, self._versions, self._failures = self._where(), self._counts(), failures.count
        if any(one.device != self._device for one in [*self._tensors, *inputs]):
            raise NotCapturable("its inputs, parameters and buffers are on several devices")
        if any(type(one) not in PLAIN_TENSORS for one in self._tensors):
            raise NotCapturable("some of its parameters are of a tensor class of their own")
        self._fits, self._layouts = same_tensors(self._tensors), self._layouts_now()
        with torch.inference_mode(False):  # where writes are counted
            self._inputs = [torch.empty_like(one, requires_grad=False) for one in inputs]
        for own, one in zip(self._inputs, inputs, strict=True):
            own.copy_(one.detach())
        written = [one._version for one in self._inputs]
        self._engine = ENGINES[self._device.type](self._device, self._shares_memory)
        self._calls: list[tuple[State, int, int]] = []
        contents, hosts = Contents(root, trace), host_state(self._device)
        try:
            with _autocast_without_cache(self._device.type), drawing_apart(self._device):
                leaves, self._form = tree_flatten(self._capture(run, inputs))
                if host_state(self._device) != hosts:
                    raise NotCapturable(DRAWS)
            pairs = zip(self._inputs, inputs, strict=True)  # what is written by way of `data` is not counted
            is_alike = all(torch.equal(own.nan_to_num(), one.detach().nan_to_num()) for own, one in pairs)
            if [one._version for one in self._inputs] != written or not is_alike:
                raise NotCapturable("it writes to its input")
            for leaf in leaves:
                if type(leaf) is not Tensor and not isinstance(leaf, (int, float, str, type(None))):
                    raise NotCapturable(f"it returns a {type(leaf).__name__}, which a graph does not compute")
            self._leaves, (self._order, self._outputs) = leaves, distinct(leaves)
            if self._where() != self._places or not self._is_laid_out():
                raise NotCapturable(CHANGES)
        finally:
            self._statistics = contents.restore()
        self.looks_after &= not self._statistics  # which a replay whose result is thrown away would have written to
        self._counted, self.read_by_backward = (
            [one for one in found if not any(one is other for other in self._statistics)]
            for found in (self._counted, self.read_by_backward)
        )
        self._held += [one for value in outside_values for one in _cached_results(value)]
        self._versions, self._numbers = self._counts(), [one.detach().clone() for one in self._counted]
        self.nbytes: int = self._engine.nbytes

    def _check(self) -> None:
        if any(part.training for part in self._modules):
            raise NotNow("a module in it is in training, and no gradients are recorded; call eval()")

    def _capture(self, run: Run, inputs: list[Tensor]) -> Any:
        """Capture the call, note whose calls it makes, and return its output."""
        root, states = self._modules[0], known_states(self._modules)
        before = [(one, one.calls, one.fallbacks) for one in states]
        try:
            self._warm_up(lambda: run(root, self._inputs), root)
            self._forward, output = self._engine.capture(lambda: with_numbers(settled(run, root, self._inputs)))
        finally:
            for state, calls, fallbacks in before:
                self._calls.append((state, (state.calls - calls) // RUNS, (state.fallbacks - fallbacks) // RUNS))
                state.calls, state.fallbacks = calls, fallbacks  # nobody has asked for those
        if any(isinstance(one, Tensor) and one.requires_grad for one in tree_leaves(output)):
            raise NotCapturable("it records gradients of its own, inside a call that records none")
        return output

    def _warm_up(self, run: Callable[[], Any], root: nn.Module, *guards: Guard) -> None:
        """Run a call once, and see if it draws random numbers; what it changes, the next call may change back."""
        before, gradients = random_state(self._device), _gradients(root)
        self._engine.warm_up(run)
        self._draws = not torch.equal(before, random_state(self._device))
        if _gradients(root) != gradients or not all(one.holds() for one in (self._guard, *guards)):
            raise NotCapturable(CHANGES)

    def is_safe(self) -> bool:
        """Return True if indices hold what they did; through others a kernel might read anywhere.

        All other memory that the graph reads is kept alive, whatever became of the module.
        """
        counts = self._counts()
        if counts != self._versions:  # DDP writes the same numbers to all buffers before each forward
            if not all(map(torch.equal, self._counted, self._numbers)):
                return False
            self._versions = counts
        return True

    def lies(self) -> bool:
        """Return True if all memory that the graph reads is still that of the module."""
        return self._where() == self._places and self.is_safe()

    def _is_laid_out(self) -> bool:
        """Return True if that memory is read as it was: it may be transposed, or be a part of what it was."""
        if not self._fits(*self._tensors):
            if self._layouts_now() != self._layouts:
                return False
            self._fits = same_tensors(self._tensors)  # which looks at more than graphs depend on
        return True

    def _layouts_now(self) -> list[tuple[Any, ...]]:
        return [(one.shape, one.stride(), one.dtype) for one in self._tensors]

    def holds(self, module: nn.Module) -> bool:
        """Return True if the module, and all in it, is what it was."""
        root = self._guard.modules[0]
        is_same = root.__dict__ is module.__dict__ and type(root) is type(module)
        return (
            is_same and self._failures == failures.count and self._guard.holds() and self.lies() and self._is_laid_out()
        )

    def is_free(self) -> bool:
        """Return True if nobody needs what the latest replay has left in the graph's memory."""
        return True

    def replay(self, inputs: list[Tensor]) -> Any:
        """Return what the call returns for other inputs, in memory of the caller's own."""
        return self._formed(self.forward(inputs))

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Return copies of the tensors that the call returns for other inputs."""
        engine = self._engine
        with engine.lock:
            self._drawn_from = random_state(self._device) if self._draws else None
            engine.start()
            for own, one in zip(self._inputs, inputs, strict=True):
                own.copy_(one)
            self._forward()
            copies = [one.clone() for one in self._outputs]
            engine.finish()
        return copies

    def undo(self) -> None:
        """Give the generator the state that it had before the latest replay, whose result is thrown away."""
        if self._drawn_from is not None:
            set_random_state(self._device, self._drawn_from)

    def count(self) -> None:
        """Count a replay, and the calls of the modules inside, which it does not make."""
        self.replays += 1
        for state, calls, fallbacks in self._calls:
            state.calls += calls
            state.fallbacks += fallbacks

    def _formed(self, tensors: Any) -> Any:
        """Return tensors in the form of the call's output."""
        pairs = zip(self._leaves, self._order, strict=True)
        leaves = [one if place is None else tensors[place] for one, place in pairs]
        return tree_unflatten(leaves, self._form)

    def _where(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))

    def _counts(self) -> list[int]:
        return [one._version for one in self._counted]  # of indices, through which kernels read


def distinct(leaves: list[Any]) -> tuple[list[int | None], list[Tensor]]:
    """Return for each leaf its place among the tensors, or None for what is none; and those, each once."""
    tensors: list[Tensor] = []
    places: dict[int, int] = {}
    found: list[int | None] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and id(leaf) not in places:
            places[id(leaf)] = len(tensors)
            tensors.append(leaf)
        found.append(places.get(id(leaf)))
    return found, tensors


def _cached_results(function: Any) -> list[Tensor]:
    """Return tensors that a function of `functools.lru_cache` has returned, and may let go of at any call."""
    held = gc.get_referents(function) if hasattr(function, "cache_info") else []
    return [one for one in tree_leaves(held) if isinstance(one, Tensor)]


def _gradients(module: nn.Module) -> list[tuple[int, int]]:
    """Return which gradients the parameters of a module have, and how often each was written to."""
    return [(id(one.grad), one.grad._version) for one in module.parameters() if one.is_leaf and one.grad is not None]


def _may_be_sharded() -> bool:
    """Return True if FSDP of a module around may give back memory of parameters that live on."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _autocast_without_cache(kind: str) -> Any:
    """Return autocast as it is, which converts weights anew: a graph must not read what its cache is about to free."""
    return torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False)
