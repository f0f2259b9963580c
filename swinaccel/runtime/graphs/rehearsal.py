"""Run a call for its side effects on us alone: nothing of the model, its statistics and random numbers changes.

A model's first call is rehearsed so that all its kernels are compiled at the same time.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...backends.triton.launches import compiled_ahead, prepare
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
    contents = Contents(module)
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
    twin, parameters = twin_of(module) if torch.is_grad_enabled() else (module, {})
    outs = differentiable(run(twin, inputs))
    if outs:
        sources = [*(one for one in inputs if one.requires_grad), *parameters.values()]
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


class Contents:
    """What a forward may write to in a module, as it is now: settings, buffers, and tensors that are neither.

    Of parameters it is where they lie, and not their numbers.
    """

    def __init__(self, module: nn.Module) -> None:
        spaces = list(map(vars, module.modules()))
        values = [one for space in spaces for one in space.values()]
        spaces += [one for one in values if type(one) in (dict, OrderedDict)]
        self._spaces = [(one, one.copy()) for one in spaces]
        self._lists = [(one, one[:]) for one in values if type(one) is list]
        self._places = [(one, one.detach(), one.data_ptr()) for one in module.parameters()]
        tensors = {id(one): one for one in (*module.buffers(), *values) if type(one) is Tensor}.values()
        self._kept = [(one, one.detach().clone(), one._version) for one in tensors if not one.is_inference()]

    def restore(self) -> list[Tensor]:
        """Give the module what it held, and return the buffers and other tensors that were written to."""
        for space, then in self._spaces:
            if list(space) != list(then) or not all(map(is_, space.values(), then.values())):
                space.update(then)
                for name in space.keys() - then.keys():
                    del space[name]
        for values, old in self._lists:
            values[:] = old
        for parameter, alike, place in self._places:
            if parameter.data_ptr() != place:
                parameter.data = alike
        found = [
            (one, kept)
            for one, kept, version in self._kept
            if one._version != version or not torch.equal(one, kept)  # batch norm counts no versions
        ]
        for one, kept in found:
            one.data.copy_(kept)  # without a new version, which who has saved the buffer would take for an error
        return [one for one, _ in found]


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
