"""Launches that `swinaccel tune` found to be faster than the default ones, kept on disk for the device at hand.

A record is a file of its own, so that processes that tune at once lose nothing, and named by the environment: GPU,
Triton and kernels; where any of these changes, none is found and the defaults serve. Records are read once in a
process, when the first launch is planned, never on the way of a call. Their contents are not trusted: parameters of a
wrong type, out of range or not for the kernel are as if absent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .. import cache
from ..config import cache_dir

logger = logging.getLogger("swinaccel")

KERNELS = ("small", "large", "small_backward", "query", "key", "bias")

_FOLDER = "launches"
_FORMAT = 2
_ENVIRONMENT = ("gpu", "capability", "triton", "kernels")
_LARGEST_FILE = 1 << 16
_POWERS = {"block_m": (16, 256), "block_n": (16, 256), "num_warps": (1, 16)}  # least and largest
_NUMBERS = {"images": (1, 1 << 16), "windows": (1, 1 << 16), "num_stages": (1, 8)}
_REGISTERS = (32, 255)

# What a search puts in the place of memory and defaults; asked first.
_chooser: Callable[[str, Any, Any, bool], Any] | None = None

_known: dict[torch.device, dict[str, Any]] = {}
_used = False
_distrusted = False


def launch(kernel: str, problem: Any, default: Any, grad_bias: bool = False) -> Any:
    """The launch of a kernel: the default one, or what was found to be faster.

    Args:
        kernel: one of KERNELS.
        problem: a `backends.triton._Problem`.
        default: a launch of `kernels.launch`; what is found is one of the same kind, for the same tile of D.
        grad_bias: whether a backward computes the gradient of the bias.
    """
    global _used
    if _chooser is not None:
        return _chooser(kernel, problem, default, grad_bias)
    if _distrusted:
        return default
    records = _known.get(problem.device)
    if records is None:
        records = _known[problem.device] = read(problem.device)
    if not records:
        return default
    record = records.get(describe(kernel, problem, grad_bias))
    made = None if record is None else parse(record["parameters"], kernel, default)
    _used |= made is not None
    return made or default


@contextlib.contextmanager
def choosing(chooser: Callable[[str, Any, Any, bool], Any]) -> Iterator[None]:
    """Inside, `launch` is this function of its arguments. Launches planned before or inside must be forgotten."""
    global _chooser
    before, _chooser = _chooser, chooser
    try:
        yield
    finally:
        _chooser = before


def distrust() -> bool:
    """After a failure: use defaults from now on. Whether that changes anything, so that it is worth another try."""
    global _distrusted
    if not _used or _distrusted:
        return False
    _distrusted = True
    logger.warning(
        "a launch failed while tuned ones are in use; default launches serve now, and results are right"
        " (`swinaccel tune --clear` forgets tuned ones)"
    )
    return True


def forget() -> None:
    """Read the files again at the next launch that is planned."""
    global _used, _distrusted
    _known.clear()
    _used = _distrusted = False


def describe(kernel: str, problem: Any, grad_bias: bool = False) -> str:
    """What a launch was tuned for, in words: all that shapes the kernel's code or the number of its programs.

    Batches count by powers of two: what is best for 64 images serves 64 to 127.
    """
    geometry = problem.geometry
    words = [
        kernel,
        str(problem.dtype).split(".")[-1],
        f"{'x'.join(map(str, geometry.window))}*{geometry.num_windows}",
        f"{problem.num_heads}x{problem.head_dim}",
        f"batch{1 << max(0, problem.batch.bit_length() - 1)}",
        f"bias{problem.bias_mode}",
        f"mask{problem.mask_mode}",
    ]
    flags = {
        problem.precision: problem.precision != "ieee",
        f"rank{problem.rank}": problem.rank > 0,
        "cosine": problem.cosine,
        "padded": problem.is_padded,
        "rollfirst": geometry.roll_first,
        "apart": not problem.packed,
        "headsapart": problem.heads_apart,
        "dropout": problem.dropout > 0,
        "train": problem.for_backward,
        "gradbias": grad_bias,
    }
    return " ".join([*words, *(word for word, holds in flags.items() if holds)])


def parameters(launch: Any) -> dict[str, int | None]:
    """What of a launch may be tuned, by name."""
    found = dataclasses.asdict(launch)
    del found["block_d"]
    return found


def parse(given: Any, kernel: str, default: Any) -> Any:
    """The launch of some parameters, or None where they are none for this kernel."""
    wanted = parameters(default)
    if not isinstance(given, dict) or given.keys() != wanted.keys():
        return None
    if not all(_is_valid(name, value) for name, value in given.items()):
        return None
    if kernel in ("small", "small_backward"):
        fits = given["block_n"] == default.block_n  # the whole window
    elif kernel == "large":
        fits = given.get("images", 1) in (1, 2)
    else:
        fits = given.get("images") == wanted.get("images")
    if not fits:
        return None
    return dataclasses.replace(default, **given)


def _is_valid(name: str, value: Any) -> bool:
    if name == "max_registers" and value is None:
        return True
    if type(value) is not int:
        return False
    if name in _POWERS:
        least, most = _POWERS[name]
        return least <= value <= most and value & (value - 1) == 0
    least, most = _REGISTERS if name == "max_registers" else _NUMBERS.get(name, (1, 0))
    return least <= value <= most


@lru_cache(maxsize=16)
def environment(device: torch.device) -> dict[str, str]:
    """What launches hold for."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, capability = properties.name, f"{properties.major}.{properties.minor}"
        capability += getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    else:
        name, capability = "Triton's interpreter", "none"
    from .. import kernels

    sources = hashlib.sha256()
    for path in sorted(Path(kernels.__path__[0]).glob("*.py")):
        sources.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    triton = getattr(sys.modules.get("triton"), "__version__", "none")
    return dict(zip(_ENVIRONMENT, (name, capability, triton, sources.hexdigest()[:16]), strict=True))


def folder() -> Path:
    """Return the folder of tuned launches, which need not exist; ValueError where there can be none."""
    return cache_dir() / _FOLDER


def path_of(device: torch.device, key: str) -> Path:
    """Return the place of a launch's record, which need not exist."""
    return folder() / f"{_prefix(device)}{_digest(key)}.json"


def _prefix(device: torch.device) -> str:
    return f"{_digest([_FORMAT, environment(device)])}-"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def read(device: torch.device) -> dict[str, Any]:
    """Return all that is known of a device, by `describe`: {"parameters", "default_ms", "tuned_ms"}."""
    where = cache.folder_of(_FOLDER)
    paths = [] if where is None else cache.records(where)
    if not paths:
        return {}
    place, prefix = environment(device), _prefix(device)
    documents = (_document(path) for path in paths if path.name.startswith(prefix))
    return {one["key"]: one["record"] for one in documents if one is not None and one["environment"] == place}


def _document(path: Path) -> dict[str, Any] | None:
    """Return the contents of a file, {"environment", "key", "record"}, or None where it is not to be trusted."""
    content = cache.read(path, _LARGEST_FILE)
    try:
        document = json.loads(content or b"null")
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        return None
    place, key, record = (document.get(name) for name in ("environment", "key", "record"))
    if not isinstance(place, dict) or place.keys() != set(_ENVIRONMENT) or not isinstance(key, str):
        return None
    return document if all(isinstance(word, str) for word in place.values()) and _is_record(record) else None


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or record.keys() != {"parameters", "default_ms", "tuned_ms"}:
        return False
    times = record["default_ms"], record["tuned_ms"]
    if not all(type(time) in (int, float) and 0 < time < 1e9 for time in times):
        return False
    given = record["parameters"]
    return isinstance(given, dict) and all(_is_valid(name, value) for name, value in given.items())


def stored() -> list[tuple[dict[str, str], dict[str, Any]]]:
    """Return (environment, launches) of all environments that records were found for, for people to look at."""
    found: dict[str, tuple[dict[str, str], dict[str, Any]]] = {}
    for path in cache.records(folder()):
        document = _document(path)
        if document is not None:
            place = document["environment"]
            found.setdefault(_digest(place), (place, {}))[1][document["key"]] = document["record"]
    return list(found.values())


def write(device: torch.device, records: dict[str, Any | None]) -> None:
    """Add to what is known of a device, or with None take away, each record in one step; OSError where it cannot."""
    for key, record in records.items():
        path = path_of(device, key)
        if record is None:
            path.unlink(missing_ok=True)
            continue
        document = {"format": _FORMAT, "environment": environment(device), "key": key, "record": record}
        cache.write(path, json.dumps(document, indent=1).encode())
    forget()


def clear() -> int:
    """Remove the records of all environments, and return how many there were."""
    paths = cache.records(folder())
    for path in paths:
        path.unlink(missing_ok=True)
    forget()
    return len(paths)
