"""Run blocks with products of 8 bits where that was asked for, can be, and errs no more than is allowed.

Nothing of it is silent: what a block errs by is measured on the first input that it gets with the weights that it has,
and stands in the report; so does why a block, or a call, runs without.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.triton.launches import first_line
from ..config import AccelConfig
from ..errors import KernelError
from ..layers import PLAIN_TENSORS, has_hooks, is_builtin
from ..ops import fp8
from ..ops.block import Layer
from ..spec.adapters import reads_attention_blocks
from ..spec.block import Product
from ..spec.window import Section
from .block import DTYPES, HALVES, BlockFacts, FusedBlock, norm_dtype
from .context import product_dtype
from .plan import State, state_of
from .section import TritonSection

logger = logging.getLogger("swinaccel")

fewest_channels = 256  # of a block: with up to 128 the MLP is one kernel; between nothing was measured (docs/notes.md)

_OTHER_DEVICE = "products of 8 bits run by Triton kernels, on NVIDIA GPUs of compute capability 9 or newer"

Read = Callable[[], tuple[Tensor, Tensor | None]]  # weight and bias of now
Run = Callable[..., Any]


@dataclass(slots=True, eq=False)
class Precision:
    """State of one block that was asked to multiply in 8 bits.

    Attributes:
        error: relative L2 error of its output against the block without, on the first input that these weights got.
        reason: why its latest call ran without, or None.
        versions: of the weights that the error belongs to.
        failure: why it cannot run with these weights, where that was tried.
    """

    error: float | None = None
    reason: str | None = None
    versions: list[tuple[int, int, int]] = field(default_factory=list)
    failure: str | None = None

    def become(self, other: Precision) -> None:
        """Know what another one does."""
        self.error, self.reason, self.failure, self.versions = other.error, other.reason, other.failure, other.versions

    def __str__(self) -> str:
        """Return the cell of a report."""
        if self.reason is not None or self.error is None:
            return "model"
        return f"fp8, error {self.error:.1e}"


def note(adapter: Any, module: nn.Module, config: AccelConfig, reason: str | None) -> None:
    """Note why a block does not run as a whole, and so without products of 8 bits, where these were asked for.

    Args:
        reason: None where it is that the device has no kernels.
    """
    if config.precision == "fp8" and reads_attention_blocks(adapter):
        state = state_of(adapter.inner(module)[1])
        known = state.precision = state.precision or Precision()
        known.reason = reason or _OTHER_DEVICE


def run_of(
    plain: FusedBlock, facts: BlockFacts, section: Section, reads: list[Read] | str, x: Tensor, config: AccelConfig,
    state: State, backend: str,
) -> Run:  # fmt: skip
    """Return what runs a fused block where 8 bits are asked for.

    Args:
        plain: the block without.
        section: bound, so that a plan may refer to it.
        reads: the products of its attention, or why they are not known; see `products_of`.
        state: of the attention, as reports show it.
    """
    known = state.precision = state.precision or Precision()
    reason = _reason(facts, section, reads, x, backend)
    if reason is not None or isinstance(reads, str):

        def run(x: Tensor, mask: Tensor | None = None) -> Any:
            known.reason = reason
            return plain.run(x, mask)

        return run
    return _Block(plain, facts, section, reads, config, state, known).run


def products_of(section: Section) -> list[Read] | str:
    """Return the products of a section, one or three before the attention and one behind; or why they are more."""
    found = [_read(one) for one in section.layers or (section.project, section.output)]
    reads = [one for one in found if one is not None]
    return reads if len(reads) == len(found) else "its projections are more than linear layers; merge what they add"


def _read(call: Any) -> Read | None:
    if isinstance(call, Product):
        return call.read
    if is_builtin(call, nn.Linear) and not has_hooks(call):
        return lambda: (call.weight, call.bias)
    return None


def _layers(reads: list[Read], facts: BlockFacts) -> list[Layer]:
    """Return weight and bias of now of all products: of the section's, and of the MLP's."""
    return [*(read() for read in reads), *facts.linears]


def _packed(layers: list[Layer]) -> list[Layer]:
    """Return the same with one product before the attention."""
    *parts, output, fc1, fc2 = layers
    if len(parts) == 1:
        return layers
    weights, biases = zip(*parts, strict=True)
    if all(one is None for one in biases):
        return [(torch.cat(weights), None), output, fc1, fc2]
    filled = [w.new_zeros(len(w)) if one is None else one for w, one in zip(weights, biases, strict=True)]
    return [(torch.cat(weights), torch.cat(filled)), output, fc1, fc2]


def _version(tensor: Tensor) -> tuple[int, int, int]:
    return id(tensor), tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _reason(facts: BlockFacts, section: Section, reads: list[Read] | str, x: Tensor, backend: str) -> str | None:
    """Return why a call runs without products of 8 bits, or None."""
    if backend != "triton":
        return _OTHER_DEVICE
    reason = device_reason(x.device)
    if reason is not None:
        return reason
    if isinstance(reads, str):
        return reads
    if product_dtype(x) not in HALVES:
        return "the model is not in half precision; convert it, or run it under autocast"
    layers = _layers(reads, facts)
    given = [one for pair in (*layers, *facts.norms) for one in pair[:2] if one is not None]
    if any(drop is not None for drop in facts.drops) or section.dropout:
        return "it drops numbers at random in training; call eval()"
    if torch.is_grad_enabled() and (x.requires_grad or any(one.requires_grad for one in (*given, *section.sources))):
        return "gradients are recorded, and products of 8 bits have none; call it inside torch.no_grad()"
    for one in given:
        if type(one) not in PLAIN_TENSORS or one.dtype not in DTYPES or one.device != x.device:
            return "a parameter of it is of another kind, dtype or device than products of 8 bits take"
        if not one.is_contiguous():
            return "a parameter of it is not contiguous, and products of 8 bits take no other"
    width, channels = section.num_heads * section.head_dim, facts.channels
    share = 3 * width // (len(layers) - 3)  # of one product before the attention
    mlp = (facts.hidden, channels), (channels, facts.hidden)
    shapes = [*[(share, channels)] * (len(layers) - 3), (channels, width), *mlp]
    for (weight, bias), shape in zip(layers, shapes, strict=True):
        if tuple(weight.shape) != shape or (bias is not None and tuple(bias.shape) != shape[:1]):
            return "the sizes of its projections do not fit each other"
    if any(side % fp8.MULTIPLE for side in (facts.channels, width, facts.hidden)) or not x.numel():
        return f"its channels are no multiples of {fp8.MULTIPLE}, which products of 8 bits ask for"
    if facts.channels < fewest_channels:
        return f"with fewer than {fewest_channels} channels products of 8 bits take longer"
    return None


@lru_cache(maxsize=16)
def device_reason(device: torch.device) -> str | None:
    """Return why a device has no products of 8 bits, or None."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0):  # which copy tiles by descriptors
        return None
    return _OTHER_DEVICE


def is_captured(x: Tensor) -> bool:
    """Return True if a CUDA graph is being captured, where nothing can be measured."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class _Block:
    """A block that can multiply in 8 bits, for one kind of calls."""

    def __init__(
        self, plain: FusedBlock, facts: BlockFacts, section: Section, reads: list[Read], config: AccelConfig,
        state: State, known: Precision,
    ) -> None:  # fmt: skip
        self._plain, self._facts, self._reads, self._known = plain, facts, reads, known
        self._limit, self._as_output = config.max_error, facts.block.as_output
        self._size, self._section = section.geometry.size, TritonSection(section, config, state)
        self._bound: fp8.BoundBlock | None = None

    def run(self, x: Tensor, mask: Tensor | None = None) -> Any:
        """Return what the block returns: by products of 8 bits, if they were measured and err no more than allowed."""
        known = self._known
        layers = _layers(self._reads, self._facts)
        versions = [_version(weight) for weight, _ in layers]
        if versions != known.versions:
            return self._returned(self._measured(x, mask, layers, versions))
        known.reason = known.failure or self._excess()
        out = self._in_eight(x, mask, layers) if known.reason is None else None
        return self._plain.run(x, mask) if out is None else self._returned(out)

    def _returned(self, out: Tensor) -> Any:
        return out if self._as_output is None else self._as_output(out)

    def _measured(
        self, x: Tensor, mask: Tensor | None, layers: list[Layer], versions: list[tuple[int, int, int]]
    ) -> Tensor:
        """Return what the block gives, and note how far products of 8 bits are from it."""
        known, expected = self._known, self._plain.bare(x, mask)
        if is_captured(x):
            known.reason = "its error was not measured before a CUDA graph is captured; run the model once before"
            return expected
        known.error, known.failure = None, None
        out = self._in_eight(x, mask, layers)
        if out is not None and (out.shape, out.dtype) != (expected.shape, expected.dtype):
            known.reason = known.failure = "products of 8 bits gave another shape or dtype than the block does"
        if out is None or known.failure is not None:
            known.versions = versions
            return expected
        wide = expected.float()
        error = ((out.float() - wide).norm() / wide.norm()).item()
        if not math.isfinite(error):
            known.reason = "its error could not be measured on an output that is zero or not finite"
            return expected
        known.versions, known.error = versions, error
        known.reason = self._excess()
        return out if known.reason is None else expected

    def _excess(self) -> str | None:
        """Return why the block must not multiply in 8 bits, if it errs by more than is allowed."""
        error = self._known.error
        if error is None or error <= self._limit:
            return None
        return f"products of 8 bits err by {error:.1e} of its output on its first input; raise max_error for them"

    def _in_eight(self, x: Tensor, mask: Tensor | None, layers: list[Layer]) -> Tensor | None:
        """Return what the block gives by products of 8 bits; None where these fail, which is noted."""
        facts, attended = self._facts, self._section.attended
        try:
            bound = self._bound = self._bound or self._bind(x)
            image = (x.shape[0], *self._size, -1)
            return bound.run(x, lambda qkv: attended(qkv.view(image), mask=mask), facts.norms, _packed(layers))
        except (torch.OutOfMemoryError, KernelError):
            raise
        except Exception as error:
            reason = f"products of 8 bits failed: {first_line(error)}"
            self._known.failure = self._known.reason = reason
            logger.warning("%s; the block runs without them", reason)
            return None

    def _bind(self, x: Tensor) -> fp8.BoundBlock:
        facts, section = self._facts, self._section.section
        post_norm, width = facts.block.post_norm, section.num_heads * section.head_dim
        total = torch.promote_types(x.dtype, norm_dtype(x)) if post_norm else x.dtype
        sizes, eps = (3 * width, facts.hidden), (facts.norms[0][2], facts.norms[1][2])
        return fp8.BoundBlock(x.shape, x.device, product_dtype(x), total, sizes, eps, post_norm)
