"""Capture one call of a module together with its backward.

Loss, clipping and optimizer stay outside, and so do the parameters' own gradients: a backward hands out copies.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ...layers import PLAIN_TENSORS
from ...ops.window import is_batched
from ..guard import Guard
from ..plan import known_states
from ..weights import settled, with_numbers
from .capture import CHANGES, RUNS, Capture, NotCapturable, Run
from .rehearsal import differentiable, drawing_apart, set_random_state, states_kept, twin_of

_PATIENCE = 1.0  # seconds that a backward waits for another thread
_CHECKPOINTS = ("gradient_checkpointing", "grad_checkpointing", "use_checkpoint", "with_cp")  # settings of models


class TrainingCapture(Capture):
    """One kind of call of a module, captured with its backward.

    What the forward leaves for the backward lies in memory of the graphs, so one call at a time has a backward that can
    be a replay. Others run the module again: a backward after the forward of a later call, and one that is to be
    differentiated itself.
    """

    _shares_memory = False  # other graphs may be replayed between a forward and its backward

    def _check(self) -> None:
        if any(getattr(part, name, False) is True for part in self._modules for name in _CHECKPOINTS):
            raise NotCapturable("it checkpoints, and computes in its backward what a graph would keep")

    def _capture(self, run: Run, inputs: list[Tensor]) -> Any:
        root = self._modules[0]
        twin, parameters = self._copied(root)
        guard, places = Guard(twin.modules()), [one.data_ptr() for one in twin.parameters()]
        given = [own.detach().requires_grad_(one.requires_grad) for own, one in zip(self._inputs, inputs, strict=True)]
        sources = [*given, *parameters.values()]
        wanted = [place for place, one in enumerate(sources) if one.requires_grad]

        def forward() -> tuple[Any, list[Tensor]]:
            output = with_numbers(settled(run, twin, given))
            return output, differentiable(output)

        def backward(outs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor | None, ...]:
            # All that the forward left is kept: a backward may come twice.
            asked = [sources[place] for place in wanted]
            return torch.autograd.grad(outs, asked, grads, retain_graph=True, allow_unused=True)

        def both() -> None:
            outs = forward()[1]
            if not outs:
                raise NotCapturable("nothing that it returns has a gradient")
            backward(outs, list(map(torch.ones_like, outs)))

        saved: set[int] = set()

        def note(one: Tensor) -> Tensor:
            if type(one) in PLAIN_TENSORS:
                saved.add(one.untyped_storage().data_ptr())
            return one

        def noting() -> None:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda one: one):
                both()

        self._warm_up(noting, twin, guard)
        self._forward, (output, self._differentiable) = self._engine.capture(forward)
        if not _leaves_of(self._differentiable) <= set(map(id, sources)):
            raise NotCapturable("its code reads parameters through something else than the modules inside")
        self._given_grads = list(map(torch.zeros_like, self._differentiable))
        self._backward, grads = self._engine.capture(lambda: backward(self._differentiable, self._given_grads))
        if [one.data_ptr() for one in twin.parameters()] != places:
            raise NotCapturable(CHANGES)
        for one, other in zip(self._modules, twin.modules(), strict=True):
            for state, counted in zip(known_states([one]), known_states([other]), strict=False):
                self._calls.append((state, counted.calls // RUNS, counted.fallbacks // RUNS))
        found = dict(zip(wanted, grads, strict=True))
        # A parameter that takes no part has no gradient, which DDP must see.
        used = [place for place in range(len(sources)) if place < len(given) or found.get(place) is not None]
        own = list(parameters)
        self._parameters = [own[place - len(given)] for place in used[len(given) :]]
        self._grads = [found.get(place) for place in used]
        others = [one for one in self._tensors if not any(one is other for other in self._parameters)]
        self.read_by_backward = [one for one in others if one.untyped_storage().data_ptr() in saved]
        self._run, self._turn = run, weakref.ref(_Turn())
        return output

    def _copied(self, root: nn.Module) -> tuple[nn.Module, dict[Tensor, Tensor]]:
        try:
            return twin_of(root, self._tensors)
        except Exception as error:
            raise NotCapturable(f"it cannot be copied ({type(error).__name__})") from None

    def _layouts_now(self) -> list[tuple[Any, ...]]:
        return [(*layout, one.requires_grad) for one, layout in zip(self._tensors, super()._layouts_now(), strict=True)]

    def is_free(self) -> bool:
        """Return True if no backward is to come that needs what the latest forward has left."""
        turn = self._turn()
        return turn is None or turn.is_over

    def replay(self, inputs: list[Tensor]) -> Any:
        """Return what the call returns for other inputs, with its gradients."""
        return self._formed(_Replayed.apply(self, *inputs, *self._parameters))

    def begin(self, given: tuple[Tensor, ...]) -> tuple[list[Tensor], _Turn]:
        """Return copies of the tensors that the call returns, and what its backward is asked for by.

        Args:
            given: inputs and parameters.
        """
        turn, kind = _Turn(), self._device.type
        turn.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        with self._engine.lock:
            self._turn = weakref.ref(turn)
            outputs = self.forward(list(given[: len(self._inputs)]))
            turn.random_state = self._drawn_from
        return outputs, turn

    def backward(self, turn: _Turn, given: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """Return the gradients of inputs and parameters.

        Args:
            turn: of the forward.
            given: inputs and parameters, as they were then.
            grads: of the forward's outputs.
        """
        if not self.lies():
            raise _changed()
        turn.is_over, engine = True, self._engine
        if torch.is_grad_enabled() or any(one is not None and is_batched(one) for one in grads):
            return self._run_again(turn, given, grads)
        # Who holds the lock for long is capturing, and may wait for this very thread to run a backward.
        if not engine.lock.acquire(timeout=_PATIENCE):
            return self._run_again(turn, given, grads)
        try:
            is_latest = self._turn() is turn
            if is_latest:
                copies = self._replayed_backward(grads)
        finally:
            engine.lock.release()
        if not is_latest:
            return self._run_again(turn, given, grads)
        rest = iter(copies)
        return [None if one is None else next(rest) for one in self._grads]

    def _replayed_backward(self, grads: tuple[Tensor | None, ...]) -> list[Tensor]:
        """Return copies of the gradients that a replay computes."""
        engine = self._engine
        engine.start()
        for own, one in zip(self._given_grads, self._selected(grads), strict=True):
            if one is None:
                own.zero_()
            else:
                own.copy_(one)
        self._backward()
        # Copies, each of which may become a parameter's `grad` and be added to: the next replay writes its own.
        kept = [one for one in self._grads if one is not None]
        copies = list(map(torch.empty_like, kept))
        torch._foreach_copy_(copies, kept)  # in few kernels
        engine.finish()
        return copies

    def _run_again(
        self, turn: _Turn, given: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]
    ) -> list[Tensor | None]:
        """Return the gradients of a forward by running it anew, as it was; they have gradients themselves."""
        if not self._guard.holds() or self._layouts_now() != self._layouts:
            raise _changed()
        kind, count, creates = self._device.type, len(self._inputs), torch.is_grad_enabled()
        kept = [one.detach().clone() for one in self._statistics]
        with (
            states_kept(self._modules[0]),
            drawing_apart(self._device),
            torch.enable_grad(),
            torch.autocast(kind, turn.autocast, enabled=turn.autocast is not None),
        ):
            if turn.random_state is not None:
                set_random_state(self._device, turn.random_state)
            inputs = [one if creates else one.detach().requires_grad_(one.requires_grad) for one in given[:count]]
            outs = differentiable(self._run(self._modules[0], inputs))
        for one, then in zip(self._statistics, kept, strict=True):
            one.data.copy_(then)
        pairs = [(out, grad) for out, grad in zip(outs, self._selected(grads), strict=True) if grad is not None]
        sources = [*inputs, *given[count:]]
        wanted = [place for place, one in enumerate(sources) if one.requires_grad]
        found = torch.autograd.grad(
            [out for out, _ in pairs],
            [sources[place] for place in wanted],
            [grad for _, grad in pairs],
            create_graph=creates,
            allow_unused=True,
        )
        by_place = dict(zip(wanted, found, strict=True))
        return list(map(by_place.get, range(len(sources))))

    def is_differentiable(self) -> list[bool]:
        """Return for each output whether it has a gradient."""
        return [any(one is other for other in self._differentiable) for one in self._outputs]

    def _selected(self, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """Return the gradients of those outputs that have one, in the order in which they were captured."""
        places = {id(one): place for place, one in enumerate(self._outputs)}
        return [grads[places[id(one)]] for one in self._differentiable]


class _Turn:
    """One forward, for as long as its backward may come.

    Attributes:
        is_over: its backward has come.
        autocast: dtype, or None where it was off.
        random_state: before it, of modules that draw.
    """

    __slots__ = ("__weakref__", "autocast", "is_over", "random_state")

    def __init__(self) -> None:
        self.is_over = False
        self.autocast: torch.dtype | None = None
        self.random_state: Tensor | None = None


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, capture: TrainingCapture, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        # Their versions are compared when the backward reads them.
        ctx.save_for_backward(*given, *capture.read_by_backward)
        outputs, ctx.turn = capture.begin(given)
        ctx.capture = capture
        ctx.mark_non_differentiable(
            *(one for one, has_grad in zip(outputs, capture.is_differentiable(), strict=True) if not has_grad)
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        given = ctx.saved_tensors[: len(ctx.needs_input_grad) - 1]
        return None, *ctx.capture.backward(ctx.turn, given, grads)


def _changed() -> RuntimeError:
    return RuntimeError(
        "swinaccel: parameters were replaced, or the model was changed, between a forward and its backward, which CUDA"
        " graphs cannot follow; do it before the forward, or use graphs='auto'"
    )


def _leaves_of(outputs: list[Tensor]) -> set[int]:
    """Return the ids of all tensors whose gradients a backward from outputs would add up."""
    waiting: list[Any] = [one.grad_fn for one in outputs]
    seen, found = set(waiting), {id(one) for one in outputs if one.grad_fn is None}
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        for other, _ in () if node is None else node.next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                waiting.append(other)
    return found
