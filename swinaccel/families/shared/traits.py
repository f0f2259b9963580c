"""Traits of window attention in a module of unknown code, by names and shapes; no tensor's numbers are read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...spec.window import Axes
from .common import sides

QUERIES = re.compile(r"qkv|in_proj|(^|_)(q|kv|query|queries)(_|$)|^wq$")
WINDOW = re.compile(r"(local_|attn_|attention_)?(win|windows?|partition|stripe)(_?(sizes?|shape|resolution))?|ws|wsize")
SHIFT = re.compile(r"(window_)?shift(s|ed)?(_?(sizes?|windows?))?")
HEADS = re.compile(r"(num|n|nb)_?(attention_)?heads?|heads")
_RELATIVE = re.compile(r"rel\w*(pos|bias|table)|pos\w*(bias|table)|rpb|rpe|bias_table")
_BIAS = re.compile(rf"{_RELATIVE.pattern}|attention_bias(es)?$")
_INDEX = re.compile(r"(rel|pos|bias)\w*(index|idx)|rpi")
_MLP = re.compile(r"cpb|continuous_position|meta_mlp|(rel|pos)\w*mlp")
_OTHER_SIZES = re.compile(r"dim|chan|head|kernel|stride|dilation|depth|layer|feat|embed|scale")


@dataclass(frozen=True)
class Traits:
    """A module that may be an attention.

    Attributes:
        queries: the name of its projection to queries, or to queries, keys and values; None without.
        children: by name.
        settings: its numbers, and its pairs and triples of numbers.
        num_heads: 0 where that is not known.
        tensors: its own tensors and its children's, by name.
        bias, index, mlp: the names of relative positions: numbers, or an MLP that computes them, and their index.
        rows: how many relative positions the numbers are of; 0 without.
    """

    queries: str | None
    children: dict[str, nn.Module]
    settings: dict[str, Any]
    num_heads: int
    tensors: dict[str, Tensor]
    bias: str | None
    index: str | None
    mlp: str | None
    rows: int

    @property
    def positions(self) -> str | None:
        return self.mlp or self.bias or self.index

    def fitting_window(self) -> Any:
        """Return the setting, under whatever name, that is the window of the table's rows; None without."""
        if self.bias is None or not _RELATIVE.search(self.bias):
            return None
        sizes = (value for name, value in self.settings.items() if not _OTHER_SIZES.search(name))
        return next((value for value in sizes if self.rows in counts(value)), None)

    def has_class_token(self, window: Axes) -> bool:
        """Return True if positions are also those of a token that is in no window."""
        count, tokens = max(counts(window)), math.prod(window)
        index = 0 if self.index is None else self.tensors[self.index].numel()
        return 0 < self.rows - count <= 3 or index == (tokens + 1) ** 2


def traits_of(module: nn.Module) -> Traits | None:
    """Return what a module shows, or None where it is no attention."""
    own, children = _tensors(module), {name: child for name, child in module._modules.items() if child is not None}
    queries = [name for name in (*children, *own) if QUERIES.search(name)]
    if not queries and not (children and any(_RELATIVE.search(name) for name in dict(module._parameters))):
        return None  # a table alone is a part of an attention
    inner = {name: child for name, child in children.items() if not isinstance(child, (nn.Linear, nn.Sequential))}
    tensors = {**own, **{f"{name}.{key}": one for name, child in inner.items() for key, one in _tensors(child).items()}}
    floating = {name: one.is_floating_point() for name, one in tensors.items()}
    mlp = next(
        (name for name, child in children.items() if _MLP.search(name) and any(True for _ in child.children())), None
    )
    settings = settings_of(module)
    heads = named(settings, HEADS)[1]
    num_heads = heads if isinstance(heads, int) else 0
    sizes = set().union(*(counts(value) for name, value in settings.items() if WINDOW.fullmatch(name)))
    wide = {name: one for name, one in tensors.items() if floating[name] and one.dim() > 1}
    tables = [name for name, one in wide.items() if _BIAS.search(name) and num_heads in (0, *one.shape)]
    tables += [name for name, one in wide.items() if num_heads in one.shape and _rows(one, num_heads) in sizes]
    bias = next(iter(tables), None) if mlp is None else None
    return Traits(
        queries=min(queries, key=lambda name: (name != "qkv", "qkv" not in name), default=None),
        children=children,
        settings=settings,
        num_heads=num_heads,
        tensors=tensors,
        bias=bias,
        index=next((name for name in tensors if not floating[name] and _INDEX.search(name)), None),
        mlp=mlp,
        rows=0 if bias is None else _rows(tensors[bias], num_heads),
    )


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Return a module's numbers, and its pairs and triples of numbers, by name."""
    values = ((name.strip("_"), value) for name, value in vars(module).items() if type(value) in (int, tuple, list))
    return {name: value for name, value in values if sides(value) is not None}


def named(settings: dict[str, Any], pattern: re.Pattern[str]) -> tuple[str | None, Any]:
    """Return the first setting that is called so, with its name; None and None without."""
    return next(((name, value) for name, value in settings.items() if pattern.fullmatch(name)), (None, None))


def counts(window: Any) -> set[int]:
    """Return how many relative positions windows of these sides have; of one number, in images and in volumes."""
    if isinstance(window, int):
        return {(2 * window - 1) ** 2, (2 * window - 1) ** 3}
    return {math.prod(2 * side - 1 for side in window)}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    pairs = [*module._parameters.items(), *module._buffers.items(), *vars(module).items()]
    return {name: one for name, one in pairs if isinstance(one, Tensor) and not is_lazy(one)}


def _rows(table: Tensor, num_heads: int) -> int:
    """Return how many positions a table knows, in any layout; without the number of heads its first axis counts."""
    shape = [length for length in table.shape if length != 1]
    if num_heads > 1 and num_heads in shape:
        shape.remove(num_heads)
        return math.prod(shape)
    return math.prod(shape) if num_heads == 1 else table.shape[0]
