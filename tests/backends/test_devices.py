"""Launches for GPUs that are not there: compiled ahead of time, they must fit the shared memory of those.

SWINACCEL_EVERY_DEVICE=1 compiles for every GPU of ahead.py and every kind of problem, which takes hours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EVERYTHING = os.environ.get("SWINACCEL_EVERY_DEVICE") == "1"


@pytest.mark.timeout(6 * 3600 if EVERYTHING else 600)
def test_launches_fit_other_devices():
    script = Path(__file__).parents[1] / "ahead.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), *(["all"] if EVERYTHING else [])],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) >= 20
    assert {row["gpu"] for row in found} >= {"sm_86", "gfx942"}
    failed = [row for row in found if row["error"]]
    assert not failed, failed
    too_large = [row for row in found if row["shared"] > row["limit"]]
    assert not too_large, too_large
