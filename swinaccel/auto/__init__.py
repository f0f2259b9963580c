"""Accelerate the models of known libraries as they are first called, in programs that nobody can edit.

    python -m swinaccel.auto program.py --its arguments
    python -m swinaccel.auto -m package --its arguments

Or `SWINACCEL_AUTO=1`, where a program imports swinaccel anyway, or `swinaccel.auto.start()` in a plugin of it. The
first call of a model of these libraries is looked at, and no other code: see `LIBRARIES`. What a program accelerates by
itself is left as it is, and so are calls that a compiler or a tracer makes.
"""

from __future__ import annotations

import logging
import sys
import threading
import types
import weakref
from contextlib import suppress
from typing import Any, cast

import torch
import wrapt
from torch import Tensor, nn

from ..api import accelerate, report
from ..layers import as_replacement
from ..patching import marker
from ..runtime.context import context_reason

logger = logging.getLogger("swinaccel")

# Modules, and the classes in them whose instances hold blocks: whole models, and the parts that others call alone.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "timm.models.swin_transformer": ("SwinTransformer", "SwinTransformerStage"),
    "timm.models.swin_transformer_v2": ("SwinTransformerV2", "SwinTransformerV2Stage"),
    "timm.models.swin_transformer_v2_cr": ("SwinTransformerV2Cr", "SwinTransformerV2CrStage"),
    "torchvision.models.swin_transformer": ("SwinTransformer",),
    "torchvision.models.video.swin_transformer": ("SwinTransformer3d",),
    "transformers.models.swin.modeling_swin": ("SwinModel", "SwinEncoder"),
    "transformers.models.swinv2.modeling_swinv2": ("Swinv2Model", "Swinv2Encoder"),
    "transformers.models.swin2sr.modeling_swin2sr": ("Swin2SRModel", "Swin2SREncoder"),
    "transformers.models.donut.modeling_donut_swin": ("DonutSwinModel", "DonutSwinEncoder"),
    "transformers.models.maskformer.modeling_maskformer_swin": ("MaskFormerSwinModel", "MaskFormerSwinEncoder"),
    "transformers.models.clap.modeling_clap": ("ClapAudioEncoder",),
    "monai.networks.nets.swin_unetr": ("SwinTransformer", "BasicLayer"),
    "basicsr.archs.swinir_arch": ("SwinIR",),
    "spandrel.architectures.SwinIR.__arch.SwinIR": ("SwinIR",),
    "spandrel.architectures.Swin2SR.__arch.Swin2SR": ("Swin2SR",),
    "spandrel.architectures.HAT.__arch.HAT": ("HAT",),
    "spandrel.architectures.DRCT.__arch.drct_arch": ("DRCT",),
}

_lock = threading.RLock()
_is_on = _has_told = False
_registered: set[str] = set()  # modules that were not imported yet
_handles: dict[type, Any] = {}  # wrapt's, of the classes that are watched
_seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # instances that were called


def start() -> None:
    """Accelerate models of the known libraries from now on, be those imported already or later."""
    global _is_on
    with _lock:
        _is_on = True
        for name in LIBRARIES:
            if name in sys.modules:
                _follow(sys.modules[name])
            elif name not in _registered:
                _registered.add(name)
                wrapt.register_post_import_hook(_follow, name)


def stop() -> None:
    """Look at no model any more; those that were accelerated stay so."""
    global _is_on
    with _lock:
        _is_on = False
        _seen.clear()
        for cls in list(_handles):
            with suppress(ValueError):  # another wrapper came on top: what stays looks at no model
                wrapt.unwrap_object(cls, "forward", _handles.pop(cls))


def _follow(module: types.ModuleType) -> None:
    """Watch the classes of a library's module, where this version has them."""
    with _lock:
        for name in LIBRARIES[module.__name__] if _is_on else ():
            cls: Any = getattr(module, name, None)
            has_forward = isinstance(cls, type) and isinstance(vars(cls).get("forward"), types.FunctionType)
            if has_forward and cls not in _handles:
                _handles[cls] = wrapt.wrap_object(cls, "forward", cast(Any, _watched))


def _watched(forward: Any) -> Any:
    """Return the function that takes a forward's place: it looks at an instance before its first call."""
    is_compiling, seen, first_call = torch.compiler.is_compiling, _seen, _first_call

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_compiling() and self not in seen:
            first_call(self, args, kwargs)
        return forward(self, *args, **kwargs)

    return as_replacement(watched, forward)


def _first_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Accelerate an instance, unless the program has done so, or this call is none of its own."""
    global _has_told
    first = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
    is_capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if context_reason(first) is not None or is_capturing:
        return
    with _lock:
        if model in _seen or not _is_on:  # what could not be taken away looks at no model
            return
        _seen.update(model.modules())
        if any(marker(part) is not None for part in model.modules()):
            return
        try:
            accelerate(model)
        except Exception as error:  # an unusable variable, or strict
            logger.warning("auto mode leaves a %s as it is: %s", type(model).__name__, error)
        else:
            level = logging.INFO if _has_told else logging.WARNING  # of one model it is seen by default
            logger.log(level, "auto mode, %s: %s", type(model).__name__, report(model).summary())
            _has_told = True
