"""Run every kernel under NVIDIA's compute-sanitizer, at sizes that divide nothing.

    python tests/sanitize.py [--tool TOOL ...] [--group GROUP ...] [--sanitizer PATH] [--logs FOLDER]
    python tests/sanitize.py --run GROUP

Each group of kernels runs in a process of its own, first without a tool, so that everything is compiled, and then under
each tool, with PyTorch's memory caching off: every tensor is an allocation with ends of its own. Prints a table of
tools, kernels and numbers of reports, and exits with 1 if there is any, if a run fails, or if a kernel is in no group.
Two threads that write the same value to the same place harm nobody, nor do two that differ in the last bits of an fp32
number: Triton keeps a sum over an axis in several warps at once, each added up in another order, and all of them write
it where all read. Such reports of racecheck are counted apart.

`--run GROUP` is one such process. With TRITON_INTERPRET=1 it needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TIMEOUT = 1200  # seconds that a group may take under a tool
TOOLS = {
    "memcheck": ["--report-api-errors", "no"],
    "initcheck": [],
    "synccheck": [],
    "racecheck": ["--racecheck-report", "hazard", "--print-level", "info"],
}


# The groups. Each yields what its kernels wrote, which is then read and must be finite.


def _window(window: tuple[int, ...], head_dim: int, dtype: Any, flags: str = "", batch: int = 3) -> Iterator[Any]:
    """Yield the output and all gradients of shifted windows; flags: apart, plain, cosine, mask, dropout, divided."""
    import torch

    from swinaccel import functional

    def random(*shape: int, dtype: Any = dtype) -> Any:
        return torch.randn(shape, dtype=dtype).to(DEVICE).requires_grad_()

    heads, tokens = 3, torch.Size(window).numel()
    size = tuple(2 * side - ("divided" not in flags) for side in window)
    shift = tuple(0 if "plain" in flags else side // 2 for side in window)
    if "apart" in flags:
        qkv: Any = tuple(random(batch, *size, heads * head_dim) for _ in range(3))
    else:
        qkv = random(batch, *size, 3 * heads * head_dim)
    rows = torch.Size(2 * side - 1 for side in window).numel()
    options: dict[str, Any] = {}
    if "plain" not in flags:
        options["table"] = random(rows, heads)
        options["index"] = torch.randint(rows, (tokens, tokens)).to(DEVICE)
        options["padding"] = random(3 * heads * head_dim)
    if "cosine" in flags:
        options["logit_scale"] = random(heads, dtype=torch.float32)
    if "mask" in flags:
        options["mask"] = random(2 ** len(window), tokens, tokens, dtype=torch.float32).detach()
    out = functional.shifted_window_attention(
        qkv, window, heads, shift, dropout=0.2 if "dropout" in flags else 0.0, **options
    )
    out.backward(torch.randn(out.shape, dtype=dtype).to(DEVICE))
    yield out.detach()
    leaves = (*(qkv if isinstance(qkv, tuple) else (qkv,)), *options.values())
    yield from (leaf.grad for leaf in leaves if leaf.requires_grad)


def small_windows() -> Iterator[Any]:
    import torch

    yield from _window((3, 3), 12, torch.float16)
    yield from _window((3, 5), 20, torch.float32, "cosine dropout")
    yield from _window((2, 3, 3), 32, torch.float16, "apart mask")
    yield from _window((7, 7), 32, torch.float16, "plain divided")


def large_windows() -> Iterator[Any]:
    import torch

    yield from _window((6, 11), 12, torch.float16)
    yield from _window((6, 11), 20, torch.float32, "cosine dropout", 2)
    yield from _window((3, 5, 5), 32, torch.float16, "apart mask cosine", 2)
    yield from _window((8, 16), 32, torch.float16, "divided", 2)
    yield from _window((9, 9), 64, torch.float16, "mask dropout", 1)


def pairs_of_images() -> Iterator[Any]:
    import torch
    from swinaccel.kernels import launch

    large = launch.large
    launch.large = lambda **problem: dataclasses.replace(large(**problem), images=2)
    yield from _window((6, 11), 12, torch.float16)
    yield from _window((6, 11), 16, torch.float16, "cosine mask", 2)


def bias_forms() -> Iterator[Any]:
    """Yield what the kernels about biases wrote: factors that hold and that are stale, a table by SwinV2's MLP."""
    import torch

    from swinaccel.ops import position
    from swinaccel.ops import window as window_ops
    from swinaccel.spec.window import Geometry

    window, heads, dim = (6, 11), 3, 16
    tokens, rows = 66, 11 * 21
    table, index = torch.randn(rows, heads).to(DEVICE), torch.randint(rows, (tokens, tokens)).to(DEVICE)
    qkv = torch.randn(2, 7, 13, 3 * heads * dim).to(DEVICE)
    factors = [torch.randn(heads, tokens, 16).to(DEVICE) for _ in range(2)]
    for known in (table.clone(), table + 1):
        options: dict[str, Any] = {"num_heads": heads, "table": table, "index": index, "scale": 0.25}
        with torch.no_grad():
            geometry = Geometry((7, 13), window, (3, 5))
            yield window_ops.shifted_window_attention(
                qkv, geometry, **options, factors=[*factors, known, index.clone()]
            )
    parameters = (torch.randn(24, 2), torch.randn(24), torch.randn(heads, 24))
    yield position.position_table(torch.randn(11, 21, 2).to(DEVICE), *(one.to(DEVICE) for one in parameters))


def sequences() -> Iterator[Any]:
    import torch

    from swinaccel import functional

    for dtype, tokens, dim, kind in [
        (torch.float16, 77, 20, "factors mask"),
        (torch.float32, 70, 16, "factors causal"),
        (torch.float16, 128, 64, "factors"),
        (torch.float16, 150, 24, "blocks"),
        (torch.float32, 67, 12, "mask"),
        (torch.float16, 256, 64, "blocks"),  # on Hopper with descriptors
    ]:
        q, k, v = (torch.randn(2, 3, tokens, dim, dtype=dtype).to(DEVICE).requires_grad_() for _ in range(3))
        rank = 3 if "factors" in kind else 1
        factors = [torch.randn(3, tokens, rank, dtype=dtype).to(DEVICE).requires_grad_() for _ in range(2)]
        if kind == "blocks":
            out = functional.block_sliding_window_attention(q, k, v, 32 if tokens == 150 else 128, 2)
            factors = []
        else:
            mask = torch.randn(2, tokens, tokens).to(DEVICE) if "mask" in kind else None
            out = functional.factored_bias_attention(q, k, v, *factors, mask, causal="causal" in kind)
        out.backward(torch.randn(out.shape, dtype=dtype).to(DEVICE))
        yield out.detach()
        yield from (leaf.grad for leaf in (q, k, v, *factors))


def norms() -> Iterator[Any]:
    """Yield what the norms wrote, forward and backward, with the sums beside them, and the gathering of patches."""
    import torch

    from swinaccel.backends.triton import block as kernels
    from swinaccel.backends.triton import block_bwd as backward

    for dtype, channels in [(torch.float16, 20), (torch.float32, 96), (torch.float16, 200)]:
        x, branch, grad, other = (torch.randn(3, 37, channels, dtype=dtype).to(DEVICE) for _ in range(4))
        weight, bias = (torch.randn(channels, dtype=dtype).to(DEVICE) for _ in range(2))
        affine, scale = (weight, bias, 1e-5), torch.rand(3).to(DEVICE)
        for mode in (kernels.NORM, kernels.ADD_NORM, kernels.NORM_ADD):
            is_norm = mode == kernels.NORM
            out, stats = torch.empty_like(x), torch.empty(2, 3 * 37, device=DEVICE)
            total = None if is_norm else torch.empty_like(x)
            factors = None if is_norm else scale
            kernels.run_norm(
                mode, x, None if is_norm else branch, affine, out=out, total=total, stats=stats, scale=factors
            )
            grad_x, grad_branch = torch.empty_like(x), None if is_norm else torch.empty_like(x)
            source = x if is_norm else total if mode == kernels.ADD_NORM else branch
            sums = backward.norm(
                mode, grad, other, source, stats, factors, weight, grad_x=grad_x, grad_branch=grad_branch
            )
            yield from (one for one in (out, total, stats, grad_x, grad_branch, sums) if one is not None)
        total = torch.empty_like(x)
        kernels.run_norm(kernels.ADD, x, branch, (None, None, 0.0), total=total, scale=scale)
        yield total
        yield from backward.scaled_columns(grad.view(-1, channels), scale, torch.float32)
        image = torch.randn(2, 5, 7, channels, dtype=dtype).to(DEVICE)
        wide = [torch.randn(4 * channels, dtype=dtype).to(DEVICE) for _ in range(2)]
        yield from (kernels.merge(image, None), kernels.merge(image, (*wide, 1e-5)))
        kept = torch.empty(2, 3, 4, 4 * channels, dtype=dtype, device=DEVICE), torch.empty(2, 2 * 3 * 4, device=DEVICE)
        grad = kernels.merge(image, (*wide, 1e-5), dtype, kept)
        yield from (*kept, backward.merge(grad, image.shape, dtype)[0])
        yield from backward.merge(grad, image.shape, dtype, kept, wide[0])


def mlps() -> Iterator[Any]:
    import fused_calls
    import torch

    from swinaccel.backends.triton import block as kernels
    from swinaccel.backends.triton import block_bwd as backward
    from swinaccel.backends.triton import linear

    def random(*shape: int) -> Any:
        return torch.randn(shape).to(torch.float16).to(DEVICE)

    x, grad = random(131, 70), random(131, 70)
    yield from (kernels.gelu(x), *backward.gelu(grad, x))
    for channels in (48, 128):
        x, branch = random(131, channels), random(131, channels)
        fc1, fc2 = (random(128, channels), random(128)), (random(channels, 128), random(channels))
        affine = random(channels), random(channels), 1e-5
        yield from (fused_calls.mlp(x, branch, affine, fc1, fc2), fused_calls.mlp(x, None, affine, fc1, fc2))
    from swinaccel.kernels import fusion_launch

    x, weight, bias = random(131, 128), random(256, 128), random(256)
    for shape in (fusion_launch.LINEAR_GELU, fusion_launch.LINEAR_GELU_FEW):
        if INTERPRETED or torch.cuda.get_device_capability()[0] >= 9:
            out = torch.zeros(131, 256, dtype=torch.float16, device=DEVICE)  # initcheck sees no stores by descriptors
            kept = torch.zeros_like(out)
            linear._plan(x.device, 131, 128, 256, shape, 3, True, True, False)(out, x, weight, bias, kept, None)
            expected = torch.nn.functional.gelu(torch.nn.functional.linear(x.float(), weight.float(), bias.float()))
            torch.testing.assert_close(out.float().cpu(), expected.cpu(), atol=0.05, rtol=0.01)
            yield from (out, kept)
    x, weight = random(131, 512), random(64, 512)
    launch, parts = linear.parted_launch(x.device, 131, 512, 64)
    if launch is not None:
        sums = torch.zeros(parts, 131, 64, device=DEVICE)
        launch(sums, x, weight, None, None, None)
        torch.testing.assert_close(sums.sum(0).cpu(), x.float().cpu() @ weight.float().cpu().t(), atol=0.01, rtol=0.01)
        norm = kernels.norm_launch(kernels.NORM_ADD, x.device, 131, 64, 1e-5, parts=parts)
        out, total, weight, bias, more = (
            torch.zeros(131, 64).half().to(DEVICE),
            random(131, 64),
            *(random(64) for _ in range(3)),
        )
        norm(total, out, None, None, sums, None, weight, bias, more)
        yield from (sums, out)
    x, weight, bias, added = random(131, 72), random(200, 72), random(200), random(131, 200)
    if INTERPRETED or torch.cuda.get_device_capability()[0] >= 9:
        out = torch.zeros_like(added)
        how = fusion_launch.LINEAR, 3, False, False, True
        linear._plan(x.device, 131, 72, 200, *how)(out, x, weight, bias, None, added)
        expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float()) + added.float()
        torch.testing.assert_close(out.float().cpu(), expected.cpu(), atol=0.05, rtol=0.01)
        yield out


def embeddings() -> Iterator[Any]:
    import torch

    from swinaccel.backends.triton import block as kernels

    half, single = torch.float16, torch.float32
    for dtype, channels, patch in [(half, 20, (4, 4)), (single, 96, (2, 3)), (half, 200, (3, 3))]:
        image = torch.randn(2, 3, 7 * patch[0], 5 * patch[1], dtype=dtype).to(DEVICE)
        weight = torch.randn(channels, 3, *patch, dtype=dtype).to(DEVICE)
        bias, scale = (torch.randn(channels, dtype=dtype).to(DEVICE) for _ in range(2))
        yield from (kernels.embed(image, weight, bias, (scale, bias, 1e-5)), kernels.embed(image, weight, None, None))


GROUPS: dict[str, Callable[[], Iterator[Any]]] = {
    one.__name__: one
    for one in (small_windows, large_windows, pairs_of_images, bias_forms, sequences, norms, mlps, embeddings)
}


def run(group: str) -> set[str]:
    """Run a group; return the names of the kernels that it launched."""
    import torch

    from swinaccel.backends.triton import launches

    launched, call = set(), launches.Launch.__call__

    def note(self: Any, *tensors: Any) -> None:
        launched.add(self.kernel.__name__)
        call(self, *tensors)

    launches.Launch.__call__ = note  # type: ignore[method-assign]
    torch.manual_seed(0)
    try:
        for tensor in GROUPS[group]():
            assert torch.isfinite(tensor.cpu()).all(), f"{group}: a result is not finite"
    finally:
        launches.Launch.__call__ = call  # type: ignore[method-assign]
    return launched


def all_kernels() -> set[str]:
    """Return the names of the project's kernels."""
    from swinaccel import kernels

    names = [one.name for one in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def reports(text: str, kernels: set[str]) -> Iterator[tuple[str, bool]]:
    """Yield the kernel of each report of a tool, and whether it harms nobody; see the head of this file."""
    for block in re.split(r"^=========\s(?=\S)", text, flags=re.MULTILINE)[1:]:
        if re.match(r"(COMPUTE-SANITIZER|\w+ SUMMARY|Target application|$)", block) or " at " not in block:
            continue
        ours = re.search("|".join(sorted(kernels, key=len, reverse=True)), block)
        other = re.search(r"\bat (?:0x\w+ in )?([^\s+]+)", block)
        values = re.search(r"current value\s*:\s*(\w+)\s*,\s*incoming value\s*:\s*(\w+)", block, re.IGNORECASE)
        place = re.search(r"hazard detected at __shared__ (0x\w+)", block)
        apart = abs(int(values[1], 0) - int(values[2], 0)) if values else None
        is_lowest_byte = place is not None and int(place[1], 16) % 4 == 0
        is_same = (
            " WAW " in block and apart is not None and (apart == 0 or (is_lowest_byte and min(apart, 256 - apart) < 32))
        )
        yield ours[0] if ours else f"another's: {other[1] if other else '?'}", is_same


def _process(group: str, command: list[str], log: Path) -> tuple[int, str]:
    """Run one group in a process of its own; return its exit status and output."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with log.open("w") as file:
        try:
            status = subprocess.run(
                [*command, sys.executable, __file__, "--run", group],
                stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=TIMEOUT, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = 124
    return status, log.read_text(errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", choices=GROUPS, help="run one group, without a tool")
    parser.add_argument("--tool", choices=TOOLS, action="append")
    parser.add_argument("--group", choices=GROUPS, action="append")
    places = f"{os.environ['PATH']}:/usr/local/cuda/bin"
    parser.add_argument("--sanitizer", default=shutil.which("compute-sanitizer", path=places))
    parser.add_argument("--logs", type=Path, help="folder for what the tools print (default: a temporary one)")
    options = parser.parse_args()
    if options.run:
        os.environ["SWINACCEL_STRICT"] = "1"  # a kernel that fails raises
        if INTERPRETED:
            import interpreter

            interpreter.mend()
            interpreter.hasten()
        print("launched:", *sorted(run(options.run)))
        return 0
    if options.sanitizer is None:
        parser.error("compute-sanitizer was not found; it comes with the CUDA toolkit; --sanitizer says where it is")
    logs = options.logs or Path(tempfile.mkdtemp(prefix="sanitize-"))
    logs.mkdir(parents=True, exist_ok=True)
    groups, missing, failed = options.group or list(GROUPS), all_kernels(), []
    counts: Counter[tuple[str, str, bool]] = Counter()
    for group in groups:
        status, text = _process(group, [], logs / f"{group}.log")
        if status:
            failed.append(f"{group}: exit status {status}\n{text[-2000:]}")
            continue
        missing -= set(re.findall(r"\w+_kernel", text.rpartition("launched:")[2]))
        for tool in options.tool or TOOLS:
            flags = ["--tool", tool, "--target-processes", "application-only", "--print-limit", "10000", *TOOLS[tool]]
            status, text = _process(group, [options.sanitizer, *flags], logs / f"{group}-{tool}.log")
            if status or "launched:" not in text:
                failed.append(f"{group} under {tool}: exit status {status}\n{text[-2000:]}")
            counts.update((tool, *report) for report in reports(text, all_kernels()))
            print(f"{group:16} {tool:10} done", flush=True)
    print(f"\n{'tool':10} {'kernel':44} {'reports':>8} {'same value':>11}")
    for tool, kernel in dict.fromkeys((tool, kernel) for tool, kernel, _ in sorted(counts)):
        print(f"{tool:10} {kernel:44} {counts[tool, kernel, False]:8} {counts[tool, kernel, True]:11}")
    harmful = sum(number for (_, _, is_same), number in counts.items() if not is_same)
    if missing and not options.group:
        failed.append(f"kernels of no group: {', '.join(sorted(missing))}")
    print(f"{harmful} reports; what the tools printed is in {logs}", *failed, sep="\n")
    return 1 if harmful or failed else 0


if __name__ == "__main__":
    sys.exit(main())
