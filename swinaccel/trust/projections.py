"""Names for layers that stand where an attention had plain ones: quantised, adapted, or somebody's own."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from ..layers import PLAIN_TENSORS

# Beginnings of the names of packages, and what they do to a layer; the first that fits.
_MAKERS = (
    ("torch.ao.nn.qat", "prepared for quantisation by torch.ao"),
    ("torch.ao.nn.intrinsic.qat", "prepared for quantisation by torch.ao"),
    ("torch.ao.quantization", "prepared for quantisation by torch.ao"),
    ("torch.ao", "quantised by torch.ao"),
    ("torchao", "quantised by torchao"),
    ("bitsandbytes", "quantised by bitsandbytes"),
    ("optimum.quanto", "quantised by quanto"),
    ("hqq", "quantised by hqq"),
    ("gptqmodel", "quantised by GPTQ"),
    ("auto_gptq", "quantised by GPTQ"),
    ("awq", "quantised by AWQ"),
    ("peft", "adapted by peft"),
    ("torch.distributed", "distributed by PyTorch"),
)
_PROJECTIONS = {"qkv", "proj", "query", "key", "value", "q_proj", "k_proj", "v_proj", "o_proj", "dense"}


def name_layer(attention: nn.Module, reason: str | None) -> str | None:
    """Return why an attention is left alone, in terms of the layer that is the cause where there is an unusual one.

    Args:
        reason: what was found out, such as which name its code speaks of; None where nothing speaks against it.
    """
    layer = None if reason is None else unusual_layer(attention)
    if layer is None:
        return reason
    return (
        f"{layer}, and {reason}; its own forward runs and its results are right, and with projections that are plain"
        " nn.Linear it is accelerated"
    )


def unusual_layer(attention: nn.Module) -> str | None:
    """Return which layer of an attention is what, such as "its projection qkv is quantised by torch.ao", else None."""
    for name, part in attention.named_modules():
        what = describe(part)
        last = name.rpartition(".")[2]
        if what is None and last in _PROJECTIONS and not isinstance(part, nn.Linear) and not part._modules:
            what = f"a {type(part).__name__}, and no nn.Linear"
        if what is not None:
            return f"its {'projection' if last in _PROJECTIONS else 'layer'} {name or type(part).__name__} is {what}"
    return None


def describe(layer: nn.Module) -> str | None:
    """Return what a package other than torch.nn has made of a layer, by its class or by its tensors'; else None."""
    for cls in type(layer).__mro__:
        done = _maker_of(cls)
        if done is not None:
            return f"{done} (a {type(layer).__name__})"
    for name, tensor in layer._parameters.items():
        if tensor is not None and type(tensor) not in PLAIN_TENSORS and not is_lazy(tensor):
            done = _maker_of(type(tensor)) or "not plain"
            return f"{done} (its {name} is a {type(tensor).__name__})"
    return None


def _maker_of(cls: type) -> str | None:
    module = f"{cls.__module__}."
    return next((done for package, done in _MAKERS if module.startswith(f"{package}.")), None)
