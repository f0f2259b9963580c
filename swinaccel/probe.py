"""The proof behind a signature: a class's own forward against its family's reading of it, once, in fp64 on the CPU.

Attributes can look right and mean something else: a subclass with a changed forward, a copy that skips the
projection, another version of a library. So before a kind of module is trusted, two small copies of one run the two
ways, in eval mode, and in training mode with gradients. Every parameter is drawn at random (fresh tables are almost
zero and fresh norms can be exactly zero, and would hide a difference), and buffers and numbers are moved: what is one
or zero now may be something else after some steps of training. What limits values is seen where they are a thousand
times larger, and smaller; what a probe in fp64 cannot see at all is looked for in the code's names.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch, fusion, reference
from .families import Family, examples
from .harmless import LIBRARIES, SURVEYED
from .layout import Block, Merging
from .spec import Section, WindowSpec
from .watch import is_plain, own_method

_TOLERANCE = 1e-6
# Whether training, and by what input and parameters are multiplied, each, so that some numbers are 1e9 times larger.
_SETTINGS = ((False, 1.0), (False, 1e3), (False, 1e-3), (True, 1.0))
_NOTHING_TO_COMPARE = "the image is padded and the projection is not a plain nn.Linear"  # such calls run the original
_DROP_RATES = ("attention_dropout", "dropout")  # numbers that families read
_OWN = frozenset(nn.Module().__dict__)

_verdicts: dict[tuple, str | None] = {}


def doubt(module: nn.Module, family: Family, spec: WindowSpec) -> str | None:
    """Why this kind of module is not what its family takes it for, or None where it is; probed once for each kind.

    Args:
        module: any instance; it is not changed and not called.
    """
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return "its tensors are on the meta device; call accelerate() once they are loaded"
    attention = family.attention(module)
    reason = _replaced(attention)
    if reason is not None:
        return reason
    kind = _kind(module, attention)
    key = None if kind is None else (family.name, *kind, spec.window, any(spec.shift))
    original = own_method(type(module), family.method)
    return _verdict(key, lambda: _beyond_proof(attention.modules(), _GATES) or _probe(module, family, original))


def doubt_around(module: nn.Module, family: Any, method: str, attention: str | None) -> str | None:
    """Why what this kind of module does around its attention is not what its family takes it for, or None.

    Args:
        module: as for `doubt`.
        method: runs the whole module.
        attention: the method for its attention, where that is another one.
    """
    reason = _replaced(module)
    if reason is not None:
        return reason
    kind = _kind(module, None)

    def judge() -> str | None:
        own = None if attention is None else own_method(type(module), attention)
        forward = own_method(type(module), method)
        inside = set(family.attention(module).modules()) if hasattr(family, "attention") else set()
        around = [part for part in module.modules() if part not in inside]
        return _beyond_proof(around, _GATES | _AROUND) or _probe_around(module, family, forward, own)

    verdict = _verdict(None if kind is None else ("around", family.name, *kind), judge)
    if verdict is None:
        fusion.trust(module, family.block(module))
    return verdict


def _verdict(key: tuple | None, judge: Callable[[], str | None]) -> str | None:
    """What is judged of a kind of module, once; each time where nothing tells kinds apart."""
    if key is None:
        return judge()
    if key not in _verdicts:
        _verdicts[key] = judge()
    return _verdicts[key]


def _beyond_proof(parts: Iterable[nn.Module], words: set[str]) -> str | None:
    """Which name in the code of modules, if it is not a library's, speaks of what a probe in fp64 cannot see."""
    for part in parts:
        if type(part).__module__.startswith(LIBRARIES):
            continue
        for function in _code(type(part)):
            if not isinstance(function, types.FunctionType) or function.__module__.startswith(LIBRARIES):
                continue
            if not _NOT_RUN.intersection(function.__name__.split("_")):
                names = words.intersection(function.__code__.co_names)
                if names:
                    return f"{type(part).__name__}.{function.__name__} has to do with {min(names)}"
    return None


_NOT_RUN = {"init", "repr", "flops", "mask"}  # words in names of methods that make no activations
# What decides by dtypes, or by numbers that are not finite; and what around attention, which may clamp its logit_scale,
# changes dtypes, numbers or gradients.
_GATES = {
    "bfloat16", "finfo", "float16", "half", "is_autocast_enabled", "isfinite", "isinf", "isnan", "nan_to_num",
}  # fmt: skip
_AROUND = {
    "amp", "apply", "autocast", "clamp", "clamp_", "clip", "detach", "double", "dropout", "dtype", "float", "float32",
    "no_grad", "type_as",
}  # fmt: skip


def _replaced(attention: nn.Module) -> str | None:
    """Which method other than forward, which `dispatch` looks after, was replaced on an instance in the attention."""
    for part in attention.modules():
        for name in dispatch.replaced(part):
            if name != "forward":
                return f"{name} of a {type(part).__name__} was replaced on this instance"
    return None


def _kind(module: nn.Module, attention: nn.Module | None) -> tuple | None:
    """All that decides what modules of one kind compute, but for their tensors' values and sizes; None: who knows."""
    surveyed = type(module).__module__.startswith(SURVEYED)
    inside = set() if attention is None else set(attention.modules())
    parts = []
    for name, part in module.named_modules():
        matters = (
            not type(part).__module__.startswith(LIBRARIES)
            or (not surveyed and (part is module or not inside or part in inside))
            or (part in inside and not part._parameters and not part._modules)  # a softmax, a dropout
        )
        settings = _settings(part) if matters else ()
        if settings is None:
            return None
        parts.append((name, type(part), _code(type(part)), settings))
    tensors = tuple(name for name, _ in (*module.named_parameters(), *module.named_buffers()))
    return tuple(parts), tensors


def _code(cls: type) -> tuple:
    """Functions that instances run, as they are now, and those of their modules that they name."""
    found: list[Any] = []
    for base in cls.__mro__:
        if base.__module__.startswith("torch.nn."):
            break
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType):
                value = own_method(base, name)
                named = map(value.__globals__.get, value.__code__.co_names)
                found += value, *(one for one in named if isinstance(one, types.FunctionType))
            elif isinstance(value, (property, staticmethod, classmethod)):
                found.append(value)
    return tuple(found)


def _settings(part: nn.Module) -> tuple | None:
    """Of a module, to be compared with another's; None where there is a tensor, or what cannot be compared."""
    found: list[tuple] = []
    for name, value in sorted(vars(part).items()):
        if name in _OWN:
            continue
        if is_plain(value) or (isinstance(value, list) and all(map(is_plain, value))):
            found.append((name, repr(value), *(value if isinstance(value, list) else (value,))))  # 1, 1.0 and True
        elif isinstance(value, Tensor) or not hasattr(value, "__dict__"):
            return None
        else:
            found.append((name, _Itself(value)))
    return tuple(found)


class _Itself:
    """An object, which equals nothing else, nor what comes to lie where it was; not kept alive."""

    def __init__(self, value: Any) -> None:
        self.key, self.value = id(value), weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value() is other.value() is not None

    def __hash__(self) -> int:
        return self.key


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Nothing that surrounds the call counts, and nobody's random numbers on any device change."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.device("cpu"))
        yield


def _seed() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed would seed every GPU as well


def _probe(module: nn.Module, family: Family, original: Callable[..., Any]) -> str | None:
    reasons = []
    try:
        with _undisturbed():
            for training, factor in _SETTINGS:
                twin = _random_twin(module, family, training, factor)
                for args in _calls(family, twin, factor):
                    with torch.set_grad_enabled(training):
                        reasons.append(_compare(copy.deepcopy(twin), copy.deepcopy(twin), family, original, args))
    except Exception as error:
        return _failure(error)
    if any(reason != _NOTHING_TO_COMPARE for reason in reasons):
        reasons = [reason for reason in reasons if reason != _NOTHING_TO_COMPARE]
    for reason in reasons:
        if reason is not None:
            return reason
    dispatch.trust(family.attention(module))
    return None


def _probe_around(
    module: nn.Module, family: Any, original: Callable[..., Any], attention: Callable[..., Any] | None
) -> str | None:
    try:
        with _undisturbed():
            for training, factor in _SETTINGS:
                twin = _random_twin(module, family, training, factor, around=True)
                facts = family.block(twin)
                calls = _calls(family, twin, factor)
                for rate in (0.0, 0.2) if training else (0.0,):
                    _set_drop_rates(facts, rate)
                    for args in calls:
                        pair = copy.deepcopy(twin), copy.deepcopy(twin)
                        with torch.set_grad_enabled(training):
                            reason = _compare_around(*pair, family, original, attention, args)
                        if reason is not None:
                            return reason
    except Exception as error:
        return _failure(error)
    return None


def _set_drop_rates(facts: Any, rate: float) -> None:
    """Let drop-paths drop, the second more than the first."""
    drops = ((facts.drop1, rate), (facts.drop2, 2 * rate)) if isinstance(facts, Block) else ()
    for drop, own in drops:
        for name in ("p", "drop_prob"):
            if drop is not None and name in vars(drop) and type(drop) is not nn.Dropout:
                setattr(drop, name, own)


def _compare_around(
    twin: nn.Module,
    other: nn.Module,
    family: Any,
    original: Callable[..., Any],
    attention: Callable[..., Any] | None,
    args: tuple[Any, ...],
) -> str | None:
    """As `_compare`, for what is around the attention."""
    facts = family.block(other)
    inputs = [args[0].clone().requires_grad_(twin.training) for _ in range(2)]
    _seed()
    expected = _parts(original(twin, inputs[0], *args[1:]))
    _seed()
    args = inputs[1], *args[1:]
    x, size = family.tokens(other, *args)
    if isinstance(facts, Merging):
        found = fusion.merge_reference(facts, x, size)
    elif not isinstance(facts, Block):
        found = fusion.embed_reference(facts, x)
    else:
        if attention is not None:
            attend: Any = functools.partial(attention, other)
        elif hasattr(family, "attend"):
            attend = family.attend(other)
        else:
            attend = functools.partial(_attend, family.section(other, *args))
        found = fusion.reference(facts, attend, x, size)
    return _reason(family.name, expected, _parts(found), inputs, twin, other)


def _calls(family: Any, twin: nn.Module, factor: float) -> list[tuple[Any, ...]]:
    """Arguments of the calls that a family's examples describe: an input, a mask and the like of random numbers."""

    def made(place: int, arg: Any) -> Any:
        if not isinstance(arg, torch.Size):
            return arg
        numbers = torch.randn(arg, dtype=torch.float64)
        return numbers - 100 * (torch.rand(arg) < 0.5) if place else numbers * factor

    _seed()
    return [tuple(made(*arg) for arg in enumerate(example)) for example in examples(family, twin)]


def _failure(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"the probe of its forward failed ({type(error).__name__}: {text[0] if text else ''})"


def _compare(
    twin: nn.Module, other: nn.Module, family: Family, original: Callable[..., Any], args: tuple[Any, ...]
) -> str | None:
    """Why one call of the original does not do what its family reads out of it, or None where it does."""
    section = family.section(other, *args)
    if isinstance(section, str):
        return section
    if section.padding is None and section.geometry.is_padded:
        return _NOTHING_TO_COMPARE
    known = {id(tensor) for tensor in (*other.parameters(), *other.buffers(), *args)}
    for tensor in (*section.sources, section.logit_scale, section.mask):
        if tensor is not None and id(tensor) not in known and id(tensor._base) not in known:
            return "what its scores start from is computed anew at each call, and is no parameter or buffer"
    for part in family.attention(other).modules():
        if not type(part).__module__.startswith(LIBRARIES):
            for name, buffer in part._buffers.items():
                if (
                    buffer is not None
                    and not buffer.is_floating_point()
                    and buffer.data_ptr() != section.index.data_ptr()
                ):
                    return f"the buffer {name} of whole numbers is not its bias's index, and may be a switch"
    x, *rest = args
    inputs = [x.clone().requires_grad_(twin.training) for _ in range(2)]
    _seed()
    expected = _parts(original(twin, inputs[0], *rest))
    _seed()
    found = _parts(family.forward(other, lambda image: _attend(section, image), inputs[1], *rest))
    return _reason(family.name, expected, found, inputs, twin, other)


def _reason(
    name: str,
    expected: tuple[Any, ...],
    found: tuple[Any, ...],
    inputs: list[Tensor],
    twin: nn.Module,
    other: nn.Module,
) -> str | None:
    """Why two modules that were given one of the inputs each are not alike, or None where they are."""
    reason = _difference(name, expected, found) or _other_state(twin, other)
    if reason is None and twin.training:
        reason = _other_gradients(_gradients(expected, inputs[0], twin), _gradients(found, inputs[1], other))
    return None if reason is None else f"in training, {reason}" if twin.training else reason


def _difference(name: str, expected: tuple[Any, ...], found: tuple[Any, ...]) -> str | None:
    if len(expected) != len(found):
        return f"its forward gives {len(expected)} outputs where {name} gives {len(found)}"
    for place, (one, other) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            if one is not other and not (isinstance(one, tuple) and one == other):
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


def _gradients(parts: tuple[Any, ...], x: Tensor, module: nn.Module) -> dict[str, Tensor | None]:
    """Of the input and every parameter, by name."""
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        if isinstance(part, Tensor) and part.requires_grad:
            weights = torch.linspace(-1, 1, part.numel(), dtype=torch.float64).cos().view(part.shape)
            total = total + (part * weights).sum()
    if total.requires_grad:
        total.backward()
    return {"the input": x.grad, **{name: parameter.grad for name, parameter in module.named_parameters()}}


def _other_gradients(expected: dict[str, Tensor | None], found: dict[str, Tensor | None]) -> str | None:
    largest = max((one.abs().max() for one in expected.values() if one is not None), default=0.0)
    for name, one in expected.items():
        other = found[name]
        if one is None or other is None:
            if one is not other:
                return f"{name} has {'no' if one is None else 'a'} gradient"
        # Some vanish but for rounding, such as that of k's bias.
        elif not (one - other).abs().max() <= _TOLERANCE * (one.abs().max() + 1e-3 * largest):
            return f"the gradient of {name} is another one"
    return None


def _other_state(twin: nn.Module, other: nn.Module) -> str | None:
    """What the original's forward keeps on the module or changes, and its family does not."""
    for (path, one), (_, two) in zip(twin.named_modules(), other.named_modules(), strict=True):
        left, right = ({**vars(part), **part._buffers} for part in (one, two))
        for name in sorted((left.keys() | right.keys()) - _OWN):
            kept, expected = (list(_tensors(values.get(name))) for values in (left, right))
            is_like = len(kept) == len(expected) and all(map(_is_same, kept, expected))
            if not is_like or _plainly(left.get(name)) != _plainly(right.get(name)):
                return f"its forward changes {'.'.join(filter(None, (path, name)))}"
    return None


def _plainly(value: Any) -> Any:
    """What is not a tensor in an attribute, as far as a forward may write to it: numbers, and how many there are."""
    if is_plain(value):
        return value
    if isinstance(value, (list, tuple, dict, set)):
        return len(value)
    if isinstance(value, (Tensor, nn.Module, type)) or not hasattr(value, "__dict__") or callable(value):
        return None
    return {name: one if is_plain(one) else None for name, one in vars(value).items()}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, equal_nan=True)


def _random_twin(
    module: nn.Module, family: Any, training: bool, factor: float = 1.0, around: bool = False
) -> nn.Module:
    """A CPU copy in fp64, every tensor and number another one, without hooks and dropping nothing; nothing is shared.

    Of more than one head, the first has a table whose spread lets tokens see past the shift mask's -100, which is not
    -inf. Scales of cosine attention lie above their clamp as well as below it.
    """
    _seed()
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
        value = torch.randn(parameter.shape, dtype=torch.float64) * (1.5 / max(1, fan_in) ** 0.5)
        if name.endswith("logit_scale"):
            value = torch.linspace(5.5, -3.0, parameter.numel(), dtype=torch.float64).view(parameter.shape)
        elif name.endswith("relative_position_bias_table") and value.shape[-1] > 1:
            value[:, 0] *= 200
        memo[id(parameter)] = nn.Parameter(value * factor, training)
    for buffer in module.buffers():
        value = buffer.detach().to("cpu", copy=True)
        memo[id(buffer)] = value + torch.rand_like(value) if value.is_floating_point() else value
    twin = copy.deepcopy(module, memo).to("cpu", torch.float64).train(training)
    for part in twin.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            hooks.clear()
        if type(part) is nn.Dropout:
            part.p = 0.0
    attention = (
        family.attention(twin) if hasattr(family, "attention") else getattr(family.block(twin), "attention", None)
    )
    inside = set() if attention is None else set(attention.modules())
    for part in twin.modules() if around else {twin, *inside}:
        for name, number in vars(part).items():
            if type(number) is float and not type(part).__module__.startswith("torch.nn."):
                is_rate = name in _DROP_RATES and (part in inside or not around)
                vars(part)[name] = 0.0 if is_rate else 1.25 * number + 0.05
    return twin


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
