"""Do what AOTInductor does with a model first, for a GPU that is not there: `python tests/fake_gpu.py`.

Tensors are fake ones of a CUDA device. Prints what is left of a program in JSON: the operators of swinaccel, and of
each kernel its name, its grid, and the arguments that its source writes to, as the compiler copied it. Not for pytest's
own process, where the kernels are interpreted.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ahead
import helpers
import torch
from torch import nn
from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table
from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import swinaccel
from swinaccel import functional

HALF, DEVICE = torch.bfloat16, torch.device("cuda:0")


def pretend() -> None:
    """Answer as a GPU of compute capability 9.0 would, to what launches are planned from."""
    properties = SimpleNamespace(shared_memory_per_block_optin=227 << 10, multi_processor_count=132)
    torch.cuda.get_device_properties = lambda *_: properties  # type: ignore[assignment,return-value]
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))


def program(model: nn.Module, *sizes: tuple[int, ...], dynamic: int | None = None) -> Any:
    """Return a program of a model on the GPU, for inputs of such sizes, whose axis `dynamic` may have any."""
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        for module in model.modules():
            for name, one in module._parameters.items():
                if one is not None:
                    module._parameters[name] = nn.Parameter(torch.empty_like(one, device=DEVICE), requires_grad=False)
            for name, one in module._buffers.items():
                module._buffers[name] = None if one is None else torch.empty_like(one, device=DEVICE)
        inputs = [torch.empty(size, dtype=HALF, device=DEVICE) for size in sizes]
    shapes = None if dynamic is None else tuple({dynamic: torch.export.Dim("any", min=2, max=2048)} for _ in sizes)
    with torch.no_grad():
        return torch.export.export(model, tuple(inputs), dynamic_shapes=shapes, strict=False)


def left(program: Any, packaging: bool = True) -> dict[str, Any]:
    """Return what a program consists of when the compiler gets it."""
    with V.set_aot_compilation(True) if packaging else nullcontext():
        graph = program.run_decompositions({}, decompose_custom_triton_ops=True).graph
    operators = sorted(str(node.target) for node in graph.nodes if "swinaccel" in str(node.target))
    kernels = [_kernel(node) for node in graph.nodes if "triton_kernel" in str(node.target)]
    return {"operators": operators, "kernels": kernels}


def _kernel(node: Any) -> tuple[str, list[str], list[str]]:
    kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    kernel = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel
    values = {name: getattr(one, "meta", {}).get("val", one) for name, one in node.kwargs["kwargs"].items()}
    source = user_defined_triton_kernel_transitive_closure_source_code(kernel)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "copied.py")
        path.write_text(f"import triton\nimport triton.language as tl\n@triton.jit\n{source}")
        spec: Any = importlib.util.spec_from_file_location("copied", path)
        copied = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copied)
        place = kernel_side_table.add_kernel(getattr(copied, kernel.__name__))
        written = get_mutated_tensors(place, node.kwargs["constant_args_idx"], values, {})
    return kernel.__name__, [str(one) for one in node.kwargs["grid"][0]], sorted(map(str, written))


def doubles() -> list[str]:
    """Return the kernels that compute tiles in fp64 where their numbers come so."""
    posed = (
        lambda: ahead.window((2, 2), 16, HALF, "padded dropout"),
        lambda: ahead.window((9, 9), 16, HALF, "mask padded dropout"),
        lambda: ahead.mlp(32),
        lambda: ahead.sequence(16, 0, HALF, HALF, True),
    )
    launches = [one for plan in posed for one in ahead.launched(plan, "sm_90") if "bwd" not in one[0].kernel.__name__]
    compiled = [(one[0], ahead.compile_launch(*one, ahead.GPUS["sm_90"][0], "fp64")) for one in launches]
    return [launch.kernel.__name__ for launch, one in compiled if re.search(r"tensor<[^>]*f64", one.asm["ttir"])]


class Rest(nn.Module):
    """All of a block after its attention, by the operator."""

    def __init__(self, channels: int, post_norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.post_norm = post_norm

    def forward(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        norms = [(one.weight, one.bias, one.eps) for one in (self.norm1, self.norm2)]
        layers = [(one.weight, one.bias) for one in (self.fc1, self.fc2)]
        return torch.ops.swinaccel.after_attention(
            x, branch, *norms[0], *norms[1], *layers[0], *layers[1], self.post_norm
        )


class Attention(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return functional.block_sliding_window_attention(q, q, q, block_size=64, window_blocks=2)


def main() -> None:
    pretend()
    sizes = {"depths": (2,), "num_heads": (2,), "embed_dim": 64}
    small = swinaccel.accelerate(helpers.timm_v1(img_size=56, **sizes).eval().to(HALF), backend="triton")
    large = swinaccel.accelerate(helpers.timm_v2(img_size=96, window=12, **sizes).eval().to(HALF), backend="triton")
    fixed = program(small, (8, 3, 56, 56))
    rows, many = [(4, 49, 512)] * 2, [(512, 49, 64)] * 2
    found = {
        "doubles": doubles(),
        "small": left(fixed),
        "exported": left(fixed, packaging=False),
        "any batch": left(program(small, (8, 3, 56, 56), dynamic=0)),
        "large": left(program(large, (64, 3, 96, 96))),
        "rest": left(program(Rest(512, False).to(HALF), *rows)),
        "rest, post-norm": left(program(Rest(512, True).to(HALF), *rows, dynamic=0)),
        "rest in one": left(program(Rest(64, False).to(HALF), *many, dynamic=0)),
        "any length": left(program(Attention(), (2, 2, 256, 64), dynamic=2)),
        "sequence": left(program(Attention(), (2, 2, 256, 64))),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
