"""Kernels are launched past Triton's own runner, by an interface that it does not promise: kernels/triton/run.py."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import helpers
import pytest
from swinaccel.kernels import run
from triton import knobs
from triton.compiler import CompiledKernel


class Loaded(CompiledKernel):
    """A compiled kernel as it is once it was loaded, which takes a GPU."""

    def __init__(self, calls):
        self.module, self.src, self.name = object(), None, "kernel"
        self.function, self.packed_metadata = "function", "metadata"
        self._run = lambda *arguments: calls.append(arguments)

    def __del__(self):
        pass  # there is nothing to unload


def test_a_compiled_kernel_is_run_as_triton_runs_it():
    """Triton's runner and ours hand the same arguments to the same function; an update that changes it fails."""
    calls = []
    compiled = Loaded(calls)
    compiled[(4, 3, 2)]("q", None, 7, 0.5, stream=9)
    run.runner(compiled, (4, 3, 2), (7, 0.5), lambda device: 9 + device, 0)(["q", None])
    theirs, ours = calls
    assert theirs[:6] == ours[:6] == (4, 3, 2, 9, "function", "metadata")
    assert theirs[7:9] == (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    assert ours[6:9] == (None, None, None)  # what is said about a launch, for hooks that nobody has set
    assert theirs[9:] == ours[9:] == ("q", None, 7, 0.5)


class Compiled:
    """A compiled kernel of Triton 3.6: the module that launches it is imported under a name that all of them share."""

    imported = ""

    def __init__(self, name):
        self.name, self.launcher = name, None

    def __getitem__(self, grid):
        if self.launcher is None:
            Compiled.imported = self.name
            time.sleep(0.01)
            self.launcher = Compiled.imported


class Kernel:
    def __init__(self, name):
        self.compiled = Compiled(name)

    def warmup(self, *arguments, grid, **options):
        return self.compiled

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.compiled[grid]
            return self.compiled

        return launch


@pytest.mark.parametrize("vendor", ["nvidia", "amd"])
def test_who_builds_launchers(vendor, monkeypatch):
    """Triton 3.6 does, and imports all of them under one name, which stands in its code."""
    backend = importlib.import_module(f"triton.backends.{vendor}.driver")
    cls = {"nvidia": "CudaLauncher", "amd": "HIPLauncher"}[vendor]
    active = types.SimpleNamespace(launcher_cls=getattr(backend, cls))
    monkeypatch.setattr(run, "driver", types.SimpleNamespace(active=active))
    assert run.builds_launchers() == ("__triton_launcher" in inspect.getsource(backend))


@pytest.mark.parametrize("has_launchers", [True, False])
def test_kernels_are_launched_by_their_own_launchers(has_launchers, monkeypatch):
    monkeypatch.setattr(run, "builds_launchers", lambda: has_launchers)
    kernels = [Kernel(str(number)) for number in range(24)]

    def work(number):
        for kernel in kernels[number::8]:
            if number % 2:
                run.compile_ahead(kernel, (1,), (), {})
            run.launch_first(kernel, (1,), (), {})

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert [one.compiled.launcher for one in kernels] == [one.compiled.name for one in kernels]


def test_launchers_are_built_at_the_same_time(monkeypatch):
    monkeypatch.setattr(run, "builds_launchers", lambda: True)
    together = threading.Barrier(4, timeout=20)
    monkeypatch.setattr(Compiled, "__getitem__", lambda compiled, grid: together.wait())
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda name: run.compile_ahead(Kernel(name), (1,), (), {}), "abcd"))


FIRST = """
import sys, torch, swinaccel, helpers
from swinaccel.kernels import run

def noted(kernel, *given, plain=run.compile_ahead):
    plain(kernel, *given)
    names.append(kernel.__name__)

names, run.compile_ahead = [], noted
model = swinaccel.accelerate(helpers.timm_v1().cuda().half().eval())
with torch.inference_mode():
    model(torch.randn(2, 3, 56, 56, device="cuda", dtype=torch.float16))
print(*sorted(set(names)))
"""


@pytest.mark.gpu
def test_the_first_call_of_a_process_compiles_all_kernels_at_once(tmp_path):
    """Nothing has set up the GPU's libraries before."""
    paths = [str(Path(helpers.__file__).parent), *sys.path]
    given = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | given
    command = [sys.executable, "-c", FIRST]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert {"_window_attention_fwd_small_kernel", "_norm_kernel"} <= set(done.stdout.split()), done.stderr
