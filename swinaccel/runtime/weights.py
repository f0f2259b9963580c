"""Return attention weights lazily: they are computed when they are read, and not before.

Some code returns the weights beside the output, and its callers hardly ever read them. `LazyTensor` stands for such a
tensor: shape, dtype and device are known, and any other access computes the numbers first, from copies of what may
change after the call.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..errors import KernelError
from ..spec.reference import section_weights
from ..spec.window import Section
from .context import has_dispatch_mode
from .section import plain_layer

# Answered without the numbers.
_METADATA = {
    getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point}
# What collects the weights of several blocks is put off, too.
_DEFERRABLE = {torch.unsqueeze, Tensor.unsqueeze, torch.cat, torch.stack, torch.mean, Tensor.mean}


class LazyTensor(Tensor):
    """A tensor whose numbers are computed when they are asked for.

    Attributes:
        family: all that were made of each other; they are computed together, before anything may write to one of them.
    """

    _compute: Callable[[], Tensor]
    _value: Tensor | None
    _is_inference: bool
    family: list[weakref.ref[LazyTensor]]

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, compute: Callable[[], Tensor]) -> LazyTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        made._compute, made._value, made.family = compute, None, []
        made._is_inference = torch.is_inference_mode_enabled()
        made.family.append(weakref.ref(made))
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of PyTorch's that was given one of these."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **(kwargs or {}))
            if func in _DEFERRABLE and not torch.is_grad_enabled() and not torch._C._is_any_autocast_enabled():
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

    def read(self) -> Tensor:
        """Return the numbers."""
        if self._value is None:
            mode = torch.inference_mode(self._is_inference)  # that of the call
            with mode, torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                value = self._compute()
            if (value.shape, value.dtype, value.device) != (self.shape, self.dtype, self.device):
                raise RuntimeError("swinaccel: attention weights came out in another shape or dtype than was expected")
            self._value, self._compute = value, self.read
        return self._value


def _with_numbers(tree: Any) -> Any:
    """Return arguments with numbers in the place of what is computed later."""
    found: list[LazyTensor] = []
    tree_map_only(LazyTensor, found.append, tree)
    for one in found:
        for reference in one.family:
            if (other := reference()) is not None:
                other.read()
    return tree_map_only(LazyTensor, LazyTensor.read, tree)


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
        numbers = tree_map_only(LazyTensor, LazyTensor.read, (args, kwargs))
        return func(*numbers[0], **numbers[1])

    made = LazyTensor(like, found[0].device, compute)
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
    if torch.is_grad_enabled():
        return "it returns its attention weights, which record gradients; call it inside torch.no_grad() to accelerate"
    if torch.is_autocast_enabled(x.device.type) or has_dispatch_mode():
        return "it returns its attention weights, and autocast or another mode decides how they are computed"
    return None


def refuse_capture(x: Tensor) -> None:
    """Raise KernelError inside a capture, whose replays would not compute the weights of a call anew."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise KernelError("it returns its attention weights, which nobody could read after a CUDA graph has run")


def lazy_weights(section: Section, image: Tensor, x: Tensor) -> Tensor:
    """Return the weights of a call, to be computed when they are read, from copies of all that may change until then.

    Args:
        section: whose projection is plain, as `weights_reason` demands.
        image: what the section was given.
        x: what the call was given.
    """
    if image.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        image = image.clone()  # the caller may write to it
    frozen = _detached_copy(section)
    geometry = section.geometry
    tokens, windows = geometry.tokens, image.shape[0] * geometry.num_windows
    dtype = image.dtype
    for one in (*section.sources, *(() if section.mask is None else (section.mask,))):
        dtype = torch.promote_types(dtype, one.dtype)
    like = torch.empty(windows, section.num_heads, tokens, tokens, dtype=dtype, device="meta")
    return LazyTensor(like, image.device, lambda: section_weights(frozen, image))


def _detached_copy(section: Section) -> Section:
    """Return a section of copies, which takes a hundredth of the time that its products take."""

    def copied(one: Tensor | None) -> Tensor | None:
        return None if one is None else one.detach().clone()

    weight, bias = map(copied, plain_layer(section.project) or ())
    table = None if section.table is None else copied(section.table())
    padding = None if section.padding is None else copied(section.padding())
    return dataclasses.replace(
        section,
        project=lambda image: F.linear(image, weight, bias),  # type: ignore[arg-type]
        table=None if table is None else lambda: table,
        padding=None if section.padding is None else lambda: padding,
        index=copied(section.index),
        mask=copied(section.mask),
        logit_scale=copied(section.logit_scale),
    )
