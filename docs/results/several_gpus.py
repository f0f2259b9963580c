"""Train a Swin on several GPUs under DDP and FSDP2, as it came and accelerated, and compare losses and times.

    python docs/results/several_gpus.py --json several_gpus.json                 # a process for each GPU
    torchrun --nproc-per-node 2 docs/results/several_gpus.py                     # the same
    python docs/results/several_gpus.py --device cpu --ranks 2 --small           # gloo, in plain PyTorch

All variants have the same start, images and seeds. The gradients are those of the third backward, which is a replay
where there are graphs, as an average over ranks; the losses are those of all ranks and steps. Two runs of the original
say what noise is: the same once more, and one in fp32. A variant is within it if it lies at most twice as far from
the original as one of those; roundings that know nothing of each other are √2 times as far apart as from the truth.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

NOISE = 2.0
SMALL = {"img_size": 56, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32}
WARM_UP = 3  # backwards before the first step


class Variant(NamedTuple):
    """A way to train: what is done with the model, in this order, and how."""

    made: tuple[str, ...]
    graphs: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def is_accelerated(self) -> bool:
        """Return True unless it is the original."""
        return "accelerate" in self.made


ORIGINAL, AGAIN, EXACT = "original, DDP", "original, DDP, again", "original, DDP, fp32"
VARIANTS = {
    ORIGINAL: Variant(("DDP",)),
    AGAIN: Variant(("DDP",)),
    EXACT: Variant(("DDP",), dtype=torch.float32),
    "accelerate, DDP": Variant(("accelerate", "DDP")),
    "accelerate, DDP, graphs=True": Variant(("accelerate", "DDP"), True),
    "original, FSDP2": Variant(("FSDP2",)),
    "accelerate, FSDP2": Variant(("accelerate", "FSDP2")),
    "FSDP2, accelerate": Variant(("FSDP2", "accelerate")),
    "accelerate, FSDP2, graphs=True": Variant(("accelerate", "FSDP2"), True),
    "FSDP2, accelerate, graphs=True": Variant(("FSDP2", "accelerate"), True),
    "DDP, accelerate": Variant(("DDP", "accelerate")),
    "DDP, accelerate, graphs=True": Variant(("DDP", "accelerate"), True),
}


class Found(NamedTuple):
    """What a run gives.

    Attributes:
        losses: (ranks, steps).
        gradient: of all parameters, as one vector.
        ms: of a step, the slowest rank's median.
        ranks: what each rank says of itself.
    """

    losses: Tensor
    gradient: Tensor
    ms: float
    ranks: list[dict[str, Any]]


def build(options: argparse.Namespace) -> nn.Module:
    """Return the model, the same on every rank, with bias tables and norms that are not what fresh ones are."""
    import timm

    torch.manual_seed(0)
    small = SMALL if options.small else {}
    model = timm.create_model(options.model, drop_path_rate=options.drop_path, num_classes=options.classes, **small)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if one.dim() == 1 or name.endswith("bias_table"):
                one.add_(torch.randn_like(one), alpha=0.3)
    return model.to(options.device).train()


def prepare(model: nn.Module, variant: Variant, options: argparse.Namespace) -> nn.Module:
    """Wrap, shard and accelerate a model."""
    import swinaccel

    device = torch.device(options.device)
    for what in variant.made:
        if what == "accelerate":
            backend = "torch" if device.type == "cpu" else "auto"  # which trains on no CPU unless it is asked to
            model = swinaccel.accelerate(model, graphs=variant.graphs, backend=backend)
        elif what == "DDP":
            model = nn.parallel.DistributedDataParallel(model, None if device.type == "cpu" else [device.index])
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
            for part in [one for one in model.modules() if "SwinTransformerBlock" in type(one).__name__]:
                fully_shard(part, mesh=mesh)
            fully_shard(model, mesh=mesh)
    return model


def run(variant: Variant, options: argparse.Namespace, batches: list[tuple[Tensor, Tensor]]) -> Found:
    """Train one variant."""
    import swinaccel

    device, rank = torch.device(options.device), dist.get_rank()
    model = prepare(build(options), variant, options)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, fused=device.type == "cuda")

    def backward(number: int) -> Tensor:
        torch.manual_seed(1000 * number + rank)  # of drop-path
        images, labels = batches[number % len(batches)]
        with torch.autocast(device.type, torch.bfloat16, enabled=variant.dtype == torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def step(number: int) -> Tensor:
        loss = backward(number)
        optimizer.step()
        return loss

    for _ in range(WARM_UP):
        backward(0)
    gradient = torch.cat([whole(one).flatten().float() for one in model.parameters() if one.grad is not None])
    losses = torch.stack([step(number) for number in range(options.steps)]).float()
    every = [torch.empty_like(losses) for _ in range(dist.get_world_size())]
    dist.all_gather(every, losses)
    times = []
    for number in range(options.timed):
        synchronize(device)
        begin = time.perf_counter()
        step(number)
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    mine = {"ms": statistics.median(times), "norm": gradient.double().norm().item(), **counts(swinaccel.report(model))}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return Found(torch.stack(every).cpu(), gradient, max(one["ms"] for one in ranks), ranks)


def whole(parameter: nn.Parameter) -> Tensor:
    """Return the gradient of a parameter, gathered from all ranks where it is sharded."""
    grad: Any = parameter.grad
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def counts(report: Any) -> dict[str, Any]:
    """Return what a report says, in numbers; calls are those of all attentions together."""
    return {
        "accelerated": len(report.accelerated),
        "original": len(report.original),
        "calls": sum(one.calls for one in report),
        "calls_original": sum(one.fallbacks for one in report),
        "captured": sum(one.captured for one in report.graphs),
        "replays": sum(one.replays for one in report.graphs),
        "reasons": sorted({one.reason for one in (*report, *report.graphs) if one.reason}),
    }


def distances(one: Found, other: Found) -> dict[str, float]:
    """Return how far apart two runs are: losses by their root mean square, the gradient relative to its length."""
    apart = (one.gradient - other.gradient).double().norm() / other.gradient.double().norm()
    losses = one.losses.double() - other.losses.double()
    return {"losses": losses.square().mean().sqrt().item(), "gradient": apart.item()}


def judged(name: str, found: dict[str, Found]) -> dict[str, Any]:
    """Return a row: the numbers of a variant, and whether it is the original but for noise.

    `within` is None as long as no noise is known.
    """
    one, original = found[name], found[ORIGINAL]
    apart = distances(one, original)
    noise = [distances(found[other], original) for other in (AGAIN, EXACT) if other in found and other != name]
    within = None
    if name not in (ORIGINAL, AGAIN, EXACT) and noise:
        within = all(apart[key] <= NOISE * max(other[key] for other in noise) for key in apart)
    is_same = len({rank["norm"] for rank in one.ranks}) == 1
    return {
        "variant": name, "ms": one.ms, "losses": one.losses.tolist(), "apart": apart, "within": within,
        "ranks_agree": is_same, "ranks": one.ranks,
    }  # fmt: skip


def told(row: dict[str, Any]) -> str:
    """Return a row of the table, with a line for each kind of rank below it."""
    if "error" in row:
        return f"{row['variant']:32} {row['error']}"
    apart, verdict = row["apart"], {None: "", True: "within the noise", False: "NOT WITHIN THE NOISE"}[row["within"]]
    verdict += "" if row["ranks_agree"] else "  RANKS HAVE DIFFERENT GRADIENTS"
    losses = f"{row['losses'][0][0]:.4f} to {row['losses'][0][-1]:.4f}"
    head = (
        f"{row['variant']:32} {row['ms']:9.2f}  {losses:20} {apart['losses']:9.1e} {apart['gradient']:9.1e}  {verdict}"
    )
    lines: dict[str, list[str]] = {}
    for rank, one in enumerate(row["ranks"]):
        if one["calls"]:
            text = f"{one['accelerated']} accelerated, {one['original']} original, {one['calls_original']} of"
            text += f" {one['calls']} calls original, {one['captured']} graphs, {one['replays']} replays"
            lines.setdefault("; ".join([text, *one["reasons"]]), []).append(str(rank))
    return "\n".join([head.rstrip(), *(f"    rank {', '.join(ranks)}: {text}" for text, ranks in lines.items())])


def work(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all variants in a process group that exists, and return their rows; rank 0 prints and writes them."""
    rank, device = dist.get_rank(), torch.device(options.device)
    generator = torch.Generator().manual_seed(rank)
    side = SMALL["img_size"] if options.small else 224
    batches = [
        (
            torch.randn(options.batch, 3, side, side, generator=generator).to(device),
            torch.randint(options.classes, (options.batch,), generator=generator).to(device),
        )
        for _ in range(options.steps)
    ]
    tell: Callable[[str], None] = (lambda text: print(text, flush=True)) if rank == 0 else (lambda text: None)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    tell(f"{dist.get_world_size()} x {name}, torch {torch.__version__}, {options.model}, batch {options.batch} a rank")
    tell(f"{'':32} {'ms a step':>9}  {'losses of rank 0':20} {'apart':>9} {'gradient':>9}")
    found: dict[str, Found] = {}
    rows: list[dict[str, Any]] = []
    for variant in [one for one in VARIANTS if options.only in one or one in (ORIGINAL, AGAIN, EXACT)]:
        if is_late(options.deadline, device):
            tell("the time is up")
            break
        try:
            found[variant] = run(VARIANTS[variant], options, batches)
            row = judged(variant, found)
        except Exception as error:  # on all ranks alike, or the group's own time limit ends the others
            row = {"variant": variant, "error": f"{type(error).__name__}: {str(error).strip()[:200]}"}
        rows.append(row)
        tell(told(row))
        if options.json and rank == 0:
            Path(options.json).write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def is_late(deadline: float, device: torch.device) -> bool:
    """Return whether it is later than `time.time()` says, the same on all ranks."""
    late = torch.tensor(float(time.time() > deadline), device=device)
    dist.broadcast(late, 0)
    return bool(late)


def start(rank: int, ranks: int, where: str, options: argparse.Namespace) -> None:
    """Join the group, and work."""
    options.device = f"cuda:{rank % torch.cuda.device_count()}" if options.device == "cuda" else options.device
    if options.device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(options.device)
    backend = "gloo" if options.device == "cpu" else "nccl"
    patience = timedelta(seconds=min(60.0, options.seconds))  # of a rank, where another one has failed
    dist.init_process_group(backend, init_method=where, rank=rank, world_size=ranks, timeout=patience)
    work(options)
    dist.destroy_process_group()


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, help="processes (one for each GPU; 2 on a CPU)")
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224", help="of timm (%(default)s)")
    parser.add_argument("--small", action="store_true", help="two stages, small images")
    parser.add_argument("--batch", type=int, default=32, help="images a rank (%(default)s)")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--drop-path", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=8, help="whose losses are compared (%(default)s)")
    parser.add_argument("--timed", type=int, default=10, help="further steps, which are timed (%(default)s)")
    parser.add_argument("--only", default="", help="part of a variant's name")
    parser.add_argument("--seconds", type=float, default=130, help="begin no variant after so many (%(default)s)")
    parser.add_argument("--json", help="a file, written after each variant")
    options = parser.parse_args(arguments)
    options.deadline = time.time() + options.seconds
    options.ranks = options.ranks or (max(1, torch.cuda.device_count()) if options.device == "cuda" else 2)
    return options


def main(arguments: list[str]) -> None:
    """Start the processes, or be one of those that torchrun has started."""
    options = parse(arguments)
    if "RANK" in os.environ:
        start(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://", options)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.multiprocessing.spawn(start, (options.ranks, where, options), options.ranks)


if __name__ == "__main__":
    main(sys.argv[1:])
