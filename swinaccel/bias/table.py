"""SVD factors of the relative position bias (FlashBias, Wu et al. 2025, arXiv:2505.12044), cached and never stale.

A bias (heads, N, N) of low rank is q_factor · k_factorᵀ with factors (heads, N, R), which a kernel appends to q and
k: the bias then costs a slightly longer dot product and no element-wise work. The factors carry the table and index
they were made from; the kernel compares those with the live ones at every call and uses the live table where
anything differs, so an edit by whatever means costs speed, never correctness.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..config import AccelConfig
from ..spec import reference
from ..spec.window import Section
from . import cache
from .factors import factorize

RANKS = (16, 32, 64, 128)  # what the kernel's dot product takes
MIN_TOKENS = 65  # smaller windows keep the whole bias in registers
FOLDER = "factors"  # of the cache
_FORMAT = "3"
_HEADER = 4096  # bytes of a record beside its numbers, and more


@dataclass(frozen=True)
class Factors:
    """Factors of one module's bias.

    Attributes:
        q, k: (heads, N, R).
        table, index: what they were made from, copies.
        rank: R before its padding to what the kernel takes.
        error: largest absolute error of the reconstructed bias, natural units.
    """

    q: Tensor
    k: Tensor
    table: Tensor
    index: Tensor
    rank: int
    error: float

    def describe(self) -> str:
        return f"factors, rank {self.rank}, error {self.error:.1e}"


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def factors(section: Section, config: AccelConfig, dtype: torch.dtype) -> Factors | None:
    """Return the factors that a call may use, made at the first request, or None where the live table serves.

    Args:
        section: of a call in inference.
        config: its `bias` and `bias_energy` choose the rule.
        dtype: the compute dtype.
    """
    if section.table is None or section.index is None or section.geometry.tokens < MIN_TOKENS or not wanted(config):
        return None
    key = (*map(_version, (*section.sources, section.index)), dtype, config.bias, config.bias_energy)
    per_source = _known.get(section.sources[0])
    if per_source is None or per_source[0] != key:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None  # computing factors waits for the device, which a capture forbids
        with torch.no_grad():
            made = _load_or_make(section, dtype, config.bias_energy)
        _known[section.sources[0]] = per_source = (key, made)
    return per_source[1]


def wanted(config: AccelConfig) -> bool:
    """Return True if these options ask for factors.

    "auto" alone does not: the exact dense bias was faster than factors of the lowest rank on every shape measured
    (docs/notes.md).
    """
    return config.bias == "factors" or (config.bias == "auto" and config.bias_energy is not None)


def forget() -> None:
    """Drop all factors held in memory."""
    _known.clear()


def _version(tensor: Tensor) -> tuple:
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tuple(tensor.shape), tensor.dtype, tensor.device


def _load_or_make(section: Section, dtype: torch.dtype, energy: float | None) -> Factors | None:
    assert section.table is not None
    assert section.index is not None
    table, index = section.table().detach(), section.index
    if table.dim() != 2:  # rows of windows have biases of their own, which kernels take as they are
        return None
    bias = reference.bias_from_table(table, index).float()
    if not bool(torch.isfinite(bias).all()):
        return None
    record = _record_path((*section.sources, index), table, dtype, energy)
    found = None if record is None else _read(record, bias, dtype, energy)
    if found is None:
        found = _make(bias, dtype, energy)
        if record is not None:
            q, k = (factor.cpu().contiguous() for factor in found)
            cache.keep(record, safetensors.torch.save({"q": q, "k": k}))
    q, k = found
    if not q.shape[-1]:
        return None
    error = (bias - q.float() @ k.float().mT).abs().max().item()
    return Factors(q, k, table.clone().contiguous(), index.clone().contiguous(), q.shape[-1], error)


def _make(bias: Tensor, dtype: torch.dtype, energy: float | None) -> tuple[Tensor, Tensor]:
    """Return q and k by the rule of `AccelConfig.bias_energy`; of rank 0 where none is good enough."""
    stored = _stored_dtype(dtype)
    for rank in (rank for rank in RANKS if rank <= bias.shape[-1]):
        try:
            q, k = (factor.to(stored).contiguous() for factor in factorize(bias, rank))
        except torch.linalg.LinAlgError:  # numbers so large that their products are not finite
            break
        if _enough(bias, q, k, dtype, energy):
            return q, k
    empty = bias.new_empty((*bias.shape[:2], 0), dtype=stored)
    return empty, empty


def _stored_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float32 else torch.float16


def _enough(bias: Tensor, q: Tensor, k: Tensor, dtype: torch.dtype, energy: float | None) -> bool:
    """Return True if factors hold as much of a bias as the rule wants; NaN is never enough."""
    missed = bias - q.float() @ k.float().mT
    if energy is None:
        return bool(missed.abs().max() <= bias.abs().max() * torch.finfo(dtype).eps / 2)
    missed_energy, whole = (one.double().square().sum((-2, -1)) for one in (missed, bias))  # fp32 may overflow
    return bool((missed_energy <= (1 - energy) * whole).all())


def _record_path(tensors: tuple[Tensor, ...], table: Tensor, dtype: torch.dtype, energy: float | None) -> Path | None:
    """Return the place of factors, named by the contents of what the bias is computed from: the same on every device.

    Families compute tables from the same in several ways: two digits of its largest number tell those apart, and are
    no matter of a device's rounding.
    """
    folder = cache.folder_of(FOLDER)
    if folder is None:
        return None
    digest = hashlib.sha256(json.dumps([_FORMAT, str(dtype), energy, f"{table.abs().max().item():.1e}"]).encode())
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return folder / f"{digest.hexdigest()}.safetensors"


def _read(path: Path, bias: Tensor, dtype: torch.dtype, energy: float | None) -> tuple[Tensor, Tensor] | None:
    """Return the q and k of a record, or None where there is none that could have been made for this bias."""
    content = cache.read(path, 2 * bias.shape[0] * bias.shape[1] * RANKS[-1] * 4 + _HEADER)
    if content is None:
        return None
    try:
        found = safetensors.torch.load(content)
        q, k = found["q"], found["k"]
        rank = q.shape[-1]
        fits = rank in (0, *RANKS) and all(
            one.dtype == _stored_dtype(dtype) and one.shape == (*bias.shape[:2], rank) for one in (q, k)
        )
        if fits:
            q, k = q.to(bias.device), k.to(bias.device)
            fits = rank == 0 or _enough(bias, q, k, dtype, energy)
    except Exception:  # whatever a file may hold that is no record
        fits = False
    if not fits:
        cache.tell_once(f"the record {path} does not hold factors of this bias, and is made anew")
        return None
    return q, k
