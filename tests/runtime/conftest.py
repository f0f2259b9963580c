"""Fixtures of the runtime's tests: what ran, and that it did not fail."""

from __future__ import annotations

import pytest
import torch
from blocks import AROUND
from helpers import TRITON_DEVICE
from swinaccel.kernels import fusion_launch
from tape import Tape

from swinaccel import ops
from swinaccel.backends.triton import block as kernels
from swinaccel.backends.triton import devices, launches, linear
from swinaccel.ops import block_autograd as recorded
from swinaccel.runtime import call, precision
from swinaccel.runtime.graphs import capture

NORMS = {kernels.NORM: "norm", kernels.ADD_NORM: "add_norm", kernels.NORM_ADD: "norm_add", kernels.ADD: "add"}


@pytest.fixture
def kernels_that_run():
    yield
    assert not ops.has_failures()


@pytest.fixture
def ran(monkeypatch):
    """Names of the functions that ran, in order."""
    names = []

    def spy(name):
        plain = getattr(recorded, name)

        def run(*args):
            names.append(name)
            return plain(*args)

        monkeypatch.setattr(recorded, name, run)

    for name in ("norm", "add_norm", "norm_add", "mlp", "merge"):
        spy(name)
    return names


@pytest.fixture
def embedded(monkeypatch):
    """Shapes of the images that the kernel embedded; a kernel that fails is none."""
    shapes, plain = [], kernels.embed

    def embed(x, *rest):
        shapes.append(tuple(x.shape))
        return plain(x, *rest)

    monkeypatch.setattr(kernels, "embed", embed)
    yield shapes
    assert not ops.has_failures()


@pytest.fixture
def anywhere(monkeypatch):
    """Few channels are enough, and an interpreter is."""
    monkeypatch.setattr(precision, "fewest_channels", 16)
    if TRITON_DEVICE == "cpu":
        monkeypatch.setattr(precision, "device_reason", lambda device: None)


@pytest.fixture
def few_processors(monkeypatch):
    """A GPU whose multiprocessors few tiles keep busy, and which copies tiles by descriptors; no rows are few."""
    monkeypatch.setattr(fusion_launch, "_FEW", 0)
    monkeypatch.setattr(devices, "multiprocessors", lambda device: 1)
    if TRITON_DEVICE == "cpu":
        monkeypatch.setattr(devices, "has_copy_engine", lambda device: True)
    elif not devices.has_copy_engine(torch.device("cuda", 0)):
        pytest.skip("this GPU has no copy engine")
    linear._how.cache_clear()
    yield
    linear._how.cache_clear()


@pytest.fixture
def few_rows(monkeypatch):
    """A GPU on which few rows are multiplied by a kernel of ours."""
    if TRITON_DEVICE == "cpu":
        monkeypatch.setattr(devices, "has_copy_engine", lambda device: True)
    elif not devices.has_copy_engine(torch.device("cuda", 0)):
        pytest.skip("this GPU has no copy engine")
    launches.launches.clear()
    linear._how.cache_clear()
    yield
    launches.launches.clear()
    linear._how.cache_clear()


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that ran, in order; as on a GPU that any number of rows keeps busy."""
    names, running = [], []
    monkeypatch.setattr(devices, "multiprocessors", lambda device: 0)

    def spy(owner, launch_of):
        plain = owner.__call__

        def call(self, *tensors):
            launch = launch_of(self)
            if not running and launch.kernel.__name__ in AROUND:
                name = AROUND[launch.kernel.__name__]
                names.append(NORMS[launch.arguments[4]] if name == "norm" else name)
            running.append(self)
            try:
                plain(self, *tensors)
            finally:
                running.pop()

        monkeypatch.setattr(owner, "__call__", call)

    spy(launches.BoundLaunch, lambda bound: bound._launch)
    spy(launches.Launch, lambda launch: launch)
    return names


@pytest.fixture
def read(monkeypatch):
    """How many calls were planned, rather than run by a plan of before."""
    made = []
    plan = call.plan_attention

    def counted(*arguments):
        made.append(1)
        return plan(*arguments)

    monkeypatch.setattr(call, "plan_attention", counted)
    return made


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where graphs are captured; on CPUs by a stand-in."""
    import graphed

    monkeypatch.setattr(graphed, "DEVICE", request.param)
    monkeypatch.setitem(capture.ENGINES, "cpu", Tape)
