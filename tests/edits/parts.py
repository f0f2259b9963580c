"""Edits of submodules, hooks, forwards and attributes, and copies."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edits.tables import chosen, edit, numbers, of_type, places, replace

# Submodules.


class LowRank(nn.Module):
    """A linear layer with a low-rank addition, as adapters wrap one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        with torch.no_grad():
            for one in (self.down.weight, self.up.weight):
                one.copy_(0.3 * numbers(one, 1))
        self.to(base.weight)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Transparent(nn.Module):
    """Passes calls and attributes on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@edit
def adapter(model, number):
    replace(model, number, lambda name, one: type(one) is nn.Linear, LowRank)


@edit
def linear_subclass(model, number):
    place = chosen(places(model, lambda name, one: type(one) is nn.Linear), number)
    if place is not None:
        place[2].__class__ = Doubled


@edit
def new_linear(model, number):
    def make(one: nn.Linear) -> nn.Linear:
        made = copy.deepcopy(one)
        made.weight.data = numbers(made.weight, number)
        return made

    replace(model, number, lambda name, one: type(one) is nn.Linear, make)


@edit
def dropout_to_identity(model, number):
    replace(model, number, of_type(nn.Dropout), lambda one: nn.Identity())


@edit
def norm_to_identity(model, number):
    replace(model, number, of_type(nn.LayerNorm), lambda one: nn.Identity())


@edit
def norm_in_a_sequence(model, number):
    replace(model, number, of_type(nn.LayerNorm), lambda one: nn.Sequential(one, nn.Tanh()))


@edit
def other_activation(model, number):
    replace(model, number, of_type(nn.GELU), lambda one: (nn.ReLU, nn.SiLU, nn.Tanh)[number % 3]())


@edit
def tanh_gelu(model, number):
    place = chosen(places(model, of_type(nn.GELU)), number)
    if place is not None:
        place[2].approximate = "tanh"


@edit
def softmax_at_half_the_heat(model, number):
    replace(model, number, of_type(nn.Softmax), lambda one: Hot(dim=-1))


class Hot(nn.Softmax):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(0.5 * x)


@edit
def proxy(model, number):
    replace(model, number, _is_attention, Transparent)


def _is_attention(name: str, module: nn.Module) -> bool:
    return name in ("attn", "attention", "blocks", "0", "1") and not isinstance(module, (nn.Linear, nn.Conv2d))


# Hooks.


def _shift_output(module: nn.Module, args: Any, out: Any) -> Any:
    return out + 0.25 if isinstance(out, Tensor) else None


def _scale_input(module: nn.Module, args: Any) -> Any:
    return tuple(1.5 * one if isinstance(one, Tensor) and one.is_floating_point() else one for one in args)


def _scale_gradient(module: nn.Module, grads: Any, _: Any) -> Any:
    return tuple(one if one is None else 3.0 * one for one in grads)


def _fail(module: nn.Module, args: Any) -> None:
    raise ArithmeticError("a hook has had enough")


@edit
def forward_hook(model, number):
    chosen(list(model.modules()), number).register_forward_hook(_shift_output)


@edit
def forward_pre_hook(model, number):
    chosen(list(model.modules()), number).register_forward_pre_hook(_scale_input)


@edit
def backward_hook(model, number):
    chosen(list(model.modules()), number).register_full_backward_hook(_scale_gradient)


@edit
def failing_hook(model, number):
    chosen(list(model.modules()), number).register_forward_pre_hook(_fail)


@edit
def no_hooks(model, number):
    for one in model.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(one, name).clear()


# Forwards of instances.


def _halved(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    out = forward(*args, **kwargs)
    return 0.5 * out if isinstance(out, Tensor) else out


class Halved:
    """A callable object in a forward's place, as offloading makes them."""

    def __init__(self, forward: Callable) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _halved(self.forward, *args, **kwargs)


def _own(module: nn.Module) -> Callable:
    """The forward of its class, for this very instance, also after it was copied."""
    return functools.partial(type(module).forward, module)


@edit
def forward_by_function(model, number):
    one = chosen(list(model.modules())[1:], number)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _halved(_own(one), *args, **kwargs)

    one.forward = forward


@edit
def forward_by_partial(model, number):
    one = chosen(list(model.modules())[1:], number)
    one.forward = functools.partial(_halved, _own(one))


@edit
def forward_by_object(model, number):
    one = chosen(list(model.modules())[1:], number)
    one.forward = Halved(_own(one))


@edit
def own_forwards(model, number):
    for one in model.modules():
        one.__dict__.pop("forward", None)


# Attributes.


def _attribute(model: nn.Module, number: int, *names: str) -> tuple[nn.Module, str] | None:
    return chosen([(one, name) for one in model.modules() for name in names if name in one.__dict__], number)


@edit
def scale(model, number):
    found = _attribute(model, number, "scale", "scaling")
    if found is not None:
        setattr(*found, (0.5, 0.125, 1, 2.0)[number % 4])


@edit
def fused_attention(model, number):
    for one in model.modules():
        if "fused_attn" in one.__dict__:
            one.fused_attn = not one.fused_attn


@edit
def shift(model, number):
    found = _attribute(model, number, "shift_size")
    if found is not None:
        owner, name = found
        old, step = getattr(owner, name), number % 4
        setattr(owner, name, step if isinstance(old, int) else type(old)(step for _ in old))


@edit
def drop_paths(model, number):
    for one in model.modules():
        for name in ("drop_prob", "p"):
            if name in one.__dict__ and not isinstance(one, nn.Dropout):
                setattr(one, name, (0.0, 0.5)[number % 2])


@edit
def dropouts(model, number):
    place = chosen(places(model, of_type(nn.Dropout)), number)
    if place is not None:
        place[2].p = (0.0, 0.5)[number % 2]


@edit
def epsilon(model, number):
    place = chosen(places(model, of_type(nn.LayerNorm)), number)
    if place is not None:
        place[2].eps = (1e-5, 0.5)[number % 2]


@edit
def input_size(model, number):
    """timm's way to resize; others take what they are given."""
    if hasattr(model, "set_input_size"):
        size = (32, 48, 40)[number % 3]
        resize(model, img_size=(size, size))


@edit
def window_size(model, number):
    if hasattr(model, "set_input_size"):
        resize(model, img_size=(32, 32), window_size=(2, 4)[number % 2])


def resize(model, **sizes):
    """timm resizes tables by arithmetic between them and tensors on the CPU, and so fails on a GPU."""
    device = next(model.parameters()).device
    model.cpu().set_input_size(**sizes)
    model.to(device)


# Copies.


@edit
def deep_copy(model, number):
    return copy.deepcopy(model)


@edit
def shallow_copy(model, number):
    return copy.copy(model)


@edit
def pickled(model, number):
    try:
        return pickle.loads(pickle.dumps(model))
    except (pickle.PicklingError, AttributeError, TypeError):  # hooks and forwards of a test
        return model


@edit
def saved(model, number):
    file = io.BytesIO()
    try:
        torch.save(model, file)
    except (pickle.PicklingError, AttributeError, TypeError):
        return model
    file.seek(0)
    return torch.load(file, weights_only=False)
