"""Look at what surrounds a call: tracers, transforms, modes and hooks that expect the original's own operations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..config import AccelConfig, env_interpret
from ..layers import CALLED, PLAIN_TENSORS, is_torch_function
from ..spec.adapters import BlockReader
from ..trust.fingerprint import Identity

_tracing_state, _interpreter_stack = torch._C._get_tracing_state, torch._C._functorch.peek_interpreter_stack
_active_mode, _PROXY = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY
_function_modes, _is_any_autocast_enabled = torch._C._len_torch_function_stack, torch._C._is_any_autocast_enabled

# Functions and methods that plans call in place of modules, where they are PyTorch's: (namespace, name, value).
PATCHABLE = tuple(
    (vars(namespace), name, vars(namespace)[name])
    for namespace, name in (
        *((F, name) for name in CALLED),
        (nn.Module, "__call__"),
        (nn.Module, "_call_impl"),
        (nn.Conv2d, "_conv_forward"),
    )
)


def are_functions_torchs() -> bool:
    """Return True if the functions that plans call are PyTorch's own, now and when swinaccel was imported."""
    return _were_functions_torchs and all(namespace[name] is value for namespace, name, value in PATCHABLE)


_were_functions_torchs = all(
    getattr(value, "__code__", None) is None or is_torch_function(value) for _, _, value in PATCHABLE
)


def calls_reason() -> str | None:
    """Return why no module may be passed over: calls of all modules run somebody else's code; or None."""
    if is_torch_function(nn.Module.__call__) and is_torch_function(nn.Module._call_impl):
        return None
    return "nn.Module.__call__ was replaced, which expects the original's own modules; put it back to accelerate"


def context_reason(x: Any) -> str | None:
    """Return why nothing can be replaced for this input, or where this call runs; None if it can."""
    if not isinstance(x, Tensor):
        return "the input is no tensor"
    if _has_any_global_hook():
        return "a global module hook is registered, which expects the original's own modules; remove it to accelerate"
    if torch.compiler.is_compiling():
        return None  # what follows is no concern of a compiler's own tracing, and cannot be traced
    if _tracing_state() is not None:
        return "the model is being traced, and a trace holds no kernels; use torch.export or torch.compile in its place"
    if type(x) not in PLAIN_TENSORS:
        return f"the input is a {type(x).__name__}"
    if x.is_neg():  # of which kernels would read the numbers as they lie
        return "the input is a view of numbers with the other sign; call resolve_neg() on it to accelerate"
    if x.is_meta:
        return "the input is on the meta device, where nothing is computed"
    if _interpreter_stack() is not None:
        return "the call is inside a torch.func transform, which kernels have no rules for; call it outside"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active, which kernels have no rules for; use backward() to accelerate"
    if _active_mode(_PROXY) is not None:
        return "the call is being traced into a graph by make_fx; use torch.export or torch.compile in its place"
    if _function_modes() and not all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack()):
        return "a torch function mode is active, which may replace PyTorch's functions; leave it to accelerate"
    return None


def backend_of(config: AccelConfig, device: torch.device) -> str:
    """Return "triton" or "torch", for tensors on a device."""
    if config.backend != "auto":
        return config.backend
    return "triton" if device.type == "cuda" or (device.type == "cpu" and env_interpret()) else "torch"


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which products of x are computed."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def call_key(
    entry: Any, settings: tuple[Any, ...], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple | None:
    """Return all that decides what a call of one module runs, beside the module; None for arguments of other kinds.

    Args:
        entry: how calls run.
        settings: values of attributes that callers set before each call.
    """
    others: tuple[Any, ...] = ()
    if len(args) != 1 or kwargs:
        others = (len(args), *args[1:], *kwargs.items())
        if not _is_plain(others):
            if not entry.takes_mask:
                return None
            forms = [_form_of(one) for one in (*args[1:], *kwargs.values())]
            if any(form is None for form in forms):
                return None
            others = (len(args), *kwargs, *forms)
    autocast = None
    if _is_any_autocast_enabled() and torch.is_autocast_enabled(kind := x.device.type):
        autocast = torch.get_autocast_dtype(kind)
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast
    return entry, settings, x.shape, x.dtype, x.get_device(), x.requires_grad, x.is_contiguous(), modes, others


def _form_of(value: Any) -> tuple | None:
    """Return what decides about a plan in an argument, of a mask all but its numbers; None for one of other kinds.

    An index is what it is until it is written to.
    """
    if _is_plain((value,)):
        return "value", value
    if type(value) not in PLAIN_TENSORS or value.layout != torch.strided:
        return None
    if not value.is_floating_point():
        return None if value.is_inference() else ("index", Identity(value))
    return "mask", value.shape, value.dtype, value.device, value.requires_grad, value.stride(), value.is_neg()


def _is_plain(values: tuple[Any, ...]) -> bool:
    return all(
        isinstance(one, _PLAIN_VALUES) or (type(one) in (tuple, torch.Size) and _is_plain(one)) for one in values
    )


_PLAIN_VALUES = (int, str, type(None))


def tokens_of(
    adapter: BlockReader, module: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[int, int] | None] | None:
    """Return what a call is about, or None where it is not a call that the original would take."""
    try:
        tokens, size = adapter.tokens(module, *args, **kwargs)
    except (AttributeError, TypeError, ValueError, KeyError):
        return None
    if tokens is not x or x.dim() != (4 if size is None else 3):
        return None
    return (x, size) if size is None or x.shape[1] == size[0] * size[1] else None
