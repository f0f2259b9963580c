"""Run a program in auto mode: `python -m swinaccel.auto program.py --its arguments`, or `-m package`."""

from __future__ import annotations

import os
import runpy
import sys

from ..config import set_auto
from . import start

_USAGE = "usage: python -m swinaccel.auto (program.py | -m module) [its arguments]"


def main(arguments: list[str]) -> None:
    """Run a program as `python` would, with its own arguments and folder."""
    is_module = arguments[:1] == ["-m"]
    target = arguments[is_module : is_module + 1]
    if not target or (target[0].startswith("-") and not os.path.exists(target[0])):
        print(_USAGE, file=sys.stderr)
        sys.exit(2)
    set_auto()
    start()
    sys.argv = arguments[is_module:]
    if is_module:
        runpy.run_module(target[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.realpath(target[0]))
        runpy.run_path(target[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
