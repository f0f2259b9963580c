"""Plans of calls, and what is known of one accelerated module: its counts, and its plans while their guard holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..ops.failures import failures
from ..trust.registry import registry
from .guard import Guard, same_tensors

if TYPE_CHECKING:
    from .graphs.replay import Graphs
    from .precision import Precision

_MOST_PLANS = 16  # of one module; sizes that never come back
_MOST_GUARDS = 8  # guards to be made of a module that keeps changing, before one has paid for itself


class Plan:
    """A way to run one kind of call, for as long as its module's guard holds and so does this.

    Attributes:
        run: the call.
        mask_of: finds the mask of a block's call, which `run` is then given, or None.
        is_reusable: all that it takes from a call's arguments is in the call's key, or read anew at each call.
        problem: what failures of the attention's kernels are kept under, or None.
        counted: whose call it is, in the report, where that is not the module itself.
        failures: how many kernels had failed when this was made.
    """

    __slots__ = (
        "_fits", "_index", "_tensors", "_version", "counted", "failures", "is_reusable", "mask_of", "problem", "run",
    )  # fmt: skip

    def __init__(
        self,
        run: Callable[..., Any],
        problem: tuple | None,
        guard: Guard | None,
        index: Tensor | None = None,
        counted: State | None = None,
        mask_of: Callable[..., Any] | None = None,
        is_reusable: bool = True,
    ) -> None:
        self.is_reusable = is_reusable
        self.run, self.problem, self.counted, self.mask_of = run, problem, counted, mask_of
        self.failures, self._index = failures.count, index
        self._version = _version(index)
        self._tensors = [] if guard is None else guard.tensors()
        self._fits = same_tensors(self._tensors)

    def holds(self) -> bool:
        """Return True if tensors are laid out as they were, no kernel failed, and the bias index holds what it did."""
        return (
            self.failures == failures.count
            and self._fits(*self._tensors)
            and (self._index is None or _version(self._index) == self._version)
        )


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version


class PlanCache:
    """Plans of a module's calls and the facts behind them, of its attention or of the whole block, while a guard holds.

    Attributes:
        guard: None where the module cannot be guarded, or keeps changing: each call is planned anew then.
        facts: what calls are planned from, or one sentence why the original must run.
        plans: of calls, by their keys.
    """

    __slots__ = ("_guards_left", "_proof_count", "facts", "guard", "plans")

    def __init__(self) -> None:
        self.guard: Guard | None = None
        self.facts: Any = None
        self.plans: dict[tuple, Plan] = {}
        self._guards_left = _MOST_GUARDS
        self._proof_count = 0

    def holds(self, module: nn.Module) -> bool:
        """Return True if the facts are still those of this module."""
        guard = self.guard
        if guard is None or (isinstance(self.facts, str) and self._proof_count != registry.count):
            return False
        root = guard.modules[0]
        if root.__dict__ is not module.__dict__ or type(root) is not type(module) or not guard.holds():
            return False
        self._guards_left = _MOST_GUARDS
        return True

    def renew(self, facts: Any, make_guard: Callable[[], Guard | None]) -> None:
        """Take new facts, and a new guard for them, unless the module keeps changing."""
        self.plans.clear()
        self.guard, self._proof_count = None, registry.count
        if self._guards_left:
            self._guards_left -= 1
            self.guard = make_guard()
        self.facts = None if self.guard is None else facts  # else they might keep the module alive for ever

    def find(self, module: nn.Module, key: tuple | None) -> Plan | None:
        """Return the plan of a call, if it and the facts still hold."""
        found = None if key is None else self.plans.get(key)
        return found if found is not None and found.holds() and self.holds(module) else None

    def add(self, key: tuple | None, plan: Plan) -> None:
        """Add the plan of a call, for the next of its kind."""
        if self.guard is not None and key is not None and plan.is_reusable:
            if len(self.plans) >= _MOST_PLANS:
                self.plans.clear()
            self.plans[key] = plan


@dataclass(slots=True, eq=False)
class State:
    """One accelerated module.

    Attributes:
        calls, fallbacks: calls so far, and those of them that ran the original.
        reason: why the last of those did.
        unfused: why what is around the attention runs by itself, or None.
        bias: the form of the bias in use.
        graphs: of a model, its captured calls; None before the first.
        precision: of a block, what is known of its products of 8 bits; None where it was not asked for any.
    """

    calls: int = 0
    fallbacks: int = 0
    reason: str | None = None
    unfused: str | None = None
    bias: str | None = None
    attention: PlanCache = field(default_factory=PlanCache)
    block: PlanCache = field(default_factory=PlanCache)
    graphs: Graphs | None = None
    precision: Precision | None = None


_states: dict[int, tuple[weakref.ref[nn.Module], State]] = {}


def state_of(module: nn.Module) -> State:
    """Return the state of a module; it is not copied or pickled with the module, and does not keep it alive."""
    found = _states.get(id(module))
    if found is not None and found[0]() is module:
        return found[1]
    address, state, states = id(module), State(), _states

    def forget(reference: weakref.ref[nn.Module]) -> None:  # as Python ends as well, when globals may be gone
        if (known := states.get(address)) is not None and known[0] is reference:
            del states[address]

    _states[address] = weakref.ref(module, forget), state
    return state


def known_states(modules: Iterable[nn.Module]) -> list[State]:
    """Return the states of those of the modules that have one."""
    found = (_states.get(id(one), (None, None)) for one in modules)
    return [state for _, state in found if state is not None]


def forget_state(module: nn.Module) -> None:
    """Drop the state of a module."""
    _states.pop(id(module), None)
