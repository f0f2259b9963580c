"""Prove a signature: a module's own forward against its family's reading of it, on small random copies on the CPU.

Attributes can look right and mean something else: a subclass with a changed forward, a copy that skips the projection,
another version of a library. Copies run the two ways in fp64, in eval mode at three magnitudes and in training mode
with gradients; code outside of the surveyed libraries also in eval mode with gradients and in training mode without,
in lower precision with frozen parameters, under autocast, and with numbers that are not finite. Every parameter is
drawn at random (fresh tables are almost zero and fresh norms can be exactly zero, and would hide a difference), and
floating-point attributes are moved: what is one or zero now may be something else after some steps of training. Blocks
that hold a large image's size pass all trials at a small one, and two at their own.

A verdict is about what was run. It is kept by the module's fingerprint, which holds all that decides what ran; what
depends on the one module beyond that (the size to which its window has shrunk, say) is judged each time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family
from ..layers import own_method, replaced_methods
from ..spec.adapters import is_family
from ..spec.window import Section, WindowSpec
from . import projections
from .compare import PADDED, Inconclusive
from .copies import (
    EXACT,
    OTHERS,
    Setting,
    Subject,
    Widened,
    deep_copy,
    isolated,
    set_drop_rates,
    set_idle_rates,
    set_path_rates,
)
from .dropping import with_dropouts
from .fingerprint import LIVE, Untraceable, fingerprint
from .libraries import is_installed, is_library_function, is_of_library
from .names import helpers_of, names_in
from .registry import Reading, attention_key, block_key, mask_kind, parts_of_attention, registry
from .trial import compare_attention, compare_block

_BARE = (
    "its forward leaves out the {}, as some code that calls scaled_dot_product_attention does; where a setting chooses"
    " that, switch it off and call accelerate() again (the results are others then)"
)
_AT_ITS_SIZE = EXACT[0], EXACT[-1]  # of what passed all trials with a small image
_WRITES = "its forward changes, outside of the module, what its code reads"
# What a run on the CPU does not show, by names in code outside of the surveyed libraries: devices, and PyTorch's modes.
_UNSEEN = frozenset((
    "amp", "are_deterministic_algorithms_enabled", "autocast", "backends", "cpu", "cuda", "custom_fwd", "device.type",
    "device_type", "get_autocast_dtype", "get_default_dtype", "get_float32_matmul_precision", "get_num_threads",
    "getenv", "initial_seed", "is_autocast_enabled", "is_cpu", "is_cuda", "is_grad_enabled", "is_inference",
    "is_inference_mode_enabled", "random",
))  # fmt: skip


# Of those, what layers of installed packages may name: peft merges 16-bit weights in fp32 on CPUs.
_ADAPTED = frozenset(("cpu", "device.type", "is_cpu"))


def judge(module: nn.Module, family: Family, spec: WindowSpec) -> str | None:
    """Return why a module's window attention cannot be replaced, or None if it is proven that it can.

    Args:
        module: it is not changed and not called.
    """
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return "its tensors are on the meta device; call accelerate() once they are loaded"
    attention = family.attention(module)
    extra = family.name, spec.window, any(spec.shift)
    own = own_method(type(module), family.method)
    # Of a block whose attention is a method of its own, a library's does not look at what stands around it.
    decisive = parts_of_attention(family, module) if is_of_library(module) else list(module.named_modules())
    reason = _judge(
        ("attention", *extra),
        decisive,
        (family.method,),
        _read(attention, family.projections(module)),
        lambda known: _probe(module, family, own, known),
        lambda: attention_key(family, module),
    )
    return projections.name_layer(attention, reason)


def judge_block(module: nn.Module, family: Any, method: str, attention: str | None) -> str | None:
    """Return why a module around window attention cannot be run in fewer kernels, or None if it is proven that it can.

    Args:
        module: as for `judge`.
        method: runs the whole module.
        attention: the method for its attention, where that is another one.
    """
    inside = set(family.attention(module).modules()) if hasattr(family, "attention") else set()
    methods = (method,) if attention is None else (method, attention)
    forward = own_method(type(module), method)
    own = None if attention is None else own_method(type(module), attention)
    return _judge(
        ("block", family.name),
        list(module.named_modules()),
        methods,
        [part for part in module.modules() if part not in inside],
        lambda known: _probe_block(module, family, forward, own, known),
        lambda: block_key(family, module),
    )


def _read(attention: nn.Module, projections: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules of an attention that a section stands in for, without those that it calls."""
    called = {part for projection in projections for part in projection.modules()}
    return [part for part in attention.modules() if part not in called]


def _judge(
    key: tuple[Hashable, ...],
    decisive: list[tuple[str, nn.Module]],
    methods: tuple[str, ...],
    parts: Iterable[nn.Module],
    probe: Callable[[Reading | None], Reading | str],
    proven_by: Callable[[], Hashable],
) -> str | None:
    parts, sizes = list(parts), _sizes(decisive)
    reason = _replaced(parts) or _unseen(parts)
    if reason is not None:
        return reason
    try:
        verdict: Reading | str | None = None
        for _ in range(2):  # what code keeps for later calls is there in the second
            found = (*key, fingerprint(decisive, methods))
            known = registry.verdict(found)
            if isinstance(known, str):
                return known
            verdict = registry.verdict((*found, sizes))
            if verdict is not None:
                break
            verdict = probe(known)
            if found == (*key, fingerprint(decisive, methods)):
                registry.record(found, known or verdict)
                registry.record((*found, sizes), verdict)
                break
        else:
            verdict = _WRITES
        if isinstance(verdict, Reading):
            registry.prove(proven_by(), verdict)
            return None
        return verdict
    except (Untraceable, Inconclusive) as reason:
        return str(reason)


def _sizes(parts: list[tuple[str, nn.Module]]) -> tuple[Hashable, ...]:
    """Return what families read at each call of modules that are no library's, whose code may do more with it."""
    own = [(path, vars(part)) for path, part in parts if not is_of_library(part)]
    return tuple((path, name, repr(held[name])) for path, held in own for name in sorted(LIVE & held.keys()))


def _replaced(parts: Iterable[nn.Module]) -> str | None:
    """Return which method other than forward, which every call looks after, was replaced on an instance."""
    for part in parts:
        for name in replaced_methods(part):
            if name != "forward":
                return f"{name} of a {type(part).__name__} was replaced on this instance"
    return None


def _unseen(parts: Iterable[nn.Module]) -> str | None:
    """Return which code of modules may do on GPUs what a run on the CPU does not show, or None."""
    found = _speaks_of(parts, _UNSEEN)
    return None if found is None else f"{found[0]} has to do with {found[1]}, which no run of a copy shows"


def _speaks_of(parts: Iterable[nn.Module], words: Iterable[str]) -> tuple[str, str] | None:
    """Return a method, or a function that one calls, that has one of the words, with the word; or None.

    Code of the surveyed libraries is not looked at.
    """
    for part in parts:
        if is_of_library(part):
            continue
        for base in type(part).__mro__:
            for name, function in vars(base).items():
                if not hasattr(function, "__code__") or is_library_function(function) or not _is_run(name):
                    continue
                for one in _with_helpers(function):
                    found = set(words).intersection(names_in(one.__code__))
                    if is_installed(one):
                        found -= _ADAPTED
                    if found:
                        where = type(part).__name__ if one is function else one.__module__
                        return f"{where}.{one.__name__}", min(found)
    return None


def _with_helpers(function: Any) -> list[Any]:
    """Return a function and those that it and they call by name, but for those of packages that are installed."""
    found = [function]
    for one in found:  # which grows
        for helper in helpers_of(one):
            is_known = is_library_function(helper) or is_installed(helper)
            if helper not in found and not is_known and _is_run(helper.__name__):
                found.append(helper)
    return found


def _is_run(name: str) -> bool:
    return not _NOT_RUN.intersection(name.split("_"))


_NOT_RUN = {"init", "repr", "flops", "mask"}  # words in names of functions that make no activations


def _settings(module: nn.Module) -> tuple[Setting, ...]:
    return EXACT if all(map(is_of_library, module.modules())) else EXACT + OTHERS


def _probe(module: nn.Module, family: Family, original: Callable[..., Any], known: Reading | None) -> Reading | str:
    """Return how the attention of a module is to be read, or why its forward is not its family's.

    Args:
        known: how that of the same code at another size is; then one trial at this size is enough.
    """
    inside = set(family.attention(module).modules()) | {module}
    subject = Subject(module, family, inside, original)
    settings: tuple[Setting, ...] = EXACT[:1]
    smaller = subject.smaller() if known is None else None
    if smaller is not None:
        found, settings = _prove(smaller), _AT_ITS_SIZE
        known = found if isinstance(found, Reading) else None
    if known is None:
        return _prove(subject)
    return _run(subject, _compared(subject, known), settings=settings) or known


def _compared(subject: Subject, reading: Reading) -> Callable[..., str | None]:
    return functools.partial(compare_attention, family=subject.family, original=subject.original, reading=reading)


def _prove(subject: Subject) -> Reading | str:
    """Return how the attention of a module is to be read, or why its forward is not its family's, by all trials."""
    first, refused = None, _refused(subject)
    for weights in (False, True):
        if weights and not str(first).startswith("its forward gives 2 outputs"):
            continue
        for default_scale in (False, True):
            reading = Reading(default_scale=default_scale, weights=weights, refused=refused)
            reason = _run(subject, _compared(subject, reading))
            if reason is None:
                return with_dropouts(subject, reading, functools.partial(_compared, subject))
            first = first or reason
    assert first is not None
    for without in ("", "position bias", "mask", "position bias and the mask"):  # the least first
        for power in (0, 1, 2):
            bare = _Bare(power=power, without=without, refused=refused)
            if _run(subject, _compared(subject, bare), settings=EXACT[:1]) is None:
                return _BARE.format(without) if without else first
    return first


def _refused(subject: Subject) -> frozenset[str]:
    """Return the kinds of masks at which a module raises an error, where it takes calls of other kinds."""
    taken, raised = set(), set()
    if all(map(is_of_library, subject.module.modules())):
        return frozenset()
    try:
        with isolated(), torch.no_grad():
            clone, arguments = subject.prepared()
            for args in arguments:
                section = subject.family.section(deep_copy(clone), *args)
                kind = section if isinstance(section, str) else mask_kind(section, args[0])
                try:
                    subject.original(deep_copy(clone), *args)
                    taken.add(kind)
                except Exception:
                    raised.add(kind)
    except Exception:  # which the comparison meets, too, and reports
        return frozenset()
    return frozenset(raised - taken) if taken else frozenset()


@dataclasses.dataclass(frozen=True)
class _Bare(Reading):
    """Scores without position bias, mask or both, as some code by `scaled_dot_product_attention` has them.

    Attributes:
        power: how many of two factors scale them: the module's own, PyTorch's, or both.
        without: what they leave out.
    """

    power: int = 0
    without: str = ""

    def apply(self, section: Section, attention: Any, x: Tensor) -> Section | str:
        found, default = super().apply(section, attention, x), section.head_dim**-0.5
        if isinstance(found, str):
            return found
        scale = (section.scale, default, section.scale * default)[self.power]
        found = dataclasses.replace(found, scale=scale)
        if "bias" in self.without:
            found = dataclasses.replace(found, table=None, position=None)
        return dataclasses.replace(found, mask=None, mask_value=0.0) if "mask" in self.without else found


def _probe_block(
    module: nn.Module,
    family: Any,
    original: Callable[..., Any],
    attention: Callable[..., Any] | None,
    known: Reading | None,
) -> Reading | str:
    """Return a reading if what a module does around its attention is what its family takes it for, else why not."""
    reading = (registry.reading(attention_key(family, module)) if is_family(family) else None) or Reading()
    if isinstance(reading, str):
        return reading
    subject = Subject(module, family, set(module.modules()), original)
    compared = functools.partial(compare_block, family=family, original=original, attention=attention, reading=reading)
    settings: tuple[Setting, ...] = () if known is None else EXACT[:1]
    smaller = subject.smaller() if known is None else None
    if smaller is not None and _run(smaller, compared, drops=True) is None:
        settings = _AT_ITS_SIZE
    return _run(subject, compared, drops=True, settings=settings) or reading


def _run(
    subject: Subject, compared: Callable[..., str | None], drops: bool = False, settings: tuple[Setting, ...] = ()
) -> str | None:
    """Return the first difference that two copies show in any setting and call, or None."""
    module, family = subject.module, subject.family
    empty, narrows = False, _speaks_of(module.modules(), ("float", "float32", "tensor", "type")) is not None
    try:
        with isolated():
            for setting in settings or _settings(module):
                clone, arguments = subject.prepared(setting)
                if drops and not setting.training:
                    set_idle_rates(clone, family)
                compares = 0
                for rate in (0.0, 0.2) if setting.training and setting.grad else (0.0,):
                    set_path_rates(clone, rate)
                    if drops:
                        set_drop_rates(family.block(clone), rate)
                    for args in arguments:
                        pair = deep_copy(clone), deep_copy(clone)
                        with (
                            Widened() if narrows and setting.is_exact else nullcontext(),
                            torch.set_grad_enabled(setting.grad),
                            torch.autocast("cpu", torch.bfloat16, enabled=setting.autocast),
                        ):
                            reason = compared(*pair, args, setting)
                        if reason == PADDED:
                            continue
                        compares += 1
                        if reason is not None:
                            return reason
                empty = empty or (setting.is_exact and not compares)
    except Inconclusive:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise Inconclusive(f"there was no memory to probe its forward in ({_first_line(error)})") from None
    except Exception as error:
        return f"the probe of its forward failed ({_first_line(error)})"
    return PADDED if empty else None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
