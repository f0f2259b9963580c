"""The libraries that swinaccel knows: one file for each, found by structure and never by name.

A family recognises a module by its attributes and shapes, reads the live facts of a call off it, and repeats what
the original does around the section. To add one, write a class with the members of `Family` and append it to
FAMILIES (see examples/new_variant.py); before a class of modules is trusted it is probed against its own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from ..layers import is_wrapper
from ..spec.block import Block, Embedding, Merging, Tokens
from ..spec.window import Section, WindowSpec
from .around import PatchMerging, TorchvisionBlock
from .detection import Detection, ShiftWindowMSA
from .embedding import Embeddings, PatchEmbed
from .huggingface import HuggingFaceSwin
from .huggingface_legacy import HuggingFaceSwinLegacy
from .microsoft import Microsoft
from .restoration import Hat, SwinIR
from .timm import Timm
from .timm_cr import TimmCr
from .torchvision import Torchvision, Torchvision3d
from .video import Video
from .window_attention import WindowAttention

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


# A module is the first's that recognises it: attention by itself comes last.
FAMILIES: list[Family] = [
    Timm(),
    TimmCr(),
    Torchvision(),
    Torchvision3d(),
    HuggingFaceSwin(),
    HuggingFaceSwinLegacy(),
    Microsoft(),
    SwinIR(),
    Hat(),
    Detection(),
    ShiftWindowMSA(),
    Video(),
    WindowAttention(),
]


BLOCK_ADAPTERS: list[BlockAdapter] = [TorchvisionBlock(), PatchMerging(), PatchEmbed(), Embeddings()]


def examples(family: Any, module: nn.Module) -> list[tuple[Any, ...]]:
    """Yield every call that shows what a module of this family does."""
    found = family.example(module)
    return found if isinstance(found, list) else [found]


def match(module: nn.Module) -> tuple[Family, WindowSpec] | None:
    """Return the first family that recognises the module, and what it is; None for a proxy of another module, too."""
    if is_wrapper(module):
        return None
    for family in FAMILIES:
        try:
            spec = family.match(module)
            if spec is not None and not is_wrapper(family.attention(module)):
                return family, spec
        except Exception:  # a foreign module may answer attribute reads with anything
            continue
    return None


def block_adapter(module: nn.Module) -> BlockAdapter | None:
    """Return the adapter of a module around window attention that is no family's, or None."""
    if is_wrapper(module):
        return None
    for adapter in BLOCK_ADAPTERS:
        try:
            if adapter.match(module) and not is_wrapper(getattr(adapter.block(module), "attention", module)):
                return adapter
        except Exception:  # as above
            continue
    return None


def by_name(name: str) -> Any:
    """Return the family or block adapter of that name, or None (a marker may come from another version)."""
    everything: list[Any] = [*FAMILIES, *BLOCK_ADAPTERS]
    return next((family for family in everything if family.name == name), None)
