"""The command doctor: what would run here, what is in the way, and its exit code."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

import swinaccel
from swinaccel.cli import doctor, main


def document(code: int = 0) -> dict:
    result = CliRunner().invoke(main.app, ["doctor", "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture(autouse=True)
def _without_libraries(monkeypatch):
    """Importing them takes longer than the rest."""
    monkeypatch.setattr(doctor, "_MODELS", ("timm", "no_such_package"))


def test_what_would_run(monkeypatch):
    found = document()
    assert found["swinaccel"] == swinaccel.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["no_such_package"] is None
    assert found["backend"] == "triton"  # on a GPU, or interpreted
    assert "and is right" in found["trial"]
    if not torch.cuda.is_available():
        monkeypatch.delenv("TRITON_INTERPRET")
        result = CliRunner().invoke(main.app, ["doctor"])
        assert result.exit_code == 0
        assert "torch: there is no GPU" in result.stdout
        assert "PROBLEM" not in result.stdout


def test_switched_off(monkeypatch):
    monkeypatch.setenv("SWINACCEL_DISABLE", "1")
    found = document()
    assert found["backend"] is None
    assert "SWINACCEL_DISABLE is set" in found["reason"]
    assert found["environment"]["SWINACCEL_DISABLE"] == "1"


def test_what_is_in_the_way(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SWINACCEL_STRICT", "perhaps")
    monkeypatch.setenv("SWINACCEL_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setitem(sys.modules, "timm", None)  # installed, and not to be imported
    monkeypatch.setattr(doctor.ops.window, "shifted_window_attention", lambda *_, **__: 1 / 0)
    problems = "\n".join(document(code=1)["problems"])
    for words in ("SWINACCEL_STRICT='perhaps'", "SWINACCEL_CACHE_DIR=", "timm cannot be imported", "ZeroDivisionError"):
        assert words in problems


def test_wrong_numbers_are_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "_try", lambda *_: 0.5)
    found = document(code=1)
    assert "wrong by 5e-01" in found["trial"]
    assert "please report it" in found["problems"][0]


def test_a_driver_that_pytorch_does_not_see(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "PyTorch sees no CUDA device" in document(code=1)["problems"][0]
