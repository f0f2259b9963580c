"""Return attention weights lazily: they are computed when they are read, and not before.

Some code returns the weights beside the output, and its callers hardly ever read them. `LazyTensor` stands for such a
tensor: shape, dtype and device are known, and any other access computes the numbers first, from copies of what may
change after the call.

A replay of a CUDA graph computes what was captured, and nothing else. So what a call inside a capture has put off is
computed at its end, inside the capture too, where somebody still holds it; of what nobody holds nothing is captured.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..errors import KernelError
from ..ops.observed import count_modes
from ..spec.reference import section_weights
from ..spec.window import Section
from .section import plain_layer

# Answered without the numbers.
_METADATA = {
    getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point}
# Asked of the place that a tensor has in the graph of gradients.
_IN_GRAPH = {
    getattr(getattr(Tensor, name), kind)
    for name in ("grad", "grad_fn", "is_leaf", "output_nr", "retains_grad", "_backward_hooks")
    for kind in ("__get__", "__set__", "__delete__")
    if hasattr(getattr(Tensor, name), kind)
} | {Tensor.retain_grad, Tensor.register_hook, Tensor.backward, torch.autograd.grad, torch.autograd.backward}
# What collects the weights of several blocks is put off, too.
_DEFERRABLE = {torch.unsqueeze, Tensor.unsqueeze, torch.cat, torch.stack, torch.mean, Tensor.mean}


class Record:
    """State of weights that were put off while gradients were recorded.

    Attributes:
        weights: they, for as long as somebody may ask for them.
        mixed: what the graph of gradients has of the output that was made with them.
    """

    def __init__(self) -> None:
        self.weights: Callable[[], LazyTensor | None] = lambda: None
        self.mixed: Callable[[], Any] = lambda: None

    def keep(self) -> None:
        """Keep them while the output may be asked for its gradient, which goes through them from now on."""
        if (mixed := self.mixed()) is not None:
            mixed.weights = self.weights()


class LazyTensor(Tensor):
    """A tensor whose numbers are computed when they are asked for.

    Args:
        like: of its shape, strides and dtype.
        record: where it has a place of its own in the graph of gradients, and its numbers come in later.

    Attributes:
        family: all that were made of each other; they are computed together, before anything may write to one of them.
    """

    _compute: Callable[[], Tensor]
    _value: Tensor | None
    _is_inference: bool
    _is_recorded: bool
    _is_captured: bool
    record: Record | None
    family: list[weakref.ref[LazyTensor]]

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        device: torch.device,
        compute: Callable[[], Tensor],
        record: Record | None = None,
        requires_grad: bool = False,
    ) -> LazyTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device, requires_grad=requires_grad
        )
        made._compute, made._value, made.family, made.record = compute, None, [], record
        made._is_recorded = requires_grad
        made._is_inference = torch.is_inference_mode_enabled()
        made.family.append(weakref.ref(made))
        made._is_captured = is_settled_later()
        if made._is_captured:
            _captured.made.append(weakref.ref(made))
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of PyTorch's that was given one of these."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                one, *rest = args
                return func(one if one._value is None else one._value, *rest, **(kwargs or {}))
            if func in _IN_GRAPH:
                args, kwargs = tree_map_only(LazyTensor, LazyTensor._in_graph, (args, kwargs or {}))
                return func(*args, **kwargs)
            if func in _DEFERRABLE and not torch._C._is_any_autocast_enabled():
                made = _defer(func, args, kwargs or {})
                if made is not None:
                    return made
            args, kwargs = _with_numbers((args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run an operator, which other code than Python calls."""
        args, kwargs = _with_numbers((args, kwargs or {}))
        return func(*args, **kwargs)

    def _in_graph(self) -> Tensor:
        """Return what has the place of this in the graph of gradients."""
        if self.record is None:
            return self.read()
        self.record.keep()
        return self

    def lasts(self) -> bool:
        """Return True unless this is a tensor of before a capture, inside which numbers are there at replays only."""
        return self._is_captured or captured_stream() is None

    def read(self) -> Tensor:
        """Return the numbers."""
        if self._value is None:
            if self.record is not None:
                self.record.keep()
            mode = torch.inference_mode(self._is_inference)  # that of the call
            is_recorded = self.requires_grad
            with mode, torch.set_grad_enabled(is_recorded), torch.autocast(self.device.type, enabled=False):
                value = self._compute() if self._is_recorded or not is_recorded else Numbers.apply(self, self._compute)
            if (value.shape, value.dtype, value.device) != (self.shape, self.dtype, self.device):
                raise RuntimeError("swinaccel: attention weights came out in another shape or dtype than was expected")
            if not self.lasts():
                return value
            self._value, self._compute = value, self.read
        return self._value


class Numbers(torch.autograd.Function):
    """From weights that have a place in the graph of gradients to their numbers."""

    @staticmethod
    def forward(ctx: Any, weights: LazyTensor, compute: Callable[[], Tensor]) -> Tensor:
        return compute()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Captured(threading.local):
    """The outermost call that is captured in this thread.

    Attributes:
        stream: that was current when it began, or None where there is no such call.
        made: what it has put off.
    """

    stream: int | None = None
    made: list[weakref.ref[LazyTensor]]


_captured = _Captured()


def captured_stream() -> int | None:
    """Return the current stream, if it is captured, or None."""
    if not torch.cuda.is_initialized() or not torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream().cuda_stream


def is_settled_later() -> bool:
    """Return True if the end of a call around will compute, inside the same capture, what is put off now."""
    return _captured.stream is not None and captured_stream() == _captured.stream


def settled(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a call; inside a capture, also compute what it has put off and somebody may still read."""
    stream = captured_stream()
    if stream is None or _captured.stream is not None:
        return run(*args, **kwargs)
    _captured.stream, _captured.made = stream, []
    try:
        result = run(*args, **kwargs)
        _read(_captured.made)
    except BaseException:
        with suppress(Exception):  # the capture itself may have failed
            _read(_captured.made)
        raise
    finally:
        _captured.stream, _captured.made = None, []
    return result


def _read(references: list[weakref.ref[LazyTensor]]) -> None:
    for reference in references:
        if (one := reference()) is not None:
            one.read()


def with_numbers(tree: Any) -> Any:
    """Return an output, or arguments, with numbers in the place of what is computed later."""
    return tree_map_only(LazyTensor, LazyTensor.read, tree)


def _with_numbers(tree: Any) -> Any:
    """Return arguments with numbers in the place of what is computed later, after all that was made of the same."""
    found: list[LazyTensor] = []
    tree_map_only(LazyTensor, found.append, tree)
    for one in found:
        if one.lasts():
            _read(one.family)
    return with_numbers(tree)


_likes: dict[tuple, Tensor] = {}  # what functions give, by what they are given: to find that out takes their time


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments of a deferrable function, which are tensors, lists of tensors and settings, as one list."""
    leaves: list[Any] = []
    for name, one in (*enumerate(args), *kwargs.items()):
        leaves += (name, len(one), *one) if isinstance(one, (list, tuple)) else (name, one)
    return leaves


def _on_meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _defer(func: Any, args: Any, kwargs: Any) -> LazyTensor | None:
    """Return what a function gives, computed when it is asked for; None where it is given other tensors as well."""
    leaves = _leaves(args, kwargs)
    found: list[Any] = [one for one in leaves if isinstance(one, Tensor)]
    if not all(type(one) is LazyTensor and one._value is None for one in found):
        return None
    key = func, *((one.shape, one.stride(), one.dtype) if isinstance(one, Tensor) else one for one in leaves)
    like = _likes.get(key)
    if like is None:
        if len(_likes) > 256:
            _likes.clear()
        given = tree_map_only(LazyTensor, _on_meta, (args, kwargs))
        like = _likes[key] = func(*given[0], **given[1])

    def compute() -> Tensor:
        numbers = with_numbers((args, kwargs))
        return func(*numbers[0], **numbers[1])

    recorded = torch.is_grad_enabled() and any(one.requires_grad for one in found)
    made = LazyTensor(like, found[0].device, compute, requires_grad=recorded)
    alive = {id(one): one for other in (*found, made) for reference in other.family if (one := reference()) is not None}
    family = list(map(weakref.ref, alive.values()))
    for one in alive.values():
        one.family = family
    return made


def weights_reason(section: Section, x: Tensor) -> str | None:
    """Return why code that returns attention weights must compute them at once, or None."""
    if plain_layer(section.project) is None:
        return "it returns its attention weights, and its projection is more than a linear layer; merge what it adds"
    if section.dropout > 0:
        return "it returns its attention weights, which dropout changes at random now; call eval() to accelerate"
    if torch.is_autocast_enabled(x.device.type) or count_modes():
        return "it returns its attention weights, and autocast or another mode decides how they are computed"
    return None


def refuse_capture() -> None:
    """Raise KernelError inside a capture, unless the end of a call around tells which weights somebody still holds."""
    if captured_stream() is not None and not is_settled_later():
        raise KernelError("it returns its attention weights, and a CUDA graph is captured of less than the whole model")


def lazy_weights(section: Section, image: Tensor, x: Tensor) -> Tensor:
    """Return the weights of a call, to be computed when they are read, from copies of all that may change until then.

    Args:
        section: whose projection is plain, as `weights_reason` demands.
        image: what the section was given.
        x: what the call was given.
    """
    if image.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        image = image.clone()  # the caller may write to it
    frozen = detached_copy(section)
    return LazyTensor(weights_like(section, image), image.device, lambda: section_weights(frozen, image))


def weights_like(section: Section, image: Tensor) -> Tensor:
    """Return a tensor without memory like the weights of a section.

    Args:
        image: what the section is given, or what its projection makes of that.
    """
    geometry, dtype = section.geometry, image.dtype
    for one in (*section.sources, *(() if section.mask is None else (section.mask,))):
        dtype = torch.promote_types(dtype, one.dtype)
    windows, tokens = image.shape[0] * geometry.num_windows, geometry.tokens
    return torch.empty(windows, section.num_heads, tokens, tokens, dtype=dtype, device="meta")


def detached_copy(section: Section) -> Section:
    """Return a section of copies, which takes a hundredth of the time that its products take."""
    weight, bias = plain_layer(section.project) or (None, None)
    table = None if section.table is None else section.table()
    padding = None if section.padding is None else section.padding()
    kept = _copies([weight, bias, table, padding, section.index, section.mask, section.logit_scale])
    weight, bias, table, padding, index, mask, logit_scale = kept
    return dataclasses.replace(
        section,
        project=lambda image: F.linear(image, weight, bias),  # type: ignore[arg-type]
        table=None if section.table is None else lambda: table,  # type: ignore[arg-type, return-value]
        padding=None if section.padding is None else lambda: padding,
        index=index,
        mask=mask,
        logit_scale=logit_scale,
    )


def _copies(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Return copies, those of one dtype by one kernel."""
    given = [one.detach() for one in tensors if one is not None]
    copies = list(map(torch.empty_like, given))
    for dtype in {one.dtype for one in given}:
        places = [place for place, one in enumerate(given) if one.dtype is dtype]
        torch._foreach_copy_([copies[place] for place in places], [given[place] for place in places])
    rest = iter(copies)
    return [None if one is None else next(rest) for one in tensors]
