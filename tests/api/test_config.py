"""Options and environment variables: what is accepted, and errors that name what is not."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import typing
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from torch import nn
from typing_extensions import Unpack

import swinaccel
from swinaccel import AccelConfig, config
from swinaccel.bias import cache

MODEL = nn.Linear(2, 2)


def test_defaults_are_the_contract():
    options = AccelConfig()
    assert (options.backend, options.bias, options.bias_energy) == ("auto", "auto", None)
    assert (options.filter, options.strict, options.fuse) == (None, False, "auto")


def test_options_are_named_in_signatures_and_types():
    """The dataclass owns the list; what type checkers and notebooks are told agrees with it."""
    owned = {field.name: field for field in dataclasses.fields(AccelConfig)}
    types = typing.get_type_hints(config.Options)
    assert types == typing.get_type_hints(AccelConfig)
    for function in (swinaccel.accelerate, swinaccel.accelerated, swinaccel.plan, swinaccel.verify):
        named = {
            one.name: one.default
            for one in inspect.signature(function).parameters.values()
            if one.kind is one.KEYWORD_ONLY
        }
        assert named == {name: field.default for name, field in owned.items()}
        assert typing.get_type_hints(inspect.unwrap(function))["options"] == Unpack[config.Options]


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        AccelConfig().backend = "torch"


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "triton"},
        {"backend": "torch"},
        {"bias": "table"},
        {"bias": "factors"},
        {"bias_energy": 0.995},
        {"bias_energy": 1},
        {"filter": lambda name, module: True},
        {"strict": False},
        {"fuse": "attention"},
        {"precision": "fp8"},
        {"max_error": 1},
    ],
    ids="-".join,
)
def test_accepted(options):
    for call in (swinaccel.accelerate, swinaccel.plan, AccelConfig.from_options):
        call(options) if call == AccelConfig.from_options else call(MODEL, **options)


WRONG = [
    ({"backend": "cuda"}, ValueError, r"backend must be one of 'auto', 'triton', 'torch'; got 'cuda'"),
    ({"backend": None}, ValueError, "backend must be one of"),
    ({"bias": "svd"}, ValueError, r"bias must be one of 'auto', 'table', 'factors'; got 'svd'"),
    ({"fuse": True}, ValueError, "fuse must be one of"),
    ({"bias_energy": 0}, ValueError, "bias_energy"),
    ({"bias_energy": 1.5}, ValueError, "bias_energy"),
    ({"bias_energy": float("nan")}, ValueError, "bias_energy"),
    ({"bias_energy": "0.9"}, TypeError, "bias_energy"),
    ({"bias_energy": True}, TypeError, "bias_energy"),
    ({"filter": "layers"}, TypeError, "filter must be None or a callable"),
    ({"precision": "fp16"}, ValueError, r"precision must be one of 'model', 'fp8'; got 'fp16'"),
    ({"max_error": 0}, ValueError, "max_error must be a positive number, a relative error such as 0.1; got 0"),
    ({"max_error": float("nan")}, ValueError, "max_error must be a positive number"),
    ({"max_error": True}, ValueError, "max_error must be a positive number"),
    ({"strict": 1}, TypeError, "strict must be True or False; got 1"),
    ({"speed": 9}, TypeError, "unknown option 'speed'; accelerate takes backend, bias, bias_energy, filter"),
    ({"backend": ["triton"]}, (TypeError, ValueError), "backend must be one of"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=[str(case[0]) for case in WRONG])
@pytest.mark.parametrize("function", ["accelerate", "plan", "accelerated"])
def test_wrong_options_are_named(function, options, error, message):
    def call():
        if function == "accelerated":
            with swinaccel.accelerated(MODEL, **options):
                raise AssertionError("the body must not run")
        getattr(swinaccel, function)(MODEL, **options)

    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["SWINACCEL_DISABLE", "SWINACCEL_STRICT", "SWINACCEL_AUTO"])
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", True),
        ("true", True),
        ("Yes", True),
        (" ON ", True),
        ("0", False),
        ("false", False),
        ("no", False),
        ("", False),
    ],
)
def test_flags(monkeypatch, name, text, value):
    monkeypatch.setenv(name, text)
    assert config._READERS[name]() is value


@pytest.mark.parametrize("name", ["SWINACCEL_DISABLE", "SWINACCEL_STRICT"])
def test_unusable_flags_name_the_variable(monkeypatch, name):
    monkeypatch.setenv(name, "perhaps")
    with pytest.raises(ValueError, match=f"{name}='perhaps' is not usable: set it to 1, true, yes or on"):
        swinaccel.accelerate(MODEL)


def test_log_level(monkeypatch):
    logger = logging.getLogger("swinaccel")
    before = logger.level
    try:
        monkeypatch.setenv("SWINACCEL_LOG", "debug")
        swinaccel.accelerate(MODEL)
        assert logger.level == logging.DEBUG
        logger.setLevel(logging.ERROR)
        monkeypatch.delenv("SWINACCEL_LOG")
        swinaccel.accelerate(MODEL)
        assert logger.level == logging.ERROR
    finally:
        logger.setLevel(before)


def test_unusable_log_level_names_the_variable(monkeypatch):
    monkeypatch.setenv("SWINACCEL_LOG", "loud")
    with pytest.raises(ValueError, match="SWINACCEL_LOG='loud' is not usable"):
        swinaccel.plan(MODEL)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SWINACCEL_CACHE_DIR", str(tmp_path / "mine"))
    assert config.cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("SWINACCEL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert config.cache_dir() == tmp_path / "swinaccel"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert config.cache_dir() == Path.home() / ".cache" / "swinaccel"


@pytest.mark.parametrize("text", ["~/mine", "missing/in/missing", "."])
def test_cache_folders_that_are_usable(monkeypatch, tmp_path, text):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWINACCEL_CACHE_DIR", text)
    assert (tmp_path / config.cache_dir()).resolve() == (tmp_path / text.replace("~/", "")).resolve()
    assert list(tmp_path.iterdir()) == [], "nothing is made before there is something to keep"


@pytest.mark.parametrize("name", ["SWINACCEL_CACHE_DIR", "XDG_CACHE_HOME"])
def test_empty_is_as_if_not_set(monkeypatch, tmp_path, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SWINACCEL_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(name, "")
    assert config.cache_dir() == tmp_path / ".cache" / "swinaccel"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file", "is no folder"),
        ("file/below", "is no folder"),
        ("loop/below", ""),
        ("~nobody-is-called-so/cache", "home"),
    ],
    ids=["file", "below-a-file", "loop", "no-user"],
)
def test_unusable_cache_folders_name_the_variable(monkeypatch, tmp_path, text, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setenv("SWINACCEL_CACHE_DIR", text)
    with pytest.raises(ValueError, match=rf"^SWINACCEL_CACHE_DIR=.* is not usable: .*{reason}"):
        config.cache_dir()


def test_cache_folders_that_are_closed(monkeypatch, tmp_path):
    monkeypatch.setattr(config.os, "access", lambda path, mode: mode == os.X_OK)  # root may do anything
    (tmp_path / "here").mkdir()
    for name, usable in (("here", True), ("missing", False)):
        monkeypatch.setenv("SWINACCEL_CACHE_DIR", str(tmp_path / name))
        if usable:
            assert config.cache_dir() == tmp_path / name, "what it holds may be of use"
        else:
            with pytest.raises(ValueError, match="closed to this user"):
                config.cache_dir()


def test_a_user_without_a_home(monkeypatch):
    """As in containers that run under a number of their own: kernels run, and nothing is kept."""
    monkeypatch.delenv("SWINACCEL_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(config.Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(ValueError, match=r"the cache folder ~/.cache/swinaccel is not usable: no home"):
        config.cache_dir()
    with pytest.warns(UserWarning, match="set SWINACCEL_CACHE_DIR to a folder that you can write to"):
        assert cache.folder_of("factors") is None


@pytest.mark.parametrize(("text", "backend"), [("1", "triton"), ("0", "torch")])
def test_auto_follows_the_interpreter(monkeypatch, text, backend):
    import torch

    from swinaccel.runtime import context

    monkeypatch.setenv("TRITON_INTERPRET", text)
    assert context.backend_of(AccelConfig(), torch.device("cpu")) == backend
    assert context.backend_of(AccelConfig(), torch.device("cuda")) == "triton"
    assert context.backend_of(AccelConfig(backend="torch"), torch.device("cuda")) == "torch"


def test_markers_carry_the_options_as_text():
    import json

    options = AccelConfig(backend="torch", strict=True, bias_energy=0.9, filter=lambda name, module: True)
    text = json.loads(options.to_json())
    assert text == {
        **{"backend": "torch", "bias": "auto", "bias_energy": 0.9, "strict": True, "fuse": "auto"},
        **{"graphs": "auto", "graphs_memory": 0.5, "precision": "model", "max_error": 0.1},
    }
