"""Deliberate faults, and whether the tests notice them.

    python tests/mutants.py [--only WORD] [--jobs N] [--timeout SECONDS] [--after FILE] [--no-baseline]

Each mutant, of the tables in tests/faults, is one piece of text in one file, put otherwise in a temporary copy of the
tree, where the tests that must notice it are run. A text that does not occur exactly once is out of date: put the
mutant where the fact has gone. Exits with 1 if a mutant survived or its tests ran into the time limit, which says
nothing, with 2 if one is out of date or the tests fail without any.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from faults import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
# What tests import beside the package.
LIBRARIES = ["torch", "triton", "torchvision", "timm", "transformers", "hypothesis", "pytest"]
FORKS = multiprocessing.get_context("forkserver")
WORDS = ("caught", "survived", "timed out", "out of date")


class Outcome(NamedTuple):
    mutant: Mutant
    word: str  # of WORDS
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


class Done(NamedTuple):
    returncode: int | None  # None: it ran into the time limit
    output: str


def run_tests(tree: Path, tests: str, timeout: float) -> Done:
    """Run tests in a process of their own, forked from one that has imported what the tests do."""
    log = tree.parent / "log"
    process = FORKS.Process(target=run_pytest, args=(str(tree), shlex.split(tests), str(log)))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return Done(None, log.read_text())
    return Done(process.exitcode, log.read_text())


def run_pytest(tree: str, tests: list[str], log: str) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    sys.path[:] = [tree, *(place for place in sys.path if not place.startswith(str(ROOT)))]
    os.environ.update(PYTHONPATH=tree, PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    sys.exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", *tests])))


def is_current(mutant: Mutant) -> bool:
    path = ROOT / mutant.file
    return path.exists() and path.read_text().count(mutant.old) == 1


def described(mutant: Mutant) -> str:
    return f"{mutant.file}: {mutant.old!r} -> {mutant.new!r}  "


def tried(mutant: Mutant, timeout: float, earlier: list[str]) -> Outcome:
    """Run the tests of a mutant where it lives."""
    if not is_current(mutant):
        return Outcome(mutant, "out of date")
    for line in earlier:
        if line.startswith(f"{'caught':11} {described(mutant)}"):
            return Outcome(mutant, "caught", line.removeprefix(f"{'caught':11} {described(mutant)}"))
    with copied_tree() as tree:
        path = tree / mutant.file
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
        done = run_tests(tree, mutant.tests, timeout)
    if done.returncode is None:
        return Outcome(mutant, "timed out")
    if done.returncode < 0:
        return Outcome(mutant, "caught", f"the tests ended by signal {-done.returncode}")
    if done.returncode > 1:
        return Outcome(mutant, "out of date", done.output[-300:])
    failed = [line for line in done.output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return Outcome(mutant, "caught" if done.returncode else "survived", failed[0][:150] if failed else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutants with this word in their file, texts or tests")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600, help="seconds that the tests of one mutant may take")
    parser.add_argument("--after", type=Path, help="output of an earlier run: what was caught there is not run again")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a mutant first")
    options = parser.parse_args()
    chosen = [one for one in MUTANTS if options.only in " ".join(one)]
    os.environ["OMP_NUM_THREADS"] = "1"
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, as conftest.py has it
    FORKS.set_forkserver_preload(LIBRARIES)
    if not options.no_baseline:
        with copied_tree() as tree:
            for tests in sorted({one.tests for one in chosen if is_current(one)}):
                done = run_tests(tree, tests, options.timeout)
                if done.returncode:
                    print(f"without any mutant these tests fail: {tests}\n{done.output[-2000:]}")
                    return 2
    earlier = [] if options.after is None else options.after.read_text().splitlines()
    words: list[str] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(tried, chosen, repeat(options.timeout), repeat(earlier)):
            words.append(outcome.word)
            print(f"{outcome.word:11} {described(outcome.mutant)}{outcome.detail}", flush=True)
    counts = {word: words.count(word) for word in WORDS}
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return 2 if counts["out of date"] else 1 if counts["survived"] or counts["timed out"] else 0


if __name__ == "__main__":
    sys.exit(main())
