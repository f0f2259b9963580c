"""Every reason that the report can give is in docs/troubleshooting.md, and every one there can be given."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"

SOURCES = ("families", "trust", "runtime", "backends", "ops", "api.py", "patching.py")
WITH_CONSTANTS = ("trust", "runtime", "api.py")
# Exceptions whose message becomes a reason.
GIVEN_AS = {"Untraceable", "Inconclusive", "NotFusable", "NotCapturable", "NotNow", "KernelError"}


def reasons() -> set[str]:
    """Return the reasons in the code, with … for each value that is put in.

    They are what functions return that may return a string, what is assigned to a `reason` or `facts`, messages of some
    exceptions, and constants of modules.
    """
    found: set[str] = set()
    for name in SOURCES:
        path = ROOT / "swinaccel" / name
        for source in path.rglob("*.py") if path.is_dir() else path.parent.glob(name):
            tree = ast.parse(source.read_text())
            found.update(text for value in values(tree) for text in texts(value))
            if name in WITH_CONSTANTS:
                constants = (one.value for one in tree.body if isinstance(one, ast.Assign))
                found.update(text for one in constants if isinstance(one, ast.Constant) for text in texts(one))
    return {text for text in found if len(re.findall(r"[a-z]{2,}\b", text)) > 1}


def values(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield the expressions that give reasons."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and re.search(r"\b(str|Any)\b", ast.unparse(node.returns or node.args)):
            yield from (one.value for one in ast.walk(node) if isinstance(one, ast.Return) and one.value is not None)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).split(".")[-1] in ("reason", "facts"):
            yield node.value
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            if ast.unparse(node.exc.func).split(".")[-1] in GIVEN_AS:
                yield node.exc.args[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("require", "self.refuse"):
            yield node.args[1]


def texts(value: ast.expr) -> Iterator[str]:
    """Yield the strings that an expression may be."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value.replace("{}", "…")
    elif isinstance(value, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in value.values)
    elif isinstance(value, ast.IfExp):
        yield from (text for one in (value.body, value.orelse) for text in texts(one))
    elif isinstance(value, (ast.BoolOp, ast.Tuple)):
        parts = value.values if isinstance(value, ast.BoolOp) else value.elts
        yield from (text for one in parts for text in texts(one))


def test_the_page_has_every_reason_and_no_other():
    rows = re.findall(r"^\| `(.+?)` \|", PAGE.read_text(), re.MULTILINE)
    found = reasons()
    assert len(found) > 100
    assert sorted(found - set(rows)) == [], "reasons without a row in docs/troubleshooting.md"
    assert sorted(set(rows) - found) == [], "rows of docs/troubleshooting.md that no code gives"
    assert len(rows) == len(set(rows))
