"""Read off a device what launches depend on."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch

from .checks import DTYPES

_INSTALLED = find_spec("triton") is not None


def unsupported_reason(device: torch.device, dtypes: tuple[torch.dtype, ...], interpret: bool) -> str | None:
    """Return why no kernel can run on a device with numbers of such dtypes, as one sentence, or None."""
    if not _INSTALLED:
        return "Triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and interpret):
        return f"the Triton kernels run on CUDA devices, not on {device.type}"
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"the Triton kernels take fp16, bf16 and fp32, not {dtype}"
    if interpret and torch.bfloat16 in dtypes:
        return "Triton's interpreter takes the bits of a bfloat16 for an integer when it multiplies"
    return None


@lru_cache(maxsize=16)
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return 1 << 17
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; 1 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache(maxsize=16)
def has_copy_engine(device: torch.device) -> bool:
    """Return True if a device copies tiles by descriptors, and is of the kind that this was measured on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def are_few(device: torch.device, rows: int, channels: int) -> bool:
    """Return True if tokens are so few for a device that what counts is how soon one kernel follows another."""
    if isinstance(rows, torch.SymInt) or not has_copy_engine(device):
        return False
    from ...kernels import fusion_launch

    return fusion_launch.are_few(rows, channels)


def are_dependent(device: torch.device, rows: int, channels: int) -> bool:
    """Return True if kernels of so many tokens are launched before the last one has ended; no interpreter does that."""
    return device.type == "cuda" and are_few(device, rows, channels)


def precision(dtype: torch.dtype) -> str:
    """Return how a product of fp32 tiles is computed: by TF32 exactly where PyTorch's own products would be."""
    if dtype != torch.float32:
        return "ieee"
    try:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:  # the process configures precision through torch.backends.*.fp32_precision
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
