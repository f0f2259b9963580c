"""Protocols: all that the rest of the house asks of a family, and of an adapter of whole blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from ..spec.block import Block, Embedding, Merging, Tokens
from ..spec.window import Section, WindowSpec

Attend = Callable[[Tensor], Tensor]


class Family(Protocol):
    """How one library's window attention is recognised, read and repeated.

    A family whose module is a whole block may also be a `BlockAdapter`; where the method that runs the block is another
    than `method`, it has that method's name as `block_method`.

    Attributes:
        name: short, shown in reports and carried in markers.
        method: the method that is replaced.
        call_settings: where there is such, the names of attributes that callers set before each call.
    """

    name: str
    method: str

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


class BlockAdapter(Protocol):
    """A module around window attention, or beside it: a block, a patch merging, a patch embedding.

    A block also has `inner(module)`: the family and the module that its attention's section belongs to. Where those are
    not the block's own, it has `attend(module)`: what stands for its attention, (B, H, W, C) to the same.
    """

    name: str
    method: str

    def match(self, module: nn.Module) -> bool:
        """Return True if a module looks like one."""

    def block(self, module: nn.Module) -> Block | Embedding | Merging:
        """Return what a module consists of."""

    def tokens(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tokens:
        """Return what a call with these arguments is about."""

    def example(self, module: nn.Module) -> tuple[Any, ...] | list[tuple[Any, ...]]:
        """Return what the probe calls it with, as a family does."""
