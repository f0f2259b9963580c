"""The command line: what it prints, its exit codes, and its words for mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from typer.testing import CliRunner

from swinaccel import cli, models

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
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


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


def test_verify_fails_where_nothing_is_accelerated(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("import torch\ndef make():\n    return torch.nn.Conv2d(3, 4, 1)\n")
    found = document("verify", f"{path}:make", "--size", 8, "--device", "cpu", code=1)
    assert found["passed"] is False


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


@pytest.mark.parametrize(
    "name", ["torchvision:swin_v2_t", "hf:swin", "hf:swinv2-tiny", "timm:swin_tiny_patch4_window7_224"]
)
def test_models_by_name(name):
    kind, _, rest = name.partition(":")
    with torch.device("meta"):  # no memory and no time for the weights
        model = models._LOADERS[kind](rest, False, None)
    (image,) = model.example_inputs(2)
    assert image.shape[:2] == (2, 3)
    assert image.shape[2] == (256 if "v2" in name else 224)


def test_huggingface_sizes_are_the_published_ones():
    kind, settings = models.HUGGINGFACE["swinv2-base"]
    assert kind == "swinv2"
    assert settings["num_heads"] == (4, 8, 16, 32)
    assert (settings["embed_dim"], settings["window_size"], settings["image_size"]) == (128, 8, 256)


def test_huggingface_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, window_size=4, embed_dim=16, depths=[1, 1], num_heads=[1, 2], num_labels=3
    )
    transformers.SwinForImageClassification(config).save_pretrained(tmp_path)
    for name, pretrained in ((tmp_path, False), (tmp_path / "config.json", False), (tmp_path, True)):
        model, example_inputs = models.load(f"hf:{name}", pretrained)
        assert type(model).__name__ == "SwinForImageClassification"
        with torch.no_grad():
            assert model(*example_inputs(1)).logits.shape == (1, 3)


def test_fresh_models_hide_nothing():
    model = models.load("timm:swinv2_tiny_window8_256").model
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 1 or parameter.std() > 0, name
