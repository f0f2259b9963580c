"""Measure other engines beside PyTorch: each runs the original model in a process of its own.

The engines' threads wait in loops for the next call, which would take the cores from whoever is measured next. So every
engine has a process, which loads what was exported here, and takes a sample when it is asked for one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..verify import _flat
from .factory import told
from .timing import Runner, dtype_name

REST_S = 0.01  # before every sample: until the threads of the one before have gone to sleep

Inputs = tuple[Tensor, ...]
Call = Callable[..., list[Tensor]]


class Peer(NamedTuple):
    """An engine.

    Attributes:
        title: of its row.
        modules: that it needs, by import name; the first is the engine's own.
        packages: that bring them.
        device: the type of devices that it is measured on; on CPUs in float32 only, without lower precision inside.
        export: writes (model, inputs) into a folder.
        load: reads that folder in the engine's process, where it is imported by its name, and returns the call.
    """

    title: str
    modules: tuple[str, ...]
    packages: str
    device: str
    export: Callable[[nn.Module, Inputs, Path], None]
    load: Callable[[Path, Inputs, int], Call]

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot be measured here, in a sentence, else None."""
        if device.type != self.device:
            return f"it is measured on {self.device} devices, and this one is {device.type}"
        if device.type == "cpu" and dtype != torch.float32:
            return f"it is measured in float32 on CPUs, and the inputs are {dtype_name(dtype)}"
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} must be installed first; pip install {self.packages} does that"
        return None


def chosen(names: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names of peers, from names or from a text with commas; "all" is every one.

    Raises:
        ValueError: for a name that is none.
    """
    wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    for name in wanted:
        if name != "all" and name not in PEERS:
            raise ValueError(f"peers must be all, or some of {', '.join(PEERS)}; got {name!r}")
    return tuple(PEERS) if "all" in wanted else tuple(dict.fromkeys(wanted))


class PeerRunner(Runner):
    """An engine's process, which is timed as a variant is; a context that ends it."""

    def __init__(self, peer: Peer, make: Callable[[], nn.Module], inputs: tuple[Any, ...], folder: Path) -> None:
        """Export what `make` returns into a new folder, and begin the process that will load it."""
        if not all(isinstance(value, Tensor) for value in inputs):
            raise ValueError("an engine is called with tensors only")
        device = inputs[0].device
        super().__init__(self._ask, (), device, None)
        folder.mkdir()
        torch.save(tuple(tensor.cpu() for tensor in inputs), folder / "inputs.pt")
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # tracers warn of every size that becomes a constant
            peer.export(_Outputs(make()).eval(), inputs, folder)
        self.job = pickle.dumps((_start, peer.load, folder, str(device), torch.get_num_threads()))
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from swinaccel.cli import peers; peers.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )

    def __enter__(self) -> PeerRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def warm_up(self) -> list[Tensor]:
        """Load and settle; return the outputs of the first call."""
        outputs, self.sample_ms, self.timed = self._ask(self.job)
        return [output.to(self.device) for output in outputs]

    def _time(self) -> float:
        return self._ask(pickle.dumps((_sample,)))

    def _ask(self, request: bytes) -> Any:
        """Return what the process answers; RuntimeError with its reason where it fails."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
            answer, reason = pickle.load(self.process.stdout)
        except (EOFError, OSError):  # it has closed its ends, so it ends
            raise RuntimeError(f"its process ended with exit code {self.process.wait()}") from None
        if reason is not None:
            raise RuntimeError(f"in its process: {reason}")
        return answer


class _Outputs(nn.Module):
    """A model that returns a tuple of what is compared: every engine can export that."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(_flat(self.model(*inputs)))


def serve() -> None:
    """Answer requests, which are a function and its arguments, until there are no more: in the engine's process."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what an engine prints is no answer
    torch.set_grad_enabled(False)
    while True:
        try:
            work, *arguments = pickle.load(sys.stdin.buffer)
            answer: tuple[Any, str | None] = (work(*arguments), None)
        except EOFError:
            return
        except Exception as error:
            answer = (None, told(error))
        pickle.dump(answer, answers)
        answers.flush()


_runners: list[Runner] = []  # of the engine's process: its only one


def _start(
    load: Callable[[Path, Inputs, int], Call], folder: Path, device: str, threads: int
) -> tuple[list[Tensor], float, str]:
    torch.set_num_threads(threads)
    inputs = tuple(tensor.to(device) for tensor in torch.load(folder / "inputs.pt"))
    runner = Runner(load(folder, inputs, threads), inputs, torch.device(device), None)
    outputs = [output.cpu() for output in runner.warm_up()]
    _runners.append(runner)
    return outputs, runner.sample_ms, "calls, in a process of its own"


def _sample() -> float:
    runner = _runners[0]
    runner.sample()
    return runner.samples[-1]


def _export_openvino(model: nn.Module, inputs: Inputs, folder: Path) -> None:
    import openvino

    shapes = [tuple(tensor.shape) for tensor in inputs]  # fixed, as the other engines have them
    found = openvino.convert_model(model, example_input=inputs, input=shapes)
    openvino.save_model(found, folder / "model.xml", compress_to_fp16=False)


def _load_openvino(folder: Path, inputs: Inputs, threads: int) -> Call:
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(folder / "model.xml", "CPU", hints).create_infer_request()

    def call(*inputs: Tensor) -> list[Tensor]:
        found = request.infer([tensor.numpy() for tensor in inputs], share_inputs=True, share_outputs=True)
        return [torch.from_numpy(value) for value in found.to_tuple()]

    return call


def _export_onnx(model: nn.Module, inputs: Inputs, folder: Path) -> None:
    torch.onnx.export(model, inputs, folder / "model.onnx", dynamo=False, opset_version=17)


def _load_onnxruntime(folder: Path, inputs: Inputs, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # after a call; within one they may
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def call(*inputs: Tensor) -> list[Tensor]:
        found = session.run(None, dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True)))
        return [torch.from_numpy(value) for value in found]

    return call


def _export_program(model: nn.Module, inputs: Inputs, folder: Path) -> None:
    torch.export.save(torch.export.export(model, inputs), folder / "model.pt2")


def _load_tensorrt(folder: Path, inputs: Inputs, threads: int) -> Call:
    import torch_tensorrt

    program = torch.export.load(folder / "model.pt2")
    compiled = torch_tensorrt.dynamo.compile(program, inputs, disable_tf32=True)  # as PyTorch's own products
    return lambda *inputs: list(compiled(*inputs))


PEERS = {
    "openvino": Peer("OpenVINO", ("openvino",), "openvino", "cpu", _export_openvino, _load_openvino),
    "onnxruntime": Peer(
        "ONNX Runtime", ("onnxruntime", "onnx"), "onnxruntime onnx", "cpu", _export_onnx, _load_onnxruntime
    ),
    "tensorrt": Peer("TensorRT", ("torch_tensorrt",), "torch-tensorrt", "cuda", _export_program, _load_tensorrt),
}


def starters(
    names: Iterable[str],
    make: Callable[[], nn.Module],
    inputs: tuple[Any, ...],
    folder: str,
    stack: contextlib.ExitStack,
) -> dict[str, Callable[[], Runner]]:
    """Return functions that begin the engines, by title; `stack` ends them."""

    def start(name: str) -> Runner:
        return stack.enter_context(PeerRunner(PEERS[name], make, inputs, Path(folder, name)))

    return {PEERS[name].title: partial(start, name) for name in names}
