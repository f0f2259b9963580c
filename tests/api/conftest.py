"""Where functions run."""

from __future__ import annotations

import helpers
import pytest

from swinaccel.backends.torch import windows as torch_windows
from swinaccel.ops import window as window_ops


@pytest.fixture
def backend(request, monkeypatch):
    """Where the functions run. No kernel fails unseen, none leaves memory unwritten, and none is passed by."""
    calls = dict.fromkeys(("triton", "torch"), 0)

    def count(owner, name, key):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            calls[key] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    monkeypatch.setenv("SWINACCEL_STRICT", "1")
    if request.param == "torch":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    count(window_ops, "shifted_window_attention", "triton")
    count(torch_windows, "attention", "torch")
    with helpers.poisoned_empty(monkeypatch):
        yield helpers.DEVICES[request.param]
    other = "torch" if request.param == "triton" else "triton"
    assert calls[request.param], f"nothing ran on {request.param}"
    assert not calls[other], f"some of it ran on {other}"
