"""Near misses: modules that look like window attention and that no family recognises, with what keeps them from it.

A module is listed that projects to queries, lives in windows, and has a bias of relative positions or shifts. Windows
with neither (DaViT's, Hiera's, SAM's), attention over whole images (CoAtNet's, LeViT's) and positions of a class token
(BEiT's) are no Swin's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ...spec.window import WindowSpec
from .common import positional_names, sides
from .traits import SHIFT, WINDOW, Traits, counts, named, settings_of, traits_of

_ABOVE = 3  # so far above an attention may be the block that knows window and shift
_CALLED = ("qkv", "proj", "attn_drop", "proj_drop")


def near_misses(model: nn.Module, recognised: Iterable[nn.Module]) -> Iterator[tuple[str, WindowSpec, str]]:
    """Yield name, facts and reason of each near miss; numbers that are not known are 0.

    Args:
        recognised: the modules that a family knows: they, what is in them and what they are in, are none.
    """
    known = {part for module in recognised for part in module.modules()}
    modules = dict(model.named_modules())
    around = {path for name, module in modules.items() if module in known for path in _above(name)}
    listed: set[str] = set()
    for name, module in modules.items():
        above = _above(name)
        if module in known or name in around or not listed.isdisjoint(above):
            continue
        try:
            found = _judge(module, [modules[path] for path in above[:_ABOVE] if path in modules])
        except Exception:  # a foreign module may answer attribute reads with anything
            continue
        if found is not None:
            listed.add(name)
            yield name, *found


def _above(name: str) -> list[str]:
    """Return the names of all that a module is in, from the inside; "" is the model."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, -1, -1)] if name else []


def _judge(module: nn.Module, above: list[nn.Module]) -> tuple[WindowSpec, str] | None:
    traits = traits_of(module)
    if traits is None or (traits.queries is None and above and getattr(traits_of(above[0]), "queries", None)):
        return None  # no attention, or a part of one
    settings = [traits.settings, *map(settings_of, above)]
    window, shift = (
        next((value for one in settings if (value := named(one, pattern)[1]) is not None), None)
        for pattern in (WINDOW, SHIFT)
    )
    if window is None:
        window = traits.fitting_window()
    if window is None and _has_no_settings(module):
        root = math.isqrt(traits.rows)
        window = (root + 1) // 2 if root * root == traits.rows and root % 2 else None
    axes = sides(window) or ()
    if min(axes, default=0) < 2 or traits.has_class_token(axes) or (traits.positions is None and shift is None):
        return None
    steps = sides(shift) or ()
    steps = steps if len(steps) == len(axes) else (0,) * len(axes)
    width = getattr(traits.children.get("proj"), "in_features", 0)
    head_dim = width // traits.num_heads if traits.num_heads and isinstance(width, int) else 0
    head_dim = head_dim or (traits.settings["head_dim"] if isinstance(traits.settings.get("head_dim"), int) else 0)
    seen = f"relative positions, {traits.positions}" if traits.positions else "windows and shifts"
    if traits.rows in counts(axes):
        seen = f"a relative position bias table of {traits.rows} rows"
    return WindowSpec("unknown", axes, steps, traits.num_heads, head_dim), (
        f"looks like window attention ({seen}), but {_difference(module, traits)}; its own forward runs and its"
        " results are right, and a family of your own (examples/new_variant.py) or swinaccel.functional makes it faster"
    )


def _has_no_settings(module: nn.Module) -> bool:
    """Return True if a module has lost its code, and its settings with it."""
    return type(module) is nn.Module or isinstance(module, torch.jit.ScriptModule)


def _difference(module: nn.Module, traits: Traits) -> str:
    """Return what keeps the families from reading a module: the first thing that does."""
    if _has_no_settings(module):
        return "torch.jit or torch.fx has taken its code, which goes after accelerate() and not before"
    if traits.queries is None:
        return "it has no qkv, the projection that families read"
    if any(isinstance(child, nn.Unfold) for child in traits.children.values()):
        return "its keys come from larger windows than its queries, where kernels take as many of each"
    if traits.queries not in ("qkv", "qkv_bias"):
        return f"its projection is called {traits.queries}, which no family reads here"
    missing = [name for name in _CALLED if name not in traits.children]
    if missing:
        return f"it has no {' and no '.join(missing)}, which families read"
    window, heads = traits.settings.get("window_size"), traits.settings.get("num_heads")
    if window is None:
        name = named(traits.settings, WINDOW)[0]
        return f"its window is called {name}, and not window_size" if name else "it has no window_size of its own"
    if not isinstance(heads, int):
        return "its number of heads is not called num_heads"
    if traits.mlp is None:
        if traits.bias is None:
            return "it has no relative position bias"
        if traits.bias != "relative_position_bias_table":
            return f"its position bias is called {traits.bias}, and not relative_position_bias_table"
        if traits.rows not in counts(window):
            return f"its position bias has {traits.rows} rows, where its windows have {max(counts(window))} positions"
        if tuple(traits.tensors[traits.bias].shape) != (traits.rows, heads):
            return f"its position bias has the shape {tuple(traits.tensors[traits.bias].shape)}, and not (rows, heads)"
    if traits.index != "relative_position_index":
        return "it has no relative_position_index"
    if named(traits.settings, SHIFT)[0] is not None:
        return "it shifts and cuts its windows by itself, as no family does"
    forward = type(module).forward
    arguments = positional_names(forward) if callable(forward) else ()
    if len(arguments) != 2:
        return f"its forward takes ({', '.join(arguments)}), and families read one of windows and a mask"
    return "its parts are not put together as in any family"
