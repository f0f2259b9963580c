"""Look at a machine: versions, device, what would run on it and why, and what is in the way."""

from __future__ import annotations

import importlib
import platform
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .. import __version__, functional, ops
from ..bias import cache, table
from ..config import AccelConfig, cache_dir, env_disabled, env_interpret, environment
from ..runtime.context import backend_of
from ..spec.window import Geometry
from .factory import told
from .timing import device_name, version

_NEEDED = ("torch", "triton", "wrapt")
_MODELS = ("timm", "transformers", "torchvision", "monai")


@dataclass
class Diagnosis:
    """One machine.

    Attributes:
        versions: of Python and of packages; None for one that is not installed.
        device: what a model would run on that is moved to the first GPU, or else stays on the CPU.
        backend: what backend="auto" takes there, "triton" or "torch"; None where models keep their originals.
        reason: why.
        trial: how one attention ran there, against fp64.
        environment: variables that are set.
        cache: folder of bias factors, None where there can be none.
        problems: what is in the way, and what to do about it.
        advice: what could be added.
    """

    versions: dict[str, str | None]
    device: str
    backend: str | None = None
    reason: str = ""
    trial: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    cache: str | None = None
    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {"swinaccel": __version__, **asdict(self)}

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in self.versions.items())
        variables = ", ".join(f"{name}={value!r}" for name, value in self.environment.items())
        rows = [
            ("swinaccel", __version__),
            ("versions", versions),
            ("device", self.device),
            ("would run", f"{self.backend or 'originals'}: {self.reason}"),
            ("trial", self.trial),
            ("environment", variables or "none of swinaccel's variables is set"),
            ("cache", self.cache or "not usable"),
            *(("PROBLEM", one) for one in self.problems),
            *(("advice", one) for one in self.advice),
        ]
        return "\n".join(f"{name:<12} {text}" for name, text in rows if text)


def examine() -> Diagnosis:
    """Look at this machine, and run one attention on it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = {"python": platform.python_version(), **{name: version(name) for name in (*_NEEDED, *_MODELS)}}
    versions["torch"] = torch.__version__  # with what it was built for
    found = Diagnosis(versions, device_name(device))
    found.environment, found.problems = environment()
    _look_at_cache(found)
    _look_at_packages(found)
    _look_at_device(found, device)
    with suppress(ValueError):  # which is a problem already
        if env_disabled():
            found.reason = "SWINACCEL_DISABLE is set; unset it to accelerate"
            return found
    found.backend, found.reason = _choice(device)
    try:
        error = _try(device, found.backend)
    except Exception as failure:  # a driver or a compiler may raise anything
        found.trial = f"failed: {told(failure)}"
        found.problems.append(
            f"the {found.backend} backend does not run here ({told(failure)}); models run their originals, rightly"
        )
        if found.backend == "triton" and shutil.which("cc") is None and shutil.which("gcc") is None:
            found.problems.append("Triton compiles launchers with a C compiler, and there is none; install gcc")
    else:
        found.trial = f"one shifted window attention ran, and is right (largest error {error:.0e}, against fp64)"
        if error > 0.02:
            found.trial = f"one shifted window attention ran, and is wrong by {error:.0e}, against fp64"
            found.problems.append("a kernel computes wrong numbers here; please report it, with this output")
    return found


def _choice(device: torch.device) -> tuple[str, str]:
    backend, reason = backend_of(AccelConfig(), device), "there is a GPU"
    if backend == "torch":
        reason = "there is no GPU; inference runs a rearranged section in plain PyTorch, training the originals"
    elif device.type == "cpu":
        reason = "TRITON_INTERPRET=1 interprets the kernels, slowly"
    return backend, reason


def _try(device: torch.device, backend: str) -> float:
    """Return the largest error of one attention, relative to the largest value of what fp64 gives."""
    generator = torch.Generator().manual_seed(0)
    qkv, bias = (torch.randn(shape, generator=generator) for shape in ((1, 8, 8, 96), (49, 2)))
    index = torch.randint(49, (16, 16), generator=generator)
    geometry, scale = Geometry((8, 8), (4, 4), (2, 2)), 16**-0.5
    exact = functional.shifted_window_attention(qkv.double(), 4, 2, 2, table=bias.double(), index=index, scale=scale)
    qkv, bias, index = qkv.to(device), bias.to(device), index.to(device)
    if backend == "triton":
        out = ops.window.shifted_window_attention(qkv, geometry, num_heads=2, table=bias, index=index, scale=scale)
    else:
        out = functional.shifted_window_attention(qkv, 4, 2, 2, table=bias, index=index, scale=scale)
    return ((out.cpu().double() - exact).abs().max() / exact.abs().max()).item()


def _look_at_cache(found: Diagnosis) -> None:
    try:
        folder = cache_dir() / table.FOLDER
        cache.check(folder)
        found.cache = str(folder)
    except ValueError as error:
        if str(error) not in found.problems:
            found.problems.append(str(error))


def _look_at_packages(found: Diagnosis) -> None:
    for name in (*_NEEDED, *_MODELS):
        if found.versions[name] is None:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:
            found.problems.append(f"{name} cannot be imported: {told(error)}; install versions that fit each other")
    if not any(found.versions[name] for name in _MODELS):
        found.advice.append('no library of models is installed; pip install "swinaccel[bench]" brings timm and others')


def _look_at_device(found: Diagnosis, device: torch.device) -> None:
    if device.type == "cuda":
        if found.versions["triton"] is None:
            found.problems.append("Triton is not installed, and a GPU's kernels need it; pip install triton")
        return
    if shutil.which("nvidia-smi") is not None:
        found.problems.append(
            "an NVIDIA driver is installed, and this PyTorch sees no CUDA device"
            f" ({'built without CUDA' if torch.version.cuda is None else 'built for CUDA ' + torch.version.cuda});"
            " check CUDA_VISIBLE_DEVICES and the driver, or install a PyTorch that fits them"
        )
    if env_interpret():
        found.advice.append("TRITON_INTERPRET=1 is for tests; unset it, and a CPU runs plain PyTorch, which is faster")
