"""Other engines beside the benchmark's rows: a stand-in, what is not there, and ONNX Runtime where it is installed."""

from __future__ import annotations

import json
import math
import os
import sys

import helpers
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import swinaccel
from swinaccel.cli import bench, main, peers, timing

IMAGES = (torch.randn(2, 3, 56, 56),)

STAND_IN = """
    import os, torch

    def load(folder, inputs, threads):
        print("an engine may print")
        assert torch.get_num_threads() == threads
        program = torch.export.load(folder / "model.pt2").module()
        kind = (folder / "kind").read_text()
        if kind == "missing":
            import a_part_that_is_missing
        calls = []

        def call(*inputs):
            calls.append(None)
            if kind == "ends":
                os._exit(3)
            outputs = program(*inputs)
            (folder / "calls").write_text(f"{os.getpid()} {threads} {len(calls)}")
            return [2 * output if kind == "wrong" else output for output in outputs]

        return call
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Return a function that makes an engine out of a file, which its process imports by name."""
    (tmp_path / "stand_in_engine.py").write_text("\n".join(line[4:] for line in STAND_IN.splitlines()))
    monkeypatch.syspath_prepend(tmp_path)
    folders = []

    def make(kind):
        import stand_in_engine

        def export(model, inputs, folder):
            assert not swinaccel.report(model).accelerated
            peers.PEERS["tensorrt"].export(model, inputs, folder)
            (folder / "kind").write_text(kind)
            folders.append(folder)

        peer = peers.Peer(kind, ("stand_in_engine",), "nothing", "cpu", export, stand_in_engine.load)
        monkeypatch.setitem(peers.PEERS, kind, peer)

    make.folders = folders
    yield make
    sys.modules.pop("stand_in_engine", None)


def test_engines_run_the_original_in_processes_of_their_own(stand_in, monkeypatch):
    stand_in("right")
    stand_in("wrong")
    seen = []
    row = peers.PeerRunner.row

    def look(runner, *arguments):
        seen.append((stand_in.folders[len(seen)] / "calls").read_text().split())
        return row(runner, *arguments)

    monkeypatch.setattr(peers.PeerRunner, "row", look)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what a new process would take
    model = swinaccel.accelerate(helpers.timm_v1(), backend="torch")
    with timing.threads(1):
        result = bench.run(model, IMAGES, rounds=3, backend="torch", peers="right, wrong")
    assert [row.name for row in result.variants] == ["original", "SDPA", "accelerated", "right", "wrong"]
    found = result["right"]
    assert found.error is None
    assert found.difference < 1e-6
    assert result["wrong"].difference == pytest.approx(1, abs=1e-4)
    assert found.p10_ms <= found.latency_ms <= found.p90_ms
    assert found.speedup == pytest.approx(result["original"].latency_ms / found.latency_ms)
    assert found.timed == "calls, in a process of its own"
    assert json.loads(json.dumps(result.to_dict()))["variants"][4]["difference"] == result["wrong"].difference
    assert {(int(threads), int(calls)) for _, threads, calls in seen} == {(1, 2 + 3)}  # two settle
    processes = {int(process) for process, _, _ in seen}
    assert len(processes | {os.getpid()}) == 3
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert not any(folder.exists() for folder in stand_in.folders)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "in its process: ModuleNotFoundError: No module named 'a_part_that_is_missing'"),
        ("ends", "its process ended with exit code 3"),
    ],
)
def test_an_engine_that_fails_says_why(stand_in, tmp_path, kind, words):
    stand_in(kind)
    job = (peers.PEERS[kind], lambda: nn.Linear(4, 4), (torch.randn(2, 4),), tmp_path / "job")
    with pytest.raises(RuntimeError, match=words), peers.PeerRunner(*job) as runner:
        runner.warm_up()


def test_what_cannot_be_measured_is_said_and_is_no_error(monkeypatch):
    for name in ("onnx", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    result = bench.run(helpers.timm_v1(), IMAGES, rounds=1, backend="torch", peers="all")
    assert [row.name for row in result.variants] == ["original", "SDPA", "accelerated"]
    assert "OpenVINO was not measured: openvino must be installed first; pip install openvino does" in str(result)
    assert "pip install onnxruntime onnx" in result.to_dict()["skipped"]["ONNX Runtime"]
    assert "measured on cuda devices, and this one is cpu" in result.skipped["TensorRT"]
    assert "float32 on CPUs, and the inputs are bfloat16" in peers.PEERS["openvino"].obstacle(
        torch.device("cpu"), torch.bfloat16
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peers": "openvino,tvm"}, "peers must be all, or some of openvino, onnxruntime, tensorrt; got 'tvm'"),
        ({"peers": ""}, "got ''"),
        ({"peers": ["onnxruntime"], "train": True}, "peers run inference"),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(ValueError, match=words):
        bench.run(nn.Conv2d(3, 4, 1), IMAGES, **options)


def test_an_unknown_engine_is_told_before_anything_is_loaded():
    result = CliRunner().invoke(main.app, ["bench", "timm:there_is_no_such_model", "--peers", "tvm"])
    assert result.exit_code == 2
    assert result.output.strip().splitlines() == [
        "error: peers must be all, or some of openvino, onnxruntime, tensorrt; got 'tvm'"
    ]


def test_threads():
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        with timing.threads(None):
            assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


class TwoImages(nn.Module):
    """A model of two inputs whose outputs have names, and one that is no number to compare."""

    def __init__(self):
        super().__init__()
        self.swin = helpers.timm_v1()

    def forward(self, one, other):
        return {"sum": self.swin(one) + self.swin(other), "index": other.argmax(), "first": self.swin(one)}


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_engines_that_are_installed(name):
    peer = peers.PEERS[name]
    reason = peer.obstacle(torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    images = tuple(torch.randn(1, 3, 56, 56) for _ in range(2))
    result = bench.run(TwoImages().eval(), images, rounds=2, backend="torch", peers=[name])
    assert result[peer.title].error is None
    assert result[peer.title].difference < 1e-4
    assert not math.isnan(result[peer.title].latency_ms)
    assert result.peers[peer.title] == timing.version(name)
    assert f"{peer.title} {timing.version(name)} ran the original" in str(result)
