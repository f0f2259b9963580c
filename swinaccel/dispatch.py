"""One call: a plan, or the sentence why not, and then the section or the original.

Everything here is decided from the live facts of the call. What is remembered of earlier ones is kernels that failed,
and, for as long as a `Watch` finds a module the same in all its parts, what was read off it: see `_Memory`.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from . import bias, fusion, ops
from .backends import torch as torch_backend
from .config import AccelConfig, env_interpret, env_strict
from .layout import Attend, Merging, Product
from .spec import Section
from .watch import METHODS, Unwatchable, Watch, has_hooks, has_own_forward, is_own, is_pytorchs, own_method, twin


class FallbackError(RuntimeError):
    """Strict mode: an original would have run in place of a kernel."""


class Stats:
    """What happened to one module: calls, those of them that ran the original, and why the last of those did."""

    __slots__ = ("bias", "calls", "fallbacks", "index", "looked_at", "memory", "patience", "reason")

    def __init__(self) -> None:
        self.calls = 0
        self.fallbacks = 0
        self.reason: str | None = None
        self.bias: str | None = None
        self.looked_at: Tensor | None = None  # the bias index last found to fit its table; kept, its address is its own
        self.index: tuple[Any, ...] | None = None  # and the state of both
        self.memory: _Memory | None = None
        self.patience = 8  # with a module that keeps changing: memories to be made before one has paid for itself


class _Memory:
    """What was read off a module, of one thing: the sections of its calls on GPUs, which are judged to fit.

    The module itself is not kept alive by it, nor is it copied or pickled with the module.
    """

    __slots__ = ("config", "sections", "twin", "watch")

    def __init__(self, family: Any, module: nn.Module, config: AccelConfig) -> None:
        self.config = config
        self.twin = twin(module)
        self.sections: dict[tuple, Section] = {}
        attention = family.attention(self.twin)
        below = list(attention.modules())
        unhooked = below[1:] if attention is self.twin else below
        self.watch = Watch(below if attention is self.twin else [self.twin, *below], unhooked)

    def holds(self, module: nn.Module, config: AccelConfig) -> bool:
        return (
            config is self.config
            and module.__dict__ is self.twin.__dict__
            and type(module) is type(self.twin)
            and self.watch.holds()
        )


def _call_key(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
    """What else than the module decides about a section: its input's form, and the other arguments; None: too much."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if len(args) == 1 and not kwargs:
        return x.shape, x.dtype, x.get_device(), dtype
    others = (*args[1:], *kwargs.items())
    return (x.shape, x.dtype, x.get_device(), dtype, len(args), others) if _is_plain(others) else None


def _is_plain(values: tuple[Any, ...]) -> bool:
    return all(isinstance(one, _PLAIN_VALUES) or (type(one) is tuple and _is_plain(one)) for one in values)


_PLAIN_VALUES = (int, str, type(None))


# By role, what was seen inside probed attention: what their families call, or leave out, is known to fit.
_trusted: dict[tuple, set[tuple]] = {}

_warned: set[str] = set()


def run(
    family: Any,
    module: nn.Module,
    original: Callable[..., Any],
    config: AccelConfig,
    stats: Stats | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """One call of an accelerated module.

    Args:
        family: the module's `families.Family`.
        original: its own method, unbound.
        stats: counted up where given; nothing is counted while a compiler traces.
    """
    x = _first_tensor(args, kwargs)
    if torch.compiler.is_compiling() and isinstance(x, Tensor) and _backend(config, x.device) == "torch":
        return original(module, *args, **kwargs)  # already plain PyTorch: the compiler fuses it in its own way
    if stats is not None:
        stats.calls += 1
    section = _remembered(module, config, stats, x, args, kwargs)
    if section is not None:
        attend: Attend = partial(_attend_triton, section, config, stats)
    else:
        plan = _plan(family, module, config, stats, x, args, kwargs)
        if isinstance(plan, str):
            return _fall_back(plan, module, original, config, stats, args, kwargs)
        section, attend = plan
    look = tokens = None
    backend = _backend(config, x.device)
    if hasattr(family, "block") and not hasattr(family, "block_method"):  # else the block has its own dispatcher
        look = _surroundings(family, module, config, x, backend)
        tokens = None if look is None else _tokens(family, module, x, args, kwargs)
    try:
        if look is None or tokens is None:
            result = family.forward(module, attend, *args, **kwargs)
        elif torch.compiler.is_compiling():
            result = fusion.forward_traced(look, attend, *tokens)
        else:
            result = fusion.forward(look, attend, *tokens, backend=backend)
    except ops.KernelError as error:
        return _fall_back(str(error), module, original, config, stats, args, kwargs)
    if look is not None:
        _demand_fused(module, config)
    if ops.has_failures() and stats is not None:
        failed = _kernel_failure(section, x)
        if failed is not None:
            return _fall_back(failed, module, original, config, stats, args, kwargs)
    return result


def _remembered(
    module: nn.Module, config: AccelConfig, stats: Stats | None, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Section | None:
    """The section of an earlier call like this one, for the kernels, where nothing speaks against that."""
    if stats is None or (memory := stats.memory) is None:
        return None
    if _context_reason(x) is not None or ops.has_failures() or not (x.is_cuda or env_interpret()):
        return None
    key = _call_key(x, args, kwargs)
    if key is None or not memory.holds(module, config):
        return None
    section = memory.sections.get(key)
    if section is None or (section.mask is not None and section.mask.requires_grad):
        return None
    if stats.index != _index_state(section):
        return None
    stats.patience = 8
    return section


def _remember(
    family: Any,
    module: nn.Module,
    config: AccelConfig,
    stats: Stats,
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Keep the section of a call that runs the kernels for the next of its kind."""
    key = _call_key(x, args, kwargs)
    if key is None or not stats.patience:
        return
    memory = stats.memory
    if memory is None or not memory.holds(module, config):
        stats.patience -= 1
        stats.memory = None
        try:
            memory = stats.memory = _Memory(family, module, config)
        except Unwatchable:
            stats.patience = 0
            return
    if len(memory.sections) >= 16:  # sizes that never come back
        memory.sections.clear()
    section = family.section(memory.twin, *args, **kwargs)
    section.project, section.output = _directly(section.project), _directly(section.output)
    memory.sections[key] = section


def _directly(call: Any) -> Callable[..., Any]:
    """A plain linear layer as its product alone, for as long as a watch finds it the same and without hooks."""
    if isinstance(call, Product):
        return lambda x: fusion.linear(x, call.layer.weight, call.bias())
    if not is_own(call, nn.Linear) or call._compiled_call_impl is not None:
        return call
    weight, bias = call.weight, call.bias  # the watch has an eye on what the class's forward is

    def product(x: Tensor) -> Tensor:
        return fusion.linear(x, weight, bias) if nn.Module.__call__ is _module_call else call(x)

    return product


_module_call = nn.Module.__call__ if is_pytorchs(nn.Module.__call__) else None


def run_around(
    family: Any,
    module: nn.Module,
    original: Callable[..., Any],
    config: AccelConfig,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """One call of a module around accelerated attention, which has a dispatcher of its own: fused, or the original."""
    x = _first_tensor(args, kwargs)
    if _context_reason(x) is None:
        backend = _backend(config, x.device)
        is_block = hasattr(family, "attend")
        look = _surroundings(family, module, config, x, backend) if is_block or backend != "torch" else None
        tokens = None if look is None else _tokens(family, module, x, args, kwargs)
        if look is not None and tokens is not None:
            if torch.compiler.is_compiling():
                if is_block:
                    return fusion.forward_traced(look, family.attend(module), *tokens)
                return fusion.embed_traced(look, x)
            if is_block:
                result = fusion.forward(look, family.attend(module), *tokens, backend=backend)
            else:
                result = fusion.merge(look, *tokens) if isinstance(look.facts, Merging) else fusion.embed(look, x)
            _demand_fused(module, config)
            return result
    return original(module, *args, **kwargs)


def _surroundings(family: Any, module: nn.Module, config: AccelConfig, x: Tensor, backend: str) -> Any:
    """What is known of a block, merging or embedding that may be fused in this call, or None."""
    if config.fuse != "auto":
        return None
    if torch.compiler.is_compiling():
        is_block = hasattr(family, "attend") or hasattr(family, "section")
        look = fusion.traced if is_block else fusion.traced_embedding
        return look(family, module, x) if backend == "triton" else None
    if not fusion.is_worth(x, backend):
        return None
    if backend == "triton":
        _demand_fused(module, config)
    return fusion.fitting(family, module, x, backend)


def _demand_fused(module: nn.Module, config: AccelConfig) -> None:
    """Raise in strict mode where a kernel failed, so that layers around the attention run one by one."""
    if fusion.has_failures() and not torch.compiler.is_compiling() and (config.strict or env_strict()):
        raise FallbackError(f"{type(module).__name__} would run its own layers: {fusion.failure()}")


def _tokens(family: Any, module: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call is about, or None where it is not a call that the original would take."""
    try:
        tokens, size = family.tokens(module, *args, **kwargs)
    except (AttributeError, TypeError, ValueError, KeyError):
        return None
    if tokens is not x or x.dim() != (4 if size is None else 3):
        return None
    return (x, size) if size is None or x.shape[1] == size[0] * size[1] else None


def _fall_back(
    reason: str,
    module: nn.Module,
    original: Callable[..., Any],
    config: AccelConfig,
    stats: Stats | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if config.strict or env_strict():
        raise FallbackError(f"{type(module).__name__} would run its original: {reason}")
    if stats is not None:
        stats.fallbacks += 1
        stats.reason = reason
        if reason not in _warned:
            _warned.add(reason)
            warnings.warn(f"swinaccel: the original runs, because {reason}", stacklevel=4)
    return original(module, *args, **kwargs)


def _plan(
    family: Any,
    module: nn.Module,
    config: AccelConfig,
    stats: Stats | None,
    x: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Section, Attend] | str:
    attention = family.attention(module)
    reason = _context_reason(x) or _hook_reason(attention, attention is module)
    if reason is not None:
        return reason
    try:
        section = family.section(module, *args, **kwargs)
    except TypeError as error:
        return f"the call is not one that the {family.name} family knows ({error})"
    if isinstance(section, str):
        return section
    reason = _section_reason(section)
    if reason is not None:
        return reason
    if _backend(config, x.device) == "torch":
        reason = _torch_reason(section, attention, config, x)
        if reason is not None:
            return reason
        if stats is not None:
            stats.bias = "table"
        in_parts = torch_backend.is_plain(attention)
        return section, lambda image: torch_backend.shifted_window_attention(section, image, in_parts=in_parts)
    reason = _triton_reason(section, x)
    if reason is None and stats is not None:
        reason = _index_reason(section, stats)
    if reason is not None:
        return reason
    if stats is not None:
        _remember(family, module, config, stats, x, args, kwargs)
        # Products as in later calls: a checkpoint compares what this one saves with what is saved then.
        section.project, section.output = _directly(section.project), _directly(section.output)
    return section, partial(_attend_triton, section, config, stats)


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _context_reason(x: Any) -> str | None:
    """Why nothing can be replaced for this input, or where this call runs."""
    if not isinstance(x, Tensor):
        return "the input is no tensor"
    if _has_any_global_hook():
        return "hooks of all modules are registered, which expect the original's own"
    if torch.compiler.is_compiling():
        return None  # what follows is no concern of a compiler's own tracing, and cannot be traced
    if _tracing_state() is not None:
        return "the model is being traced"
    if type(x) not in _PLAIN_TENSORS:
        return f"the input is a {type(x).__name__}"
    if x.is_meta:
        return "the input is on the meta device"
    if _interpreter_stack() is not None:
        return "the call is inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if _active_mode(_PROXY) is not None:
        return "the call is being traced into a graph"
    if _function_modes() and not all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack()):
        return "a mode is active that may replace PyTorch's functions"
    return None


_PLAIN_TENSORS = (Tensor, nn.Parameter)
_tracing_state, _interpreter_stack = torch._C._get_tracing_state, torch._C._functorch.peek_interpreter_stack
_active_mode, _PROXY = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY
_function_modes = torch._C._len_torch_function_stack


def trust(attention: nn.Module) -> None:
    """Let sections stand in for the parts of a probed attention, and for others in the same roles."""
    parts: list[tuple[type | None, str, nn.Module]] = [(None, "", attention)]
    parts += [(type(parent), name, child) for parent in attention.modules() for name, child in parent.named_children()]
    for parent, name, part in parts:
        _trusted.setdefault((parent, name, type(part)), set()).add(_nature(part))


def _nature(part: nn.Module) -> tuple:
    """A class's forward as it is now, what a part without parameters is set to, and the switches of unknown code.

    Such parts are not called by a section, which reads drop rates (`p`) anew at each call.
    """
    attributes = part.__dict__
    if attributes["_parameters"] or attributes["_modules"]:
        forward = own_method(type(part), "forward")
        return (forward,) if fusion.harmless.is_of_library(part) else (forward, _switches(attributes))
    settings = frozenset([(key, repr(attributes[key])) for key in attributes.keys() - _READ_OTHERWISE])
    return own_method(type(part), "forward"), settings


_READ_OTHERWISE = {*nn.Module().__dict__, "p"}


def _switches(attributes: dict[str, Any]) -> frozenset:
    """What is set to yes, no, nothing, a word or a function; families read numbers anew, and probes move them."""
    own = [(key, one) for key, one in attributes.items() if key[0] != "_" and key != "training"]
    own += [(key, one) for kept in ("_parameters", "_buffers", "_modules") for key, one in attributes[kept].items()]
    return frozenset([(key, one) for key, one in own if isinstance(one, (bool, str, type(None), types.FunctionType))])


def _hook_reason(module: nn.Module, is_called: bool, parent: type | None = None, name: str = "") -> str | None:
    """Why modules that the section stands in for must be called: someone watches them, or changed them since.

    Args:
        module: the attention, and from there down.
        is_called: the module itself is called all the same, so that its own hooks run.
        parent, name: whose part it is, where it is not the attention.
    """
    if not is_called and has_hooks(module):
        return f"{type(module).__name__} inside the attention has hooks, which expect its own tensors"
    for method in replaced(module):
        if method != "forward" or not is_called:
            return f"{type(module).__name__} inside the attention has a {method} of its own"
    natures = _trusted.get((parent, name, type(module)))
    if natures is None or not (torch.compiler.is_compiling() or _nature(module) in natures):
        return f"a {type(module).__name__} came into the attention after accelerate(), or was changed; call it again"
    for key, child in module._modules.items():
        if child is not None:
            reason = _hook_reason(child, False, type(module), key)
            if reason is not None:
                return reason
    return None


def replaced(module: nn.Module) -> list[str]:
    """Methods replaced on this very instance; a compiler, which cannot walk over attributes, asks for `forward`."""
    if torch.compiler.is_compiling():
        return ["forward"] if has_own_forward(module) else []
    cls, attributes = type(module), module.__dict__
    return [name for name, value in attributes.items() if isinstance(value, METHODS) and hasattr(cls, name)]


def _section_reason(section: Section) -> str | None:
    """What no backend can do."""
    geometry = section.geometry
    if geometry.tokens < 2 or min(geometry.window) < 1:
        return "the window is a single token"
    if not all(0 <= shift < window for shift, window in zip(geometry.shift, geometry.window, strict=True)):
        return f"the shift {geometry.shift} does not lie inside the window {geometry.window}"
    index, tokens = section.index, geometry.tokens
    if tuple(index.shape) != (tokens, tokens):
        return f"the bias index {tuple(index.shape)} does not belong to a window of {tokens} tokens"
    mask = section.mask
    if mask is not None and tuple(mask.shape) != (geometry.num_windows, tokens, tokens):
        return f"the mask {tuple(mask.shape)} belongs to another image size than {geometry.size}"
    if mask is not None and not mask.is_floating_point():
        return f"the mask is of {mask.dtype}"
    if mask is not None and mask.requires_grad:
        return "the mask has a gradient"
    return None


def _torch_reason(section: Section, attention: nn.Module, config: AccelConfig, x: Tensor) -> str | None:
    """What the torch backend cannot do, or not faster: it trains slower than the originals.

    One that was asked for by name records gradients all the same.
    """
    if section.dropout > 0:
        return "attention dropout is active, and the torch backend has none"
    if config.backend != "torch" and _records_gradients(attention, x):
        return "gradients are recorded, and only on GPUs is training accelerated"
    return None


def _records_gradients(attention: nn.Module, x: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(parameter.requires_grad for parameter in attention.parameters())


def _backend(config: AccelConfig, device: torch.device) -> str:
    if config.backend != "auto":
        return config.backend
    return "triton" if device.type == "cuda" or (device.type == "cpu" and env_interpret()) else "torch"


def _triton_reason(section: Section, x: Tensor) -> str | None:
    interpret = x.device.type == "cpu" and env_interpret()
    reason = ops.unsupported_reason(
        x.device, fusion.product_dtype(x), section.geometry, section.num_heads, section.head_dim, interpret
    )
    if reason is None and section.geometry.is_padded and section.padding is None:
        reason = "the image is padded and the projection is not a plain nn.Linear"
    if reason is None and ops.has_failures():
        reason = _kernel_failure(section, x)
    return reason


def _index_reason(section: Section, stats: Stats) -> str | None:
    """Why the kernels, which check no index, cannot take this one; it is looked through once in each of its states."""
    index, state = section.index, _index_state(section)
    if state == stats.index:
        return None
    if index.is_cuda and torch.cuda.is_current_stream_capturing():
        return "its bias index was not looked through before a CUDA graph is captured; run the model once before"
    low, high = index.aminmax()
    with torch.no_grad():
        rows = section.table().shape[0]
    if low < 0 or high >= rows:
        return f"the bias index goes from {int(low)} to {int(high)}, and its table has {rows} rows"
    stats.looked_at, stats.index = index, state
    return None


def _index_state(section: Section) -> tuple[Any, ...]:
    """What tells another index, or one that was written to, or a table of other sizes."""
    index = section.index
    version = 0 if index.is_inference() else index._version
    return index.data_ptr(), version, *[source.shape for source in section.sources]


def _kernel_failure(section: Section, x: Tensor) -> str | None:
    return ops.failure(
        x.device, fusion.product_dtype(x), section.geometry, section.head_dim, section.logit_scale is not None
    )


def _attend_triton(section: Section, config: AccelConfig, stats: Stats | None, image: Tensor) -> Tensor:
    qkv = section.project(image)
    trained = torch.is_grad_enabled() and any(source.requires_grad for source in section.sources)
    factors = None
    if stats is not None:  # no compiler traces
        if not trained and bias.wanted(config):
            factors = bias.factors(section, config, qkv.dtype if isinstance(qkv, Tensor) else qkv[0].dtype)
        stats.bias = "table" if factors is None else factors.describe()
    table = None
    if section.position is not None and not trained:
        table = ops.position_table(*section.position)
    geometry, logit_scale = section.geometry, section.logit_scale
    out = ops.shifted_window_attention(
        qkv,
        geometry,
        num_heads=section.num_heads,
        table=section.table() if table is None else table,
        index=section.index,
        padding=section.padding() if geometry.is_padded and section.padding is not None else None,
        mask=section.mask,
        mask_value=section.mask_value,
        scale=section.scale,
        logit_scale=None if logit_scale is None else logit_scale.reshape(-1),
        factors=None if factors is None else (factors.q, factors.k, factors.table, factors.index),
        dropout=section.dropout,
    )
    return section.output(out)
