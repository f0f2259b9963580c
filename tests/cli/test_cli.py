"""The command line: what it prints, its exit codes, and its words for mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
from typer.testing import CliRunner

from swinaccel.cli import main, models, terminal

TINY = """
    import timm, torch

    _TINY = dict(depths=(2, 1), num_heads=(2, 4), embed_dim=32, num_classes=5)

    def swin():
        torch.manual_seed(0)
        return timm.create_model("swin_tiny_patch4_window7_224", img_size=56, **_TINY)

    def swinv2():  # 144 tokens: large enough for factors
        torch.manual_seed(0)
        print("a factory may print")
        return timm.create_model("swinv2_tiny_window8_256", img_size=96, window_size=12, **_TINY)

    def plain():
        return torch.nn.Linear(4, 4)

    def fragile():
        return torch.nn.Linear(3, 3)

    def number():
        return 3

    def example_inputs(batch):
        return torch.randn(batch, 3, 56, 56)
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(textwrap.dedent(TINY))
    return path


def call(*arguments: object):
    return CliRunner().invoke(main.app, [str(argument) for argument in arguments])


def document(*arguments: object, code: int = 0):
    result = call(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_help_lists_the_commands():
    result = call("--help")
    assert result.exit_code == 0
    for word in ("inspect", "verify", "bench", "precompute", "timm:NAME"):
        assert word in result.stdout


def test_the_installed_command_runs():
    command = os.path.join(os.path.dirname(sys.executable), "swinaccel")
    if not os.path.exists(command):
        pytest.skip("the package is not installed beside this Python")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __import__("swinaccel").__version__


def test_inspect(tiny):
    result = call("inspect", f"{tiny}:swin")
    assert result.exit_code == 0, result.output
    assert "3 of 3 window attentions accelerated" in result.stdout
    assert "layers.0.blocks.1" in result.stdout
    found = document("inspect", f"{tiny}:swin")
    assert (found["accelerated"], found["original"]) == (3, 0)
    assert found["entries"][1]["shift"] == [3, 3]
    assert found["parameters"] > 0


def test_inspect_finds_nothing(tiny):
    result = call("inspect", f"{tiny}:plain")
    assert result.exit_code == 0
    assert "no window attention found" in result.stdout


def test_verify(tiny):
    found = document("verify", f"{tiny}:swin", "--backend", "torch", "--dtype", "float32", "--device", "cpu")
    assert found["passed"] is True
    assert found["dtype"] == "float32"
    assert found["max_error"] < 1e-5
    result = call("verify", f"{tiny}:swin", "--backend", "torch", "--batch", 1, "--device", "cpu")
    assert result.exit_code == 0
    assert "passed" in result.stdout


def test_verify_fails_where_nothing_is_accelerated(plain):
    found = document("verify", plain, "--size", 8, "--device", "cpu", code=1)
    assert found["passed"] is False
    result = call("verify", plain, "--size", 8, "--device", "cpu")
    assert "no window attention was found" in result.stdout
    assert "give the part of the model" in result.stdout


def test_bench(tiny, tmp_path):
    picture = tmp_path / "picture.png"
    arguments = ("--backend", "torch", "--device", "cpu", "--batch", 1, "--rounds", 2)
    found = document("bench", f"{tiny}:swin", *arguments, "--plot", picture)
    assert [row["name"] for row in found["variants"]] == ["original", "SDPA", "accelerated"]
    assert found["rounds"] == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = call("bench", f"{tiny}:swin", *arguments)
    assert result.exit_code == 0
    assert "speed-up" in result.stdout


def test_precompute(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SWINACCEL_CACHE_DIR", str(tmp_path / "cache"))
    found = document("precompute", f"{tiny}:swinv2", "--bias-energy", 0.9, "--device", "cpu")
    assert found["dtype"] == "bfloat16"
    rows = found["modules"]
    assert len(rows) == 3
    assert all(row["rank"] and row["error"] > 0 and row["tokens"] == 144 for row in rows)
    assert list((tmp_path / "cache" / "factors").iterdir())
    (reason,) = {row["reason"] for row in document("precompute", f"{tiny}:swinv2", "--bias", "auto")["modules"]}
    assert reason == "bias='auto' uses the exact table unless --bias-energy is given"
    result = call("precompute", f"{tiny}:swin", "--device", "cpu")
    assert result.exit_code == 0
    assert "0 of 3 modules have factors" in result.stdout
    assert "a window of 49 tokens keeps its whole bias in registers" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "swin_tiny"), ("MODEL must be", "timm:NAME", "'swin_tiny'")),
        (("inspect", "timm:swin_tny_patch4_window7_224"), ("timm has no model", "swin_tiny_patch4_window7_224")),
        (("inspect", "torchvision:swin_x"), ("torchvision has no model", "swin_t")),
        (("inspect", "hf:swim"), ("no architecture", "swinv2-tiny", "owner/name")),
        (("inspect", "hf:swin-tiny", "--pretrained"), ("without weights", "hub name")),
        (("inspect", "nowhere.py:make"), ("there is no file 'nowhere.py'",)),
        (("inspect", "{tiny}:absent"), ("no function 'absent'", "swinv2")),
        (("inspect", "{tiny}:number"), ("must return a torch.nn.Module", "int")),
        (("inspect", "{tiny}"), ("MODEL must be", "a file without a function of it")),
        (("verify", "{tiny}:swin", "--dtype", "int8"), ("dtype must be one of", "bfloat16", "'int8'")),
        (("verify", "{tiny}:swin", "--backend", "cuda"), ("backend must be one of", "'cuda'")),
        (("verify", "{tiny}:swin", "--device", "toaster"), ("device must be", "'toaster'")),
        (("bench", "{tiny}:swin", "--bias-energy", "2"), ("bias_energy must lie in (0, 1]",)),
        (("bench", "{tiny}:fragile", "--device", "cpu"), ("the model does not run",)),
        (("precompute", "{tiny}:swin", "--bias", "table"), ("the table needs no precomputation",)),
    ],
    ids=lambda value: " ".join(value) if value[0] in ("inspect", "verify", "bench", "precompute") else "",
)
def test_mistakes_get_one_sentence(tiny, arguments, words):
    result = call(*(argument.format(tiny=tiny) for argument in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("path", ["missing/plot.png", "folder"])
def test_plots_that_cannot_be_written_are_found_out_before_the_work(tiny, tmp_path, monkeypatch, path):
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(models, "load", None)
    result = call("bench", f"{tiny}:swin", "--plot", tmp_path / path)
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
    assert "give another path" in result.stderr


@pytest.mark.parametrize("path", ["plot", "plot.doc"])
def test_plots_of_no_known_kind_are_found_out_before_the_work(tiny, tmp_path, monkeypatch, path):
    monkeypatch.setattr(models, "load", None)
    result = call("bench", f"{tiny}:swin", "--plot", tmp_path / path)
    assert result.exit_code == 2
    assert "end it in .png" in result.stderr
    assert not list(tmp_path.glob("plot*"))


def test_the_place_of_a_plot(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = terminal.image_path("--plot", "~/plot.png")
    assert path == tmp_path / "plot.png"
    assert not path.exists()
    path.write_bytes(b"before")
    terminal.image_path("--plot", str(path))
    assert path.read_bytes() == b"before"


def test_factors_that_cannot_be_kept(tiny, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "factors").touch()
    for folder, words in (("cache", "nothing can be kept in"), ("tiny.py", "is not usable: ")):
        monkeypatch.setenv("SWINACCEL_CACHE_DIR", str(tmp_path / folder))
        result = call("precompute", f"{tiny}:swin", "--device", "cpu")
        assert result.exit_code == 2
        assert words in result.stderr
        assert "SWINACCEL_CACHE_DIR" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, ""),
        (AttributeError("odd"), 2, "error: AttributeError: odd (swinaccel --traceback shows where)"),
        (RuntimeError("a\nb"), 2, "error: RuntimeError: a (swinaccel --traceback shows where)"),
        (PermissionError(13, "Permission denied", "x/y"), 2, "error: x/y: Permission denied"),
        (ValueError(), 2, "error: ValueError (swinaccel --traceback shows where)"),
    ],
    ids=repr,
)
def test_other_ends(monkeypatch, error, code, words):
    monkeypatch.setattr(models, "load", lambda *_: (_ for _ in ()).throw(error))
    result = call("inspect", "timm:x")
    assert (result.exit_code, result.stderr.strip()) == (code, words)
    if code == 2:
        result = call("--traceback", "inspect", "timm:x")
        assert result.exception is error


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("import torch\ndef make():\n    return torch.nn.Conv2d(3, 4, 1)\n")
    return f"{path}:make"


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_reader_who_leaves(plain):
    """As `head -1` does: no traceback, neither at once nor when Python ends."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "swinaccel.cli", "inspect", plain]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert done.returncode == 141
    assert "rror" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_output_that_cannot_be_written(plain):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "swinaccel.cli", "inspect", plain, "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "error: the output cannot be written: No space left on device\n"
