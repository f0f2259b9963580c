"""Tell whether a call must be visible as an operator."""

from __future__ import annotations

import torch


def is_observed() -> bool:
    """Return True if anyone but the device looks at operators now: a compiler, a mode, a profiler."""
    return (
        torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or torch.autograd._profiler_enabled()
    )
