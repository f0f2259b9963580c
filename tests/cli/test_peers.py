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
import os
from functools import wraps
import torch

def engine(kind):
    @wraps(kind)
    def load(program, folder):
        print("an engine may print")
        program, calls = program.module(), []

        def call(*inputs):
            calls.append(None)
            (folder / "calls").write_text(f"{os.getpid()} {torch.get_num_threads()} {len(calls)}")
            return [kind(output) for output in program(*inputs)]

        return call
    return load

@engine
def right(output):
    return output

@engine
def wrong(output):
    return 2 * output

@engine
def ends(output):
    os._exit(3)

def missing(program, folder):
    import a_part_that_is_missing
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Return a function that makes an engine out of a file, which its process imports by name."""
    (tmp_path / "stand_in_engine.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)

    def make(kind):
        import stand_in_engine

        peer = peers.Peer(kind, ("stand_in_engine",), "cpu", getattr(stand_in_engine, kind))
        monkeypatch.setitem(peers.PEERS, kind, peer)
        return peer

    yield make
    sys.modules.pop("stand_in_engine", None)


def test_engines_run_the_original_in_processes_of_their_own(stand_in, monkeypatch):
    stand_in("right")
    stand_in("wrong")
    seen, folders = [], []

    class Watched(peers.PeerRunner):
        def __init__(self, peer, model, inputs, folder):
            assert not swinaccel.report(model).accelerated
            super().__init__(peer, model, inputs, folder)
            folders.append(folder)

        def row(self, *arguments):
            seen.append((self.folder / "calls").read_text().split())
            return super().row(*arguments)

    monkeypatch.setattr(peers, "PeerRunner", Watched)
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
    assert len(folders) == 2
    assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "in its process: ModuleNotFoundError: No module named 'a_part_that_is_missing'"),
        ("ends", "its process ended with exit code 3"),
    ],
)
def test_an_engine_that_fails_says_why(stand_in, tmp_path, kind, words):
    runner = peers.PeerRunner(stand_in(kind), nn.Linear(4, 4), (torch.randn(2, 4),), tmp_path / "job")
    try:
        with pytest.raises(RuntimeError, match=words):
            runner.warm_up()
    finally:
        runner.end()


def test_what_cannot_be_measured_is_said_and_is_no_error(monkeypatch):
    for name in ("onnxscript", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    result = bench.run(helpers.timm_v1(), IMAGES, rounds=1, backend="torch", peers="all")
    assert [row.name for row in result.variants] == ["original", "SDPA", "accelerated"]
    assert "OpenVINO was not measured: openvino must be installed first; pip install openvino does" in str(result)
    assert "pip install onnxruntime onnxscript does that" in result.to_dict()["skipped"]["ONNX Runtime"]
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
