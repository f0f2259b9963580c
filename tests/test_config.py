"""Options and environment variables: what is accepted, and errors that name what is not."""

from __future__ import annotations

import logging
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from torch import nn

import swinaccel
from swinaccel import AccelConfig, config

MODEL = nn.Linear(2, 2)


def test_defaults_are_the_contract():
    options = AccelConfig()
    assert (options.backend, options.bias, options.bias_energy) == ("auto", "auto", None)
    assert (options.filter, options.strict, options.fuse) == (None, False, "auto")


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


@pytest.mark.parametrize("name", ["SWINACCEL_DISABLE", "SWINACCEL_STRICT"])
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
    read = {"SWINACCEL_DISABLE": config.env_disabled, "SWINACCEL_STRICT": config.env_strict}[name]
    assert read() is value


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


def test_cache_folder_that_is_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWINACCEL_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"SWINACCEL_CACHE_DIR=.* is not usable"):
        config.cache_dir()


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
    assert text == {"backend": "torch", "bias": "auto", "bias_energy": 0.9, "strict": True, "fuse": "auto"}
