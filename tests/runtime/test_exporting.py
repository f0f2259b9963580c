"""ONNX has no Triton kernels: what is exported to it are originals, and the kernels serve again afterwards."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys

import helpers
import pytest
import torch
from helpers import TRITON_DEVICE
from torch import nn

import swinaccel
from swinaccel import functional
from swinaccel.ops.failures import failures
from swinaccel.ops.observed import is_onnx_export

pytestmark = pytest.mark.filterwarnings("ignore")

EVERY_WAY = pytest.mark.parametrize("export", ["captured", "dynamo", "traced"], indirect=True)


@pytest.fixture
def export(request, monkeypatch, tmp_path):
    """A function of a model and its input, one of PyTorch's ways to ONNX; gives the graph's nodes and the file."""
    if "dynamo" not in inspect.signature(torch.onnx.export).parameters:
        pytest.skip("this PyTorch has one exporter")
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    onnx = pytest.importorskip("onnx")
    if request.param == "dynamo":  # what PyTorch falls back to
        strategies = pytest.importorskip("torch.onnx._internal.exporter._capture_strategies")
        monkeypatch.setattr(strategies, "CAPTURE_STRATEGIES", (strategies.TorchExportStrictStrategy,))

    def run(model, x):
        path = str(tmp_path / "model.onnx")
        torch.onnx.export(model, (x,), path, verbose=False, dynamo=request.param != "traced")
        return [(node.domain, node.op_type) for node in onnx.load(path).graph.node], path

    return run


@EVERY_WAY
def test_the_question(export):
    """Dynamo would answer PyTorch's own question by no."""

    class Asking(nn.Module):
        def forward(self, x):
            return x.relu() if is_onnx_export() else x.sigmoid()

    x = torch.randn(3)
    assert export(Asking(), x)[0] == [("", "Relu")]
    assert torch.equal(Asking()(x), x.sigmoid())
    compiled = torch.compile(Asking(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x.sigmoid())
    for strict in (False, True):
        exported = torch.export.export(Asking(), (x,), strict=strict)
        assert torch.equal(exported.module()(x), x.sigmoid())


@pytest.mark.long
@pytest.mark.skipif(TRITON_DEVICE != "cpu", reason="packages for GPUs hold the kernels")
def test_packages_for_cpus_call_the_operators(tmp_path):
    """Interpreted kernels cannot be packaged: with swinaccel a process runs them, and without it cannot load them."""
    model = helpers.timm_v1(img_size=28, window=7, depths=(2,), num_heads=(2,), embed_dim=16).to(TRITON_DEVICE)
    x = torch.randn(2, 3, 28, 28, device=TRITON_DEVICE)
    swinaccel.accelerate(model, backend="triton")
    with torch.no_grad():
        program, expected = torch.export.export(model, (x,)), model(x)
    assert "swinaccel.shifted_window_attention" in {str(n.target).rpartition(".")[0] for n in program.graph.nodes}
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    with torch.no_grad():
        helpers.assert_close(torch._inductor.aoti_load_package(path)(x), expected)
    code = f"import torch; torch._inductor.aoti_load_package({path!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Could not find schema for swinaccel::shifted_window_attention" in done.stderr


class Function(nn.Module):
    def forward(self, q):
        return functional.window_attention(q, q, q)


def attends(model, x, path):
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})
    with torch.no_grad():
        helpers.assert_close(torch.from_numpy(found), model(x).cpu())


@EVERY_WAY
def test_accelerated_models_are_exported_as_their_originals(export):
    model = helpers.timm_v1(img_size=28, window=7, depths=(2,), num_heads=(2,), embed_dim=16).to(TRITON_DEVICE)
    x = torch.randn(2, 3, 28, 28, device=TRITON_DEVICE)
    fast = swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    expected, _ = export(model, x)
    found, path = export(fast, x)
    assert found == expected
    attends(model, x, path)
    before = [entry.fallbacks for entry in swinaccel.report(fast)]
    with torch.no_grad():
        helpers.assert_close(fast(x), model(x))
    assert [entry.fallbacks for entry in swinaccel.report(fast)] == before


@EVERY_WAY
def test_functions_are_exported_as_plain_pytorch(export):
    q = torch.randn(4, 2, 16, 8, device=TRITON_DEVICE)
    assert not failures
    found, path = export(Function(), q)
    assert {domain for domain, _ in found} == {""}
    assert not failures
    attends(Function(), q, path)
