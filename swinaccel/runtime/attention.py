"""Plan the attention of a module: its section, read by its family, bound to a backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.torch import products
from ..backends.torch import window as torch_backend
from ..config import AccelConfig, env_interpret
from ..layers import PLAIN_TENSORS, alias, has_hooks, replaced_methods
from ..ops import window as window_ops
from ..ops.failures import failures
from ..ops.linear import product_of
from ..spec.adapters import Adapter, Family, block_method, call_settings
from ..spec.block import Product
from ..spec.reference_block import attend_tokens
from ..spec.window import Section, with_mask
from ..trust.compare import PADDED
from ..trust.fingerprint import Trace, Untraceable, rates
from ..trust.libraries import is_of_library, unsharded_class
from ..trust.registry import Reading, attention_key, registry
from .context import PATCHABLE, backend_of, calls_reason, product_dtype
from .guard import Guard, NotGuardable
from .plan import Plan, PlanCache, State
from .recorded_weights import attend_recorded
from .section import TritonSection, direct, form_of
from .weights import lazy_weights, refuse_capture, weights_reason

MaskOf = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Tensor | None]

CHANGED = (
    "its {} was changed after accelerate(), or came from a file or another process; call"
    " swinaccel.accelerate(model) to look at it anew"
)


def proven_reading(family: Family, module: nn.Module, cache: PlanCache) -> Reading | str:
    """Return how a module's attention is read, or why its original must run; looked up anew when its guard fails."""
    if cache.holds(module):
        return cache.facts
    root = alias(module)
    attention = family.attention(root)
    parts = list(attention.modules())
    facts = reading_of(family, module)
    facts = calls_reason() or parts_reason(parts, attention is root, facts) or facts
    inside = [root, *(part for part in parts if part is not root)]
    if isinstance(facts, Reading):
        inside += [part for part in dict.fromkeys(facts.holders(module)) if part not in inside and part is not module]
        dropout = facts.active(module)
        if dropout is not None:
            facts = (
                f"its dropout {dropout.removesuffix('.p')} is active, and only its own code says where it drops; "
                "call eval(), or set its rate to 0"
            )
    cache.renew(facts, lambda: guard_of(family, inside))
    return facts


def guard_of(adapter: Adapter, parts: list[nn.Module]) -> Guard | None:
    """Return a guard of modules and of what their code reads elsewhere, or None where that cannot be compared."""
    try:
        trace = Trace([("", part) for part in parts], (adapter.method, block_method(adapter)))
        functions = [(namespace, name, namespace[name]) for namespace, name, _ in PATCHABLE]
        return Guard(parts, [*trace.cells, *functions], trace.contents, call_settings(adapter))
    except (NotGuardable, Untraceable):
        return None


def parts_reason(parts: list[nn.Module], is_called: bool, reading: Reading | str) -> str | None:
    """Return why modules that the section stands in for must be called: they have hooks or a replaced method; or None.

    Args:
        parts: the attention first.
        is_called: the attention itself is called all the same, so that its own hooks run.
        reading: of the attention, which may know a number to be a rate.
    """
    known = reading.rate if isinstance(reading, Reading) else ""
    for place, part in enumerate(parts):
        name = type(part).__name__
        if has_hooks(part) and (place or not is_called):
            if unsharded_class(type(part)) is not type(part):
                return f"{name} inside the attention is sharded by itself; shard the whole block in its place"
            return f"{name} inside the attention has hooks, which expect its own tensors; remove them"
        is_left_out = (place or not is_called) and not isinstance(part, nn.Linear)  # a projection is called
        if is_left_out and part._compiled_call_impl is not None:
            return f"{name} inside the attention is compiled by itself; compile the block or the model in its place"
        for method in replaced_methods(part):
            if method != "forward" or place or not is_called:
                return f"{name} inside the attention has a {method} of its own; delete it to accelerate"
        for rate, value in () if is_of_library(part) else rates(part):
            if value and (place or rate != known):
                return f"{rate} of its {name} is not zero, and only its own code says if that drops; set it to 0"
    return None


def reading_of(family: Family, module: nn.Module) -> Reading | str:
    """Return how the attention of a module was proven to be read, or why its original must run."""
    try:
        reading = registry.reading(attention_key(family, module))
    except Untraceable as reason:
        return str(reason)
    return reading or CHANGED.format(type(family.attention(module)).__name__)


def plan_attention(
    family: Family,
    module: nn.Module,
    reading: Reading,
    config: AccelConfig,
    state: State,
    guard: Guard | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Plan | str:
    """Return the plan of a call, or why its original must run; it runs (module, args, kwargs).

    Args:
        guard: of the module, if the plan may be kept.
    """
    root = module if guard is None else guard.modules[0]  # what a plan refers to must not keep the module alive
    section = section_of(family, root, reading, args, kwargs)
    if isinstance(section, str):
        return section
    x = args[0] if args else next(iter(kwargs.values()))
    attention = family.attention(module)
    reason = weights_reason(section, x) if reading.weights else None
    bound = reason or bind_backend(section, attention, config, state, x)
    if isinstance(bound, str):
        return bound
    attend, problem = bound
    is_recorded = reading.weights and torch.is_grad_enabled()
    if is_recorded and not isinstance(attend, TritonSection):
        return "it returns its attention weights, which record gradients; call it inside torch.no_grad() to accelerate"
    forward: Callable[..., Any] = family.forward
    if problem is not None and section.beside is not None:
        beside = bind_backend(section.beside, attention, config, State(), x)
        if isinstance(beside, str):
            return beside
        forward = with_beside(family, beside[0])
    mask_of, is_reusable = release_mask(family, module, section, args, kwargs)

    def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(module, attend, *args, **kwargs)

    def run_with_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = mask_of(module, args, kwargs)  # type: ignore[misc]
        return forward(module, lambda image: attend(image, mask), *args, **kwargs)

    def run_with_weights(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else next(iter(kwargs.values()))
        refuse_capture()
        made, mask = [], None if mask_of is None else mask_of(module, args, kwargs)

        def watched(image: Tensor) -> Tensor:
            if not is_recorded:
                out, weights = attend(image, mask), lazy_weights(with_mask(section, mask), image, given)
            else:
                out, weights = attend_recorded(attend, image, mask)  # type: ignore[arg-type]
            made.append(weights)
            return out

        return family.forward(module, watched, *args, **kwargs), made.pop()

    way = run_with_weights if reading.weights else run if mask_of is None else run_with_mask
    return Plan(way, problem, guard, section.index, is_reusable=is_reusable)


def with_beside(family: Any, beside: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return a family's forward, whose calls are told what runs the section beside its own."""

    def forward(module: nn.Module, attend: Any, *args: Any, **kwargs: Any) -> Any:
        return family.forward_beside(module, attend, beside, *args, **kwargs)

    return forward


def release_mask(
    family: Family, module: nn.Module, section: Section, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[MaskOf | None, bool]:
    """Let a section that takes the mask of its call keep none, since each call of its plan brings another.

    Returns:
        What finds a call's mask, of (module, args, kwargs), or None where the section takes none; and if the plan may
        serve other calls, which it may not where the section makes another mask of it.
    """
    mask_of = getattr(family, "mask_of", None)
    mask = None if mask_of is None else mask_of(module, args, kwargs)
    if mask is None or section.mask is None:
        return None, True
    if not _is_same(section.mask, mask):
        return None, False
    section.mask = mask.new_empty(0)
    if section.beside is not None:
        section.beside.mask = section.mask
    return mask_of, True


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return True if two masks are one, or a copy of the other."""
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    is_captured = one.is_cuda and torch.cuda.is_current_stream_capturing()  # where nothing can be looked at
    return not is_captured and torch.equal(one, other)


def section_of(
    family: Family, module: nn.Module, reading: Reading | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Section | str:
    """Return the section of a call, or why its original must run."""
    try:
        section = family.section(module, *args, **kwargs)
    except TypeError as error:
        return f"the call is not one that the {family.name} family knows ({error})"
    if isinstance(section, str) or reading is None:
        return section
    return reading.apply(section, family.attention(module), args[0] if args else next(iter(kwargs.values())))


def bind_backend(
    section: Section,
    attention: nn.Module,
    config: AccelConfig,
    state: State,
    x: Tensor,
    size: tuple[int, int] | None = None,
) -> tuple[Callable[..., Tensor], tuple | None] | str:
    """Return what runs a section, with the problem that its failures are kept under, or why nothing may.

    It runs images, or images and a mask in place of the section's.

    Args:
        size: height and width of the image, where the section is to be given tokens of one axis.
    """
    reason = section_reason(section, x)
    if reason is not None:
        return reason
    others = (section.mask, section.logit_scale, *section.sources, *attention.parameters())
    if any(one is not None and one.is_neg() for one in others):
        return "a mask or parameter is a view of numbers with the other sign; call resolve_neg() on it to accelerate"
    if backend_of(config, x.device) == "torch":
        reason = _torch_reason(section, attention, config, x) or index_reason(section)
        if reason is not None:
            return reason
        state.bias = form_of(section)
        in_parts = torch_backend.is_plain(attention)
        _bypass_layers(section, products.linear if x.is_cpu else F.linear)
        if x.is_cpu and len(section.layers) == 4:  # q, k and v by layers of their own: one product is no gain on CPUs
            section.project = _by_each([direct(layer, products.linear) for layer in section.layers[:-1]])

        def attend(image: Tensor, mask: Tensor | None = None) -> Tensor:
            return torch_backend.shifted_window_attention(with_mask(section, mask), image, in_parts=in_parts)

        if size is None:
            return attend, None
        return (lambda y, mask=None: attend_tokens(lambda image: attend(image, mask), y, size)), None
    problem = problem_of(section, x)
    reason = triton_reason(section, x, problem) or index_reason(section)
    if reason is not None:
        return reason
    _bypass_layers(section, product_of(x))
    return TritonSection(section, config, state, size), problem


def _by_each(runs: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Any]:
    return lambda x: tuple([run(x) for run in runs])


def _bypass_layers(section: Section, product: Callable[..., Tensor]) -> None:
    """Let a section call a product in place of the plain layers that hold the weights; see `section.direct`."""
    section.project, section.output = direct(section.project, product), direct(section.output, product)


def section_reason(section: Section, x: Tensor) -> str | None:
    """Return what no backend can do with a section of an input, or None."""
    geometry, heads = section.geometry, section.num_heads
    tokens = geometry.tokens
    if tokens < 2 or min(geometry.window) < 1:
        return "the window is a single token, where attention has nothing to weigh"
    if not all(0 <= shift < window for shift, window in zip(geometry.shift, geometry.window, strict=True)):
        return f"the shift {geometry.shift} does not lie inside the window {geometry.window}"
    if section.index is not None:
        if section.index.dtype not in (torch.int64, torch.int32):
            return f"the bias index is of {section.index.dtype}"
        if tuple(section.index.shape) != (tokens, tokens):
            return f"the bias index {tuple(section.index.shape)} does not belong to a window of {tokens} tokens"
        shape = table_shape(section)
        if len(shape) not in (2, 3) or shape[-1] != heads:
            return f"the bias table {shape} has not one column for each of {heads} heads"
        if len(shape) == 3 and (shape[1] < 1 or math.prod(geometry.grid[:-1]) % shape[1]):
            return f"the bias table {shape} does not divide the rows of windows, {geometry.grid[:-1]}"
    if section.logit_scale is not None and section.logit_scale.numel() != heads:
        return f"logit_scale holds {section.logit_scale.numel()} numbers, and the attention has {heads} heads"
    mask = section.mask
    if mask is not None and tuple(mask.shape) != (geometry.num_windows, tokens, tokens):
        return f"the mask {tuple(mask.shape)} belongs to another image size than {geometry.size}"
    if mask is not None and not mask.is_floating_point():
        return f"the mask is of {mask.dtype}, and kernels add one of floating-point numbers; convert it"
    if mask is not None and mask.requires_grad:
        return "the mask records gradients, and kernels give it none; detach it"
    for tensor in (*section.sources, section.index, mask, section.logit_scale):
        if tensor is not None and tensor.device != x.device:
            return f"a tensor of its bias or mask is on {tensor.device}, the input on {x.device}; move all of the model"
        if tensor is not None and tensor.dtype == torch.float64 != x.dtype:  # at which most originals raise
            return f"a tensor of its bias or mask is of {tensor.dtype}, the input of {x.dtype}; convert one of them"
    if not all(tensor.is_floating_point() for tensor in section.sources):
        return "its bias does not consist of floating-point numbers; convert its table"
    for layer in (section.project, section.output, *section.layers):
        weight = _plain_weight(layer)
        if weight is not None and weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            return f"its projections are of {weight.dtype}, the input of {x.dtype}, which only its own code may convert"
    return None


def _plain_weight(product: Any) -> Tensor | None:
    """Return the weight of a linear layer that multiplies what it is given as it is, or None."""
    layer = product.layer if isinstance(product, Product) else product
    return layer.weight if type(layer) is nn.Linear and type(layer.weight) in PLAIN_TENSORS else None


def table_shape(section: Section) -> tuple[int, ...]:
    """Return the shape of the bias table, without computing it."""
    assert section.table is not None
    return section.table_shape or tuple(section.table().shape)


def _torch_reason(section: Section, attention: nn.Module, config: AccelConfig, x: Tensor) -> str | None:
    """Return what the torch backend cannot do, or not faster: it trains slower than the originals.

    One that was asked for by name records gradients all the same.
    """
    if section.dropout > 0:
        return "attention dropout is active, and the torch backend has none; call eval(), or set its rate to 0"
    is_recorded = torch.is_grad_enabled() and any(one.requires_grad for one in (x, *attention.parameters()))
    if config.backend != "torch" and is_recorded:
        return "gradients are recorded, and here only inference is accelerated; call it inside torch.no_grad()"
    return None


def problem_of(section: Section, x: Tensor) -> tuple:
    """Return what failures of the window kernels are kept under."""
    return window_ops.problem(
        x.device, product_dtype(x), section.geometry, section.head_dim, section.logit_scale is not None
    )  # fmt: skip


def triton_reason(section: Section, x: Tensor, problem: tuple) -> str | None:
    """Return what the kernels cannot do with a section, or None."""
    interpret = x.device.type == "cpu" and env_interpret()
    reason = window_ops.unsupported_reason(
        x.device, product_dtype(x), section.geometry, section.num_heads, section.head_dim, interpret
    )
    if reason is None and section.geometry.is_padded and section.padding is None:
        reason = PADDED
    return reason or failures.get(problem)


def index_reason(section: Section) -> str | None:
    """Return why the kernels, which check no index, cannot take this one, or None."""
    index = section.index
    if index is None:
        return None
    rows = table_shape(section)[0]
    if index.is_cuda and torch.cuda.is_current_stream_capturing():
        return "its bias index was not looked through before a CUDA graph is captured; run the model once before"
    low, high = index.aminmax()
    if low < 0 or high >= rows:
        return f"the bias index goes from {int(low)} to {int(high)}, and its table has {rows} rows"
    return None
