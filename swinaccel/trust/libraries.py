"""Know the libraries whose code was surveyed, by where a class or function is defined."""

from __future__ import annotations

import sysconfig
from typing import Any

import torch

from .names import functions_behind

# Homes of the surveyed implementations of window attention, and of the layers that they use.
LIBRARIES = (
    "timm.models.swin_transformer", "torchvision.models.swin_transformer", "torchvision.models.video.swin_transformer",
    "torch.", "timm.layers.", "torchvision.ops.", "transformers.", "monai.networks.",
)  # fmt: skip

_PARTS = "Model", "ForImageClassification", "Backbone", "Encoder", "Stage"
# Whole models and stages that run the same operators at every call of one signature, whatever the values of tensors.
MODELS = {
    "timm.models.swin_transformer": ("SwinTransformer", "SwinTransformerStage"),
    "timm.models.swin_transformer_v2": ("SwinTransformerV2", "SwinTransformerV2Stage"),
    "timm.models.swin_transformer_v2_cr": ("SwinTransformerV2Cr", "SwinTransformerV2CrStage"),
    "torchvision.models.swin_transformer": ("SwinTransformer",),
    "torchvision.models.video.swin_transformer": ("SwinTransformer3d",),
    "transformers.models.swin.modeling_swin": tuple(f"Swin{one}" for one in _PARTS),
    "transformers.models.swinv2.modeling_swinv2": tuple(f"Swinv2{one}" for one in _PARTS),
    "transformers.models.donut.modeling_donut_swin": tuple(f"DonutSwin{one}" for one in _PARTS),
    "transformers.models.maskformer.modeling_maskformer_swin": tuple(f"MaskFormerSwin{one}" for one in _PARTS),
}

_INSTALLED = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")})


def unsharded_class(cls: type) -> type:
    """Return the class that FSDP2 made a class from, which is then its first base outside of torch.distributed."""
    copies = getattr(vars(cls).get("__deepcopy__"), "__module__", None) or ""  # a function that refuses to
    if not copies.startswith("torch.distributed."):
        return cls
    return next(base for base in cls.__mro__ if not base.__module__.startswith("torch.distributed."))


def is_of_library(module: Any) -> bool:
    """Return True if all code of a module's class is a surveyed library's or PyTorch's.

    A subclass without code of its own is what it was made from.
    """
    for base in unsharded_class(type(module)).__mro__:
        if base.__module__.startswith(LIBRARIES):
            if base.__module__.startswith("torch."):
                return True
        elif base is not object and (torch.compiler.is_compiling() or _has_code(base)):
            return False  # dynamo of torch 2.11 cannot walk over a class
    return True


def _has_code(cls: type) -> bool:
    return not all(map(is_library_function, filter(callable, vars(cls).values())))


def is_capturable(module: Any) -> bool:
    """Return True if a module is one of `MODELS`, and all in it a surveyed library's or PyTorch's."""
    cls = type(module)
    return cls.__name__ in MODELS.get(cls.__module__, ()) and all(map(is_of_library, module.modules()))


def is_library_function(function: Any) -> bool:
    """Return True if a function is defined in a surveyed library or in PyTorch."""
    return (getattr(function, "__module__", None) or "").startswith(LIBRARIES)


def is_surveyed_function(function: Any) -> bool:
    """Return True if a function is defined in a surveyed library."""
    return is_library_function(function) and not function.__module__.startswith("torch.")


def is_installed(function: Any) -> bool:
    """Return True if a function's file lies where packages are installed, rather than in a project of the user's."""
    code = getattr(function, "__code__", None)
    return code is None or code.co_filename.startswith((*_INSTALLED, "<frozen"))


def is_installed_class(cls: type) -> bool:
    """Return True if a class is a library's, PyTorch's, Python's or another installed package's."""
    if is_library_function(cls):
        return True
    functions = (one for value in vars(cls).values() for one in functions_behind(value))
    return all(map(is_installed, functions)) and cls.__module__ not in ("__main__", "__mp_main__")
