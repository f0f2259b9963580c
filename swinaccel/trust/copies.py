"""Make what a probe runs: small random copies of a module on the CPU, and the calls of them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from ..families import examples
from ..spec.block import Block
from .fingerprint import rates
from .libraries import is_of_library, unsharded_class


@dataclass(frozen=True)
class Setting:
    """Settings of a probe: in training or not, how large its numbers are, and in which dtype.

    Attributes:
        grad: gradients are recorded.
        factor: what input and parameters are multiplied by; code that limits values shows where they are 1e9 apart.
        dtype: of the copy; under autocast products are computed in bfloat16.
        odd: one number of the input is infinite and one is NaN.
        drops: a rate of dropout is on trial, and outputs may be zero.
    """

    training: bool = False
    grad: bool = False
    factor: float = 1.0
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    odd: bool = False
    drops: bool = field(default=False, compare=False)

    @property
    def is_exact(self) -> bool:
        """Return True if rounding hides nothing."""
        return self.dtype == torch.float64

    @property
    def tolerance(self) -> float:
        """Return the difference, relative to the largest number, that two orders of the same arithmetic may have."""
        if self.is_exact:
            return 1e-6
        return 0.1 if self.autocast or self.dtype == torch.bfloat16 else 0.02


EXACT = (Setting(), Setting(factor=1e3), Setting(factor=1e-3), Setting(training=True, grad=True))
# What code outside of the surveyed libraries may do in other modes, to dtypes and to numbers that are not finite.
OTHERS = (
    Setting(grad=True),
    Setting(training=True),
    Setting(dtype=torch.float32, odd=True),
    Setting(dtype=torch.float16, odd=True),
    Setting(dtype=torch.float16),
    Setting(dtype=torch.bfloat16),
    Setting(dtype=torch.float32, autocast=True),
)


_COMPOSABLE = "__composable_api"  # how the names begin under which FSDP2 keeps its state in a module


class Widened(TorchFunctionMode):
    """Let code that computes in float32 for itself stay in float64, where its arithmetic is looked at.

    How it rounds is looked at in lower precision, without this.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave numbers as they are where they would become float32."""
        kwargs = kwargs or {}
        if func is torch.tensor and "dtype" not in kwargs:  # a constant, as the official V2's clamp
            made = func(*args, **kwargs)
            return made.double() if made.dtype == torch.float32 else made
        if args and getattr(args[0], "dtype", None) == torch.float64:
            if func is Tensor.float:
                return args[0]
            args, kwargs = tuple(map(_wide, args)), {name: _wide(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def isolated() -> Iterator[None]:
    """Keep what surrounds a probe out of it, and its random numbers out of what surrounds it."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.get_default_device().type != "cpu":  # a mode that looks at every call
            stack.enter_context(torch.device("cpu"))
        yield


def seed() -> None:
    """Seed the CPU's generator alone; torch.manual_seed would seed every GPU as well."""
    torch.default_generator.manual_seed(0)


def generator_state() -> bytes:
    """Return the state of the generator that `seed` seeds, which shows how much was drawn since."""
    return torch.default_generator.get_state().numpy().tobytes()


def random_copy(module: nn.Module, moved: set[nn.Module], setting: Setting, draws: dict[str, Tensor]) -> nn.Module:
    """Return a CPU copy, every tensor and number another one, without hooks and dropping nothing; nothing is shared.

    In fp64, the first of several heads has a table whose spread lets tokens see past the shift mask's -100, which is
    not -inf, and scales of cosine attention lie above their clamp as well as below it. In lower precision scores are
    moderate, or rounding would be all that is seen, and parameters are frozen.

    Args:
        moved: the modules whose floating-point attributes are moved. Rates of dropout become 0.
        draws: random numbers of the parameters, by their names, which copies of one module share; drawn where missing.
    """
    seed()
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
        if name not in draws:
            draws[name] = torch.randn(parameter.shape, dtype=torch.float64)
        value = draws[name] * (1.5 / max(1, fan_in) ** 0.5)
        if name.endswith("logit_scale"):
            largest = 5.5 if setting.is_exact else 0.5
            value = torch.linspace(largest, -3.0, parameter.numel(), dtype=torch.float64).view(parameter.shape)
        elif name.endswith("relative_position_bias_table") and value.shape[-1] > 1 and setting.is_exact:
            value[:, 0] *= 200
        memo[id(parameter)] = nn.Parameter((value * setting.factor).to(setting.dtype), setting.is_exact)
    for buffer in module.buffers():
        value = buffer.detach().to("cpu", copy=True)
        memo[id(buffer)] = value + torch.rand_like(value) if value.is_floating_point() else value
    for part in module.modules():
        for one in vars(part).values():
            if isinstance(one, Tensor) and one.is_floating_point() and id(one) not in memo:
                value = one.detach().to("cpu", setting.dtype, copy=True)
                memo[id(one)] = value + torch.rand_like(value)
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            memo[id(hooks)] = OrderedDict()
    places = [place for place, part in enumerate(module.modules()) if part in moved]
    clone = _copied(module, memo)
    clone.to("cpu", setting.dtype)
    clone.train(setting.training)  # in detection backbones, neither returns the module
    parts = list(clone.modules())
    for part in parts:
        if isinstance(part, _DropoutNd):
            part.p = 0.0
    for part in (parts[place] for place in places):
        if not type(part).__module__.startswith("torch.nn."):
            for name, number in vars(part).items():
                if type(number) is float:
                    vars(part)[name] = 0.0 if "drop" in name else 1.25 * number + 0.05
    return clone


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy; of what FSDP2 shards, which refuses to be copied, one of the class that it was made from.

    Args:
        memo: copies by the addresses of their originals; those of a module's forward hooks are in it.
    """
    sharded = [part for part in module.modules() if unsharded_class(type(part)) is not type(part)]
    for part in sharded:
        memo[id(part)] = object.__new__(unsharded_class(type(part)))
    for part in sharded:
        kept = {name: value for name, value in vars(part).items() if not name.startswith(_COMPOSABLE)}
        memo[id(part)].__dict__ = copy.deepcopy(kept, memo)
    return deep_copy(module, memo)


def deep_copy(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return `copy.deepcopy` of a module; most of its time would go into the empty dictionaries of hooks."""
    memo = memo or {}
    for part in module.modules():
        memo |= {id(one): type(one)() for one in vars(part).values() if type(one) in (dict, OrderedDict) and not one}
    return copy.deepcopy(module, memo)


def calls(family: Any, clone: nn.Module, setting: Setting) -> list[tuple[Any, ...]]:
    """Return the arguments of the calls that a family's examples describe: inputs, masks and the like, at random."""

    def made(place: int, argument: Any) -> Any:
        if not isinstance(argument, torch.Size):
            return argument
        numbers = torch.randn(argument, dtype=torch.float64)
        if place:
            return (numbers - 100 * (torch.rand(argument) < 0.5)).to(setting.dtype)
        numbers = numbers * setting.factor
        if setting.odd:
            flat = numbers.view(-1)
            flat[0], flat[-1] = float("inf"), float("nan")
        return numbers.to(setting.dtype)

    seed()
    return [tuple(made(*argument) for argument in enumerate(example)) for example in examples(family, clone)]


@dataclass(frozen=True)
class Subject:
    """A module that copies are made of, and how they are called.

    Attributes:
        moved, draws: as for `random_copy`.
        original: the module's own method, unbound.
        is_small: copies have the smallest image that shows all that a block does with windows.
    """

    module: nn.Module
    family: Any
    moved: set[nn.Module]
    original: Callable[..., Any]
    draws: dict[str, Tensor] = field(default_factory=dict)
    is_small: bool = False

    def prepared(self, setting: Setting = EXACT[0]) -> tuple[nn.Module, list[tuple[Any, ...]]]:
        """Return a random copy, and the arguments of its calls."""
        clone = random_copy(self.module, self.moved, setting, self.draws)
        if hasattr(self.family, "shrink") and is_of_library(self.module):
            self.family.shrink(clone)
        if self.is_small:
            self.family.shrink_image(clone)
        return clone, calls(self.family, clone, setting)

    def smaller(self) -> Subject | None:
        """Return the same with small images, or None where they are small, or cannot be made so."""
        shrink = getattr(self.family, "shrink_image", None)
        if shrink is None or is_of_library(self.module):
            return None
        try:
            return replace(self, is_small=True) if shrink(deep_copy(self.module)) else None
        except Exception:  # of code that lets nobody set its size
            return None


def set_drop_rates(facts: Any, rate: float) -> None:
    """Let drop-paths drop, the second more than the first."""
    drops = ((facts.drop1, rate), (facts.drop2, 2 * rate)) if isinstance(facts, Block) else ()
    for drop, own in drops:
        for name in ("p", "drop_prob"):
            if drop is not None and name in vars(drop) and type(drop) is not nn.Dropout:
                setattr(drop, name, own)


def set_idle_rates(clone: nn.Module, adapter: Any) -> None:
    """Set all rates of dropout around an attention, which must not count in evaluation."""
    attention = getattr(adapter.block(clone), "attention", None)
    inside = set() if attention is None else set(attention.modules())
    for part in clone.modules():
        if part not in inside and not is_of_library(part):
            for name, _ in rates(part):
                setattr(part, name, 0.5)
        if part not in inside and isinstance(part, _DropoutNd):
            part.p = 0.5


def set_path_rates(clone: nn.Module, rate: float) -> None:
    """Let all drop-paths of a copy drop, wherever they stand."""
    for part in clone.modules():
        for name in ("p", "drop_prob"):
            if isinstance(part.__dict__.get(name), float) and not isinstance(part, _DropoutNd):
                setattr(part, name, rate)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value and in its containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors(one)
