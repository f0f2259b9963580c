"""Measure what a call of one block costs the host: every launch and every product is replaced by an empty one.

    python tests/host_time.py [--profile]

Prints microseconds of thread time, the smallest of 40 repeats, of a block in inference: the original's modules aside,
what is left is dispatch, guards, plans, allocations and the launchers. No GPU is needed, and no number means anything
on one; compare two versions on the same machine, in turns. With --profile it counts calls and moves in place of that.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import time

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F

_linear = F.linear
_outputs: dict[tuple, torch.Tensor] = {}
_is_empty = False


def _product(x, weight, bias=None):
    if not _is_empty:
        return _linear(x, weight, bias)
    key = (x.dtype, x.shape, weight.shape)
    found = _outputs.get(key)
    if found is None:
        found = _outputs[key] = _linear(x, weight, bias)
    return found


def main() -> None:
    global _is_empty
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="count calls and moves between files, in fp32 and fp16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    F.linear = functools.partial(_product)  # before anyone looks at whose function it is

    sys.path.insert(0, os.path.dirname(__file__))
    import helpers

    import swinaccel
    from swinaccel.backends.triton import block as kernels
    from swinaccel.backends.triton import launches, linear

    def compile_nothing(self, index, tensors, kind):
        self.runners[kind] = (lambda pointers: None), True
        self.latest = list(kind), self.runners[kind]

    blocks = {
        "timm V1": (helpers.timm_block((8, 8), shift=2), (torch.randn(1, 8, 8, 16),)),
        "timm V2": (helpers.timm_block((8, 8), shift=2, v2=True), (torch.randn(1, 8, 8, 16),)),
        "Hugging Face Swin": (helpers.huggingface_layer("Swin", shift=2), (torch.randn(1, 64, 16), (8, 8))),
        "Hugging Face Swinv2": (helpers.huggingface_layer("Swinv2", shift=2), (torch.randn(1, 64, 16), (8, 8))),
        "Hugging Face, padded": (helpers.huggingface_layer("Swin", shift=2), (torch.randn(1, 63, 16), (9, 7))),
        "official V1": (helpers.microsoft_block((8, 8), shift=2), (torch.randn(1, 64, 16),)),
        "torchvision V1": (helpers.torchvision_model().features[1][1], (torch.randn(1, 8, 8, 16),)),
        "torchvision V2": (helpers.torchvision_model(v2=True).features[1][1], (torch.randn(1, 8, 8, 16),)),
    }
    chosen = kernels.pays_in_one, linear.linear_launch
    in_parts = (
        lambda *_: False,
        lambda device, rows, _, hidden, gelu=False, **__: kernels.gelu_launch(device, rows * hidden) if gelu else None,
    )
    # Times are of half precision, since in fp32 PyTorch's own GELU is run. Moves are of both, whose launches differ,
    # and of an MLP in parts, which larger models have on GPUs with a copy engine.
    ways = ["float16", "float32", "float16 in parts"] if options.profile else ["float16"]
    for (name, (block, inputs)), way in itertools.product(blocks.items(), ways):
        _is_empty = False
        dtype = getattr(torch, way.split()[0])
        kernels.pays_in_one, linear.linear_launch = in_parts if "parts" in way else chosen
        swinaccel.accelerate(block.eval().to(dtype), backend="triton")
        inputs = tuple(one.to(dtype) if isinstance(one, torch.Tensor) else one for one in inputs)
        _is_empty = True
        launches.Launch._compile = compile_nothing
        launches.launches.clear()
        with torch.no_grad():
            for _ in range(5):
                block(*inputs)
            if options.profile:
                measured = f"{way}: {_trace(block, inputs)}"
            else:
                measured = f"{min(_repeat(block, inputs) for _ in range(40)):6.1f} us"
        (entry,) = swinaccel.report(block)
        assert entry.fallbacks == 0, entry.reason
        print(f"{name:22} {measured}")


def _repeat(block, inputs, calls: int = 200) -> float:
    start = time.thread_time()
    for _ in range(calls):
        block(*inputs)
    return (time.thread_time() - start) / calls * 1e6


def _trace(block, inputs) -> str:
    """Return how many Python calls of the package one call makes, in how many files, and the moves between those."""
    seen: list[str] = []

    def look(frame, event, _):
        if event == "call" and f"{os.sep}swinaccel{os.sep}" in frame.f_code.co_filename:
            seen.append(frame.f_code.co_filename)

    sys.setprofile(look)
    block(*inputs)
    sys.setprofile(None)
    moves = sum(one != other for one, other in itertools.pairwise(seen))
    return f"{len(seen)} calls in {len(set(seen))} files, {moves} moves"


if __name__ == "__main__":
    main()
