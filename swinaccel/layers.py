"""Look at a module's class and hooks: PyTorch's own layers, hooks on them, methods that were replaced."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DISPATCHER = "_swinaccel_dispatcher"  # attribute of a dispatcher: itself
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PLAIN_TENSORS = (Tensor, nn.Parameter)
# What is put on modules and their classes: the marker of an instance, and what was proven of a class's instances.
MARKER, PROVEN = "_swinaccel", "_swinaccel_proven"

CALLED = ("linear", "gelu", "layer_norm")  # functions that plans call in place of modules, whoever wrote them

BASE_ATTRIBUTES = frozenset(nn.Module().__dict__)  # those that every module has

_TORCH = os.path.dirname(torch.__file__) + os.sep
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_IDLE_METHODS = frozenset(("extra_repr", "__repr__"))  # which no forward runs


def is_torch_function(function: Any) -> bool:
    """Return True if a function was written in PyTorch; one that takes its place may carry its name, not its code."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(_TORCH)


_LAYERS = (nn.LayerNorm, nn.Linear, nn.GELU, nn.Identity, nn.Dropout, nn.Conv2d)
_FORWARDS = {cls: cls.forward if is_torch_function(cls.forward) else None for cls in _LAYERS}


def is_builtin(module: Any, cls: Any) -> bool:
    """Return True if a module is exactly PyTorch's layer, one of `_LAYERS`, whose calls run its class's forward."""
    is_one = type(module) is cls and module._compiled_call_impl is None
    return is_one and cls.forward is _FORWARDS[cls] and _is_called_plainly(cls)


def _is_called_plainly(cls: Any) -> bool:
    """Return True if a class calls its forward as every module does."""
    return cls.__call__ is nn.Module.__call__ and cls._call_impl is nn.Module._call_impl


def has_hooks(module: nn.Module) -> bool:
    """Return True if a module has hooks of its own, on its forward or its backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_own_forward(module: nn.Module) -> bool:
    """Return True if forward was replaced on this instance; reading it is what makes a compiler guard the answer."""
    return module.forward is None or "forward" in module.__dict__


def replaced_methods(module: nn.Module) -> list[str]:
    """Return the names of methods that were replaced on this very instance, by whatever can be called."""
    cls = type(module)
    return [
        name
        for name in module.__dict__.keys() - BASE_ATTRIBUTES
        if isinstance(getattr(cls, name, None), _FUNCTIONS) and name not in _IDLE_METHODS
    ]


def owner(cls: type, method: str) -> type:
    """Return the class that defines the method which instances of `cls` run."""
    return next(base for base in cls.__mro__ if method in vars(base))


def own_method(cls: type, method: str) -> Callable[..., Any]:
    """Return the class's own method, unbound, without swinaccel's dispatcher."""
    return without_dispatcher(vars(owner(cls, method))[method])


def as_replacement(function: Any, method: Any) -> Callable[..., Any]:
    """Return a function, which names nothing global, marked as swinaccel's and with a method's name and globals."""
    # torch.jit.script compiles the source of what functools.wraps names, in the globals of what it was given.
    made = types.FunctionType(function.__code__, method.__globals__, closure=function.__closure__)
    functools.update_wrapper(made, method)
    # update_wrapper copies it, and dynamo would then take ours for the original.
    made.__dict__.pop("_torchdynamo_orig_callable", None)
    made.__dict__[DISPATCHER] = made
    return made


def without_dispatcher(function: Any) -> Any:
    """Return the method behind a dispatcher of swinaccel's; any other function as it is."""
    # Itself: functools.wraps copies attributes, and what wraps a dispatcher is none.
    return vars(function)["__wrapped__"] if getattr(function, DISPATCHER, None) is function else function


def alias(module: nn.Module) -> nn.Module:
    """Return an object that shares a module's attributes: a reference to it does not keep the module alive."""
    other = object.__new__(type(module))
    other.__dict__ = module.__dict__
    return other


def is_wrapper(module: nn.Module) -> bool:
    """Return True if a module's class passes attribute reads on, as proxies of another module do."""
    cls = type(module)
    return cls.__getattr__ is not nn.Module.__getattr__ or cls.__getattribute__ is not object.__getattribute__
