"""Run one call while a compiler traces it: the same decisions, in code that compilers follow and guard by themselves.

A compiler cannot walk over attributes or keep plans. Fingerprints it has looked up once, while it traces. Its guards
see later changes of what it reads by itself: it takes the types of submodules, and their places, for what
`accelerate()` proved (`PROVEN` on the class), and reads hooks, forwards and settings one by one.
"""

from __future__ import annotations

import ctypes
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import _has_any_global_hook

from ..config import env_strict
from ..errors import FallbackError
from ..layers import BASE_ATTRIBUTES, MARKER, PROVEN, has_hooks, has_own_forward, is_builtin, replaced_methods
from ..spec.adapters import Adapter, Family, call_settings, is_family, reads_attention_blocks
from ..spec.block import Attend, Block, Embedding
from ..spec.reference_block import attend_tokens
from ..spec.window import Section
from ..trust.fingerprint import Untraceable, rates
from ..trust.libraries import is_of_library
from ..trust.registry import block_key, mask_kind, registry
from .attention import CHANGED, parts_reason, problem_of, reading_of, section_of, section_reason, triton_reason
from .block import HALVES, rest
from .context import backend_of, product_dtype, tokens_of
from .neighbours import embedding_of, is_patchwise
from .section import attend_triton, table_of

if TYPE_CHECKING:
    from .call import Entry

_marked: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # whose facts were asked for

_CONV_FORWARD = nn.Conv2d._conv_forward
_LINEAR, _GELU, _LAYER_NORM = F.linear, F.gelu, F.layer_norm

# ("part", type of parent, name, type), ("setting", type, name, value) of code that no library holds, ("rate", type,
# name) of a rate of dropout, ("weights", type) of a module that returns its attention weights, ("refused", type, kind
# of mask) of one that raises for such a mask, and ("always", type of parent, name) of a dropout that drops in
# evaluation, too.
Fact = tuple[Any, ...]

_PLAIN = (bool, int, float, str)
_SETTINGS = (*_PLAIN, type(None), types.FunctionType, types.BuiltinFunctionType)


def proven_facts(adapter: Adapter, module: nn.Module) -> frozenset[Fact]:
    """Return what was proven of a module and of all inside it, as code can look it up that a compiler traces."""
    _marked.add(module)
    if hasattr(adapter, "is_captured"):
        return frozenset()  # which no compiler asks of a whole model, and which would keep its functions alive
    found: list[Fact] = [("part", None, "", type(module))]
    ignored = {*BASE_ATTRIBUTES, *call_settings(adapter), MARKER}
    for parent in module.modules():
        found += [("part", type(parent), name, type(child)) for name, child in parent.named_children()]
        if not is_of_library(parent):
            found += [("rate", type(parent), name) for name, _ in rates(parent)]
        if not is_of_library(parent) or isinstance(parent, nn.Softmax):
            none = {name: None for name, one in parent._parameters.items() if one is None}
            settings = {name: one for name, one in (vars(parent) | none).items() if name not in ignored}
            found += [("setting", type(parent), *each) for each in settings.items() if isinstance(each[1], _SETTINGS)]
    if is_family(adapter) and not is_of_library(module):
        reading = reading_of(adapter, module)
        if isinstance(reading, str) or reading.weights:
            found.append(("weights", type(module)))
        else:
            found += [("refused", type(module), kind) for kind in reading.refused]
            for path in (name.removesuffix(".p") for name in reading.always if name.endswith(".p")):
                parent_path, _, name = path.rpartition(".")
                found.append(("always", type(module.get_submodule(parent_path)), name))
    return frozenset(found)


def call(
    entry: Entry, module: nn.Module, original: Callable[..., Any], x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return what one call of an accelerated module's method returns, as `call.call` does."""
    family, adapter, config = entry.family, entry.block, entry.config
    if not isinstance(x, Tensor) or _has_any_global_hook() or backend_of(config, x.device) == "torch":
        return original(module, *args, **kwargs)  # plain PyTorch: the compiler fuses it in its own way
    attend: Any = None
    if family is not None:
        attend = _attend(family, module, args, kwargs, x)
        if isinstance(attend, str):
            if config.strict or env_strict():
                raise FallbackError(f"{type(module).__name__} would run its original: {attend}")
            return original(module, *args, **kwargs)
    if adapter is not None and reads_attention_blocks(adapter):
        block = _plain_block(adapter, module, x)
        tokens = None if block is None else tokens_of(adapter, module, x, args, kwargs)
        if block is not None and tokens is not None and _are_proven(id(adapter), id(type(module))):
            return _block(block, adapter.attend(module) if attend is None else attend, *tokens)
    elif adapter is not None:
        embedding = _plain_embedding(adapter, module, x)
        if (
            embedding is not None
            and tokens_of(adapter, module, x, args, kwargs) is not None
            and _are_proven(id(adapter), id(type(module)))
        ):
            return embedding_of(embedding, x)
    if family is None:
        return original(module, *args, **kwargs)
    return family.forward(module, attend, *args, **kwargs)


# Compilers run the next two while they trace, and take what they return for a constant. They are given addresses, since
# torch 2.11 gives such functions nothing but constants, and those of classes, since what has been asked for its `id` is
# guarded by it: code that is compiled for one block serves all of its class. So they judge all of its class.


def _changed_reason(family_id: int, class_id: int) -> str | None:
    """Return why an attention of some module of a class is not what was proven, or None."""
    family = _object(family_id)
    for module in _marked_of(_object(class_id)):
        attention, reading = family.attention(module), reading_of(family, module)
        reason = reading if isinstance(reading, str) else None
        reason = reason or parts_reason(list(attention.modules()), attention is module, reading)
        if reason is not None:
            return reason
    return None


def _are_proven(adapter_id: int, class_id: int) -> bool:
    """Return True if all blocks, mergings or embeddings of a class are what was proven."""
    adapter = _object(adapter_id)
    try:
        return not any(
            registry.reading(block_key(adapter, module)) is None or any(map(replaced_methods, module.modules()))
            for module in _marked_of(_object(class_id))
        )
    except (AttributeError, TypeError, KeyError, ValueError, Untraceable):
        return False


# What torch.compiler.assume_constant_result does, which would import the compiler.
_changed_reason._dynamo_marked_constant = _are_proven._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _object(address: int) -> Any:
    """Return the object whose `id` this is, and which the caller holds."""
    return ctypes.cast(address, ctypes.py_object).value


def _marked_of(cls: type) -> list[nn.Module]:
    return [one for one in list(_marked) if type(one) is cls and MARKER in one.__dict__]


def _attend(
    family: Family, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
) -> Attend | str:
    """Return what runs the attention of a call, (B, H, W, C) to the same, or why the original must run."""
    attention = family.attention(module)
    proven = getattr(module, PROVEN)
    if ("weights", type(module)) in proven:
        return "it returns its attention weights as well, which a compiler is left to compute"
    reason = (
        _dropout_reason(module, attention)
        or _parts_reason(proven, attention, attention is module, _root(module, attention))
        or _changed_reason(id(family), id(type(module)))
    )
    if reason is not None:
        return reason
    section = section_of(family, module, None, args, kwargs)
    if isinstance(section, str):
        return section
    refused = [fact[2] for fact in proven if fact[0] == "refused" and fact[1] is type(module)]
    if refused and mask_kind(section, x) in refused:
        return "in a trial its own code raised an error for such a mask, or for none"
    is_sure = is_of_library(module) and not getattr(attention, "fused_attn", False)
    if section.logit_scale is None and section.scale != section.head_dim**-0.5 and not is_sure:
        return "its code may take another scale than the one that it holds, which a compiler is not told"
    problem = problem_of(section, x)
    reason = section_reason(section, x) or triton_reason(section, x, problem)
    return reason or _bound(section)


def _bound(section: Section) -> Attend:
    def attend(image: Tensor) -> Tensor:
        trained = torch.is_grad_enabled() and any(source.requires_grad for source in section.sources)
        return section.output(attend_triton(section, section.project(image), table_of(section, trained)))

    return attend


def _root(module: nn.Module, attention: nn.Module) -> tuple[type | None, str]:
    """Return whose child the attention is, and its name there."""
    if attention is module:
        return None, ""
    for name, child in module._modules.items():
        if child is attention:
            return type(module), name
    return None, ""


def _parts_reason(
    proven: frozenset[Fact], part: nn.Module, is_called: bool, place: tuple[type | None, str]
) -> str | None:
    """Return why modules that the section stands in for must be called; see `attention.parts_reason`."""
    if not is_called and has_hooks(part):
        return f"{type(part).__name__} inside the attention has hooks, which expect its own tensors; remove them"
    if not is_called and has_own_forward(part):
        return f"{type(part).__name__} inside the attention has a forward of its own"
    if ("part", *place, type(part)) not in proven:
        return f"a {type(part).__name__} came into the attention after accelerate(); call it again"
    for fact in proven:
        if fact[0] == "rate" and fact[1] is type(part) and getattr(part, fact[2]):
            return f"{fact[2]} is not zero, and only its own code says when that drops"
    if not _has_settings(proven, part):
        return CHANGED.format(type(part).__name__)
    for name, child in part._modules.items():
        if child is not None:
            reason = _parts_reason(proven, child, False, (type(part), name))
            if reason is not None:
                return reason
    return None


def _has_settings(proven: frozenset[Fact], part: nn.Module) -> bool:
    """Return True if every setting of a module, if it is of code that no library holds, has a value that was proven."""
    known = [fact for fact in proven if fact[0] == "setting" and fact[1] is type(part)]
    for name in [fact[2] for fact in known]:
        value = getattr(part, name)
        same = [one for _, _, other, one in known if other == name and type(one) is type(value)]
        if not any(one == value if type(value) in _PLAIN else one is value for one in same):
            return False
    return True


def _dropout_reason(module: nn.Module, attention: nn.Module) -> str | None:
    """Return why code that no library holds may drop what no family reads, or None."""
    if not is_of_library(module) or not is_of_library(attention):
        proven = getattr(module, PROVEN)
        for holder in (module, attention):
            for name, part in holder._modules.items():
                if not isinstance(part, _DropoutNd) or not part.p:
                    continue
                if part.training or module.training or ("always", type(holder), name) in proven:
                    return "dropout is active in code that no library holds"
        for fact in proven:
            if fact[0] == "rate" and fact[1] is type(module) and getattr(module, fact[2]):
                return f"{fact[2]} is not zero, and only its own code says when that drops"
    return None


def _plain_block(adapter: Any, module: nn.Module, x: Tensor) -> Block | None:
    """Return what a block consists of, if one operator may stand for all that follows its attention."""
    if x.dtype not in HALVES or torch.is_autocast_enabled(x.device.type):
        return None
    if F.linear is not _LINEAR or F.gelu is not _GELU or F.layer_norm is not _LAYER_NORM:
        return None
    block, proven = adapter.block(module), getattr(module, PROVEN)
    norms, linears = (block.norm1, block.norm2), (block.fc1, block.fc2)
    named = (*norms, *linears, block.activation, block.attention, *block.holders)
    for holder in (module, *block.holders):
        if holder._parameters:
            return None
        for name, child in holder._modules.items():
            if child is None:
                continue
            if ("part", type(holder), name, type(child)) not in proven:
                return None
            if not any(child is one for one in named) and (child.training or has_hooks(child)):
                return None
        if not _has_settings(proven, holder):
            return None
    for part in (*norms, *linears, *block.holders, block.activation, block.drop1, block.drop2):
        if part is not None and (has_hooks(part) or has_own_forward(part)):
            return None
    if type(block.activation) is nn.GELU and block.activation.approximate != "none":
        return None
    if type(block.activation) is not nn.GELU and not is_of_library(block.activation):
        return None
    parameters: list[Any] = []
    for norm in norms:
        if type(norm) is not nn.LayerNorm or norm.normalized_shape != x.shape[-1:]:
            return None
        if any(one is not None and one.shape != x.shape[-1:] for one in (norm.weight, norm.bias)):
            return None
        parameters += norm.weight, norm.bias
    for layer in linears:
        if type(layer) is not nn.Linear or (layer.bias is not None and layer.bias.shape != layer.weight.shape[:1]):
            return None
        parameters += layer.weight, layer.bias
    for one in parameters:
        if one is not None and (type(one) is not nn.Parameter or one.dtype != x.dtype or not one.is_contiguous()):
            return None
    if torch.is_grad_enabled() and (x.requires_grad or any(p is not None and p.requires_grad for p in parameters)):
        return None
    return block


def _plain_embedding(adapter: Any, module: nn.Module, x: Tensor) -> Embedding | None:
    """Return what a patch embedding consists of, if patches may be multiplied where there was a convolution."""
    dtype = product_dtype(x)
    if not hasattr(adapter, "constrains_sizes") or not is_of_library(module) or type(x) is not Tensor:
        return None
    if dtype not in HALVES or x.dtype not in (dtype, torch.float32) or not adapter.constrains_sizes(module):
        return None
    try:
        embedding: Embedding = adapter.block(module)
    except KeyError:
        return None
    projection, norm = embedding.projection, module._modules.get("norm")
    if not is_builtin(projection, nn.Conv2d) or has_hooks(projection) or has_own_forward(projection):
        return None
    if not is_patchwise(projection) or nn.Conv2d._conv_forward is not _CONV_FORWARD:
        return None
    if type(projection.weight) is not nn.Parameter or type(projection.bias) not in (nn.Parameter, type(None)):
        return None
    if norm is None:
        return embedding if "projection" in module._modules else None  # others call their norm
    is_plain = type(norm) is nn.Identity
    if type(norm) is nn.LayerNorm:
        is_plain = norm.normalized_shape == projection.weight.shape[:1]
    return embedding if is_plain and not has_hooks(norm) and not has_own_forward(norm) else None


def _block(block: Block, attend: Attend, x: Tensor, size: tuple[int, int] | None) -> Any:
    branch = attend_tokens(attend, x if block.post_norm else block.norm1(x), size)
    if branch.dtype != x.dtype or branch.shape != x.shape:
        out = rest(block, x, branch)
    else:
        norm1, norm2, fc1, fc2 = block.norm1, block.norm2, block.fc1, block.fc2
        norms = norm1.weight, norm1.bias, norm1.eps, norm2.weight, norm2.bias, norm2.eps
        layers = fc1.weight, fc1.bias, fc2.weight, fc2.bias
        out = torch.ops.swinaccel.after_attention(x, branch, *norms, *layers, block.post_norm)
    return out if block.as_output is None else block.as_output(out)
