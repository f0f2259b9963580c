"""Run a call for its side effects on us alone: nothing of the model, its statistics and random numbers changes.

A model's first call is rehearsed so that all its kernels are compiled at the same time.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...backends.triton.launches import compiled_ahead, prepare
from ...layers import has_hooks
from ...trust.fingerprint import Trace, Untraceable
from ...trust.libraries import is_of_library
from ..guard import Guard, NotGuardable
from ..plan import known_states
from ..precision import Precision
from .cuda_graph import CudaGraphs


def prepare_compilers(module: nn.Module) -> None:
    """Begin with what compilers of kernels wait for, if a module is on a GPU."""
    if any(one.is_cuda for one in module.parameters()):
        prepare()


def compile_ahead(module: nn.Module, run: Callable[[nn.Module, list[Tensor]], Any], inputs: list[Tensor]) -> None:
    """Compile what a call of a module will launch, its backward too where gradients are recorded.

    Args:
        run: the call, of a module and of tensors.
    """
    device = inputs[0].device
    if device.type != "cuda":
        return
    modules = list(module.modules())
    if any(map(has_hooks, modules[1:])) or any(map(is_finalized, modules)):
        return  # hooks, and what a copy finalizes, are somebody else's; those of the module itself run outside of it
    try:
        Guard(modules)
        trace = trace_of(modules)
    except (NotGuardable, Untraceable):
        return  # it could not be undone, or is too much to be copied
    if trace is not None and has_generators(trace):
        return  # nor could what such a generator draws
    contents = Contents(module, trace)
    # What fails is raised again by the call itself.
    with (
        states_kept(module),
        suppress(Exception),
        drawing_apart(device),
        CudaGraphs(device).aside() as stream,
        compiled_ahead(stream),
    ):
        _rehearse(module, run, inputs)
    contents.restore()
    torch.cuda.empty_cache()  # of that stream


@contextmanager
def states_kept(module: nn.Module) -> Iterator[None]:
    """Give calls that are counted, and errors that are measured, their values back: what is rehearsed is no call."""
    before = {one: (one.calls, one.fallbacks, copy.copy(one.precision)) for one in known_states(module.modules())}
    try:
        yield
    finally:
        for state in known_states(module.modules()):
            state.calls, state.fallbacks, known = before.get(state, (0, 0, None))
            if state.precision is not None:
                state.precision.become(known or Precision())


def _rehearse(module: nn.Module, run: Callable[[nn.Module, list[Tensor]], Any], inputs: list[Tensor]) -> None:
    is_own = not all(map(is_of_library, module.modules()))  # its code may write to what it is given, and to objects
    twin, parameters = twin_of(module) if is_own or torch.is_grad_enabled() else (module, {})
    copies = [one.detach().clone() for one in inputs]
    for one, given in zip(copies, inputs, strict=True):
        if given.requires_grad:
            one.requires_grad_()
    outs = differentiable(run(twin, copies))
    if outs:
        sources = [*(one for one in copies if one.requires_grad), *parameters.values()]
        torch.autograd.grad(outs, sources, list(map(torch.ones_like, outs)), allow_unused=True)


def differentiable(output: Any) -> list[Tensor]:
    """Return the tensors of an output that have a gradient, each once."""
    leaves = {id(one): one for one in tree_leaves(output) if isinstance(one, Tensor) and one.requires_grad}
    return list(leaves.values())


def twin_of(module: nn.Module, shared: Iterable[Tensor] = ()) -> tuple[nn.Module, dict[Tensor, Tensor]]:
    """Return a copy of a module that shares its memory, and its parameters that want gradients, by the module's.

    The node that adds up a parameter's gradient runs on the stream that it was made on, and may be alive. The copy's
    parameters have nodes of their own.

    Args:
        shared: further tensors that are not to be copied.
    """
    memo: dict[int, Any] = {id(one): one for one in (*module.buffers(), *shared)}
    found: dict[Tensor, Tensor] = {}
    for one in module.parameters():
        memo[id(one)] = other = nn.Parameter(one.detach(), one.requires_grad)
        if one.requires_grad:
            found[one] = other
    return copy.deepcopy(module, memo), found


def has_generators(trace: Trace) -> bool:
    """Return True if code reads a generator outside of the module, which draws on the host."""
    held = [value for _, _, value in trace.cells]
    for _, then in trace.contents:
        held += then.values() if isinstance(then, dict) else then
    return any(isinstance(one, (random.Random, torch.Generator)) for one in held)


def is_finalized(module: nn.Module) -> bool:
    """Return True if code runs when a module, or a copy that shares what it holds, is freed."""
    return hasattr(type(module), "__del__")


def trace_of(modules: list[nn.Module]) -> Trace | None:
    """Return what the code of modules reads elsewhere, or None where all of it is of libraries and cannot be followed.

    Raises:
        Untraceable: where it cannot be followed otherwise.
    """
    try:
        return Trace([("", one) for one in modules], ("forward",))
    except Untraceable:
        if all(map(is_of_library, modules)):
            return None
        raise


class Contents:
    """What a forward may write to, as it is now: settings and tensors of a module, and what its code reads elsewhere.

    Of a library's parameters it is where they lie, and not their numbers.
    """

    def __init__(self, module: nn.Module, trace: Trace | None = None) -> None:
        spaces = list(map(vars, module.modules()))
        held = [one for space in spaces for one in space.values()]
        cells, contents = ([], []) if trace is None else (trace.cells, [one for one, _ in trace.contents])
        containers = {id(one): one for one in (*spaces, *held, *contents)}.values()
        self._spaces = [(one, dict(one)) for one in containers if isinstance(one, dict)]
        self._lists = [(one, list(one)) for one in containers if isinstance(one, (list, deque))]
        self._sets = [(one, set(one)) for one in containers if isinstance(one, set)]
        self._cells = [(owner, name, value) for owner, name, value in cells if _look(owner, name) is value]
        self._places = [(one, one.detach(), one.data_ptr()) for one in module.parameters()]
        self._gradients = [(one, one.grad) for one in module.parameters() if one.is_leaf]
        tensors = [one for one in {id(one): one for one in (*module.buffers(), *held)}.values() if type(one) is Tensor]
        if not all(map(is_of_library, module.modules())):
            tensors += [one for pair in self._gradients for one in pair if one is not None]
        self._kept = [(one, one.detach().clone(), one._version) for one in tensors if not one.is_inference()]

    def restore(self) -> list[Tensor]:
        """Put back what was held, and return the tensors that were written to."""
        for space, then in self._spaces:
            if list(space) != list(then) or not all(map(is_, space.values(), then.values())):
                for name in [name for name in space if name not in then]:
                    del space[name]
                for name, value in then.items():  # a Counter's `update` would add
                    if space.get(name, _look) is not value:
                        space[name] = value
                    if isinstance(space, OrderedDict):
                        space.move_to_end(name)
        for values, old in self._lists:
            if len(values) != len(old) or not all(map(is_, values, old)):
                values.clear()
                values.extend(old)
        for entries, before in self._sets:
            if entries != before:
                entries.clear()
                entries |= before
        for owner, name, value in self._cells:
            if _look(owner, name) is not value:
                if isinstance(owner, dict):
                    owner[name] = value
                else:
                    setattr(owner, name, value)
        for parameter, alike, place in self._places:
            if parameter.data_ptr() != place:
                parameter.data = alike
        for parameter, gradient in self._gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient
        found = [
            (one, kept)
            for one, kept, version in self._kept
            if one._version != version or not torch.equal(one, kept)  # batch norm counts no versions
        ]
        for one, kept in found:
            if one.shape != kept.shape:
                one.data = kept
            one.data.copy_(kept)  # without a new version, which who has saved the buffer would take for an error
        return [one for one, _ in found]


def _look(owner: Any, name: str) -> Any:
    """Return what a dictionary or an object has by a name; what cannot be written to has nothing."""
    if isinstance(owner, dict):
        return owner.get(name, _look)
    return _look if isinstance(owner, Mapping) else getattr(owner, name, _look)


@contextmanager
def drawing_apart(device: torch.device) -> Iterator[None]:
    """Give the generators of a device, and those of the host, their states back in the end."""
    state, numpy = random.getstate(), sys.modules.get("numpy.random")
    array_state = None if numpy is None else numpy.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.set_state(array_state)


def host_state(device: torch.device) -> tuple[Any, ...]:
    """Return the states of all generators but the device's, to be compared."""
    numpy = sys.modules.get("numpy.random")
    return (
        random.getstate(),
        None if numpy is None else repr(numpy.get_state()),
        None if device.type == "cpu" else torch.get_rng_state().tolist(),
    )


def random_state(device: torch.device) -> Tensor:
    """Return the state of the generator of a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Set the state of the generator of a device."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
