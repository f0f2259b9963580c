"""Models for the command line: a user's file that may do anything, and names of the libraries' models."""

from __future__ import annotations

import sys
import textwrap

import helpers
import pytest
import torch
from test_cli import call, document, tiny  # noqa: F401

from swinaccel.cli import bench, factory, models

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
def nets(tiny, tmp_path):  # noqa: F811
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


def test_what_a_model_is_called_with_may_fail(tiny):  # noqa: F811
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


def test_libraries_that_are_not_there_or_broken(monkeypatch, tmp_path):
    (tmp_path / "broken_package.py").write_text("raise AttributeError('no such operator')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"absent_package is not installed; pip install"):
        models.library("absent_package.part")
    with pytest.raises(
        ImportError, match=r"broken_package cannot be imported: AttributeError: no such operator; install"
    ):
        models.library("broken_package")


@pytest.mark.parametrize(
    "name", ["torchvision:swin_v2_t", "hf:swin", "hf:swinv2-tiny", "timm:swin_tiny_patch4_window7_224"]
)
def test_models_by_name(name):
    kind, _, rest = name.partition(":")
    with helpers.on_meta():  # no memory and no time for the weights
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
