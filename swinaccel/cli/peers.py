"""Measure other engines beside PyTorch: each runs the original model in a process of its own.

The engines' threads wait in loops for the next call, which would take the cores from whoever is measured next. So every
engine has a process, which loads what was exported here, and takes a sample for every line that it is sent.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..verify import _flat
from .factory import told
from .timing import Runner, dtype_name

REST_S = 0.01  # before every sample: until the threads of the one before have gone to sleep

_SERVE = "import json, sys; sys.path[:], *job = json.loads(sys.argv[1]); import swinaccel.cli.peers as p; p.serve(*job)"

Call = Callable[..., list[Tensor]]


class Peer(NamedTuple):
    """An engine.

    Attributes:
        title: of its row.
        modules: that it needs, by import name; the first is the engine's own.
        device: the type of devices that it is measured on; on CPUs in float32 only, without lower precision inside.
        load: makes (program, folder) into the call, in the engine's process, which imports it by its name; the folder
            is for its files.
    """

    title: str
    modules: tuple[str, ...]
    device: str
    load: Callable[[ExportedProgram, Path], Call]

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot be measured here, in a sentence, else None."""
        if device.type != self.device:
            return f"it is measured on {self.device} devices, and this one is {device.type}"
        if device.type == "cpu" and dtype != torch.float32:
            return f"it is measured in float32 on CPUs, and the inputs are {dtype_name(dtype)}"
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if missing:
            packages = " ".join(self.modules).replace("_", "-")
            return f"{' and '.join(missing)} must be installed first; pip install {packages} does that"
        return None


def chosen(names: str | Iterable[str]) -> tuple[Peer, ...]:
    """Return the peers of these names, or of a text with commas; "all" is every one.

    Raises:
        ValueError: for a name that is none.
    """
    wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    for name in {*wanted} - {"all", *PEERS}:
        raise ValueError(f"peers must be all, or some of {', '.join(PEERS)}; got {name!r}")
    return tuple(PEERS[name] for name in (PEERS if "all" in wanted else dict.fromkeys(wanted)))


class PeerRunner(Runner):
    """An engine's process, which is timed as a variant is, and goes on until it is ended."""

    def __init__(self, peer: Peer, model: nn.Module, inputs: tuple[Any, ...], folder: Path) -> None:
        """Export the model into a new folder, and begin the process that will load it."""
        if not all(isinstance(value, Tensor) for value in inputs):
            raise ValueError("an engine is called with tensors only")
        super().__init__(self._time, (), inputs[0].device, None)
        self.folder = folder
        folder.mkdir()
        torch.export.save(torch.export.export(_Outputs(model).eval(), inputs), folder / "model.pt2")
        paths = [path or os.getcwd() for path in sys.path]
        job = [paths, peer.load.__module__, peer.load.__qualname__, str(folder), torch.get_num_threads()]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def warm_up(self) -> list[Tensor]:
        """Load and settle; return the outputs of the first call."""
        self.timed, self.sample_ms = "calls, in a process of its own", self._time()
        return [tensor.to(self.device) for _, tensor in sorted(load_file(self.folder / "outputs").items())]

    def _time(self) -> float:
        """Return the next milliseconds that the process answers; RuntimeError with its reason where it fails."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(OSError):  # it reads no longer; perhaps it has answered
            print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:  # it has closed its ends, so it ends
            raise RuntimeError(f"its process ended with exit code {self.process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, str):
            raise RuntimeError(f"in its process: {answer}")
        return float(answer)


class _Outputs(nn.Module):
    """A model that returns a tuple of what is compared: every engine can take that."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(_flat(self.model(*inputs)))


def serve(module: str, load: str, folder: str, threads: int) -> None:
    """Answer every line with the next milliseconds, or with a text that says what failed: in the engine's process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints is no answer
    torch.set_num_threads(threads)
    times = _times(module, load, Path(folder))
    for _ in sys.stdin:
        try:
            answer: float | str = next(times)
        except Exception as error:
            answer = told(error)
        print(json.dumps(answer), file=answers, flush=True)


@torch.no_grad()
def _times(module: str, load: str, folder: Path) -> Iterator[float]:
    """Load an engine and write what it returns into the folder; yield the time of a sample, without end."""
    program = torch.export.load(folder / "model.pt2")
    inputs = program.example_inputs[0]
    runner = Runner(getattr(importlib.import_module(module), load)(program, folder), inputs, inputs[0].device, None)
    outputs = {f"{index:03}": tensor.cpu().contiguous() for index, tensor in enumerate(runner.warm_up())}
    save_file(outputs, folder / "outputs")
    yield runner.sample_ms
    while True:
        runner.sample()
        yield runner.samples[-1]


def _on_arrays(run: Callable[[list[Any]], Iterable[Any]]) -> Call:
    return lambda *inputs: [torch.from_numpy(array) for array in run([tensor.numpy() for tensor in inputs])]


def _openvino(program: ExportedProgram, folder: Path) -> Call:
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    hints["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
    compiled = openvino.Core().compile_model(openvino.convert_model(program), "CPU", hints)
    request = compiled.create_infer_request()
    return _on_arrays(lambda arrays: request.infer(arrays, share_inputs=True, share_outputs=True).to_tuple())


def _onnxruntime(program: ExportedProgram, folder: Path) -> Call:
    import onnxruntime

    torch.onnx.export(program, (), folder / "model.onnx", dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # after a call; within one they may
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return _on_arrays(lambda arrays: session.run(None, dict(zip(names, arrays, strict=True))))


def _tensorrt(program: ExportedProgram, folder: Path) -> Call:
    import torch_tensorrt

    compiled = torch_tensorrt.dynamo.compile(
        program, program.example_inputs[0], disable_tf32=True
    )  # as PyTorch's own products
    return lambda *inputs: list(compiled(*inputs))


PEERS = {
    "openvino": Peer("OpenVINO", ("openvino",), "cpu", _openvino),
    "onnxruntime": Peer("ONNX Runtime", ("onnxruntime", "onnxscript"), "cpu", _onnxruntime),
    "tensorrt": Peer("TensorRT", ("torch_tensorrt",), "cuda", _tensorrt),
}
