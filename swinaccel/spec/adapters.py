"""Adapters: all that the house asks of a family, and of what reads a module around window attention or beside it."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard

from torch import nn

from .block import Attend, Block, Embedding, Merging, Tokens
from .window import Section, WindowSpec


class Adapter(Protocol):
    """A kind of module of which a method is replaced.

    Attributes:
        name: short, shown in reports and carried in markers.
        method: the method that is replaced.
    """

    name: str
    method: str


class Family(Adapter, Protocol):
    """Adapter of one library's window attention: it recognises, reads and repeats it.

    A family whose module is a whole block may also be an `AttentionBlock`; where the method that runs the block is
    another than `method`, it has that method's name as `block_method`. Where callers set attributes of the module
    before each call, it has their names as `call_settings`. Where calls are given their mask, it may have `mask_of`,
    which returns it, of (module, args, kwargs), as the section takes it where it takes one: calls with masks of one
    form have one plan, so nothing of a section but its mask may depend on the numbers in it. Where a section has
    another one `beside` it, the family has `forward_beside`, which is given (module, attend, beside, *args, **kwargs)
    where kernels run both; `beside` takes an image and its mask, or None for the section's.
    """

    def match(self, module: nn.Module) -> WindowSpec | None:
        """Return the static facts of a module that looks like this family's, by structure; None for any other."""

    def attention(self, module: nn.Module) -> nn.Module:
        """Return the submodule that the section stands in for; hooks anywhere in it make a call run the original."""

    def projections(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """Return the modules in the attention that calls run as modules, token by token, as the original does."""

    def section(self, module: nn.Module, *args: Any, **kwargs: Any) -> Section | str:
        """Return the live facts of a call with these arguments, or one sentence why the original must run."""

    def forward(self, module: nn.Module, attend: Attend, *args: Any, **kwargs: Any) -> Any:
        """Return what the original computes and returns, with `attend` ((B, H, W, C) to the same) for the section."""

    def example(self, module: nn.Module) -> tuple[Any, ...] | list[tuple[Any, ...]]:
        """Return positional arguments of a small call, or of several; each torch.Size becomes a random tensor.

        The module is a copy, which may be prepared for the calls.
        """


class BlockReader(Adapter, Protocol):
    """Adapter of a module that may run in fewer kernels as a whole: a block, a patch merging, a patch embedding."""

    def block(self, module: nn.Module) -> Block | Embedding | Merging:
        """Return what a module consists of."""

    def tokens(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tokens:
        """Return the input of a call with these arguments, and the size of its image."""

    def example(self, module: nn.Module) -> tuple[Any, ...] | list[tuple[Any, ...]]:
        """Return what the probe calls it with, as a family does."""


class AttentionBlock(BlockReader, Protocol):
    """Adapter of a block around window attention."""

    def inner(self, module: nn.Module) -> tuple[Family, nn.Module]:
        """Return the family and the module that the section of its attention belongs to."""

    def attend(self, module: nn.Module) -> Attend:
        """Return its attention, (B, H, W, C) to the same; needed where the section is another method's or module's."""


class BlockAdapter(BlockReader, Protocol):
    """A module around window attention, or beside it, that is no family's."""

    def match(self, module: nn.Module) -> bool:
        """Return True if a module looks like one."""


def is_family(adapter: Adapter) -> TypeGuard[Family]:
    """Return True if an adapter reads a window attention's section."""
    return hasattr(adapter, "section")


def reads_blocks(adapter: Adapter) -> TypeGuard[BlockReader]:
    """Return True if an adapter reads modules that may run in fewer kernels as a whole."""
    return hasattr(adapter, "block")


def reads_attention_blocks(adapter: Adapter) -> TypeGuard[AttentionBlock]:
    """Return True if those are blocks around window attention."""
    return hasattr(adapter, "inner")


def block_method(adapter: Adapter) -> str:
    """Return the name of the method that runs the whole module."""
    return getattr(adapter, "block_method", adapter.method)


def call_settings(adapter: Adapter) -> tuple[str, ...]:
    """Return the names of attributes that callers set before each call."""
    return getattr(adapter, "call_settings", ())
