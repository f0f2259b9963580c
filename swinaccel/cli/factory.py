"""Load a model from a user's file, whose code may do anything: its errors and exits are told in one sentence."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn


@contextmanager
def blamed(what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever is raised inside into a ValueError of one sentence; only an interrupt is passed on.

    Args:
        what: the sentence's beginning, such as "net.py cannot be imported".
        advice: its end, with what may be done about it.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # code that is run for its model may call sys.exit
        raise ValueError(f"{what}: {told(error)}{advice}") from error


def told(error: BaseException) -> str:
    """Return what an error is, in one line."""
    if isinstance(error, SystemExit):
        return f"it calls sys.exit({'' if error.code is None else repr(error.code)})"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def load(name: str) -> tuple[nn.Module, Any]:
    """Return what FACTORY gives of a `path/to/file.py:FACTORY`, and the `example_inputs` of the model or the file.

    Raises:
        ValueError: where there is no such file or factory, or one that fails or gives no module.
    """
    file, _, factory = name.rpartition(":")
    path = Path(file).expanduser().resolve()
    if path.is_dir():
        raise ValueError(f"{file!r} is a folder; give a file in it, as path/to/file.py:FACTORY")
    if not path.is_file():
        raise ValueError(f"there is no file {file!r}; MODEL must be path/to/file.py:FACTORY, or a library's model")
    sys.path.insert(0, str(path.parent))  # what lies beside the file can be imported, as when it is run
    try:
        module = _imported(path, file)
        made = getattr(module, factory, None)
        model = made if isinstance(made, nn.Module) else _made(made, module, f"{file}:{factory}")
    finally:
        if str(path.parent) in sys.path:
            sys.path.remove(str(path.parent))
    given = getattr(model, "example_inputs", None)
    return model, getattr(module, "example_inputs", None) if given is None else given


def _imported(path: Path, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    is_new = sys.modules.setdefault(path.stem, module) is module
    try:
        with blamed(f"{file} cannot be imported", "; it must run by itself, as `python FILE` does"):
            spec.loader.exec_module(module)
    except BaseException:
        if is_new:
            sys.modules.pop(path.stem, None)
        raise
    return module


def _made(factory: Any, module: ModuleType, name: str) -> nn.Module:
    if not callable(factory):
        own = [
            key
            for key, value in vars(module).items()
            if callable(value) and not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
        ]
        file, _, wanted = name.rpartition(":")
        raise ValueError(f"{file} has no function {wanted!r}; it has {', '.join(own) or 'none'}")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ValueError(f"{name} is called without arguments, but it is {error}; write a function around it") from None
    except ValueError:  # of those written in C
        pass
    with blamed(f"{name}() fails"):
        model = factory()
    if not isinstance(model, nn.Module):
        kind = "nothing" if model is None else f"a {type(model).__name__}"
        raise ValueError(f"{name}() must return a torch.nn.Module; it returned {kind}")
    return model
