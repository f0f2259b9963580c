"""Kernels are launched past Triton's own runner, by an interface that it does not promise: kernels/triton/run.py."""

from __future__ import annotations

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
