"""What users do to a model, and how they call one: tables of functions that do the very same to any two alike.

An edit takes a model and a number by which it chooses among places and values, and changes the model in place, or
returns another one. A way calls a model on inputs and gives output and gradients.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import helpers
import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.utils.checkpoint import checkpoint

import swinaccel

EDITS: dict[str, Callable[[nn.Module, int], Any]] = {}
WAYS: dict[str, Callable[[nn.Module, tuple[Any, ...]], Any]] = {}
SCOPES: set[str] = set()  # ways that concern swinaccel


def edit(function: Callable) -> Callable:
    EDITS[function.__name__] = function
    return function


def way(function: Callable) -> Callable:
    WAYS[function.__name__] = function
    return function


def scope(function: Callable) -> Callable:
    SCOPES.add(function.__name__)
    return way(function)


# Choosing. Two models that are alike have the same names in the same order.


def places(model: nn.Module, suits: Callable[[str, nn.Module], bool]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return (parent, name, module) of all children that suit."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if suits(name, child)
    ]


def chosen(found: list, number: int) -> Any:
    return found[number % len(found)] if found else None


def of_type(*types: type) -> Callable[[str, nn.Module], bool]:
    return lambda name, module: isinstance(module, types)


def replace(model: nn.Module, number: int, suits: Callable, make: Callable[[nn.Module], nn.Module]) -> None:
    place = chosen(places(model, suits), number)
    if place is not None:
        parent, name, child = place
        made = make(child)
        made.train(child.training)
        parent._modules[name] = made


def numbers(like: Tensor, number: int) -> Tensor:
    """Random numbers of a tensor's form, the same for all tensors of that form."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)


def parameter(model: nn.Module, number: int) -> tuple[nn.Module, str, nn.Parameter]:
    found = [
        (owner, name, one) for owner in model.modules() for name, one in owner._parameters.items() if one is not None
    ]
    return chosen(found, number)


def buffer(model: nn.Module, number: int, floating: bool) -> tuple[nn.Module, str, Tensor] | None:
    found = [
        (owner, name, one)
        for owner in model.modules()
        for name, one in owner._buffers.items()
        if one is not None and one.is_floating_point() == floating
    ]
    return chosen(found, number)


# Modes, dtypes, state dicts.


@edit
def train(model, number):
    model.train()


@edit
def evaluate(model, number):
    model.eval()


@edit
def train_a_part(model, number):
    chosen(list(model.modules()), number).train(number % 2 == 0)


def _noisy(model: nn.Module, number: int) -> dict[str, Tensor]:
    return {
        name: one + 0.3 * numbers(one, number + place)
        if one.is_floating_point() and "mask" not in name
        else one.clone()
        for place, (name, one) in enumerate(model.state_dict().items())
    }


@edit
def load(model, number):
    model.load_state_dict(_noisy(model, number))


@edit
def load_by_assigning(model, number):
    model.load_state_dict(_noisy(model, number), assign=True)


@edit
def half(model, number):
    model.half()


@edit
def bfloat16(model, number):
    model.bfloat16()


@edit
def double(model, number):
    model.double()


@edit
def single(model, number):
    model.float()


@edit
def one_part_double_and_back(model, number):
    chosen(list(model.modules()), number).double()
    model.float()


@edit
def channels_last(model, number):
    if not any(one.dim() == 5 for one in model.parameters()):
        model.to(memory_format=torch.channels_last)


# Parameters and buffers.


@edit
def data_copied(model, number):
    _, _, one = parameter(model, number)
    one.data.copy_(numbers(one, number))


@edit
def data_replaced(model, number):
    _, _, one = parameter(model, number)
    one.data = numbers(one, number)


@edit
def data_scaled(model, number):
    _, _, one = parameter(model, number)
    one.data *= 1.5


@edit
def in_place(model, number):
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(1.05)


@edit
def parameter_replaced(model, number):
    owner, name, one = parameter(model, number)
    setattr(owner, name, nn.Parameter(numbers(one, number)))


@edit
def parameter_transposed_in_memory(model, number):
    _, _, one = parameter(model, number)
    if one.dim() == 2:
        one.data = one.data.t().contiguous().t()


@edit
def bias_removed(model, number):
    place = chosen(places(model, of_type(nn.Linear)), number)
    if place is not None and place[2].bias is not None:
        place[2].bias = None


@edit
def frozen(model, number):
    for place, one in enumerate(model.parameters()):
        one.requires_grad_((number >> place % 8) & 1 == 0)


@edit
def unfrozen(model, number):
    model.requires_grad_()


@edit
def mask_edited(model, number):
    found = buffer(model, number, True)
    if found is not None and "mask" in found[1]:
        owner, name, one = found
        change = number % 4
        if change == 0:
            owner._buffers[name] = None
        elif change == 1:
            one.mul_(0.5)
        elif change == 2:
            setattr(owner, name, one + 0.5 * numbers(one, number))
        else:
            one.data = torch.zeros_like(one)


@edit
def index_permuted(model, number):
    found = buffer(model, number, False)
    if found is not None and "index" in found[1]:
        owner, name, one = found
        if number % 2:
            setattr(owner, name, one.flip(-1).contiguous())
        else:
            one.copy_(one.flip(0))


@edit
def table_of_one_column(model, number):
    found = [one for one in model.modules() if "relative_position_bias_table" in one._parameters]
    owner = chosen(found, number)
    if owner is not None:
        owner.relative_position_bias_table = nn.Parameter(numbers(owner.relative_position_bias_table[:, :1], number))


@edit
def logit_scale_of_one(model, number):
    owner = chosen([one for one in model.modules() if "logit_scale" in one._parameters], number)
    if owner is not None:
        owner.logit_scale = nn.Parameter(owner.logit_scale.detach().flatten()[:1].view(1, 1, 1).clone())


@edit
def not_a_number(model, number):
    _, _, one = parameter(model, number)
    one.data.view(-1)[number % one.numel()] = (math.nan, math.inf, -math.inf)[number % 3]


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


# Ways to call.


def total(out: Any) -> Tensor:
    """A sum of all that a model gives, with other weights at each place."""
    found = [one for one in helpers.tensors(out) if one.is_floating_point()]
    return sum(
        (one.double() * torch.arange(one.numel(), device=one.device).cos().view(one.shape)).sum() for one in found
    )


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    for one in model.parameters():
        one.grad = None
    if loss.requires_grad:
        loss.backward()
    return {name: one.grad for name, one in model.named_parameters()}


@way
def without_gradients(model, args):
    with torch.no_grad():
        return model(*args)


@way
def in_inference_mode(model, args):
    with torch.inference_mode():
        return model(*args)


@way
def with_gradients(model, args):
    out = model(*args)
    return out, _gradients(model, total(out))


@way
def with_gradients_of_the_input(model, args):
    x = args[0].clone().requires_grad_()
    out = model(x, *args[1:])
    grads = _gradients(model, total(out))
    return out, grads, x.grad


@way
def twice_before_a_backward(model, args):
    first, second = model(*args), model(*args)
    return first, _gradients(model, total(first) + 2 * total(second))


@way
def under_autocast(model, args):
    with torch.autocast(args[0].device.type, torch.bfloat16), torch.no_grad():
        return model(*args)


@way
def checkpointed(model, args):
    out = checkpoint(model, *args, use_reentrant=False)
    return out, _gradients(model, total(out))


@way
def by_functional_call(model, args):
    changed = {name: 1.1 * one.detach() for name, one in model.named_parameters()}
    with torch.no_grad():
        return torch.func.functional_call(model, changed, args)


@way
def by_function_transform(model, args):
    values = {name: one.detach() for name, one in model.named_parameters()}
    if len({id(one) for one in model.parameters()}) < len(values):
        return None
    return torch.func.grad(lambda values: total(torch.func.functional_call(model, values, args)))(values)


@way
def in_a_thread(model, args):
    return _threads(model, args, 1)


@way
def in_threads_at_once(model, args):
    return _threads(model, args, 3)


def _threads(model: nn.Module, args: tuple[Any, ...], count: int) -> list[Any]:
    found: list[Any] = [None] * count

    def run(place: int) -> None:
        found[place] = _try(lambda: without_gradients(model, args))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found


def _try(function: Callable) -> Any:
    try:
        return function()
    except Exception as error:
        return error


@way
def after_a_failure(model, args):
    """A call that a hook breaks off in the middle, and then another one."""
    handle = list(model.modules())[-1].register_forward_pre_hook(_fail)
    with contextlib.suppress(ArithmeticError):
        without_gradients(model, args)
    handle.remove()
    return without_gradients(model, args)


@way
def with_hooks_of_all_modules(model, args):
    handle = every_module.register_module_forward_hook(_shift_output)
    try:
        return without_gradients(model, args)
    finally:
        handle.remove()


def _patched(name: str, cls: type) -> Callable:
    """A way to call while the forward of a class is another one."""

    def call(model: nn.Module, args: tuple[Any, ...]) -> Any:
        own = cls.__dict__["forward"]

        def forward(self: Any, *args: Any) -> Any:
            return 0.75 * own(self, *args)

        cls.forward = functools.wraps(own)(forward)
        try:
            return without_gradients(model, args)
        finally:
            cls.forward = own

    call.__name__ = f"with_a_patched_{name}"
    return way(call)


for _name, _cls in (("linear", nn.Linear), ("norm", nn.LayerNorm), ("softmax", nn.Softmax), ("gelu", nn.GELU)):
    _patched(_name, _cls)


# Ways that concern swinaccel; a twin that knows nothing of it is called without.


@scope
def where_disabled(model, args):
    with swinaccel.disabled():
        return without_gradients(model, args)


@scope
def in_a_scope(model, args):
    with swinaccel.accelerated(model, backend="torch") as fast:
        return without_gradients(fast, args)


@scope
def in_scopes_that_fail(model, args):
    with contextlib.suppress(ArithmeticError), swinaccel.accelerated(model, backend="torch", fuse="attention"):
        without_gradients(model, args)
        with swinaccel.disabled(), swinaccel.accelerated(model, backend="triton"):
            raise ArithmeticError
    return without_gradients(model, args)


# Optimizers: each makes a step and gives what comes after it.


def _stepping(name: str, make: Callable) -> Callable:
    def call(model: nn.Module, args: tuple[Any, ...]) -> Any:
        wanted = [one for one in model.parameters() if one.requires_grad]
        if not wanted:
            return None
        optimizer = make(wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grads = _gradients(model, total(model(*args)))
        optimizer.step()
        return grads, without_gradients(model, args)

    call.__name__ = f"after_a_step_of_{name}"
    return way(call)


_stepping("sgd", lambda wanted: torch.optim.SGD(wanted, 1e-3, foreach=True))
_stepping("adamw", lambda wanted: torch.optim.AdamW(wanted, 1e-3, fused=True))
_stepping("adam", lambda wanted: torch.optim.Adam(wanted, 1e-3, foreach=True))
