"""Ways to call a model, with its output and gradients."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import helpers
import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.utils.checkpoint import checkpoint

import swinaccel
from edits.parts import _fail, _shift_output
from edits.tables import scope, way

# Ways to call.


def total(out: Any) -> Tensor:
    """A sum of all that a model gives, with other weights at each place."""
    found = [one for one in helpers.tensors(out) if one.is_floating_point()]
    return sum(
        (one.double() * torch.arange(one.numel(), device=one.device).cos().view(one.shape)).sum() for one in found
    )


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    for one in model.parameters():
        one.grad = None
    if loss.requires_grad:
        loss.backward()
    return {name: one.grad for name, one in model.named_parameters()}


@way
def without_gradients(model, args):
    with torch.no_grad():
        return model(*args)


@way
def in_inference_mode(model, args):
    with torch.inference_mode():
        return model(*args)


@way
def with_gradients(model, args):
    out = model(*args)
    return out, _gradients(model, total(out))


@way
def with_gradients_of_the_input(model, args):
    x = args[0].clone().requires_grad_()
    out = model(x, *args[1:])
    grads = _gradients(model, total(out))
    return out, grads, x.grad


@way
def twice_before_a_backward(model, args):
    first, second = model(*args), model(*args)
    return first, _gradients(model, total(first) + 2 * total(second))


@way
def under_autocast(model, args):
    with torch.autocast(args[0].device.type, torch.bfloat16), torch.no_grad():
        return model(*args)


@way
def checkpointed(model, args):
    out = checkpoint(model, *args, use_reentrant=False)
    return out, _gradients(model, total(out))


@way
def by_functional_call(model, args):
    changed = {name: 1.1 * one.detach() for name, one in model.named_parameters()}
    with torch.no_grad():
        return torch.func.functional_call(model, changed, args)


@way
def by_function_transform(model, args):
    values = {name: one.detach() for name, one in model.named_parameters()}
    if len({id(one) for one in model.parameters()}) < len(values):
        return None
    return torch.func.grad(lambda values: total(torch.func.functional_call(model, values, args)))(values)


@way
def in_a_thread(model, args):
    return _threads(model, args, 1)


@way
def in_threads_at_once(model, args):
    return _threads(model, args, 3)


def _threads(model: nn.Module, args: tuple[Any, ...], count: int) -> list[Any]:
    found: list[Any] = [None] * count

    def run(place: int) -> None:
        found[place] = _try(lambda: without_gradients(model, args))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found


def _try(function: Callable) -> Any:
    try:
        return function()
    except Exception as error:
        return error


@way
def after_a_failure(model, args):
    """A call that a hook breaks off in the middle, and then another one."""
    handle = list(model.modules())[-1].register_forward_pre_hook(_fail)
    with contextlib.suppress(ArithmeticError):
        without_gradients(model, args)
    handle.remove()
    return without_gradients(model, args)


@way
def with_hooks_of_all_modules(model, args):
    handle = every_module.register_module_forward_hook(_shift_output)
    try:
        return without_gradients(model, args)
    finally:
        handle.remove()


def _patched(name: str, cls: type) -> Callable:
    """A way to call while the forward of a class is another one."""

    def call(model: nn.Module, args: tuple[Any, ...]) -> Any:
        own = cls.__dict__["forward"]

        def forward(self: Any, *args: Any) -> Any:
            return 0.75 * own(self, *args)

        cls.forward = functools.wraps(own)(forward)
        try:
            return without_gradients(model, args)
        finally:
            cls.forward = own

    call.__name__ = f"with_a_patched_{name}"
    return way(call)


for _name, _cls in (("linear", nn.Linear), ("norm", nn.LayerNorm), ("softmax", nn.Softmax), ("gelu", nn.GELU)):
    _patched(_name, _cls)


# Ways that concern swinaccel; a twin that knows nothing of it is called without.


@scope
def where_disabled(model, args):
    with swinaccel.disabled():
        return without_gradients(model, args)


@scope
def in_a_scope(model, args):
    with swinaccel.accelerated(model, backend="torch") as fast:
        return without_gradients(fast, args)


@scope
def in_scopes_that_fail(model, args):
    with contextlib.suppress(ArithmeticError), swinaccel.accelerated(model, backend="torch", fuse="attention"):
        without_gradients(model, args)
        with swinaccel.disabled(), swinaccel.accelerated(model, backend="triton"):
            raise ArithmeticError
    return without_gradients(model, args)


# Optimizers: each makes a step and gives what comes after it.


def _stepping(name: str, make: Callable) -> Callable:
    def call(model: nn.Module, args: tuple[Any, ...]) -> Any:
        wanted = [one for one in model.parameters() if one.requires_grad]
        if not wanted:
            return None
        optimizer = make(wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grads = _gradients(model, total(model(*args)))
        optimizer.step()
        return grads, without_gradients(model, args)

    call.__name__ = f"after_a_step_of_{name}"
    return way(call)


_stepping("sgd", lambda wanted: torch.optim.SGD(wanted, 1e-3, foreach=True))
_stepping("adamw", lambda wanted: torch.optim.AdamW(wanted, 1e-3, fused=True))
_stepping("adam", lambda wanted: torch.optim.Adam(wanted, 1e-3, foreach=True))
