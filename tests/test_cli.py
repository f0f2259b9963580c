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

from swinaccel.cli import bench, factory, main, models

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


FILES = {
    "syntax": (b"def make(:\n", "net.py cannot be imported: SyntaxError"),
    "zeros": (b"def make():\n    pass\n\0", "net.py cannot be imported: "),
    "latin": ("def make(): return 'café'".encode("latin-1"), "net.py cannot be imported: SyntaxError"),
    "utf-16": ("def make(): pass".encode("utf-16"), "net.py cannot be imported: "),
    "raises": (b"raise KeyError('nowhere')", "net.py cannot be imported: KeyError: 'nowhere'"),
    "exits": (b"import sys; sys.exit(3)", "net.py cannot be imported: it calls sys.exit(3)"),
    "parses": (b"import argparse; argparse.ArgumentParser().parse_args(['--no'])", "it calls sys.exit(2)"),
    "imports": (b"import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
    "base": (b"class Odd(BaseException): pass\nraise Odd('here')", "net.py cannot be imported: Odd: here"),
    "empty": (b"import torch\nfrom torch.nn import Linear", "net.py has no function 'make'; it has none"),
    "no function": (b"make = 3\ndef other(): pass", "net.py has no function 'make'; it has other"),
    "fails": (b"def make(): return 1 / 0", "make() fails: ZeroDivisionError: division by zero"),
    "fails at length": (b"def make(): raise ValueError('one' + chr(10) + 'two')", "make() fails: ValueError: one ("),
    "leaves": (b"def make(): raise SystemExit", "make() fails: it calls sys.exit()"),
    "wants": (
        b"def make(dim, depth=2): pass",
        "is called without arguments, but it is missing a required argument: 'dim'",
    ),
    "nothing": (b"def make(): pass", "must return a torch.nn.Module; it returned nothing"),
    "class": (b"import torch\ndef make(): return torch.nn.ReLU", "torch.nn.Module; it returned a type"),
    "pair": (b"import torch\ndef make(): return torch.nn.ReLU(), 1", "torch.nn.Module; it returned a tuple"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_models(tmp_path, case):
    text, words = FILES[case]
    path = tmp_path / "net.py"
    path.write_bytes(text)
    before = list(sys.path), set(sys.modules)
    result = call("inspect", f"{path}:make")
    assert result.exit_code == 2
    assert result.stdout == ""
    (sentence,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert result.stderr.endswith(f"{sentence}\n")
    assert words in sentence
    assert "Traceback" not in result.stderr
    assert sys.path == before[0]
    if "cannot be imported" in words:
        assert "net" not in set(sys.modules) - before[1]
    sys.modules.pop("net", None)


NETS = """
    import torch, swinaccel
    from torch import nn
    from tiny import swin as tiny_swin

    class Silent(nn.Sequential):
        def train(self, mode=True):  # as detection backbones have it
            super().train(mode)

        def to(self, *args, **kwargs):
            super().to(*args, **kwargs)

    class Failing(nn.Linear):
        def forward(self, x):
            raise NotImplementedError("no" + chr(10) + "way")

    class Leaving(nn.Linear):
        def forward(self, x):
            raise SystemExit(4)

    def silent():
        import beside

        return Silent(tiny_swin())

    def failing():
        return Failing(2, 2)

    def leaving():
        return Leaving(2, 2)

    ready = nn.Sequential(tiny_swin())

    def example_inputs(batch):
        return torch.ones(batch, 3, 56, 56)
"""


@pytest.fixture
def nets(tiny, tmp_path):
    (tmp_path / "beside.py").touch()
    path = tmp_path / "nets.py"
    path.write_text(textwrap.dedent(NETS))
    yield path
    for name in ("nets", "tiny", "beside"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "arguments", ["inspect", "verify --backend torch", "bench --backend torch --rounds 1", "precompute"]
)
def test_models_whose_train_gives_nothing(nets, arguments):
    command, *options = arguments.split()
    options += [] if command == "inspect" else ["--device", "cpu", "--dtype", "float32"]
    result = call(command, f"{nets}:silent", *options)
    assert result.exit_code == 0, result.output


def test_training_of_models_whose_train_gives_nothing(nets):
    assert bench._copy(factory.load(f"{nets}:silent")[0], train=True).training


def test_a_model_that_is_there_already(nets):
    assert document("inspect", f"{nets}:ready")["accelerated"] == 3


@pytest.mark.parametrize("command", ["verify", "bench"])
@pytest.mark.parametrize(("name", "words"), [("failing", "NotImplementedError: no;"), ("leaving", "sys.exit(4)")])
def test_models_that_do_not_run(nets, command, name, words):
    result = call(command, f"{nets}:{name}", "--device", "cpu")
    assert result.exit_code == 2
    assert "the model does not run on its example inputs (" in result.stderr
    assert "x3x56x56): " in result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_what_a_model_is_called_with_may_fail(tiny):
    tiny.write_text(tiny.read_text() + "\ndef example_inputs(batch):\n    return [][batch]\n")
    result = call("verify", f"{tiny}:swin", "--device", "cpu")
    assert result.exit_code == 2
    assert "example_inputs(2) of" in result.stderr
    assert "fails: IndexError" in result.stderr


@pytest.mark.parametrize("model", ["{folder}", "{folder}:make", "{folder}/x.py:make"])
def test_a_folder_is_no_model(tmp_path, model):
    (tmp_path / "x.py").mkdir()
    result = call("inspect", model.format(folder=tmp_path))
    assert result.exit_code == 2
    assert "a folder" in result.stderr


@pytest.mark.parametrize("path", ["missing/plot.png", "folder"])
def test_plots_that_cannot_be_written_are_found_out_before_the_work(tiny, tmp_path, monkeypatch, path):
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(models, "load", None)
    result = call("bench", f"{tiny}:swin", "--plot", tmp_path / path)
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
    assert "give another path" in result.stderr


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


def test_libraries_that_are_not_there_or_broken(monkeypatch, tmp_path):
    (tmp_path / "broken_package.py").write_text("raise AttributeError('no such operator')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"absent_package is not installed; pip install"):
        models.library("absent_package.part")
    with pytest.raises(
        ImportError, match=r"broken_package cannot be imported: AttributeError: no such operator; install"
    ):
        models.library("broken_package")


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
