"""Time calls as users make them: wall time of one call with its synchronisation, of each variant, on one GPU.

    python docs/results/as_called.py [--only WORD] [--modes default,reduce-overhead] [--json FILE]

Each model is a process of its own. All compile at the same time, and then are timed one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def _huggingface(version: str, **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{version}Config")(
        embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], num_labels=1000, **options
    )
    return getattr(transformers, f"{version}ForImageClassification")(config)


def _torchvision(name: str) -> nn.Module:
    import torchvision

    return getattr(torchvision.models, name)(weights=None)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm swin_base": (lambda: _timm("swin_base_patch4_window7_224"), 224),
    "timm swinv2_base window 8": (lambda: _timm("swinv2_base_window8_256"), 256),
    "Hugging Face Swin base": (lambda: _huggingface("Swin"), 224),
    "Hugging Face Swinv2 base window 8": (lambda: _huggingface("Swinv2", window_size=8, image_size=256), 256),
    "torchvision swin_b": (lambda: _torchvision("swin_b"), 224),
    "torchvision swin_v2_b": (lambda: _torchvision("swin_v2_b"), 256),
}
TRAINING = "train timm swin_tiny"
BATCHES = (1, 8, 64)


def randomize(model: nn.Module) -> nn.Module:
    """Draw parameters anew: fresh norms of SwinV2 are zero, and products of zeros are quicker."""
    torch.manual_seed(0)
    for name, one in model.named_parameters():
        if "logit_scale" not in name:
            nn.init.normal_(one, std=0.5 / one[0].numel() ** 0.5) if one.dim() > 1 else nn.init.normal_(one, 0.5, 0.2)
    return model


def tensor_of(out: Any) -> Tensor:
    """Return the logits of an output."""
    return out if isinstance(out, Tensor) else out.logits


def inference(name: str, modes: list[str]) -> dict[str, Callable[[], Any]]:
    """Return the calls of one model, warmed up, by "variant, B batch"."""
    import swinaccel

    make, size = MODELS[name]

    def build(**options: Any) -> nn.Module:
        with torch.device("cuda"):
            model = randomize(make()).bfloat16().eval()
        return swinaccel.accelerate(model, **options) if options else model

    models: dict[str, Any] = {
        "original": build(),
        "accelerate, graphs=False": build(graphs=False),
        "accelerate": build(graphs="auto"),
    }
    for mode in modes:
        models[f"torch.compile {mode}"] = torch.compile(build(), mode=mode, dynamic=False)
    calls: dict[str, Callable[[], Any]] = {}
    for batch in BATCHES:
        x = torch.randn(batch, 3, size, size, device="cuda", dtype=torch.bfloat16)
        outs = {}
        for variant, model in models.items():

            def call(model: nn.Module = model, x: Tensor = x) -> Any:
                with torch.inference_mode():
                    return model(x)

            for _ in range(6):
                outs[variant] = tensor_of(call()).float()
            calls[f"{variant}, B{batch}"] = call
        for variant, out in outs.items():
            error = ((out - outs["original"]).norm() / outs["original"].norm()).item()
            print(f"{name}, {variant}, B{batch}: differs by {error:.1e} from the original", file=sys.stderr)
        calls[f"replayed by hand, B{batch}"] = by_hand(calls[f"accelerate, graphs=False, B{batch}"])
        held = sum(graph.nbytes for graph in swinaccel.report(models["accelerate"]).graphs) / 2**20
        print(f"{name}: graphs of batches up to {batch} hold {held:.0f} MiB", file=sys.stderr)
        torch.cuda.empty_cache()
    return calls


def by_hand(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return the replay of a call's graph: the time of its kernels."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    # Of cuBLAS's workspace the graph keeps the address only, and torch.compile frees it (pytorch#193402): let it be
    # allocated anew, from memory of this graph.
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.graph(graph, stream=stream):
        kept = call()
    return lambda: (graph.replay(), kept)


def training(modes: list[str]) -> dict[str, Callable[[], Any]]:
    """Return training steps of swin_tiny, B128, drop-path 0.2, autocast to bf16, fused AdamW."""
    import timm

    import swinaccel

    x = torch.randn(128, 3, 224, 224, device="cuda")
    target = torch.randint(1000, (128,), device="cuda")
    calls: dict[str, Callable[[], Any]] = {}

    def build(variant: str, change: Callable[[nn.Module], Any]) -> None:
        model = change(timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.2).cuda().train())
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

        def call() -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss

        for _ in range(5):
            loss = call()
        assert loss.isfinite(), variant
        held = sum(graph.nbytes for graph in swinaccel.report(getattr(model, "_orig_mod", model)).graphs) / 2**20
        print(f"{TRAINING}, {variant}: graphs hold {held:.0f} MiB", file=sys.stderr)
        torch.cuda.empty_cache()
        calls[f"{variant}, B128"] = call

    build("original", lambda model: model)
    build("accelerate, graphs=False", lambda model: swinaccel.accelerate(model, graphs=False))
    build("accelerate, graphs=True", lambda model: swinaccel.accelerate(model, graphs=True))
    if modes:
        build("torch.compile", torch.compile)
        build("accelerate + torch.compile", lambda model: torch.compile(swinaccel.accelerate(model, graphs=False)))
    return calls


def measure(calls: dict[str, Callable[[], Any]], rounds: int = 15) -> dict[str, dict[str, float]]:
    """Return milliseconds of a call, median and least, and the peak of memory above what lay there, in MiB."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    peaks = {}
    for name, call in calls.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {
        name: {"median_ms": statistics.median(one), "min_ms": min(one), "peak_mib": peaks[name]}
        for name, one in times.items()
    }


def main() -> None:
    """Run all models, or in a child of this script one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="words; models whose names hold one of them, in this order")
    parser.add_argument("--compiled", default="", help="a word; only models whose names hold it are compiled")
    parser.add_argument("--modes", default="default,reduce-overhead", help="of torch.compile; empty: without it")
    parser.add_argument("--wait", help="a file whose appearance means that nothing else runs any more")
    parser.add_argument("--json")
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        is_training = options.child == TRAINING
        modes = [one for one in options.modes.split(",") if one]
        calls = training(modes) if is_training else inference(options.child, modes)
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(measure(calls)), flush=True)
        return
    names = [name for word in options.only.split(",") for name in (*MODELS, TRAINING) if word in name]
    modes = {name: options.modes if options.compiled in name else "" for name in names}
    children = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--child", name, "--modes", modes[name]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    while options.wait and not os.path.exists(options.wait):
        time.sleep(0.1)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": {}}
    for name, child in children.items():
        if child.stdout.readline().strip() != "ready":  # type: ignore[union-attr]
            print(f"{name}: failed")
            continue
        out, _ = child.communicate("go\n")
        found["rows"][name] = rows = json.loads(out)
        print(f"\n{name} ({found['device']}, torch {found['torch']})")
        for row, one in rows.items():
            print(f"  {row:42} {one['median_ms']:8.3f} ms  (least {one['min_ms']:.3f})  peak {one['peak_mib']:.0f} MiB")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
