"""Every example runs from its own file, without a network, and says what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

CASES = {
    "quickstart.py": (
        ("--batch", "1", "--rounds", "2"),
        ("12 of 12 window attentions accelerated", "(passed)", "speed-up"),
    ),
    "scoped.py": ((), ("0 of 4 modules", "2 of 4 modules", "4 of 4 modules", "differ by")),
    "window_attention.py": (
        (),
        ("14x14 windows, head_dim 30", "gradients of the bias", "one seed True, for another False"),
    ),
    "cosine_window_attention.py": ((), ("gradients of logit_scale", "takes no gradient: True", "all finite: True")),
    "own_model.py": ((), ("V1: loss", "V2: loss", "logit_scale, q_bias, v_bias")),
    "finetune.py": (
        ("--compare", "--steps", "4", "--batch", "4"),
        ("4 window attentions", "original's", "median step", "losses differ by"),
    ),
    "block_sliding_window.py": ((), ("3136 tokens", "with a dense mask", "the last 5 tokens look at 152 of 495")),
    "flash_bias.py": ((), ("'energy': 0.995", "ALiBi: rank 2", "squared distances: rank 5")),
    "new_variant.py": ((), ("no window attention found", "its forward is not that of careless", "2 of 2", "differ by")),
}


def test_every_example_is_tested():
    assert sorted(CASES) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", CASES)
def test_example(name, tmp_path):
    arguments, words = CASES[name]
    if name == "quickstart.py":
        pytest.importorskip("sklearn")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for word in words:
        assert word in done.stdout, done.stdout
