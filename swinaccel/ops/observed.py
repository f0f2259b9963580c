"""Tell whether operators are observed: by compilers, modes, profilers, exporters."""

from __future__ import annotations

import sys

import torch

# Without a Python function between, for calls that no compiler traces.
count_modes, is_profiled = torch._C._len_torch_dispatch_stack, torch.autograd._profiler_enabled


def is_observed() -> bool:
    """Return True if a compiler, a mode or a profiler observes operators now."""
    return torch.compiler.is_compiling() or count_modes() > 0 or is_profiled()


def is_onnx_export() -> bool:
    """Return True inside torch.onnx.export; its graphs are of the originals, since ONNX has no Triton kernels."""
    onnx = sys.modules.get("torch.onnx")  # who exports has imported it
    return onnx is not None and onnx.is_in_onnx_export()


# Dynamo takes that function of PyTorch's for False; as torch.compiler.assume_constant_result, without its import.
is_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]
