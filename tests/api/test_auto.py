"""Auto mode: models of known libraries are accelerated as they are first called, and nothing else is touched."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import helpers
import pytest
import torch
from patched import X, output

import swinaccel
from swinaccel import auto, patching
from swinaccel.auto import __main__ as runner
from swinaccel.trust.fingerprint import Trace

KEEPS_VERDICTS = True

ROOT = Path(__file__).parents[2]
MODELS = {
    "timm": lambda: helpers.timm_v1(img_size=32, window=4),
    "hf-swin": lambda: helpers.huggingface("Swin", "ForImageClassification"),
}


@pytest.fixture
def on(monkeypatch):
    monkeypatch.setattr(auto, "_has_told", False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # plain PyTorch, as programs run it on a CPU
    auto.start()
    yield
    auto.stop()


@pytest.mark.parametrize("name", MODELS)
def test_models_are_accelerated_as_they_are_first_called(on, name, caplog):
    model = MODELS[name]()
    auto.stop()
    expected = output(model)
    auto.start()
    helpers.assert_close(output(model), expected)
    report = swinaccel.report(model)
    assert len(report.accelerated) == len(report) > 1
    assert all(entry.calls == 1 and not entry.fallbacks for entry in report)
    (line,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "window attentions accelerated" in line.getMessage()
    output(MODELS[name]())
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


class Own(torch.nn.Module):
    """Code around a model of a library."""

    def __init__(self):
        super().__init__()
        self.body = MODELS["timm"]()

    def forward(self, x):
        return 2 * self.body(x)


def test_code_around_models_can_be_followed(on):
    swinaccel.accelerate(MODELS["timm"](), graphs=True)  # its class has a dispatcher upon what auto mode put there
    auto.stop()
    auto.start()
    model = Own()
    assert Trace([("", one) for one in model.modules()], ("forward",)).contents is not None


def test_parts_that_are_called_alone(on):
    stage = MODELS["timm"]().layers[0]
    output(stage, torch.randn(1, 8, 8, 32))
    assert swinaccel.report(stage).accelerated


def test_what_the_program_has_accelerated_is_left_as_it_is(on):
    model = swinaccel.accelerate(MODELS["timm"](), filter=lambda name, _: name.endswith("blocks.0"))
    count = len(swinaccel.report(model).accelerated)
    output(model)
    assert 0 < len(swinaccel.report(model).accelerated) == count < len(swinaccel.report(model))


def test_tracers_and_compilers_see_the_library_s_own_code(on):
    model = MODELS["timm"]()
    traced = torch.jit.trace(model, X, check_trace=False)
    assert not swinaccel.report(model).accelerated
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = compiled(X)
    assert not swinaccel.report(model).accelerated
    helpers.assert_close(output(traced), expected)
    helpers.assert_close(output(model), expected)
    assert swinaccel.report(model).accelerated


def test_a_failure_leaves_the_model_alone(on, monkeypatch, caplog):
    model = MODELS["timm"]()
    monkeypatch.setenv("SWINACCEL_STRICT", "perhaps")
    with monkeypatch.context() as patch:
        patch.setattr(auto, "accelerate", lambda _: 1 / 0)
        assert output(model).isfinite().all()
    assert "leaves a SwinTransformer as it is" in caplog.text
    assert not swinaccel.report(model).accelerated


def test_stop_leaves_no_trace():
    import timm.models.swin_transformer as library

    before = {name: vars(getattr(library, name))["forward"] for name in auto.LIBRARIES[library.__name__]}
    auto.start()
    assert all(vars(getattr(library, name))["forward"] is not forward for name, forward in before.items())
    auto.stop()
    assert all(vars(getattr(library, name))["forward"] is forward for name, forward in before.items())
    output(model := MODELS["timm"]())
    assert not any(map(patching.marker, model.modules()))


@pytest.mark.parametrize("name", auto.LIBRARIES)
def test_classes_of_installed_libraries_are_there(name):
    module = pytest.importorskip(name)
    assert all(isinstance(getattr(module, cls), type) for cls in auto.LIBRARIES[name])


PROGRAM = """
    import sys
    import beside, torch
    import timm.models.swin_transformer as swin  # after whatever may have come before it

    torch.manual_seed(0)
    model = swin.SwinTransformer(32, 4, 3, 5, embed_dim=32, depths=(2,), num_heads=(2,), window_size=4).eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    marks = sum("_swinaccel" in vars(module) for module in model.modules())
    print(__name__, sys.argv[1:], marks > 0, beside.HERE)
    sys.exit(3)
"""


def test_a_program_that_nobody_edits(tmp_path):
    (tmp_path / "beside.py").write_text("HERE = 'beside'")
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "swinaccel.auto", str(program), "--size", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 3, done.stderr
    assert done.stdout == "__main__ ['--size', '4'] True beside\n"
    (line,) = [line for line in done.stderr.splitlines() if "auto mode" in line]
    assert line == "auto mode, SwinTransformer: swinaccel: 2 of 2 window attentions accelerated"


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_variable_starts_it_at_import(monkeypatch, value):
    started = []
    monkeypatch.setattr(auto, "start", lambda: started.append(1))
    monkeypatch.setenv("SWINACCEL_AUTO", value)
    importlib.reload(swinaccel)
    assert started == [1] * int(value)


MODULE = "import os, sys; print(__name__, sys.argv[1:], os.environ['SWINACCEL_AUTO'])"


def test_a_module_is_run_as_python_runs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "start", lambda: None)
    monkeypatch.setenv("SWINACCEL_AUTO", "0")
    monkeypatch.setattr(sys, "argv", ["python", "-m", "swinaccel.auto", "-m", "some_program", "-x"])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_program.py").write_text(MODULE)
    runner.main(sys.argv[3:])
    assert capsys.readouterr().out == "__main__ ['-x'] 1\n"


def test_the_runner_says_how_it_is_called(capsys):
    with pytest.raises(SystemExit, match="2"):
        runner.main([])
    assert "python -m swinaccel.auto" in capsys.readouterr().err
