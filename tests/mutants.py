"""Deliberate faults, and whether the tests notice them.

    python tests/mutants.py [--only WORD] [--jobs N] [--no-baseline]

Each mutant is one piece of text in one file, put otherwise in a temporary copy of the tree, where the tests that must
notice it are run. A text that does not occur exactly once is out of date: put the mutant where the fact has gone.
Exits with 1 if a mutant survived, with 2 if one is out of date or the tests fail without any.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TIMEOUT = 900  # seconds that the tests of a mutant may take


class Mutant(NamedTuple):
    """A fault: in `file`, under the tree's root, `old` reads `new`; `tests` are pytest's arguments."""

    file: str
    old: str
    new: str
    tests: str


def under(folder: str, *mutants: tuple[str, str, str, str]) -> list[Mutant]:
    return [Mutant(f"{folder}/{file}", *rest) for file, *rest in mutants]


FUZZ = "tests/fuzz/test_fuzz_functions.py -k quick"
GAPS = "tests/test_gaps.py"

MUTANTS = [
    *under(
        "swinaccel",
        # What is proven of a kind of module.
        ("probe.py", "(False, 1e3), ", "", GAPS),
        ("probe.py", "(False, 1e-3), ", "", GAPS),
        ("probe.py", "*= 200", "*= 1", GAPS),
        ("probe.py", "linspace(5.5, -3.0,", "linspace(1.5, -3.0,", GAPS),
        ("probe.py", " or _other_state(twin, other)", "", GAPS),
        ("probe.py", "_TOLERANCE = 1e-6", "_TOLERANCE = 1e-1", GAPS),
        ("probe.py", "if reason is None and twin.training", "if False", GAPS),
        ("probe.py", "1.25 * number + 0.05", "number", GAPS),
        ("probe.py", ", spec.window, any(spec.shift))", ", spec.window)", GAPS),
        ("probe.py", "_settings(part) if matters else ()", "()", GAPS),
        ("probe.py", "value + torch.rand_like(value) if", "value if", GAPS),
        ("probe.py", "            hooks.clear()", "            pass", GAPS),
        ("probe.py", "torch.random.fork_rng(devices=[])", "ExitStack()", "tests/test_patching.py -k random"),
        ("probe.py", "for rate in (0.0, 0.2) if", "for rate in (0.0,) if", GAPS),
        # What decides about a call.
        ("dispatch.py", "high >= rows", "high > rows", GAPS),
        ("dispatch.py", "low < 0 or ", "", "tests/test_dispatch.py -k index"),
        ("dispatch.py", "if state == stats.index:", "if stats.index is not None:", "tests/test_dispatch.py -k table"),
        ("dispatch.py", "len(memory.sections) >= 16", "len(memory.sections) >= 1 << 30", GAPS),
        ("dispatch.py", "return x.requires_grad or any(", "return x.requires_grad or False and any(", GAPS),
        ("dispatch.py", "config is self.config", "True", "tests/test_memory.py tests/test_patching.py -k options"),
        ("dispatch.py", "if not is_called and has_hooks(module):", "if False:", "tests/test_dispatch.py -k hooks"),
        ("dispatch.py", "if _has_any_global_hook():", "if False:", "tests/test_dispatch.py -k hooks"),
        ("dispatch.py", "forward_ad._current_level >= 0", "False", "tests/test_dispatch.py -k forward_mode"),
        ("dispatch.py", "_interpreter_stack() is not None", "False", "tests/test_dispatch.py -k transforms"),
        ("dispatch.py", "mask is not None and mask.requires_grad", "False", "tests/test_dispatch.py -k gradient"),
        ("dispatch.py", "nn.Module.__call__ is _module_call", "True", GAPS),
        ("dispatch.py", "section.geometry.is_padded and section.padding is None", "False", GAPS),
        ("dispatch.py", "tokens is not x or ", "", GAPS),
        ("dispatch.py", "if section.dropout > 0:", "if False:", "tests/test_dispatch.py -k dropout"),
        # Whether modules are what they were.
        ("watch.py", "list(map(vars, self.owners)) == self.settings", "True", "tests/test_memory.py"),
        ("watch.py", "not any(self.empty)", "True", "tests/test_memory.py"),
        ("watch.py", "and self._layouts() == self.layouts", "", "tests/test_memory.py"),
        ("watch.py", "list(map(type, self.modules)) == self.types", "True", "tests/test_memory.py"),
        ("watch.py", "all(map(is_, map(_forward, self.classes), self.forwards))", "True", "tests/test_memory.py"),
        ("watch.py", "all(map(is_, contents, self.contents))", "True", "tests/test_memory.py"),
        ("watch.py", "value.copy()", "value", "tests/test_memory.py"),
        (
            "watch.py",
            "and cls.forward is _OWN_FORWARD[cls]",
            "",
            "tests/test_dispatch.py tests/test_fusion.py -k patched",
        ),
        # Dispatchers and markers.
        ("patching.py", "return _off.get() or (", "return (", "tests/test_patching.py -k disabled"),
        (
            "patching.py",
            "_off_anywhere > 0 and torch._C._current_graph",
            "False and torch._C._current_graph",
            "tests/test_patching.py -k disabled",
        ),
        ("patching.py", "idle - _copied(idle)", "idle", "tests/test_patching.py -k copies"),
        ("patching.py", "if method in module.__dict__:", "if False:", "tests/test_dispatch.py -k by_hand"),
        (
            "patching.py",
            "_is_off(compiling) or env_disabled()",
            "_is_off(compiling)",
            "tests/test_patching.py -k environment",
        ),
        ("patching.py", "if checkpoints and", "if False and", "tests/test_traps.py -k checkpointing"),
        ("patching.py", "_stats.pop(module, None)", "pass", GAPS),
        ("patching.py", "delattr(cls, MARKER)", "pass", "tests/test_patching.py -k nothing"),
        # Operators.
        ("ops.py", "if twice or _is_batched(grad):", "if twice:", "tests/test_backward.py tests/test_functional.py"),
        ("ops.py", "if env_strict() or dropout:", "if env_strict():", "tests/test_backward.py -k dropout"),
        ("ops.py", "strides == k.stride() == v.stride()", "True", FUZZ),
        ("ops.py", "strides[-1] == 1", "True", FUZZ),
        (
            "ops.py",
            "table, padding, logit_scale)\n    )",
            "table, padding)\n    )",
            "tests/test_functional.py tests/test_backward.py",
        ),
        ("ops.py", "if _POSITION in _failures:", "if False:", "tests/test_dispatch.py -k position"),
        ("ops.py", "index=None if index is None else index.contiguous()", "index=index", FUZZ),
        # Factors and their cache.
        ("bias.py", "None if tensor.is_inference() else tensor._version", "None", GAPS),
        ("bias.py", "info.st_uid != os.getuid()", "False", "tests/test_bias.py"),
        ("bias.py", "(torch.isfinite(q).all() and torch.isfinite(k).all())", "True", "tests/test_bias.py"),
        ("bias.py", " and not _enough(bias, *found[:2], dtype, energy)", " and False", "tests/test_bias.py"),
        ("bias.py", "if not bool(torch.isfinite(bias).all()):", "if False:", "tests/test_bias.py"),
        (
            "bias.py",
            "tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()",
            "b''",
            "tests/test_bias.py",
        ),
        # Whole blocks.
        ("fusion.py", "if looked is None or not looked.holds(module):", "if looked is None:", "tests/test_fusion.py"),
        ("fusion.py", "and tensor.is_contiguous()\n", "\n", "tests/test_fusion.py"),
        ("fusion.py", 'return module.approximate == "none"\n', "return True\n", "tests/test_fusion.py"),
        ("fusion.py", "_demand(child not in roles)", "_demand(True)", "tests/test_fusion.py"),
        (
            "fusion.py",
            "_failure is not None or (F.linear, F.gelu, F.layer_norm) != _OWN_FUNCTIONS",
            "_failure is not None",
            "tests/test_fusion.py",
        ),
        (
            "fusion.py",
            "(x.requires_grad or any(one.requires_grad for one, _ in self.shapes))",
            "x.requires_grad",
            "tests/test_fusion.py tests/test_fusion_autograd.py",
        ),
        (
            "harmless.py",
            "test(twin) and twin.__dict__ == before",
            "test(twin)",
            "tests/test_fusion.py tests/test_fusion_autograd.py tests/test_descendants.py",
        ),
        ("harmless.py", "    if has_hooks(module):\n        return False", "", "tests/test_fusion.py"),
        # Families.
        ("families/timm.py", "dynamic or mask is not None else 0.0", "True else 0.0", GAPS),
        ("families/timm.py", "if coords.shape[0] != tokens * tokens:", "if False:", "tests/test_timm_cr.py"),
        (
            "families/_official.py",
            "attn.attn_drop.p if attn.training",
            "attn.attn_drop.p if attn.attn_drop.training",
            GAPS,
        ),
        (
            "families/torchvision.py",
            "0 if side >= length else",
            "0 if side > length else",
            "tests/test_traps.py -k clamp",
        ),
        ("families/torchvision.py", "torch.zeros_like(k_bias)", "k_bias", "tests/test_traps.py -k bias"),
        ("families/huggingface.py", "if not always_partition:", "if True:", "tests/test_traps.py -k partition"),
        (
            "families/video.py",
            "mask_matrix if geometry.is_shifted else None",
            "mask_matrix",
            "tests/test_families_3d.py",
        ),
        ("families/window_attention.py", "windows == 0 or x.shape[0] % windows", "windows == 0", GAPS),
        (
            "families/_common.py",
            "torch.zeros_like(attn.v_bias) if k_bias is None",
            "attn.v_bias if k_bias is None",
            "tests/test_families.py",
        ),
        ("families/_common.py", "not (dropout.training and dropout.p)", "not dropout.training", GAPS),
    ),
    *under(
        "kernels/triton",
        # The kernel of two images.
        ("window_fwd.py", "k_ptr + stride_next,", "k_ptr,", GAPS),
        ("window_fwd.py", "v_ptr + stride_next,", "v_ptr,", GAPS),
        ("window_fwd.py", "tl.minimum(image + IMAGES - 1, batch - 1)", "image + IMAGES - 1", GAPS),
        ("window_fwd.py", "MASK if KIND == STALE_FACTORS else KIND,", "MASK,", GAPS),
        # Windows, shifts and masks.
        ("tiles.py", "& (shift[1] > 0)) | ((place[2]", "& (shift[1] > 1)) | ((place[2]", GAPS),
        ("tiles.py", "n % WINDOW[2] >= WINDOW[2] - shift[2]", "n % WINDOW[2] > WINDOW[2] - shift[2]", FUZZ),
        ("tiles.py", "tl.maximum(mask, -1.0e30)", "mask", GAPS),
        (
            "tiles.py",
            "at = tl.where(at >= length, at - length, at)",
            "at = tl.where(at > length, at - length, at)",
            FUZZ,
        ),
        ("tiles.py", "(n < WINDOW[0] * WINDOW[1] * WINDOW[2]) & (real == 0)", "real == 0", FUZZ),
        (
            "tiles.py",
            "(tl.load(logit_scale_ptr + head).to(tl.float32), LOG_100)",
            "(tl.load(logit_scale_ptr + head).to(tl.float32), 9.0)",
            FUZZ,
        ),
        (
            "tiles.py",
            "1.0 / tl.maximum(1.0 - dropout.probability, 1e-6)",
            "1.0",
            "tests/test_kernels.py tests/test_backward.py -k dropout",
        ),
        ("bias.py", "(offs_n < num_tokens)[None, :], bias, float", "(offs_n < num_cols)[None, :], bias, float", FUZZ),
        ("window_fwd.py", 'lse, float("inf"))', "lse, 0.0)", FUZZ),
        # Gradients.
        ("window_bwd.py", "exponents = tl.minimum(exponents, 8.0)", "exponents = exponents", GAPS),
        ("window_bwd.py", "clamped = inverse > 0.9999e12", "clamped = inverse > 1e38", GAPS),
        ("window_bwd.py", "> LOG_100, 0.0, grad_scale)", "> 90.0, 0.0, grad_scale)", FUZZ),
        ("window_bwd.py", "residual[:, None] * mean_key", "0.0 * mean_key", FUZZ),
        ("window_bwd.py", "delta + residual, mask", "delta, mask", GAPS),
        ("sequence_fwd.py", "seen = total != 0", "seen = total >= 0", "tests/test_sequence.py"),
        (
            "sequence_fwd.py",
            "exponents = tl.minimum(exponents, 0.0)",
            "exponents = exponents",
            "tests/test_sequence.py",
        ),
        (
            "sequence_fwd.py",
            "(block + window_blocks) * block_size, num_tokens",
            "(block + window_blocks) * block_size + 1, num_tokens",
            FUZZ,
        ),
    ),
]


class Outcome(NamedTuple):
    mutant: Mutant
    word: str  # caught, survived, out of date
    detail: str = ""


@contextmanager
def copied_tree() -> Iterator[Path]:
    """A copy of the tree, whose package is the one that is imported by what runs in it."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "*.egg-info", "build", "dist")
        shutil.copytree(ROOT, tree, ignore=ignored)
        (tree / "swinaccel" / "kernels").symlink_to(tree / "kernels" / "triton", target_is_directory=True)
        yield tree


def run_tests(tree: Path, tests: Iterable[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT)


def is_current(mutant: Mutant) -> bool:
    path = ROOT / mutant.file
    return path.exists() and path.read_text().count(mutant.old) == 1


def tried(mutant: Mutant) -> Outcome:
    """Run the tests of a mutant where it lives."""
    if not is_current(mutant):
        return Outcome(mutant, "out of date")
    with copied_tree() as tree:
        path = tree / mutant.file
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
        try:
            done = run_tests(tree, mutant.tests.split())
        except subprocess.TimeoutExpired:
            return Outcome(mutant, "caught", "the tests do not end")
    if done.returncode not in (0, 1):
        return Outcome(mutant, "out of date", done.stdout[-300:] + done.stderr[-300:])
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return Outcome(mutant, "caught" if done.returncode else "survived", failed[0][:150] if failed else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutants with this word in their file, texts or tests")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a mutant first")
    options = parser.parse_args()
    chosen = [one for one in MUTANTS if options.only in " ".join(one)]
    if not options.no_baseline:
        with copied_tree() as tree:
            for tests in sorted({one.tests for one in chosen if is_current(one)}):
                done = run_tests(tree, tests.split())
                if done.returncode:
                    print(f"without any mutant these tests fail: {tests}\n{done.stdout[-2000:]}")
                    return 2
    words: list[str] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(tried, chosen):
            words.append(outcome.word)
            mutant = outcome.mutant
            print(f"{outcome.word:11} {mutant.file}: {mutant.old!r} -> {mutant.new!r}  {outcome.detail}", flush=True)
    counts = {word: words.count(word) for word in ("caught", "survived", "out of date")}
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return 2 if counts["out of date"] else 1 if counts["survived"] else 0


if __name__ == "__main__":
    sys.exit(main())
