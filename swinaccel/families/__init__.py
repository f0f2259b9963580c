"""The libraries that swinaccel knows: one file for each, found by structure and never by name.

A family recognises a module by its attributes and shapes, reads the live facts of a call off it, and repeats what
the original does around the section. To add one, write a class with the members of `Family` and append it to
FAMILIES (see examples/new_variant.py); before a class of modules is trusted it is probed against its own forward.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers import is_wrapper
from ..spec.adapters import Adapter, BlockAdapter, BlockReader, Family
from ..spec.window import WindowSpec
from .adapters import Captured, Outermost, PatchMerging, TorchvisionBlock
from .aurora import Aurora
from .detection import Detection, ShiftWindowMSA
from .earth import Earth
from .embedding import Embeddings, PatchEmbed
from .huggingface import HuggingFaceSwin
from .huggingface_attention import HuggingFaceAttention
from .huggingface_legacy import HuggingFaceSwinLegacy
from .microsoft import Microsoft
from .mutual import Mutual
from .rectangles import Rectangles
from .renamed import Renamed
from .restoration import Hat, Rolling, SwinIR
from .timm import Timm
from .timm_cr import TimmCr
from .torchvision import Torchvision, Torchvision3d
from .video import Video
from .window_attention import WindowAttention

# A module is the first's that recognises it: attention by itself comes last.
FAMILIES: list[Family] = [
    Timm(), TimmCr(), Torchvision(), Torchvision3d(), HuggingFaceSwin(), HuggingFaceSwinLegacy(), Microsoft(), SwinIR(),
    Rolling(), Hat(), Detection(), ShiftWindowMSA(), Video(), Aurora(), Earth(), Rectangles(), WindowAttention(),
    HuggingFaceAttention(), Renamed(), Mutual(),
]  # fmt: skip
BLOCK_ADAPTERS: list[BlockAdapter] = [TorchvisionBlock(), PatchMerging(), PatchEmbed(), Embeddings()]
CAPTURED, OUTERMOST = Captured(), Outermost()


def examples(family: Family | BlockReader, module: nn.Module) -> list[tuple[Any, ...]]:
    """Return every example call of a module of this family."""
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


def by_name(name: str) -> Adapter | None:
    """Return the family or block adapter of that name, or None (a marker may come from another version)."""
    everything: list[Adapter] = [*FAMILIES, *BLOCK_ADAPTERS, CAPTURED, OUTERMOST]
    return next((family for family in everything if family.name == name), None)
