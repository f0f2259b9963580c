"""Run one call of an accelerated module: by its plan while the guard holds, else by a new one, or by the original."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import torch_fusion
from ..config import AccelConfig, env_strict
from ..failures import KernelError, failures
from ..layers import twin
from ..layout import Embedding, Merging
from ..spec import Section
from ..trust.fingerprint import Untraceable
from ..trust.registry import attention_key, block_key, registry
from . import traced
from .attention import bind, guarded, parts_reason, plan_attention, section_of, trusted
from .block import BlockFacts, FusedBlock, NotFusable, block_problem, common_reason
from .context import backend_of, call_key, context_reason
from .errors import FallbackError
from .neighbours import EmbeddingFacts, FusedEmbedding, FusedMerging, MergingFacts
from .plan import Plan
from .state import Scope, State, state_of


Original = Callable[..., Any]

_warned: set[str] = set()


def forget_warnings() -> None:
    """Warn again of reasons that were warned of before."""
    _warned.clear()


def call(
    adapter: Any,
    module: nn.Module,
    original: Original,
    config: AccelConfig,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run one call of an accelerated module's method.

    Args:
        adapter: the module's `families.Family` or block adapter.
        original: its own method, unbound.
        method: the name of that, the adapter's `method` or its `block_method`.
    """
    x = args[0] if args else next(iter(kwargs.values()), None)
    if torch.compiler.is_compiling():
        return traced.call(adapter, module, original, config, method, x, args, kwargs)
    has_attention = hasattr(adapter, "section") and method == adapter.method
    state = state_of(module)
    if has_attention:
        state.calls += 1
    reason = context_reason(x)
    if reason is not None:
        return _original(reason, has_attention, module, original, config, state, args, kwargs)
    key = _key(adapter, module, config, x, args, kwargs)
    if config.fuse == "auto" and method == getattr(adapter, "block_method", adapter.method) and hasattr(adapter, "block"):
        plan = _fused_plan(adapter, module, config, state, key, x, args, kwargs)
        if plan is not None:
            with suppress(KernelError):  # on which the attention by itself has a word
                result = plan.run(x)
                counted = plan.counted or state
                counted.calls += not has_attention and plan.counted is not None
                reason = plan.failure()
                if reason is not None:  # plain PyTorch has computed the same
                    _note_fallback(reason, module, config, counted)
                return result
    if not has_attention:
        return original(module, *args, **kwargs)
    attention = _attention_plan(adapter, module, config, state, key, args, kwargs)
    if isinstance(attention, str):
        return _original(attention, True, module, original, config, state, args, kwargs)
    try:
        result = attention.run(module, args, kwargs)
        reason = attention.failure()
    except KernelError as error:
        reason = str(error)
    if reason is not None:
        return _original(reason, True, module, original, config, state, args, kwargs)
    return result


def _key(
    adapter: Any, module: nn.Module, config: AccelConfig, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple | None:
    """Return what the plan of a call is kept under, or None where it is not kept."""
    key = call_key(x, args, kwargs)
    return None if key is None else (config, *key, *map(module.__dict__.get, getattr(adapter, "call_settings", ())))


def _original(
    reason: str,
    is_counted: bool,
    module: nn.Module,
    original: Original,
    config: AccelConfig,
    state: State,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run the original, because of a reason that the report gives; of blocks, whose attention is asked, without one."""
    if is_counted:
        _note_fallback(reason, module, config, state)
    return original(module, *args, **kwargs)


def _note_fallback(reason: str, module: nn.Module, config: AccelConfig, state: State) -> None:
    """Count a call that runs no kernel, and warn of its reason once; raise where strict."""
    if config.strict or env_strict():
        raise FallbackError(f"{type(module).__name__} would run its original: {reason}")
    state.fallbacks += 1
    state.reason = reason
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"swinaccel: the original runs, because {reason}", stacklevel=5)


def _attention_plan(
    family: Any,
    module: nn.Module,
    config: AccelConfig,
    state: State,
    key: tuple | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Plan | str:
    """Return the plan of a call of an attention, or why its original must run."""
    scope = state.attention
    reading = trusted(family, module, scope)
    if isinstance(reading, str):
        return reading
    plan: Plan | str | None = scope.plan(key)
    if plan is None:
        plan = plan_attention(family, module, reading, config, state, scope.guard, args, kwargs)
        if not isinstance(plan, str):
            scope.keep(key, plan)
    return plan


def _fused_plan(
    adapter: Any,
    module: nn.Module,
    config: AccelConfig,
    state: State,
    key: tuple | None,
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Plan | None:
    """Return the plan of a call of a whole block, merging or embedding, or None where its own forward must run."""
    backend = backend_of(config, x.device)
    if backend == "torch" and not (hasattr(adapter, "inner") and torch_fusion.is_worth(x)):
        return None
    scope = state.block
    facts = _facts(adapter, module, scope)
    if isinstance(facts, str):
        state.unfused = facts
        return None
    plan = scope.plan(key)
    if plan is None:
        made = _plan_fused(adapter, module, facts, config, x, args, kwargs, backend, scope)
        if isinstance(made, str):
            state.unfused = made
            return None
        plan, state.unfused = made, None
        scope.keep(key, plan)
    return plan


def _facts(adapter: Any, module: nn.Module, scope: Scope) -> Any:
    """Return what a module consists of, or why it must not be stood in for; looked into anew when its guard fails."""
    if scope.holds(module):
        return scope.facts
    root = twin(module)
    try:
        facts = _look(adapter, module, root)
    except NotFusable as reason:
        facts = str(reason)
    except (AttributeError, TypeError, KeyError, ValueError, Untraceable) as error:
        facts = f"it is not built as it was ({error})"
    parts = [root, *(part for part in module.modules() if part is not module)]
    scope.renew(facts, lambda: guarded(adapter, root, parts))
    return facts


def _look(adapter: Any, module: nn.Module, root: nn.Module) -> Any:
    facts = adapter.block(root)
    if registry.reading(block_key(adapter, module)) is None:
        raise NotFusable("it was changed after accelerate()")
    if isinstance(facts, Merging):
        return MergingFacts(module, facts)
    if isinstance(facts, Embedding):
        return EmbeddingFacts(module, facts)
    return BlockFacts(module, facts)


def _plan_fused(
    adapter: Any,
    module: nn.Module,
    facts: Any,
    config: AccelConfig,
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    backend: str,
    scope: Scope,
) -> Plan | str:
    """Return the plan of a call, or why its own forward must run."""
    reason = common_reason(x, facts.parameters())
    if reason is not None:
        return reason
    tokens = tokens_of(adapter, module, x, args, kwargs)
    if tokens is None or not facts.accepts(x):
        return "the call is not one that kernels can stand in for"
    size = tokens[1]
    section = counted = attention_problem = None
    fused: Callable[..., Any]
    if isinstance(facts, BlockFacts):
        problem = block_problem(facts, x, backend)
        if backend == "torch" and problem[-1]:
            return "gradients are recorded or dtypes mixed, which on CPUs are left to its own forward"
        root = module if scope.guard is None else scope.guard.modules[0]  # which does not keep the module alive
        bound = _attention_of_block(adapter, module, root, config, x, size, args, kwargs)
        if isinstance(bound, str):
            return bound
        attend, attention_problem, section, inner = bound
        fused = FusedBlock(facts, attend, x, backend, config)
        if inner is not module or hasattr(adapter, "block_method"):
            counted = state_of(inner)
    else:
        problem = facts.problem(x)
        fused = (FusedMerging if isinstance(facts, MergingFacts) else FusedEmbedding)(facts, x, config)
    failure = failures.get(problem)
    if failure is not None:
        if config.strict or env_strict():
            raise FallbackError(f"{type(module).__name__} would run its own layers: {failure}")
        return failure
    index = None if section is None else section.index
    return Plan(lambda x: fused(x, size), attention_problem, scope.guard, index, counted)


def _attention_of_block(
    adapter: Any,
    module: nn.Module,
    root: nn.Module,
    config: AccelConfig,
    x: Tensor,
    size: tuple[int, int] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Callable[[Tensor], Tensor], tuple | None, Section, nn.Module] | str:
    """Return what runs the attention of a block, with its problem, section and module, or why it must run itself."""
    family, inner = adapter.inner(module)
    reading = registry.reading(attention_key(family, inner))
    if reading is None:
        return "its attention was changed after accelerate()"
    attention = family.attention(inner)
    reason = parts_reason(list(attention.modules()), False)
    if reason is not None:
        return reason
    if inner is not module or hasattr(adapter, "block_method"):
        args, kwargs = (x if size is None else x.view(x.shape[0], *size, x.shape[2]),), {}
    section = section_of(family, root if inner is module else inner, reading, args, kwargs)
    if isinstance(section, str):
        return section
    bound = bind(section, attention, config, state_of(inner), x)
    return bound if isinstance(bound, str) else (*bound, section, inner)


def tokens_of(
    adapter: Any, module: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[int, int] | None] | None:
    """Return what a call is about, or None where it is not a call that the original would take."""
    try:
        tokens, size = adapter.tokens(module, *args, **kwargs)
    except (AttributeError, TypeError, ValueError, KeyError):
        return None
    if tokens is not x or x.dim() != (4 if size is None else 3):
        return None
    return (x, size) if size is None or x.shape[1] == size[0] * size[1] else None
