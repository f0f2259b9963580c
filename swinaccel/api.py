"""The public functions: accelerate, restore, accelerated, disabled, plan, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from torch import nn
from typing_extensions import Unpack

from . import families, patching
from .config import AccelConfig, Options, env_disabled, env_strict, setup_logging, takes_options
from .errors import FallbackError
from .families import Family
from .families.shared import near
from .ops.failures import failures
from .report import Entry, Graph, Report
from .runtime.attention import reading_of
from .runtime.graphs.rehearsal import prepare_compilers
from .runtime.graphs.replay import Graphs
from .runtime.plan import State, state_of
from .spec.adapters import BlockReader, block_method, is_family, reads_blocks
from .spec.window import WindowSpec
from .trust import libraries, probe
from .trust.registry import Reading, parts_of_attention

_LEFT_OUT = "the filter left it out"
_DISABLED = "SWINACCEL_DISABLE is set"

Model = TypeVar("Model", bound=nn.Module)


@takes_options
def accelerate(model: Model, **options: Unpack[Options]) -> Model:
    """Make every Swin-style window attention of a model run fused kernels, in place.

    Modules are found by structure, and each kind is proven against its own forward before it is touched; what
    cannot be replaced keeps its original forward, and `report` says why. Calling it again is harmless and takes
    new options over: what a new filter leaves out gets its original back.

    Args:
        model: any module; a model, a part of one, or a container of several.
        **options: the fields of `AccelConfig`, which says what they are.
    Returns:
        The same object.
    Raises:
        TypeError, ValueError: for an argument that is none of these.
        FallbackError: with strict=True (or SWINACCEL_STRICT), where a module would keep its original or the model
            holds nothing to accelerate; the model is then unchanged.
    """
    config = _prepare(model, options)
    if env_disabled():
        return model
    prepare_compilers(model)
    found = list(_survey(model, config))
    if config.strict or env_strict():
        _check_strict(model, found)
    with patching.dropping_compiled_code(model):
        chosen: set[nn.Module] = set()
        for module, family, _, entry in found:
            if entry.status == "accelerated":
                patching.mark(module, patching.encode(family, _block_config(module, family, config)))
                chosen.add(module)
        # An earlier call may have accelerated others: before they were changed, or with another filter.
        patching.unmark(one for one in _marked_modules(model) if one not in chosen and not patching.is_block_only(one))
        around: dict[nn.Module, Any] = dict(_blocks(model, config))
        around |= dict.fromkeys(_outermost(model), families.OUTERMOST)
        around |= dict.fromkeys(_captured(model, config), families.CAPTURED)
        for module, adapter in around.items():
            patching.mark(module, patching.encode(adapter, config))
        patching.unmark(one for one in _marked_modules(model) if one not in around and patching.is_block_only(one))
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate` exactly: markers leave the model, and dispatchers the classes no marked instance is left of.

    Returns:
        The same object.
    """
    _check_model(model)
    with patching.dropping_compiled_code(model):
        patching.unmark(_marked_modules(model))
    return model


@takes_options
@contextmanager
def accelerated(model: Model, **options: Unpack[Options]) -> Iterator[Model]:
    """Accelerate a model within a `with` block; after it the model is as it was, also where the body raises.

    Blocks nest, each with its own options.
    """
    _prepare(model, options)
    before = {module: patching.marker(module) for module in model.modules()}
    try:
        yield accelerate(model, **options)
    finally:
        with patching.dropping_compiled_code(model):
            for module, text in before.items():
                if text is not None and patching.marker(module) != text:
                    patching.mark(module, text)
            patching.unmark(module for module, text in before.items() if text is None)


@contextmanager
def disabled() -> Iterator[None]:
    """Run originals inside, in this thread and context; other threads are concerned only where they compile."""
    with patching.switched_off():
        yield


@takes_options
def plan(model: nn.Module, **options: Unpack[Options]) -> Report:
    """Return what `accelerate` with these options would do, without doing it."""
    config = _prepare(model, options)
    found = list(_survey(model, config))
    entries = [*(entry for *_, entry in found), *_near_misses(model, (module for module, *_ in found))]
    if env_disabled():
        entries = [dataclasses.replace(one, status="original", reason=one.reason or _DISABLED) for one in entries]
    return Report(entries)


def report(model: nn.Module) -> Report:
    """Return what is accelerated now, with the calls so far and why any of them ran an original."""
    _check_model(model)
    entries, found = [], []
    for name, module, family, spec in _attentions(model, _is_marked):
        found.append(module)
        marked = patching.marking_of(module)
        if marked is None:
            reason = patching.foreign_reason(module, family.method) or probe.judge(module, family, spec)
            reason = reason or "accelerate() was not called on it, or its filter left it out"
            entries.append(_entry(name, spec, "original", reason))
            continue
        state = state_of(module)
        precision, why = _precision(marked.config, state)
        reason = state.reason or _failure(model, module) or why
        counts = {"bias": state.bias, "calls": state.calls, "fallbacks": state.fallbacks, "precision": precision}
        entries.append(_entry(name, spec, "accelerated", reason, **counts))
    return Report([*entries, *_near_misses(model, found)], _graphs(model))


def _precision(config: AccelConfig, state: State) -> tuple[str | None, str | None]:
    """Return how a module multiplies where 8 bits were asked for, and why not in these; None where they were not."""
    known = state.precision
    if config.precision == "model":
        return None, None
    if known is not None:
        return str(known), None if known.reason is None else f"without fp8, because {known.reason}"
    reason = "without fp8, because only whole blocks multiply in 8 bits, and this attention runs by itself"
    return "model", reason if state.calls else None


def _graphs(model: nn.Module) -> Iterator[Graph]:
    """Yield an entry for each module whose calls are replayed as graphs."""
    for name, module in model.named_modules():
        if patching.is_captured(module):
            graphs = state_of(module).graphs or Graphs()
            yield Graph(name, len(graphs.captures), graphs.replays, graphs.nbytes, graphs.reason)


def _near_misses(model: nn.Module, found: Iterable[nn.Module]) -> Iterator[Entry]:
    """Yield an entry for each module that looks like window attention and that no family recognises."""
    return (_entry(name, spec, "original", reason) for name, spec, reason in near.near_misses(model, found))


def _failure(model: nn.Module, module: nn.Module) -> str | None:
    """Return why only the attention of an accelerated module runs kernels, where one of those around it failed."""
    if not failures:
        return None
    blocks = [module, *(one for one in model.modules() if module in one.children())]
    reasons = [state_of(one).unfused for one in blocks if patching.marker(one) is not None]
    failed = next((reason for reason in reasons if reason is not None and "kernel failed" in reason), None)
    return None if failed is None else f"its attention only, because {failed}"


def _prepare(model: nn.Module, options: Options) -> AccelConfig:
    _check_model(model)
    setup_logging()
    return AccelConfig.from_options(options)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")


def _marked_modules(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if patching.marker(module) is not None)


# Whether a module is accelerated: yes; no, but the attention in it may be; no, and leave it alone.
Verdict = Literal["yes", "no", "leave"]
Judge = Callable[[str, nn.Module, Family, WindowSpec], Verdict]


def _attentions(model: nn.Module, judge: Judge) -> Iterator[tuple[str, nn.Module, Family, WindowSpec]]:
    """Yield every window attention of a model, once: as its block, or by itself where the block is not known."""
    settled: set[nn.Module] = set()
    for name, module in model.named_modules():
        found = _recognise(module)
        if found is None or module in settled:
            continue
        try:
            parts = parts_of_attention(found[0], module)
        except AttributeError:  # it was changed beyond recognition
            parts = []
        settled.update(part for _, part in parts)
        if judge(name, module, *found) == "no":
            for path, part in parts:
                inner, inner_name = _recognise(part), f"{name}.{path}".lstrip(".")
                if part is not module and inner is not None and judge(inner_name, part, *inner) == "yes":
                    name, module, found = inner_name, part, inner
                    break
        yield name, module, *found


def _is_marked(name: str, module: nn.Module, *_: Any) -> Verdict:
    return "no" if patching.marking_of(module) is None else "yes"


def _recognise(module: nn.Module) -> tuple[Family, WindowSpec] | None:
    found, marked = families.match(module), patching.marking_of(module)
    if found is None and marked is not None and is_family(family := marked.adapter):
        return family, WindowSpec(family.name, (0, 0), (0, 0), 0, 0)  # changed beyond recognition
    return found


def _survey(model: nn.Module, config: AccelConfig) -> Iterator[tuple[nn.Module, Family, WindowSpec, Entry]]:
    """Yield every window attention of a model, and what becomes of it."""
    reasons: dict[nn.Module, str | None] = {}

    def judge(name: str, module: nn.Module, family: Family, spec: WindowSpec) -> Verdict:
        if config.filter is not None and not config.filter(name, module):
            reasons[module] = _LEFT_OUT
            return "leave"
        foreign = patching.foreign_reason(module, family.method)
        reasons[module] = foreign or probe.judge(module, family, spec)
        return "yes" if reasons[module] is None else "no" if foreign is None else "leave"

    for name, module, family, spec in _attentions(model, judge):
        status = "accelerated" if reasons[module] is None else "original"
        yield module, family, spec, _entry(name, spec, status, reasons[module])


def _entry(name: str, spec: WindowSpec, status: str, reason: str | None, **counts: Any) -> Entry:
    return Entry(name, spec.family, status, reason, spec.window, spec.shift, spec.num_heads, spec.head_dim, **counts)


def _block_config(module: nn.Module, family: Family, config: AccelConfig) -> AccelConfig:
    """Return the options of one instance: fuse="attention" where its block is not known to be what it looks like."""
    if config.fuse == "auto" and reads_blocks(family):
        method = block_method(family)
        if _is_proven(module, family, method, None if method == family.method else family.method):
            return config
    return dataclasses.replace(config, fuse="attention")


def _blocks(model: nn.Module, config: AccelConfig) -> Iterator[tuple[nn.Module, families.BlockAdapter]]:
    """Yield what gets a dispatcher around accelerated attention, or beside it; a filter is asked of attention only."""
    if config.fuse != "auto" or not any(map(patching.marking_of, model.modules())):
        return
    for module in model.modules():
        adapter = families.block_adapter(module)
        if adapter is None:
            continue
        attention = getattr(adapter.block(module), "attention", None)
        if config.filter is not None if attention is None else patching.marking_of(attention) is None:
            continue
        if _is_proven(module, adapter, adapter.method, None):
            yield module, adapter


def _captured(model: nn.Module, config: AccelConfig) -> Iterator[nn.Module]:
    """Yield the modules whose calls are replayed: the largest that are known to run the same at each call."""
    if config.graphs is False:
        return
    inside = {module for module in model.modules() if patching.marking_of(module) is not None}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if not any(one in inside for one in module.modules()):
            continue
        is_free = module not in inside and patching.foreign_reason(module, families.CAPTURED.method) is None
        is_wrapper = isinstance(module, nn.parallel.DistributedDataParallel)  # whose forward starts what hooks finish
        if is_free and (libraries.is_capturable(module) or (config.graphs is True and not is_wrapper)):
            yield module
        elif config.graphs == "auto" or is_wrapper:
            waiting += module.children()


def _outermost(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest modules around attention that returns its weights."""
    inside = set(filter(_returns_weights, model.modules()))
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if patching.marking_of(module) is not None or inside.isdisjoint(module.modules()):
            continue
        is_torchs = type(module).__module__.startswith("torch.")  # a container or a wrapper, of many models
        if is_torchs or patching.foreign_reason(module, families.OUTERMOST.method) is not None:
            waiting += module.children()
        else:
            yield module


def _returns_weights(module: nn.Module) -> bool:
    """Return True if a module is accelerated, and was proven to return its attention weights."""
    marked = patching.marking_of(module)
    if marked is None or libraries.is_of_library(module) or not is_family(marked.adapter):
        return False  # no library's does, as it is accelerated
    reading = reading_of(marked.adapter, module)
    return isinstance(reading, Reading) and reading.weights


def _is_proven(module: nn.Module, adapter: BlockReader, method: str, attention: str | None) -> bool:
    if patching.foreign_reason(module, method) is not None:
        return False
    with patching.switched_off():  # attention inside runs its own forward
        return probe.judge_block(module, adapter, method, attention) is None


def _check_strict(model: nn.Module, found: list[tuple[nn.Module, Family, WindowSpec, Entry]]) -> None:
    if not found:
        for entry in _near_misses(model, ()):
            raise FallbackError(f"strict: {entry.name or type(model).__name__} stays original: it {entry.reason}")
        raise FallbackError(f"strict: {type(model).__name__} holds no Swin-style window attention")
    for *_, entry in found:
        if entry.status == "original" and entry.reason != _LEFT_OUT:
            raise FallbackError(f"strict: {entry.name or type(model).__name__} stays original: {entry.reason}")
