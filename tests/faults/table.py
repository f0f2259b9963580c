"""What a fault is."""

from __future__ import annotations

import re
from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault: in `file`, under the tree's root, `old` reads `new`; `tests` are pytest's arguments."""

    file: str
    old: str
    new: str
    tests: str


def under(folder: str, *mutants: tuple[str, str, str, str]) -> list[Mutant]:
    """Return the faults of files in a folder; of tests, "api/test_nn -k copies" means those in tests/api/test_nn.py."""
    return [
        Mutant(f"{folder}/{file}", old, new, re.sub(r"(?<!\S)(\w+/test_\w+)", r"tests/\1.py", tests))
        for file, old, new, tests in mutants
    ]
