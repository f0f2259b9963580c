"""Where a graph is made that cannot hold operators of ours."""

from __future__ import annotations

import sys


def is_onnx_export() -> bool:
    """Return True inside torch.onnx.export; its graphs are of the originals, since ONNX has no Triton kernels."""
    onnx = sys.modules.get("torch.onnx")  # who exports has imported it
    return onnx is not None and onnx.is_in_onnx_export()


# Dynamo takes that function of PyTorch's for False; as torch.compiler.assume_constant_result, without its import.
is_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]
