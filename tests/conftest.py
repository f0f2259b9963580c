"""Where the kernels run, and a clean slate for every test."""

from __future__ import annotations

import gc
import os
import sys
import warnings

import hypothesis
import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter. It is chosen before Triton is first imported, so by this file.
# Tests of plain PyTorch name their backend, since "auto" means the kernels then.
HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network; models are built from configurations

import helpers  # noqa: E402
import interpreter  # noqa: E402

from swinaccel import bias, ops, patching  # noqa: E402
from swinaccel.backends.triton import devices, launches, linear  # noqa: E402
from swinaccel.bias import cache  # noqa: E402
from swinaccel.runtime import call  # noqa: E402
from swinaccel.trust.registry import registry  # noqa: E402

torch.backends.cudnn.allow_tf32 = False  # it is on by default: patch embeddings in fp32 would depend on the algorithm
if helpers.TRITON_DEVICE == "cpu":
    interpreter.mend()
    interpreter.hasten()

# Workers of pytest-xdist are as many as the cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

# The same problems at every run, so that a red test is one that a change made red. To look for others:
# pytest --hypothesis-profile=explore
_COMMON: dict = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("fixed", derandomize=True, database=None, **_COMMON)
hypothesis.settings.register_profile("explore", print_blob=True, **_COMMON)
hypothesis.settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None
    if not HAS_CUDA:
        reason = "needs a CUDA device"
    elif helpers.TRITON_DEVICE != "cuda":
        reason = "TRITON_INTERPRET=1 interprets the kernels on the CPU"
    for item in items:
        if reason is not None and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


_modules_frozen = 0


def pytest_collection_finish() -> None:
    _freeze()


def _freeze() -> None:
    """Keep what is there, of libraries nearly all, from the collector: collecting and counting instances gets quick."""
    global _modules_frozen
    gc.collect()
    gc.freeze()
    _modules_frozen = len(sys.modules)


@pytest.fixture
def with_shared_memory(monkeypatch):
    """Lets kernels be launched as on a GPU with so much shared memory, and without a copy engine."""

    def begin(limit):
        monkeypatch.setattr(devices, "shared_memory", lambda device: limit)
        monkeypatch.setattr(devices, "has_copy_engine", lambda device: False)
        linear._how.cache_clear()
        launches.launches.clear()

    yield begin
    linear._how.cache_clear()
    launches.launches.clear()


@pytest.fixture(scope="module", autouse=True)
def _no_verdicts():
    registry.clear()
    _freeze()


@pytest.fixture(autouse=True)
def _clean_slate(request, monkeypatch, tmp_path_factory):
    """No option comes in from outside, and nothing of ours is left behind: environment, dispatchers, memories.

    Verdicts are kept in modules with KEEPS_VERDICTS, which are about other things: probing takes most of their time.
    """
    for name in list(os.environ):
        if name.startswith("SWINACCEL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SWINACCEL_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(cache, "_told", set())
    call._warned.clear()
    if not getattr(request.module, "KEEPS_VERDICTS", False):
        registry.clear()
    bias.forget()
    ops.forget_failures()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # Fallbacks are expected in many tests; those about warnings record them by themselves.
        warnings.filterwarnings("ignore", message="swinaccel: the original runs", category=UserWarning)
        yield
    assert not patching._open_switches, "a disabled() block was left open"
    if patching._installed:
        gc.collect()  # accelerated models of this test are gone, and with them the last reason for a dispatcher
        patching.unmark(())
    leftover = dict(patching._installed)
    for key in leftover:
        patching.remove(key)
    if leftover:  # something holds a model still, such as an error's frames: it is none of the next test's
        for instance in gc.get_objects():
            if issubclass(type(instance), torch.nn.Module):
                instance.__dict__.pop(patching.MARKER, None)
    torch._dynamo.reset()
    if len(sys.modules) != _modules_frozen:
        _freeze()
    if HAS_CUDA and torch.cuda.memory_reserved() > 2**32:
        torch.cuda.empty_cache()  # other workers share the GPU


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that a kernel leaves unwritten reads as NaN."""
    with helpers.poisoned_empty(monkeypatch):
        yield


@pytest.fixture
def strict_kernels(monkeypatch, poisoned):
    """A kernel that fails raises, where plain PyTorch would take its place and pass for it; see also `poisoned`."""
    monkeypatch.setenv("SWINACCEL_STRICT", "1")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16, so that a few dozen tokens make several of them in the kernels of sequences."""
    from swinaccel.kernels import sequence_launch

    from swinaccel.backends.triton import launches

    if helpers.TRITON_DEVICE == "cpu":
        first = sequence_launch._first
        monkeypatch.setattr(sequence_launch, "_first", lambda shapes, *rest: first(((16, 16, 2, 1),), *rest))
        monkeypatch.setattr(launches, "launches", {})
