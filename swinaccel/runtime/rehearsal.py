"""Run a call for its side effects on us alone: nothing of the model, its statistics and random numbers changes.

A model's first call is rehearsed so that all its kernels are compiled at the same time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..backends.triton.launches import compiled_ahead, prepare
from .cuda_graph import CudaGraphs
from .plan import known_states


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
    buffers = Buffers(module)
    before = {one: (one.calls, one.fallbacks) for one in known_states(module.modules())}
    # What fails is raised again by the call itself.
    with (
        suppress(Exception),
        drawing_apart(device),
        CudaGraphs(device).aside() as stream,
        compiled_ahead(stream),
    ):
        _rehearse(module, run, inputs)
    buffers.restore()
    torch.cuda.empty_cache()  # of that stream
    for state in known_states(module.modules()):
        state.calls, state.fallbacks = before.get(state, (0, 0))


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


class Buffers:
    """The buffers of a module, as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self._kept = [(one, one.clone(), one._version) for one in module.buffers() if not one.is_inference()]

    def restore(self) -> list[Tensor]:
        """Give those that were written to the numbers that they had, and return them."""
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
    """Give the generators of a device, and of the CPU, their states back in the end."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def random_state(device: torch.device) -> Tensor:
    """Return the state of the generator of a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Set the state of the generator of a device."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
