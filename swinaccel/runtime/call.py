"""Run one call of an accelerated module: by its plan while the guard holds, else by a new one, or by the original."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..backends.torch import block as torch_block
from ..config import AccelConfig, env_graphs, env_strict
from ..errors import FallbackError, KernelError
from ..layers import alias
from ..ops.failures import failures
from ..ops.observed import is_onnx_export
from ..spec.adapters import (
    Adapter,
    AttentionBlock,
    BlockReader,
    Family,
    block_method,
    call_settings,
    is_family,
    reads_attention_blocks,
    reads_blocks,
)
from ..spec.block import Embedding, Merging
from ..spec.window import Section
from ..trust.fingerprint import Untraceable
from ..trust.registry import block_key, registry
from . import precision, traced
from .attention import (
    MaskOf,
    bind_backend,
    guard_of,
    parts_reason,
    plan_attention,
    proven_reading,
    reading_of,
    release_mask,
    section_of,
)
from .block import BlockFacts, FusedBlock, NotFusable, block_problem, common_reason
from .context import backend_of, call_key, context_reason, tokens_of
from .graphs import replay
from .neighbours import EmbeddingFacts, MergingFacts
from .plan import Plan, PlanCache, State, state_of
from .weights import settled

Original = Callable[..., Any]

_warned: set[str] = set()


class Entry:
    """Options of the calls of one method, as a marker holds them.

    Attributes:
        family: whose section the method runs, or None.
        block: the adapter of a block, a merging or an embedding that the method runs, and that may be fused, or None.
        is_captured: whole calls of the method are replayed as graphs.
        is_outermost: it is of a whole model, some of whose attention returns its weights.
        settings: names of attributes that callers set before each call.
        takes_mask: calls are given their mask, which plans do not keep.
    """

    __slots__ = ("block", "config", "family", "is_captured", "is_outermost", "settings", "takes_mask")

    def __init__(self, adapter: Adapter, config: AccelConfig, method: str) -> None:
        self.config, self.is_captured = config, hasattr(adapter, "is_captured")
        self.is_outermost = self.is_captured or hasattr(adapter, "is_outermost")
        self.settings = call_settings(adapter)
        self.family: Family | None = None
        self.block: BlockReader | None = None
        if is_family(adapter) and method == adapter.method:
            self.family = adapter
        if config.fuse == "auto" and reads_blocks(adapter) and method == block_method(adapter):
            self.block = adapter
        self.takes_mask = hasattr(self.family, "mask_of")


def call(entry: Entry, module: nn.Module, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one call of an accelerated module's method.

    Args:
        original: its own method, unbound.
    """
    if not args and len(kwargs) > 1 and not torch.compiler.is_compiling():
        kwargs = _input_first(original, kwargs)
    x: Any = args[0] if args else next(iter(kwargs.values()), None)
    if torch.compiler.is_compiling():
        if is_onnx_export():
            return original(module, *args, **kwargs)
        return traced.call(entry, module, original, x, args, kwargs)
    reason, key, names = context_reason(x), None, entry.settings
    if entry.is_captured and reason is None and env_graphs():
        return settled(replay.call, state_of(module), module, original, args, kwargs, entry.config)
    if entry.is_outermost:
        return settled(original, module, *args, **kwargs)
    if reason is None:
        settings = tuple(map(module.__dict__.get, names)) if names else names
        key = call_key(entry, settings, x, args, kwargs)
    state, family = state_of(module), entry.family
    if family is not None:
        state.calls += 1
    if reason is None and entry.block is not None:
        fused = state.block.find(module, key) or _fused_plan(entry, module, state, key, args, kwargs)
        if fused is not None:
            try:
                mask_of = fused.mask_of
                result = fused.run(x) if mask_of is None else fused.run(x, mask_of(module, args, kwargs))
            except KernelError:  # on which the attention by itself has a word
                pass
            else:
                if fused.counted is not None:
                    fused.counted.calls += 1
                reason = None if fused.failures == failures.count else failures.get(fused.problem)
                if reason is not None:  # plain PyTorch has computed the same
                    _note_fallback(reason, module, entry.config, fused.counted or state)
                return result
    if family is None:
        return original(module, *args, **kwargs)
    plan = reason or state.attention.find(module, key) or _attention_plan(entry, module, state, key, args, kwargs)
    if isinstance(plan, str):
        reason = plan
    else:
        try:
            result = plan.run(module, args, kwargs)
            reason = None if plan.failures == failures.count else failures.get(plan.problem)
        except KernelError as error:
            reason = str(error)
    if reason is None:
        return result
    _note_fallback(reason, module, entry.config, state)
    return original(module, *args, **kwargs)


def _input_first(original: Original, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments that were all given by name, that of the input before the others."""
    name = _FIRST.get(original)
    if name is None:
        name = _FIRST[original] = [*inspect.signature(original).parameters, ""][1]
    return {name: kwargs[name], **kwargs} if name in kwargs else kwargs


_FIRST: WeakKeyDictionary[Original, str] = WeakKeyDictionary()


def _note_fallback(reason: str, module: nn.Module, config: AccelConfig, state: State) -> None:
    """Count a call that runs no kernel, and warn of its reason once; raise where strict."""
    if config.strict or env_strict():
        raise FallbackError(f"{type(module).__name__} would run its original: {reason}")
    state.fallbacks += 1
    state.reason = reason
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"swinaccel: the original runs, and its results are right: {reason}", stacklevel=4)


def _attention_plan(
    entry: Entry, module: nn.Module, state: State, key: tuple | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Plan | str:
    """Return a new plan of a call of an attention, or why its original must run."""
    cache, family = state.attention, cast(Family, entry.family)
    reading = proven_reading(family, module, cache)
    if isinstance(reading, str):
        return reading
    plan = plan_attention(family, module, reading, entry.config, state, cache.guard, args, kwargs)
    if not isinstance(plan, str):
        cache.add(key, plan)
    return plan


def _fused_plan(
    entry: Entry, module: nn.Module, state: State, key: tuple | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Plan | None:
    """Return a new plan of a call of a whole block, merging or embedding, or None where its own forward must run."""
    cache, config, adapter = state.block, entry.config, cast(BlockReader, entry.block)
    x = args[0] if args else next(iter(kwargs.values()))
    backend = backend_of(config, x.device)
    if backend == "torch" and not torch_block.is_worth(x, reads_attention_blocks(adapter)):
        precision.note(adapter, module, config, None)
        return None
    facts = _guarded_facts(adapter, module, cache)
    if backend == "torch" and isinstance(facts, EmbeddingFacts):
        return None
    made = facts
    if not isinstance(facts, str):
        made = _plan_fused(adapter, module, facts, config, x, args, kwargs, backend, cache)
    if isinstance(made, str):
        state.unfused = made
        precision.note(adapter, module, config, made)
        return None
    state.unfused = None
    cache.add(key, made)
    return made


def _guarded_facts(adapter: BlockReader, module: nn.Module, cache: PlanCache) -> Any:
    """Return what a module consists of, or why it must not be stood in for; looked into anew when its guard fails."""
    if cache.holds(module):
        return cache.facts
    root = alias(module)
    facts: Any
    try:
        facts = adapter.block(root)
        if registry.reading(block_key(adapter, module)) is None:
            raise NotFusable("it was changed after accelerate(); call accelerate() again")
        kinds = {Merging: MergingFacts, Embedding: EmbeddingFacts}
        facts = kinds.get(type(facts), BlockFacts)(module, facts)
    except NotFusable as reason:
        facts = str(reason)
    except (AttributeError, TypeError, KeyError, ValueError, Untraceable) as error:
        facts = f"it is not built as it was ({error})"
    parts = [root, *(part for part in module.modules() if part is not module)]
    cache.renew(facts, lambda: guard_of(adapter, parts))
    return facts


def _plan_fused(
    adapter: BlockReader,
    module: nn.Module,
    facts: Any,
    config: AccelConfig,
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    backend: str,
    cache: PlanCache,
) -> Plan | str:
    """Return the plan of a call, or why its own forward must run."""
    reason = common_reason(x, facts.parameters())
    if reason is not None:
        return reason
    tokens = tokens_of(adapter, module, x, args, kwargs)
    if tokens is None or not facts.accepts(x):
        return "the call is not one that kernels can stand in for"
    size = tokens[1]
    section = counted = attention_problem = mask_of = None
    is_reusable = True
    run: Callable[..., Any]
    problem = block_problem(facts, x, backend) if isinstance(facts, BlockFacts) else facts.problem(x)
    if backend == "torch" and problem[-1]:
        return "gradients are recorded or dtypes mixed, which on CPUs are left to its own forward"
    if isinstance(facts, BlockFacts) and reads_attention_blocks(adapter):
        root = module if cache.guard is None else cache.guard.modules[0]  # which does not keep the module alive
        bound = _attention_of_block(adapter, module, root, config, x, size, args, kwargs)
        if isinstance(bound, str):
            return bound
        attend, attention_problem, section, inner, products, (mask_of, is_reusable) = bound
        fused = FusedBlock(facts, attend, x, backend, config)
        run = fused.run
        if config.precision == "fp8":
            run = precision.run_of(fused, facts, section, products, x, config, state_of(inner), backend)
        if inner is not module or block_method(adapter) != adapter.method:
            counted = state_of(inner)
    else:
        run = facts.runner(x, size, config, backend)
    failure = failures.get(problem)
    if failure is not None:
        if config.strict or env_strict():
            raise FallbackError(f"{type(module).__name__} would run its own layers: {failure}")
        return failure
    index = None if section is None else section.index
    return Plan(run, attention_problem, cache.guard, index, counted, mask_of, is_reusable)


def _attention_of_block(
    adapter: AttentionBlock,
    module: nn.Module,
    root: nn.Module,
    config: AccelConfig,
    x: Tensor,
    size: tuple[int, int] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Callable[..., Tensor], tuple | None, Section, nn.Module, Any, tuple[MaskOf | None, bool]] | str:
    """Return what runs the attention of a block, or why it must run itself.

    With it come its problem, section, module and products (see `precision`), and what `release_mask` returns.
    """
    family, inner = adapter.inner(module)
    reading = reading_of(family, inner)
    if isinstance(reading, str) or reading.active(inner) is not None:
        return "its attention must run by itself"
    attention = family.attention(inner)
    reason = parts_reason(list(attention.modules()), False, reading)
    if reason is not None:
        return reason
    if inner is not module or block_method(adapter) != adapter.method:
        args, kwargs = (x if size is None else x.view(x.shape[0], *size, x.shape[2]),), {}
    root = root if inner is module else inner
    section = section_of(family, root, reading, args, kwargs)
    if isinstance(section, str):
        return section
    products = precision.products_of(section)  # before they are bound
    bound = bind_backend(section, attention, config, state_of(inner), x, size)
    if isinstance(bound, str):
        return bound
    return *bound, section, inner, products, release_mask(family, root, section, args, kwargs)
