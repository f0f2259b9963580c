"""Every example runs from its own file, without a network, and says what it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

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
    "timm_training.py": ((), ("step 3: loss", "averaged weights: (2, 4)", "4 window attentions")),
    "birefnet.py": ((), ("8 of 8 window attentions accelerated", "% foreground", "differs by")),
    "upscaler.py": ((), ("4 of 4 window attentions accelerated", "(3, 256, 512)", "differs by")),
    "trainer.py": ((), ("trained 4 steps", "4 of 4 window attentions accelerated")),
    "lightning_module.py": ((), ("trained 4 steps", "4 of 4 window attentions accelerated")),
    "swin_unetr.py": ((), ("segmented (1, 2, 96, 64, 64)", "8 of 8 window attentions accelerated")),
    "new_variant.py": ((), ("no window attention found", "its forward is not that of careless", "2 of 2", "differ by")),
}
NEEDED = {
    "quickstart.py": "sklearn",
    "trainer.py": "accelerate",
    "lightning_module.py": "lightning",
    "swin_unetr.py": "monai",
}


def test_every_example_is_tested():
    assert sorted(CASES) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module")
def parent():
    """A process that has imported what every example imports, and forks one of its own for each."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.stdin.close()


PARENT = """
import json, os, runpy, sys
import torch, torchvision
for line in sys.stdin:
    path, folder, output, *sys.argv[1:] = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        sys.argv[0], sys.path[0] = path, os.path.dirname(path)
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.stdin.close()
        runpy.run_path(path, run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("name", CASES)
def test_example(name, tmp_path, parent):
    arguments, words = CASES[name]
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    output = tmp_path / "output"
    parent.stdin.write(json.dumps([str(EXAMPLES / name), str(tmp_path), str(output), *arguments]) + "\n")
    parent.stdin.flush()
    status = parent.stdout.readline()
    printed = output.read_text()
    assert status == "0\n", printed
    for word in words:
        assert word in printed, printed


def test_quickstart_without_its_extras_is_one_sentence(tmp_path, parent):
    output = tmp_path / "output"
    (tmp_path / "alone.py").write_text(
        f"import runpy, sys\nsys.modules['sklearn'] = sys.modules['sklearn.datasets'] = None\n"
        f"runpy.run_path({str(EXAMPLES / 'quickstart.py')!r}, run_name='__main__')\n"
    )
    parent.stdin.write(json.dumps([str(tmp_path / "alone.py"), str(tmp_path), str(output)]) + "\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "2\n"
    (sentence,) = output.read_text().splitlines()
    assert "sklearn" in sentence
    assert 'pip install "swinaccel[bench]"' in sentence
