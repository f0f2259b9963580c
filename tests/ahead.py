"""Compile the kernels for GPUs that are not there: `python tests/ahead.py [all]`.

Calls are planned on the CPU for an assumed limit of shared memory; what would be launched is compiled instead. One
JSON object a line: the problem, the kernel, the GPU, the limit, and the shared memory that one program takes, or an
error. Without "all", a selection. Not for pytest's own process, where the kernels are interpreted.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fused_calls
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from swinaccel.backends.triton import block as triton_block
from swinaccel.backends.triton import devices, launches, linear8, quantise
from swinaccel.backends.triton import linear as triton_linear
from swinaccel.backends.triton import sequence as triton_sequence
from swinaccel.backends.triton import window as window_launches
from swinaccel.backends.triton import window_bwd as window_bwd_launches
from swinaccel.backends.triton.problem import Operands
from swinaccel.spec.reference import shift_mask
from swinaccel.spec.window import Geometry

KIB = 1024
# Name: target, and the most shared memory of one program.
GPUS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),  # A100
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * KIB),  # RTX 30; sm_89 is as small
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_90 twice": (GPUTarget("cuda", 90, 32), 113 * KIB),  # two programs on a multiprocessor
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),  # MI300
}
NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
}
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
EIGHT = torch.float8_e4m3fn
COMPILED = "window", "sequence", "mlp", "norm", "embed", "linear", "linear8", "quantise"  # kernels, by their first word

# Window, head_dim, dtype, and what else there is. The largest tiles of each kernel, and what costs memory beside them.
# Two of each are of the same kernels, since a head_dim of 128 in fp32 is too much for those of small windows. The third
# has a bias for each row of windows.
WINDOWS = {
    "sm_86": [
        ((16, 16), 64, FP16, "mask"),
        ((12, 12), 128, FP32, "cosine"),
        ((9, 8), 32, FP16, "mask rows"),
        ((24, 24), 32, BF16, "cosine"),
    ],
    "gfx942": [((16, 16), 64, FP16, "mask"), ((8, 8), 128, FP32, "cosine"), ((7, 7), 32, BF16, "rows")],
}
SEQUENCES = [(128, 64, FP16, FP32, True)]  # head_dim, rank, dtype, dtype of factors, mask
MLPS = [128]  # channels
EMBEDDINGS = [512]  # channels


def everything() -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    windows_and_sizes = itertools.product(
        [(2, 2), (7, 7), (8, 8), (9, 8), (12, 12), (16, 16), (24, 24), (2, 7, 7), (8, 7, 7)],
        [16, 32, 64, 96, 128],
        [FP16, BF16, FP32],
        ["", "mask padded", "cosine padded dropout", "cosine"],
    )
    sequences = [
        (head_dim, rank, dtype, factor_dtype, mask)
        for head_dim, rank, dtype, mask in itertools.product([16, 64, 128], [0, 16, 64], [FP16, FP32], [False, True])
        for factor_dtype in dict.fromkeys((dtype, FP32))
    ]
    return list(windows_and_sizes), sequences, [32, 96, 128], [96, 128, 192, 512]


def launched(plan: Any, gpu: str) -> list[tuple[Any, tuple]]:
    """Return the launches that a plan would make on such a GPU, with their tensors."""
    target, limit = GPUS[gpu]
    found = []
    plain, hip = launches.Launch.__call__, torch.version.hip
    own = devices.shared_memory, devices.has_copy_engine

    def note(launch: Any, *tensors: Any) -> None:
        found.append((launch, tensors))

    launches.Launch.__call__ = note  # type: ignore[method-assign]
    devices.shared_memory = lambda device: limit
    devices.has_copy_engine = lambda device: False
    launches.launches.clear()
    torch.version.hip = "assumed" if target.backend == "hip" else None
    try:
        plan()
    finally:
        torch.version.hip = hip
        launches.Launch.__call__ = plain  # type: ignore[method-assign]
        devices.shared_memory, devices.has_copy_engine = own
    return found


def window(shape: tuple[int, ...], head_dim: int, dtype: torch.dtype, flags: str) -> None:
    """Pose forward and backward of windows, and in inference with factors of the bias."""
    heads, batch, tokens = 2, 4, torch.Size(shape).numel()
    size = tuple(2 * side - ("padded" in flags) for side in shape)
    geometry = Geometry(size, shape, tuple(side // 2 for side in shape), False)
    channels = heads * head_dim
    qkv = torch.zeros(batch, *size, 3 * channels, dtype=dtype)
    biases = (2, heads) if "rows" in flags else (heads,)
    table = torch.zeros(torch.Size(2 * side - 1 for side in shape).numel(), *biases, dtype=dtype)
    index = torch.zeros(tokens, tokens, dtype=torch.int64)
    call = Operands(
        qkv, None, None, table, index,
        padding=torch.zeros(3 * channels, dtype=dtype) if "padded" in flags else None,
        mask=shift_mask(geometry, -100.0) if "mask" in flags else None,
        logit_scale=torch.zeros(heads) if "cosine" in flags else None,
        seed=torch.zeros(1, dtype=torch.int64) if "dropout" in flags else None,
        num_heads=heads, window=geometry.window, shift=geometry.shift, roll_first=False, mask_value=-100.0, scale=0.1,
        dropout=0.1 if "dropout" in flags else 0.0,
    )  # fmt: skip
    out, lse = window_launches.shifted_window_attention(call, geometry, for_backward=True)
    window_bwd_launches.shifted_window_attention_backward(torch.zeros_like(out), out, lse, call, geometry, True)
    if tokens > 64 and "rows" not in flags:
        kept = FP32 if dtype == FP32 else FP16
        factors = (*(torch.zeros(heads, tokens, 128, dtype=kept) for _ in range(2)), table.clone(), index.clone())
        window_launches.shifted_window_attention(call, geometry, factors)


def sequence(head_dim: int, rank: int, dtype: torch.dtype, factor_dtype: torch.dtype, has_mask: bool) -> None:
    q, k, v = (torch.zeros(1, 2, 300, head_dim, dtype=dtype) for _ in range(3))
    factors = (torch.zeros(2, 300, rank, dtype=factor_dtype) for _ in range(2)) if rank else (None, None)
    given = triton_sequence.Operands(q, k, v, *factors, torch.zeros(1, 300, 300) if has_mask else None)
    problem = triton_sequence.Problem(False, 0, 1, 0.1)
    out, lse = triton_sequence.forward(given, problem)
    triton_sequence.backward(torch.zeros_like(out), given, out, lse, problem, rank > 0)


def mlp(channels: int) -> None:
    x, norm = torch.zeros(256, channels, dtype=FP16), torch.zeros(channels, dtype=FP16)
    up, down = torch.zeros(4 * channels, channels, dtype=FP16), torch.zeros(channels, 4 * channels, dtype=FP16)
    if triton_block.mlp_launch(x.device, x.dtype, channels, 4 * channels) is not None:
        fused_calls.mlp(x, x, (norm, norm, 1e-5), (up, None), (down, None))


def linear_gelu(channels: int, rows: int) -> None:
    """Pose a product with GELU, of which two programs are to share a multiprocessor."""
    from swinaccel.kernels import fusion_launch

    x, up = torch.zeros(rows, channels, dtype=BF16), torch.zeros(4 * channels, channels, dtype=BF16)
    how = fusion_launch.linear_gelu(rows=rows, channels=channels, outputs=4 * channels, multiprocessors=132)
    assert how is not None
    hidden = torch.zeros(rows, 4 * channels, dtype=BF16)
    for kept in (None, hidden):
        launch = triton_linear._plan(x.device, rows, channels, 4 * channels, *how, True, kept is not None, False)
        launch(hidden, x, up, up[:, 0].contiguous(), kept, None)


def few_rows(rows: int, channels: int) -> None:
    """Pose a product of few rows, in parts, and the norm that adds them up, launched before the last kernel ends."""
    own = devices.has_copy_engine, devices.are_dependent
    devices.has_copy_engine, devices.are_dependent = lambda device: True, lambda *sizes: True
    try:
        x, hidden = torch.zeros(rows, channels, dtype=BF16), torch.zeros(rows, 4 * channels, dtype=BF16)
        for outputs in (channels, 3 * channels):
            weight = torch.zeros(outputs, channels, dtype=BF16)
            triton_linear.linear(x, weight, weight[:, 0].contiguous())
        launch, parts = triton_linear.parted_launch(x.device, rows, 4 * channels, channels)
        sums, norm = torch.zeros(parts, rows, channels), torch.zeros(channels, dtype=BF16)
        launch(sums, hidden, torch.zeros(channels, 4 * channels, dtype=BF16), None, None, None)
        launch = triton_block.norm_launch(triton_block.NORM_ADD, x.device, rows, channels, 1e-5, parts=parts)
        launch(x, x, None, None, sums, None, norm, norm, norm)
    finally:
        devices.has_copy_engine, devices.are_dependent = own


def eight_bits(channels: int) -> None:
    """Pose all of a block in 8 bits."""
    hidden, rows = 4 * channels, 256
    for mode in range(4):
        x, norm, scale = (torch.zeros(sides, dtype=BF16) for sides in ((rows, channels), channels, rows))
        scale, has_branch, has_norm = scale.float(), mode >= quantise.ADD_NORM, mode >= quantise.NORM
        others = [x if has_branch else None] * 2 + [norm if has_norm else None] * 2
        limits = [scale, None, None, scale] if has_branch else [scale, scale, norm, None]
        launch = quantise.rows_launch(mode, x.device, rows, channels, hidden, 1e-5, limits=not has_branch)
        launch(x.to(EIGHT), scale, x, *others, *limits)
    weights = [torch.zeros(sides, dtype=BF16) for sides in ((3, 1), (4, 1), (1, 4))]
    launch = quantise.weights_launch(x.device, channels, 3 * channels, hidden)
    launch(torch.zeros(1, dtype=EIGHT), torch.zeros(1), torch.zeros(1), *weights)
    products = [(channels, 3 * channels, False, False), (channels, hidden, True, False)]
    for inner, outputs, gelu, adds in (*products, *((hidden, channels, False, adds) for adds in (False, True))):
        out, bias = torch.zeros(rows, outputs, dtype=EIGHT if gelu else BF16), torch.zeros(outputs, dtype=BF16)
        x, weight, scale = torch.zeros(rows, inner).to(EIGHT), torch.zeros(outputs, inner).to(EIGHT), torch.zeros(1)
        launch = linear8.linear8_launch(x.device, rows, inner, outputs, gelu, adds)
        launch(out, scale if gelu else None, x, scale, weight, scale, bias, out if adds else None)


def embed(channels: int) -> None:
    image, weight = torch.zeros(2, 3, 64, 64, dtype=FP16), torch.zeros(channels, 3, 4, 4, dtype=FP16)
    norm = torch.zeros(channels, dtype=FP16)
    triton_block.embed(image, weight, norm, (norm, norm, 1e-5))


def compile_launch(launch: Any, tensors: tuple, target: GPUTarget, floats: str = "fp32") -> Any:
    """Compile a launch, whose numbers are `floats`: fp32 from Triton's launcher, fp64 from AOTInductor's."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    values = (*launch._passed(tensors), *launch.arguments)
    for place, (parameter, value) in enumerate(zip(launch.kernel.params, values, strict=True)):
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        aligned = isinstance(value, torch.Tensor)
        if isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{NAMES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[parameter.name] = floats
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=dict(launch.options))


def jobs(everywhere: bool) -> Iterator[tuple[str, str, Any]]:
    """Yield GPU, problem and plan."""
    every_window, sequences, mlps, embeddings = everything() if everywhere else ([], SEQUENCES, MLPS, EMBEDDINGS)
    for gpu in [name for name in GPUS if "twice" not in name] if everywhere else WINDOWS:
        for one in every_window or WINDOWS[gpu]:
            yield gpu, f"window {one}", lambda one=one: window(*one)
        for one in sequences:
            yield gpu, f"sequence {one}", lambda one=one: sequence(*one)
        for channels in mlps:
            yield gpu, f"mlp {channels}", lambda channels=channels: mlp(channels)
        for channels in embeddings:
            yield gpu, f"embed {channels}", lambda channels=channels: embed(channels)
    for channels in (192, 1024):
        yield "sm_90 twice", f"fp8 {channels}", lambda channels=channels: eight_bits(channels)
    for rows in (4096, 196):
        yield "sm_90 twice", f"linear_gelu 512 of {rows}", lambda rows=rows: linear_gelu(512, rows)
    for rows, channels in ((196, 512), (64, 1024)):
        yield "sm_90 twice", f"few rows, {rows} x {channels}", lambda sizes=(rows, channels): few_rows(*sizes)


def compiled(gpu: str, problem: str, launch: Any, tensors: tuple) -> dict[str, Any]:
    target, limit = GPUS[gpu]
    found = {"gpu": gpu, "limit": limit, "problem": problem, "kernel": launch.kernel.__name__}
    found |= {"options": launch.options, "shared": None, "error": None}
    try:
        found["shared"] = compile_launch(launch, tensors, target).metadata.shared
    except Exception as error:
        found["error"] = launches.first_line(error)
    return found


def main() -> None:
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    work = []
    for gpu, problem, plan in jobs("all" in sys.argv[1:]):
        only = [word for word in sys.argv[1:] if word != "all"]
        if only and not any(word in f"{gpu} {problem}" for word in only):
            continue
        seen = set()
        for launch, tensors in launched(plan, gpu):
            if launch.kernel.__name__.split("_")[1] in COMPILED and id(launch) not in seen:
                seen.add(id(launch))
                work.append((gpu, problem, launch, tensors))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for found in pool.map(lambda one: compiled(*one), work):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
