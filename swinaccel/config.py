"""Options and environment. The only module that reads environment variables.

=====================  ==========================================================================================
SWINACCEL_DISABLE      1 | true | yes | on: `accelerate` does nothing and accelerated models run their originals.
SWINACCEL_STRICT       likewise: raise where an original would run in place of a kernel.
SWINACCEL_GRAPHS       0 | false | no | off: no CUDA graphs, whatever `accelerate` was told.
SWINACCEL_CACHE_DIR    folder of bias factors; default: $XDG_CACHE_HOME/swinaccel or ~/.cache/swinaccel.
SWINACCEL_LOG          a level name of `logging` (debug, info, warning, error) for the logger "swinaccel".
SWINACCEL_AUTO         1 | true | yes | on: importing swinaccel starts `swinaccel.auto`.
TRITON_INTERPRET       Triton's own: 1 makes backend="auto" run the Triton kernels on CPU tensors.
=====================  ==========================================================================================
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from operator import contains
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, cast, get_args

from torch import nn

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"", "0", "false", "no", "off"}

Backend = Literal["auto", "triton", "torch"]
Bias = Literal["auto", "table", "factors"]
Fuse = Literal["auto", "attention"]
Graphs = Literal["auto", True, False]
Precision = Literal["model", "fp8"]
Filter = Callable[[str, nn.Module], bool]
_CHOICES = {
    "backend": get_args(Backend),
    "bias": get_args(Bias),
    "fuse": get_args(Fuse),
    "graphs": get_args(Graphs),
    "precision": get_args(Precision),
}

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Options(TypedDict, total=False):
    """The fields of `AccelConfig`, for type checkers and editors."""

    backend: Backend
    bias: Bias
    bias_energy: float | None
    filter: Filter | None
    strict: bool
    fuse: Fuse
    graphs: Graphs
    graphs_memory: float
    precision: Precision
    max_error: float


CAPTURED_CALL = 3  # of a signature: the first two compile kernels and make plans; a call earlier for graphs=True


@dataclass(frozen=True)
class AccelConfig:
    """Options of `accelerate` and `accelerated`.

    Attributes:
        backend: "triton", "torch", or "auto": Triton on CUDA devices (and on the CPU under TRITON_INTERPRET=1),
            plain PyTorch elsewhere.
        bias: form of the relative position bias. "table" is exact and always live. "factors" uses SVD factors
            (FlashBias, arXiv:2505.12044) in inference, for windows of more than 64 tokens on the Triton backend,
            where they err no more than rounding the bias to the compute dtype does. "auto" uses them only where
            they were measured to win, which so far is nowhere, or where `bias_energy` asks for them.
        bias_energy: fraction in (0, 1] of the bias's energy (its squared singular values) that the factors must
            hold, such as FlashBias's 0.995, in place of the exact rule.
        filter: callable(name, module) -> bool; modules for which it returns False stay original.
        strict: raise instead of running an original, and where a model holds nothing to accelerate.
        fuse: "attention" replaces the attention section only; "auto" may fuse plain layers around it too.
        graphs: "auto" replays calls of surveyed models as CUDA graphs in inference, from the third of a signature on;
            True those of the model itself, whoever wrote it, and in training, from the second on: its control flow must
            not depend on values, as for torch.compile with mode="reduce-overhead". False never. On CPUs nothing is.
        graphs_memory: fraction in (0, 1] of the device's memory that the graphs of one model may take.
        precision: "fp8" multiplies in 8 bits (e4m3) in the blocks that run as a whole, in half-precision inference on
            NVIDIA GPUs of compute capability 9 or newer. Results are other ones than the model's, by what the report
            says of each block; what runs without says why. "model": in the model's own precision.
        max_error: of "fp8", the largest relative L2 error of a block's output, on the first input that it gets with
            its weights, against the same block without; a block with a larger one runs without.
    Raises:
        ValueError, TypeError: for an option that is none of these; the message names it.
    """

    backend: Backend = "auto"
    bias: Bias = "auto"
    bias_energy: float | None = None
    filter: Filter | None = None
    strict: bool = False
    fuse: Fuse = "auto"
    graphs: Graphs = "auto"
    graphs_memory: float = 0.5
    precision: Precision = "model"
    max_error: float = 0.1

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
        if not isinstance(self.graphs, (str, bool)):  # 0 and 1 are equal to them
            raise ValueError(f"graphs must be 'auto', True or False; got {self.graphs!r}")
        share, error, energy = self.graphs_memory, self.max_error, self.bias_energy
        if not _is_number(share) or not 0 < share <= 1:
            raise ValueError(
                f"graphs_memory must be a number in (0, 1], a fraction of the device's memory; got {share!r}"
            )
        if not _is_number(error) or not error > 0:
            raise ValueError(f"max_error must be a positive number, a relative error such as 0.1; got {error!r}")
        if energy is not None:
            if not _is_number(energy):
                raise TypeError(f"bias_energy must be None or a number in (0, 1]; got {energy!r}")
            if not 0 < energy <= 1:
                raise ValueError(f"bias_energy must lie in (0, 1], a fraction such as 0.995; got {energy!r}")
        if self.filter is not None and not callable(self.filter):
            raise TypeError(f"filter must be None or a callable(name, module) -> bool; got {self.filter!r}")
        if not isinstance(self.strict, bool):
            raise TypeError(f"strict must be True or False; got {self.strict!r}")

    @classmethod
    def from_options(cls, options: Options | dict[str, Any]) -> AccelConfig:
        """Return the config of keyword options; an unknown one is a TypeError that lists the known ones."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"unknown option {name!r}; accelerate takes {', '.join(known)}")
        return cls(**cast(Any, options))

    def to_json(self) -> str:
        """Return the options of a call as text, which an instance's marker carries through copies and pickles."""
        options = asdict(self)
        del options["filter"]
        return json.dumps(options, sort_keys=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def takes_options(function: _Function) -> _Function:
    """Name the options in the signature of a function that takes them as `**options`: help and notebooks show it."""
    signature = inspect.signature(function)
    named = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(AccelConfig)
    ]
    kept = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=[*kept, *named])  # type: ignore[attr-defined]
    return function


def _flag(name: str) -> bool:
    text = os.environ.get(name)
    if text is None:
        return False
    value = text.strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ValueError(f"{name}={text!r} is not usable: set it to 1, true, yes or on, or to 0, false, no or off")


def env_disabled() -> bool:
    """Return True if SWINACCEL_DISABLE is on, read now."""
    return _flag("SWINACCEL_DISABLE")


def _may_be_set(name: str) -> Callable[[], bool]:
    """Return a function that returns False if a variable is not set, in a tenth of the time of reading it."""
    raw = getattr(os.environ, "_data", None)  # where os.environ keeps its bytes, on POSIX
    if os.name == "posix" and type(raw) is dict and all(type(one) is bytes for one in raw):
        return partial(contains, raw, name.encode())
    return lambda: True


may_be_disabled, _may_be_without_graphs = map(_may_be_set, ("SWINACCEL_DISABLE", "SWINACCEL_GRAPHS"))


def env_strict() -> bool:
    """Return True if SWINACCEL_STRICT is on, read now."""
    return _flag("SWINACCEL_STRICT")


def env_graphs() -> bool:
    """Return True unless SWINACCEL_GRAPHS is off, read now."""
    return not _may_be_without_graphs() or "SWINACCEL_GRAPHS" not in os.environ or _flag("SWINACCEL_GRAPHS")


def env_auto() -> bool:
    """Return True if SWINACCEL_AUTO is on, read now."""
    return _flag("SWINACCEL_AUTO")


def set_auto() -> None:
    """Let processes that this one starts be in auto mode too, where they import swinaccel."""
    os.environ["SWINACCEL_AUTO"] = "1"


def env_interpret() -> bool:
    """Return True if Triton kernels are interpreted on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").strip().lower() in _TRUE


def cache_dir() -> Path:
    """Return the folder of bias factors, which need not exist.

    Raises:
        ValueError: where there can be none; the message names the variable that says so.
    """
    text = os.environ.get("SWINACCEL_CACHE_DIR")
    place = f"SWINACCEL_CACHE_DIR={text!r}"
    if not text:
        text = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "swinaccel")
        place = f"the cache folder {text}"
    try:
        path = Path(text).expanduser()
        first = next((one for one in (path, *path.parents) if os.path.lexists(one)), path)
        if not first.is_dir():
            raise ValueError(f"{first} is no folder")
        if not os.access(first, os.X_OK if first == path else os.X_OK | os.W_OK):
            raise ValueError(f"{first} is closed to this user")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: there is no such user, or no home
        raise ValueError(f"{place} is not usable: {error}") from None
    return path


def setup_logging() -> None:
    """Apply SWINACCEL_LOG to the logger "swinaccel"; without it the logger is left to the application."""
    text = os.environ.get("SWINACCEL_LOG")
    if not text:
        return
    level = logging.getLevelName(text.strip().upper())  # of a name that is none, a text
    if not isinstance(level, int):
        raise ValueError(f"SWINACCEL_LOG={text!r} is not usable: set it to debug, info, warning or error")
    logging.getLogger("swinaccel").setLevel(level)


_READERS: dict[str, Callable[[], Any]] = {
    "SWINACCEL_DISABLE": env_disabled,
    "SWINACCEL_STRICT": env_strict,
    "SWINACCEL_AUTO": env_auto,
    "SWINACCEL_CACHE_DIR": cache_dir,
    "SWINACCEL_LOG": setup_logging,
    "TRITON_INTERPRET": env_interpret,
}


def environment() -> tuple[dict[str, str], list[str]]:
    """Return the variables that are set, with their values, and why any of them is not usable."""
    problems = []
    for read in _READERS.values():
        try:
            read()
        except ValueError as error:
            problems.append(str(error))
    return {name: os.environ[name] for name in _READERS if name in os.environ}, problems
