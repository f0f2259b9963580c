"""The proof behind a signature: a class's own forward against its family's reading of it, once, in fp64 on the CPU.

Attributes can look right and mean something else: a subclass with a changed forward, a copy that skips the
projection, another version of a library. So before a kind of module is trusted, a small copy of one, with every
parameter drawn at random (fresh tables are almost zero and fresh norms can be exactly zero, and would hide a
difference), runs both ways.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch, fusion, reference
from .families import Family, Surrounding, examples
from .layout import Block
from .spec import Section, WindowSpec

# Homes of the surveyed implementations, whose instances differ in nothing but what their family reads.
_SURVEYED = (
    "timm.models.swin_transformer",
    "torchvision.models.swin_transformer",
    "torchvision.models.video.swin_transformer",
    "transformers.models.",
    "monai.networks.nets.swin_unetr",
)
_TOLERANCE = 1e-6
_NOTHING_TO_COMPARE = "the image is padded and the projection is not a plain nn.Linear"  # such calls run the original

_verdicts: dict[tuple, str | None] = {}


def doubt(module: nn.Module, family: Family, spec: WindowSpec, original: Callable[..., Any]) -> str | None:
    """Why this kind of module is not what its family takes it for, or None where it is; probed once for each kind.

    Args:
        module: any instance; it is not changed and not called.
        original: the class's own method, unbound, without a dispatcher of ours.
    """
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return "its tensors are on the meta device; call accelerate() once they are loaded"
    key = _kind(module, family, spec, original)
    if key not in _verdicts:
        _verdicts[key] = _probe(module, family, original)
    return _verdicts[key]


def doubt_around(
    module: nn.Module, family: Family | Surrounding, original: Callable[..., Any], attention: Callable[..., Any] | None
) -> str | None:
    """Why what this kind of module does around its attention is not what its family takes it for, or None.

    Args:
        module, original: as for `doubt`, with the method that runs the whole module.
        attention: its class's own method for the attention, where it is another one.
    """
    surveyed = type(module).__module__.startswith(_SURVEYED)
    parts = tuple((name, type(part), () if surveyed else _settings(part)) for name, part in module.named_modules())
    tensors = tuple(name for name, _ in (*module.named_parameters(), *module.named_buffers()))
    key = ("around", family.name, original, parts, tensors)
    if key not in _verdicts:
        _verdicts[key] = _probe_around(module, family, original, attention)
    return _verdicts[key]


def _settings(part: nn.Module) -> tuple:
    return tuple(
        (name, repr(value))
        for name, value in sorted(vars(part).items())
        if isinstance(value, (bool, int, float, str, tuple, list)) and name != "training"
    )


def _probe_around(
    module: nn.Module, family: Any, original: Callable[..., Any], attention: Callable[..., Any] | None
) -> str | None:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            twin = _random_twin(module)
            for args in _calls(family, twin):
                facts, (x, size) = family.block(twin), family.tokens(twin, *args)
                if not isinstance(facts, Block):
                    found = fusion.merge_reference(facts, x, size)
                else:
                    if attention is not None:
                        attend: Any = functools.partial(attention, twin)
                    elif hasattr(family, "attend"):
                        attend = family.attend(twin)
                    else:
                        attend = functools.partial(_attend, family.section(twin, *args))
                    found = fusion.reference(facts, attend, x, size)
                reason = _difference(family.name, _parts(original(twin, *args)), _parts(found))
                if reason is not None:
                    return reason
                fusion.trust(twin, facts)
    except Exception as error:
        return _failure(error)
    return None


def _calls(family: Any, twin: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Arguments of the calls that a family's examples describe: sizes become random numbers."""
    for example in examples(family, twin):
        yield tuple(torch.randn(arg, dtype=torch.float64) if isinstance(arg, torch.Size) else arg for arg in example)


def _failure(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"the probe of its forward failed ({type(error).__name__}: {text[0] if text else ''})"


def _kind(module: nn.Module, family: Family, spec: WindowSpec, original: Callable[..., Any]) -> tuple:
    parts = tuple((name, type(part)) for name, part in module.named_modules())
    tensors = tuple(name for name, _ in module.named_parameters()) + tuple(name for name, _ in module.named_buffers())
    settings: tuple = ()
    if not type(module).__module__.startswith(_SURVEYED):
        settings = tuple(map(_settings, (module, *family.attention(module).modules())))
    return family.name, original, parts, tensors, spec.window, any(spec.shift), settings


def _probe(module: nn.Module, family: Family, original: Callable[..., Any]) -> str | None:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            twin = _random_twin(module)
            reasons = [_compare(twin, family, original, args) for args in _calls(family, twin)]
    except Exception as error:
        return _failure(error)
    if _NOTHING_TO_COMPARE in reasons and len(reasons) > 1:
        reasons.remove(_NOTHING_TO_COMPARE)
    for reason in reasons:
        if reason is not None:
            return reason
    dispatch.trusted_types.update(type(part) for part in family.attention(module).modules())
    return None


def _compare(twin: nn.Module, family: Family, original: Callable[..., Any], args: tuple[Any, ...]) -> str | None:
    """Why one call of the original does not give what its family reads out of it, or None where it does."""
    section = family.section(twin, *args)
    if isinstance(section, str):
        return section
    if section.padding is None and section.geometry.is_padded:
        return _NOTHING_TO_COMPARE
    expected = _parts(original(twin, *args))
    found = _parts(family.forward(twin, lambda x: _attend(section, x), *args))
    return _difference(family.name, expected, found)


def _difference(name: str, expected: tuple[Any, ...], found: tuple[Any, ...]) -> str | None:
    if len(expected) != len(found):
        return f"its forward gives {len(expected)} outputs where {name} gives {len(found)}"
    for place, (one, other) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            if one is not other:
                return f"its forward gives other outputs than {name}"
            continue
        if place and torch.equal(one, other):  # a loss may be zero; where the output is, nothing is shown
            continue
        if one.shape != other.shape:
            return f"its forward gives {tuple(one.shape)} where {name} gives {tuple(other.shape)}"
        difference = (one - other).abs().max() / one.abs().max()
        if not difference <= _TOLERANCE:
            return f"its forward is not that of {name}: outputs differ by {difference:.1e} of their size"
    return None


def _random_twin(module: nn.Module) -> nn.Module:
    """A CPU copy in fp64 and eval mode, without hooks, every parameter random and none of them copied."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
        memo[id(parameter)] = nn.Parameter(
            torch.randn(parameter.shape, dtype=torch.float64) * (1.5 / max(1, fan_in) ** 0.5), False
        )
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            hooks.clear()
    return twin.to("cpu", torch.float64).eval()


def _attend(section: Section, x: Tensor) -> Tensor:
    qkv = section.project(x)
    q, k, v = qkv.chunk(3, dim=-1) if isinstance(qkv, Tensor) else qkv
    out = reference.shifted_window_attention(
        q,
        k,
        v,
        section.geometry,
        num_heads=section.num_heads,
        table=section.table(),
        index=section.index,
        padding=section.padding() if section.padding is not None else None,
        mask=section.mask,
        mask_value=section.mask_value,
        scale=section.scale,
        logit_scale=section.logit_scale,
    )
    return section.output(out)


def _parts(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)
