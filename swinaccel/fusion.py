"""A whole block: its attention with norms, residual sums and MLP around it in few kernels.

That a class of blocks is built as its family says is proven by `probe` before; here it is decided, at each call and
from live modules, whether these are plain enough to be stood in for. Where they are not, and where anything about
dtypes is not obviously the same, the answer is no, and the block runs its own forward around the attention alone.
"""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fusion_autograd as recorded
from . import fusion_ops, harmless
from .backends import torch_fusion
from .backends import triton_fusion as kernels
from .layout import Attend, Block, Embedding, Merging
from .watch import METHODS, Unwatchable, Watch, has_hooks, has_own_forward, is_own, is_pytorchs, own_method, twin

logger = logging.getLogger("swinaccel")

_PLAIN_TENSORS = (Tensor, nn.Parameter)
_HALVES = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALVES, torch.float32)
_OWN_FUNCTIONS = (torch._C._nn.linear, torch._C._nn.gelu, F.layer_norm if is_pytorchs(F.layer_norm) else None)

# What blocks and other modules around attention, and what they hold, were made up of when they were proven.
_trusted: set[tuple] = set()
_OWN_CONVOLUTION = nn.Conv2d._conv_forward if is_pytorchs(nn.Conv2d._conv_forward) else None  # what its forward calls
_failure: str | None = None  # why whole blocks run their own forwards from then on: a kernel did not compile or fit


def trust(module: nn.Module, facts: Block | Merging | Embedding) -> None:
    """Take a proven module, with its children by their names, for what it looks like; and others made alike."""
    for holder in (module, *(() if isinstance(facts, Merging) else facts.holders)):
        _trusted.add(_make_up(holder, facts))
    if isinstance(facts, Block):
        _trust_compiled(module, facts)
    elif isinstance(facts, Embedding) and harmless.is_of_library(module):
        _embedding_types.add(type(module))


def _make_up(holder: nn.Module, facts: Block | Merging | Embedding) -> tuple:
    """All that decides what a module does with its children; of one whose code is not known, settings as well."""
    drops = (type(facts.drop1), type(facts.drop2)) if isinstance(facts, Block) else ()
    cls = type(holder)
    kinds: tuple[type, ...] = METHODS
    if not harmless.is_of_library(holder):
        kinds = (object,)
    elif isinstance(facts, Embedding):
        kinds = (*METHODS, bool, float, str)  # its switches
    attributes = sorted(holder.__dict__.items())
    settings = tuple([(key, repr(one)) for key, one in attributes if key not in _LIVE and isinstance(one, kinds)])
    return cls, own_method(cls, "forward"), tuple(holder._modules), tuple(holder._buffers), drops, settings


# Settings that families read at each call, the marker of accelerated instances, and what every module has.
_LIVE = {"H", "W", "img_size", "input_resolution", "shift_size", "window_size", "_swinaccel", *nn.Module().__dict__}


def failure() -> str | None:
    """Why nothing around the attention is fused any more in this process, or None."""
    return _failure


def has_failures() -> bool:
    return _failure is not None


def forget_failures() -> None:
    """Try the kernels again."""
    global _failure
    _failure = None


def is_worth(x: Tensor, backend: str = "triton") -> bool:
    """Whether a block around x is worth more than its attention alone."""
    return backend != "torch" or torch_fusion.is_worth(x)


def fitting(family: Any, module: nn.Module, x: Tensor, backend: str) -> Look | None:
    """What is known of a module that may be fused in a call about x; None where it holds a surprise or is watched."""
    dtype = product_dtype(x)
    if _failure is not None or (F.linear, F.gelu, F.layer_norm) != _OWN_FUNCTIONS:
        return None
    if dtype not in _DTYPES or x.dtype not in (dtype, torch.float32):
        return None
    if (dtype == torch.bfloat16 and not x.is_cuda) or torch._C._len_torch_dispatch_stack():
        return None  # Triton's interpreter does not multiply bfloat16
    looked = _looks.get(module)
    if looked is None or not looked.holds(module):
        _looks.pop(module, None)  # what came in since may be the module itself, which the look would keep alive
        try:
            looked = _looks[module] = Look(module, family.block(module))
        except (AttributeError, TypeError, KeyError, Unwatchable, _Unfit):
            return None
    if not looked.suits(x):
        return None
    return None if backend == "torch" and looked.is_mixed(x) else looked


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are computed."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _norm_dtype(x: Tensor) -> torch.dtype:
    """The dtype that layer norms of products come out in."""
    kind = x.device.type
    return torch.float32 if kind != "cpu" and torch.is_autocast_enabled(kind) else product_dtype(x)


class _Unfit(Exception):
    """A module is not plain enough to be stood in for."""


class Look:
    """A close look at a module that turned out to be plain, and what tells later calls that all of it still holds.

    Attributes:
        facts: what the module consists of.
        norms: weight, bias and eps of each, in the order of their use.
        linears: weight and bias of each, likewise; of an embedding, those of its projection.
        drops: what drops samples of the attention and of the MLP; None where nothing is dropped.
        has_plain_products: whether the attention's products take their input in any dtype, under autocast.
    """

    __slots__ = ("channels", "drops", "facts", "has_plain_products", "linears", "norms", "shapes", "twin", "watch")

    def __init__(self, module: nn.Module, facts: Block | Merging | Embedding) -> None:
        self.facts: Any = facts
        norms: tuple[tuple[Any, int], ...]
        linears: tuple[tuple[Any, int, int], ...]
        # Before any weight is looked at: a parametrized one is computed then, and may count that.
        products = (facts.fc1, facts.fc2) if isinstance(facts, Block) else (getattr(facts, "reduction", None),)
        _demand(all(one is None or is_own(one, nn.Linear) for one in products))
        if isinstance(facts, Block):
            for holder in (module, *facts.holders):  # looked for at every call of a model that is trained with dropout
                _demand(not any(type(one) is nn.Dropout and one.training and one.p for one in holder._modules.values()))
            (hidden, channels), holders = facts.fc1.weight.shape, facts.holders
            norms = (facts.norm1, channels), (facts.norm2, channels)
            linears = (facts.fc1, channels, hidden), (facts.fc2, hidden, channels)
            drops = [facts.drop1, facts.drop2]
            named = [facts.norm1, facts.norm2, facts.fc1, facts.fc2, facts.activation, facts.attention, *facts.holders]
            named += drops
            _demand(_is_gelu(facts.activation))
        elif isinstance(facts, Embedding):
            _demand(is_own(facts.projection, nn.Conv2d))
            (width, channels, *patch), holders, linears, drops = facts.projection.weight.shape, facts.holders, (), []
            norms = () if facts.norm is None else ((facts.norm, width),)
            named = [facts.projection, facts.norm, *facts.holders]
            _demand(_is_patchwise(facts.projection))
            _demand(kernels.embed_launch(width, channels * patch[0] * patch[1]) is not None)
        else:
            (width, channels), holders, drops = facts.reduction.weight.shape, (), []
            norms = ((facts.norm, width if facts.post_norm else channels),)
            linears = ((facts.reduction, channels, width),)
            named = [facts.norm, facts.reduction]
        inside = facts.attention.modules() if isinstance(facts, Block) else ()
        self.has_plain_products = all(type(one) is nn.Linear for one in inside if isinstance(one, nn.Linear))
        self.channels = channels // 4 if isinstance(facts, Merging) else channels
        for norm, size in norms:
            _demand(is_own(norm, nn.LayerNorm) and norm.normalized_shape == (size,))
        for linear, fan_in, fan_out in linears:
            _demand(tuple(linear.weight.shape) == (fan_out, fan_in))
            _demand(linear.bias is None or linear.bias.numel() == fan_out)
        idle = []
        roles = set()
        for holder in (module, *holders):
            _demand(not holder._parameters and _make_up(holder, facts) in _trusted)
            _demand(harmless.is_of_library(holder) or holder._buffers.keys() <= {"attn_mask"})
            for child in holder._modules.values():
                if child is not None and any(child is one for one in named):
                    _demand(child not in roles)  # it may be called in one place only
                    roles.add(child)
                elif child is not None:
                    _demand(_is_idle(child))
                    idle.append(child)
        self.drops = [None if one is None or _is_idle(one) else one for one in drops]
        _demand(all(one is None or harmless.passes(one, harmless.drops_samples) for one in self.drops))
        idle += [one for one in drops if one is not None]
        settled = [norm for norm, _ in norms] + idle + ([facts.activation] if isinstance(facts, Block) else [])
        plain_norms, plain_linears = [norm for norm, _ in norms], [linear for linear, *_ in linears]
        plain_linears += [facts.projection] if isinstance(facts, Embedding) else []
        stood_in_for = [*settled, *plain_linears, *holders]
        _demand(not any("forward" in one.__dict__ for one in stood_in_for))
        parameters = [one._parameters[name] for one in (*plain_norms, *plain_linears) for name in ("weight", "bias")]
        _demand(all(tensor is None or type(tensor) in _PLAIN_TENSORS for tensor in parameters))
        self.shapes = [(tensor, tensor.shape) for tensor in parameters if tensor is not None]
        self.norms: Any = tuple((norm.weight, norm.bias, norm.eps) for norm in plain_norms)
        self.linears: Any = tuple((linear.weight, linear.bias) for linear in plain_linears)
        self.twin = twin(module)
        # What an embedding gives depends on its settings, and so may what a module of unknown code does.
        own = [self.twin] if isinstance(facts, Embedding) or not harmless.is_of_library(module) else []
        self.watch = Watch([*stood_in_for, *own], stood_in_for, [self.twin])

    def holds(self, module: nn.Module) -> bool:
        """Whether module, submodules, their settings and parameters are those that were looked at, and unhooked."""
        return module.__dict__ is self.twin.__dict__ and type(module) is type(self.twin) and self.watch.holds()

    def suits(self, x: Tensor) -> bool:
        """Whether the parameters are like x; under autocast their dtypes may be others."""
        dtype, device, kind = x.dtype, x.get_device(), x.device.type
        is_autocast = torch.is_autocast_enabled(kind)
        for tensor, shape in self.shapes:
            if not (
                (tensor.dtype is dtype or (is_autocast and tensor.dtype in _DTYPES))
                and tensor.get_device() == device
                and tensor.shape == shape
                and tensor.is_contiguous()
            ):
                return False
        if isinstance(self.facts, Embedding):
            if nn.Conv2d._conv_forward is not _OWN_CONVOLUTION or x.dim() != 4 or x.shape[1] != self.channels:
                return False
            return self.is_mixed(x) or (x.is_contiguous() and _is_embeddable(x))
        return x.is_contiguous() and x.shape[-1] == self.channels

    def is_mixed(self, x: Tensor) -> bool:
        """Whether gradients are recorded, samples dropped, or autocast has dtypes of its own between the layers."""
        if torch.is_autocast_enabled(x.device.type) or any(one is not None for one in self.drops):
            return True
        return torch.is_grad_enabled() and (x.requires_grad or any(one.requires_grad for one, _ in self.shapes))


_looks: weakref.WeakKeyDictionary[nn.Module, Look] = weakref.WeakKeyDictionary()


def _demand(holds: bool) -> None:
    if not holds:
        raise _Unfit


def _is_patchwise(module: Any) -> bool:
    """Whether a plain convolution is one of patches that neither overlap nor leave gaps."""
    return (
        "_conv_forward" not in module.__dict__
        and module.kernel_size == module.stride == tuple(module.weight.shape[2:])
        and module.padding == (0, 0)
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and (module.bias is None or module.bias.shape == module.weight.shape[:1])
    )


def _is_embeddable(image: Tensor) -> bool:
    """Whether the kernel is to be preferred: in fp32 convolutions on GPUs may use TF32; patches are told by 32 bits."""
    if image.dtype is torch.float32 and image.is_cuda:
        return False
    return image.shape[0] * image.shape[2] * image.shape[3] < 2**31 - 64


def _is_gelu(module: Any) -> bool:
    if is_own(module, nn.GELU):
        return module.approximate == "none"
    return harmless.passes(module, harmless.does_gelu)


def _is_idle(module: Any) -> bool:
    """Whether a module gives back what it is given."""
    if is_own(module, nn.Identity):
        return True
    if module.training and getattr(module, "p", getattr(module, "drop_prob", None)) != 0.0:
        return False
    return is_own(module, nn.Dropout) or harmless.passes(module, harmless.does_nothing)


def forward(look: Look, attend: Attend, x: Tensor, size: tuple[int, int] | None, *, backend: str = "triton") -> Any:
    """What a block returns that is `fitting`.

    Args:
        attend: (B, H, W, C) to the same.
        x, size: see `layout.Tokens`.
        backend: "torch" on CPUs.
    """
    block: Block = look.facts
    if look.is_mixed(x):
        out = _forward_mixed(look, attend, x, size)
        return out if block.give is None else block.give(out)
    on_cpu = backend == "torch"
    y = x if block.post_norm else block.norm1(x) if on_cpu else _norm(x, look)
    branch = _branch(attend, y, size)
    if not _is_like(branch, x, x.dtype) or (branch.requires_grad and torch.is_grad_enabled()):
        out = _rest(block, x, branch)
    elif on_cpu:
        out = torch_fusion.rest(x, branch, block)
    else:
        try:
            out = fusion_ops.after_attention(x, branch, look.norms, look.linears, block.post_norm)
        except kernels.LaunchError as error:
            _fail(error)
            out = _rest(block, x, branch)
    return out if block.give is None else block.give(out)


def reference(block: Block, attend: Attend, x: Tensor, size: tuple[int, int] | None) -> Any:
    """The same by the block's own modules, in any dtype and on any device."""
    out = _rest(block, x, _branch(attend, x if block.post_norm else block.norm1(x), size))
    return out if block.give is None else block.give(out)


def _forward_mixed(look: Look, attend: Attend, x: Tensor, size: tuple[int, int] | None) -> Tensor:
    """The result where gradients are recorded or autocast is active."""
    block: Block = look.facts
    (norm1, norm2), (fc1, fc2), (drop1, drop2) = look.norms, look.linears, look.drops
    dtype = product_dtype(x)
    try:
        narrow = dtype if look.has_plain_products else torch.promote_types(x.dtype, _norm_dtype(x))
        x, y = (x, x) if block.post_norm else recorded.norm(x, norm1, narrow)
    except kernels.LaunchError as error:
        _fail(error)
        return _rest(block, x, _branch(attend, block.norm1(x), size))
    branch = _branch(attend, y, size)
    if not _is_like(branch, x, dtype):
        return _rest(block, x, branch)
    try:
        if block.post_norm:
            normed = _norm_dtype(x)
            wide = torch.promote_types(x.dtype, normed)
            total, copied = recorded.norm_add(x, branch, _drawn(drop1, x, normed), norm1, wide, True)
            added = recorded.mlp(None, total if copied is None else copied, None, fc1, fc2)
            return recorded.norm_add(total, added, _drawn(drop2, x, normed), norm2, wide, False)[0]
        total, y = recorded.add_norm(x, branch, _drawn(drop1, x, dtype), norm2)
        return recorded.mlp(total, y, _drawn(drop2, x, dtype), fc1, fc2)
    except kernels.LaunchError as error:
        _fail(error)
        return _rest(block, x, branch)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weightᵀ + bias, as PyTorch does it; where gradients are recorded, `fusion_autograd.linear`."""
    if torch.is_grad_enabled() and F.linear is _OWN_FUNCTIONS[0] and _is_recorded(x, weight, bias):
        return recorded.linear(x, weight, bias, product_dtype(x))
    return F.linear(x, weight, bias)


def _is_recorded(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = (x, weight) if bias is None else (x, weight, bias)
    if not any(one.requires_grad for one in given) or not all(type(one) in _PLAIN_TENSORS for one in given):
        return False
    if torch.is_autocast_enabled(x.device.type):
        return product_dtype(x) in _HALVES and all(one.dtype in _DTYPES for one in given)
    return x.dtype in _HALVES and all(one.dtype is x.dtype for one in given)


def _drawn(drop: Any, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The factor of each sample, (samples,), from the numbers that the module would draw for a branch in that dtype."""
    if drop is None:
        return None
    return drop(torch.ones((x.shape[0],) + (1,) * (x.dim() - 1), dtype=dtype, device=x.device)).reshape(-1)


def _branch(attend: Attend, y: Tensor, size: tuple[int, int] | None) -> Tensor:
    return attend(y) if size is None else attend(y.view(y.shape[0], *size, y.shape[2])).view(y.shape)


def _is_like(branch: Any, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the attention gave what plain projections give."""
    return (
        type(branch) in _PLAIN_TENSORS
        and branch.dtype is dtype
        and branch.shape == x.shape
        and branch.device == x.device
        and branch.is_contiguous()
    )


def _rest(block: Block, x: Tensor, branch: Tensor) -> Tensor:
    """What follows the attention, by the modules themselves."""
    drop1, drop2 = (_nothing if one is None else one for one in (block.drop1, block.drop2))
    if block.post_norm:
        x = x + drop1(block.norm1(branch))
        return x + drop2(block.norm2(block.fc2(block.activation(block.fc1(x)))))
    x = x + drop1(branch)
    return x + drop2(block.fc2(block.activation(block.fc1(block.norm2(x)))))


def _nothing(x: Tensor) -> Tensor:
    return x


def _fail(error: kernels.LaunchError) -> None:
    global _failure
    if _failure is None:
        _failure = f"the Triton kernel failed: {error}"
        logger.warning("%s; only attention is accelerated from now on", _failure)
        warnings.warn(f"swinaccel: only attention is accelerated, because {_failure}", stacklevel=4)


def _norm(x: Tensor, look: Look) -> Tensor:
    try:
        return kernels.norm(x, look.norms[0])
    except kernels.LaunchError as error:
        _fail(error)
        return look.facts.norm1(x)


# What a compiler can look up, which cannot walk over attributes: names of children, and types of what is proven.
_children: dict[type, tuple[str, ...]] = {}
_idle_types: set[type] = set()
_gelu_types: set[type] = set()
_embedding_types: set[type] = set()


def _trust_compiled(module: nn.Module, block: Block) -> None:
    for holder in (module, *block.holders):
        _children[type(holder)] = tuple(holder._modules)
        for child in holder.children():
            kind, is_bare = type(child), not (child._parameters or child._modules)
            is_new = kind not in _idle_types and is_bare and harmless.is_of_library(child)
            if is_new and _is_idle(copy.deepcopy(child).eval()):
                _idle_types.add(kind)
    kind, is_known = type(block.activation), harmless.is_of_library(block.activation)
    if kind is not nn.GELU and is_known and _is_gelu(block.activation):
        _gelu_types.add(kind)


def traced(family: Any, module: nn.Module, x: Tensor) -> Block | None:
    """What a compiler finds the module to be, if it may take one operator for all that follows its attention."""
    if _failure is not None or x.dtype not in _HALVES or torch.is_autocast_enabled(x.device.type):
        return None
    block = family.block(module)
    norms, linears = (block.norm1, block.norm2), (block.fc1, block.fc2)
    named = (*norms, *linears, block.activation, block.attention, *block.holders)
    for holder in (module, *block.holders):
        if holder._parameters or _children.get(type(holder)) != tuple(holder._modules):
            return None
        for child in holder._modules.values():
            if not any(child is one for one in named) and (child.training or type(child) not in _idle_types):
                return None
    for part in (*norms, *linears, *block.holders, block.activation, block.drop1, block.drop2):
        if part is not None and not _is_untouched(part):
            return None
    if type(block.activation) not in _gelu_types and not _is_exact(block.activation):
        return None
    parameters: list[Any] = []
    for norm in norms:
        if type(norm) is not nn.LayerNorm or norm.normalized_shape != x.shape[-1:]:
            return None
        parameters += norm.weight, norm.bias
    for linear in linears:
        if type(linear) is not nn.Linear:
            return None
        parameters += linear.weight, linear.bias
    for one in parameters:
        if one is not None and (type(one) is not nn.Parameter or one.dtype != x.dtype or not one.is_contiguous()):
            return None
    if torch.is_grad_enabled() and (x.requires_grad or any(p is not None and p.requires_grad for p in parameters)):
        return None
    return block


def traced_embedding(family: Any, module: nn.Module, x: Tensor) -> Embedding | None:
    """What a compiler finds a patch embedding to be, if it may multiply patches where there was a convolution."""
    dtype = product_dtype(x)
    if type(module) not in _embedding_types or type(x) is not Tensor or x.dtype not in (dtype, torch.float32):
        return None
    if dtype not in _HALVES or not family.constrains_sizes(module):
        return None
    try:
        embedding: Embedding = family.block(module)
    except KeyError:
        return None
    projection, norm = embedding.projection, module._modules.get("norm")
    if not is_own(projection, nn.Conv2d) or nn.Conv2d._conv_forward is not _OWN_CONVOLUTION:
        return None
    if not _is_untouched(projection) or not _is_patchwise(projection):
        return None
    if type(projection.weight) is not nn.Parameter or type(projection.bias) not in (nn.Parameter, type(None)):
        return None
    if norm is None:
        return embedding if "projection" in module._modules else None  # others call their norm
    is_plain = type(norm) is nn.Identity
    if type(norm) is nn.LayerNorm:
        is_plain = norm.normalized_shape == projection.weight.shape[:1]
    return embedding if is_plain and _is_untouched(norm) else None


def _is_untouched(part: nn.Module) -> bool:
    return not has_hooks(part) and not has_own_forward(part)


def _is_exact(activation: nn.Module) -> bool:
    return type(activation) is nn.GELU and activation.approximate == "none"


def forward_traced(block: Block, attend: Attend, x: Tensor, size: tuple[int, int] | None) -> Any:
    """What such a block returns."""
    branch = _branch(attend, x if block.post_norm else block.norm1(x), size)
    if branch.dtype != x.dtype or branch.shape != x.shape:
        out = _rest(block, x, branch)
    else:
        norms: Any = tuple([(one.weight, one.bias, one.eps) for one in (block.norm1, block.norm2)])
        linears: Any = tuple([(one.weight, one.bias) for one in (block.fc1, block.fc2)])
        out = fusion_ops.compiled_after_attention(x, branch, norms, linears, block.post_norm)
    return out if block.give is None else block.give(out)


def embed_traced(embedding: Embedding, x: Tensor) -> Any:
    """What such a patch embedding returns; by a product, which compilers fuse with its neighbours."""
    return _embedded(embedding, _multiplied(x, embedding.projection.weight, embedding.projection.bias))


def merge(look: Look, x: Tensor, size: tuple[int, int] | None) -> Tensor:
    """What a patch merging returns that is `fitting`; `x` and `size` as in `layout.Tokens`."""
    merging: Merging = look.facts
    image = x if size is None else x.view(x.shape[0], *size, x.shape[2])
    (affine,), (reduction,) = look.norms, look.linears
    try:
        if look.is_mixed(x):
            if merging.post_norm:
                out = recorded.norm(F.linear(merged(image), *reduction), affine, _norm_dtype(x))[1]
            else:
                out = F.linear(recorded.norm(merged(image), affine, product_dtype(x))[1], *reduction)
        elif merging.post_norm:
            out = kernels.norm(F.linear(kernels.merge(image, None), *reduction), affine)
        else:
            out = F.linear(kernels.merge(image, affine), *reduction)
    except kernels.LaunchError as error:
        _fail(error)
        return merge_reference(merging, x, size)
    return out if size is None else out.flatten(1, 2)


def merge_reference(merging: Merging, x: Tensor, size: tuple[int, int] | None) -> Tensor:
    """The same by its own modules."""
    y = merged(x if size is None else x.view(x.shape[0], *size, x.shape[2]))
    out = merging.norm(merging.reduction(y)) if merging.post_norm else merging.reduction(merging.norm(y))
    return out if size is None else out.flatten(1, 2)


def merged(x: Tensor) -> Tensor:
    """(B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 4 * C)."""
    batch, height, width, channels = x.shape
    if height % 2 or width % 2:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    parts = x.view(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
    return parts.permute(0, 1, 3, 4, 2, 5).flatten(3)


def embed(look: Look, x: Tensor) -> Any:
    """What a patch embedding returns that is `fitting`, of an image of whole patches (B, C_in, H, W)."""
    embedding: Embedding = look.facts
    ((weight, bias),), affine = look.linears, look.norms[0] if look.norms else None
    try:
        if look.is_mixed(x):
            image = _multiplied(x, weight, bias)
            if affine is not None:
                image = recorded.norm(image, affine, _norm_dtype(x))[1]
        else:
            image = kernels.embed(x, weight, bias, affine)
    except kernels.LaunchError as error:
        _fail(error)
        return embed_reference(embedding, x)
    return image if embedding.give is None else embedding.give(image)


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of patches as a product: (B, C_in, H, W) to (B, H / p, W / q, C), in the dtype of products."""
    parts = x.unflatten(3, (-1, weight.shape[3])).unflatten(2, (-1, weight.shape[2])).permute(0, 2, 4, 1, 3, 5)
    patches = parts.to(product_dtype(x), memory_format=torch.contiguous_format).flatten(3)
    return F.linear(patches, weight.flatten(1), bias)


def embed_reference(embedding: Embedding, x: Tensor) -> Any:
    """The same by its own modules."""
    return _embedded(embedding, embedding.projection(x).permute(0, 2, 3, 1))


def _embedded(embedding: Embedding, image: Tensor) -> Any:
    image = image if embedding.norm is None else embedding.norm(image)
    return image if embedding.give is None else embedding.give(image)
