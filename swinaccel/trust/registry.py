"""Remember what was proven: verdicts on whole modules, and the readings that hold for what calls stand in for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ..spec.window import Section
from .fingerprint import fingerprint, is_dead

_MOST = 1024
_TWO_WAYS = (
    "modules of its code were proven that scale or drop in two ways, as their windows or shifts decide; no call tells"
    " which of them it is"
)


@dataclass(frozen=True)
class Reading:
    """Facts of a proven module that its attributes do not tell, and that running it shows.

    Attributes:
        default_scale: scores are scaled by head_dim ** -0.5, whatever scale the module holds.
        unread: names of rates that no family reads: of dropouts that it does not call, or of another kind than
            elementwise, and numbers around the attention; while one is active, the original must run.
        always: those of them by which something is dropped in evaluation, too.
        rate: the name of a number of the attention, by which its weights are dropped in training, whatever dropouts
            the module holds; empty where those count.
        weights: it returns the attention weights as well.
        refused: the kinds of masks (`mask_kind`) at which the original raises.
    """

    default_scale: bool = False
    unread: tuple[str, ...] = ()
    always: frozenset[str] = frozenset()
    rate: str = ""
    weights: bool = False
    refused: frozenset[str] = frozenset()

    def joined(self, other: Reading) -> Reading | str:
        """Return a reading for modules that this one or another holds for, or why there is none."""
        unread = tuple(dict.fromkeys(self.unread + other.unread))
        always = self.always | other.always
        both = dataclasses.replace(self, unread=unread, always=always, refused=self.refused | other.refused)
        same = dataclasses.replace(other, unread=unread, always=always, refused=both.refused) == both
        return both if same else _TWO_WAYS

    def active(self, module: nn.Module) -> str | None:
        """Return the name of a rate by which something may be dropped now and that is not read, or None."""
        for name in self.unread:
            path, _, last = name.rpartition(".")
            part = module.get_submodule(path)
            if getattr(part, last) and (part.training or module.training or name in self.always):
                return name
        return None

    def holders(self, module: nn.Module) -> list[nn.Module]:
        """Return the modules that hold the rates which are not read."""
        return [module.get_submodule(name.rpartition(".")[0]) for name in self.unread]

    def apply(self, section: Section, attention: Any, x: Tensor) -> Section | str:
        """Return a section as the code of its module computes it, or why the original must run.

        Args:
            x: what the call is given.
        """
        if self.refused and mask_kind(section, x) in self.refused:
            return f"in a trial its own code raised an error for {mask_kind(section, x)}, which is left to it"
        if self.default_scale and section.logit_scale is None:
            section = dataclasses.replace(section, scale=section.head_dim**-0.5)
        if self.rate:
            rate = attrgetter(self.rate)(attention) if attention.training else 0.0
            section = dataclasses.replace(section, dropout=rate)
        return section


def mask_kind(section: Section, x: Tensor) -> str:
    """Return in words which mask a call is given: code by `scaled_dot_product_attention` may want one of its own."""
    is_given, images = section.mask is not None, x.numel() // max(1, x.shape[-1] * math.prod(section.geometry.size))
    return _KINDS[is_given, images > 1 if is_given else section.geometry.is_shifted]


# By: there is a mask; images share it, or else windows are shifted.
_KINDS = {
    (False, False): "windows without a mask",
    (False, True): "shifted windows without a mask",
    (True, False): "a mask of all windows",
    (True, True): "a mask of one image for several",
}


class Registry:
    """The proofs of this process, by fingerprint."""

    def __init__(self) -> None:
        self._verdicts: dict[Hashable, Reading | str] = {}
        self._readings: dict[Hashable, Reading | str] = {}
        self.count = 0  # goes up with every proof: what was refused before may be proven now

    def verdict(self, key: Hashable) -> Reading | str | None:
        """Return how a module of this fingerprint is read, why it is not, or None if it was not judged yet."""
        return self._verdicts.get(key)

    def reading(self, key: Hashable) -> Reading | str | None:
        """Return the reading that was proven for parts of this fingerprint, why there is not one, or None."""
        return self._readings.get(key)

    def record(self, key: Hashable, verdict: Reading | str) -> None:
        """Keep a verdict for all modules of this fingerprint."""
        _make_room(self._verdicts)
        self._verdicts[key] = verdict

    def prove(self, key: Hashable, reading: Reading) -> None:
        """Let calls stand in for parts of this fingerprint, which blocks with a shift share with those without."""
        known = self._readings.get(key)
        both = reading if known is None else known if isinstance(known, str) else reading.joined(known)
        if known != both:
            _make_room(self._readings)
            self._readings[key] = both
            self.count += 1

    def clear(self) -> None:
        """Forget everything."""
        self._verdicts.clear()
        self._readings.clear()


def _make_room(proofs: dict) -> None:
    """Drop the proofs of code that is gone, where there are many."""
    if len(proofs) >= _MOST:
        for key in [key for key in proofs if is_dead(key)]:
            del proofs[key]


registry = Registry()


def parts_of_attention(family: Any, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a module and its attention's modules, by their names: what a section stands in for."""
    inside = set(family.attention(module).modules())
    return [(path, part) for path, part in module.named_modules() if part is module or part in inside]


def attention_key(family: Any, module: nn.Module) -> Hashable:
    """Return what calls of a module are proven by: the fingerprint of what its section stands in for."""
    return "attention", family.name, fingerprint(parts_of_attention(family, module), (family.method,))


def block_key(family: Any, module: nn.Module) -> Hashable:
    """Return what whole blocks are proven by: the fingerprint of the module and of all around its attention."""
    attention = getattr(family.block(module), "attention", None)
    inside = set() if attention is None else set(attention.modules())
    parts = [(path, part) for path, part in module.named_modules() if part not in inside]
    return "block", family.name, fingerprint(parts, (getattr(family, "block_method", family.method),))
