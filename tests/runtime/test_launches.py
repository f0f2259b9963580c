"""How compiled kernels are launched: by pointers, for each kind of tensors, by descriptors, on their device."""

from __future__ import annotations

import contextlib

import pytest
import torch

from swinaccel.backends.triton import launches


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, which need not be the one that a model lies on."""
    current, seen = [0], []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.append(current[0])

    class OnSecond:
        dtype = torch.float32

        def get_device(self):
            return 1

        def data_ptr(self):
            return 0

    @contextlib.contextmanager
    def switched(index):
        current[0] = index
        yield
        current[0] = 0

    with monkeypatch.context() as patch:
        patch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
        patch.setattr(torch.cuda, "device", switched)
        launches.Launch(Kernel(), (1,), ())(OnSecond(), None)
    assert seen == [1]
    assert current == [0]


class OnGpu:
    """What a launch asks of a tensor."""

    def __init__(self, pointer, index=0):
        self.pointer, self.index, self.dtype = pointer, index, torch.float32

    def data_ptr(self):
        return self.pointer

    def get_device(self):
        return self.index


@pytest.fixture
def launched(monkeypatch):
    """A launch of two tensors and a number on the first GPU, and what was run of it."""
    seen = []

    class Compiled:
        function, packed_metadata = "function", "metadata"

        def run(self, *arguments):
            seen.append(arguments)

        def __getitem__(self, grid):
            return lambda *arguments: seen.append(("whole", *arguments))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: Compiled()

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: f"stream {index}", raising=False)
    return launches.Launch(Kernel(), (5,), (7,)), seen


def test_compiled_kernels_are_run_with_pointers(launched):
    launch, seen = launched
    for first in (16, 32, 48):
        launch(OnGpu(first), None)
    assert seen == [
        (5, 1, 1, "stream 0", "function", "metadata", None, None, None, first, None, 7) for first in (32, 48)
    ]
    launch(OnGpu(8), None)  # of another alignment: compiled by itself
    assert len(seen) == 2


def test_each_kind_of_tensors_has_its_own_compiled_kernel(launched, monkeypatch):
    """Also where kinds take turns."""
    _, seen = launched
    compiled = []

    class Compiled:
        packed_metadata = "metadata"

        def __init__(self, kind):
            self.function = kind

        def run(self, *arguments):
            seen.append(arguments[4])

        def __getitem__(self, grid):
            return None

    class Kernel:
        def __getitem__(self, grid):
            def compile(*tensors):
                kind = [one and (one.dtype, one.index, one.pointer % 16) for one in tensors]
                compiled.append(kind)
                return Compiled(kind)

            return compile

    launch = launches.Launch(Kernel(), (5,), ())
    half = OnGpu(64)
    half.dtype = torch.float16
    kinds = [(OnGpu(16), OnGpu(32)), (OnGpu(8), OnGpu(32)), (half, OnGpu(32)), (OnGpu(32), None), (OnGpu(16), OnGpu(4))]
    for _ in range(3):
        for tensors in kinds:
            launch(*tensors)
            launch(*tensors)
    turn = [kind for kind in compiled for _ in range(2)]
    assert len(compiled) == len(kinds)
    assert seen == compiled + 2 * turn


@pytest.mark.parametrize("elsewhere", [False, True])
def test_descriptors_are_made_once_and_copied_for_other_tensors(launched, elsewhere):
    launch, seen = launched

    class Descriptor:
        def __init__(self, base, shape):
            self.base, self.shape = base, shape
            if base.data_ptr() % 16:
                raise ValueError("no address of a descriptor")
            made.append(base)

    made, second = [], OnGpu(16, -1 if elsewhere else 0)
    describe = {1: lambda tensor: Descriptor(tensor, [3, 4])}
    described = launches.DescribedLaunch(describe, launch.kernel, (5,), (7,))
    tensors = [(OnGpu(pointer), OnGpu(pointer), second) for pointer in (16, 32, 48)]
    for given in tensors:
        described(*given)
    assert len(made) == (3 if elsewhere else 1)
    for (first, base, last), arguments in zip(tensors[1:], seen, strict=True):
        pointer, descriptor, *rest = arguments[9:]
        assert type(descriptor) is Descriptor
        assert (descriptor.base, descriptor.shape) == (base, [3, 4])
        assert [pointer, *rest] == ([first, last, 7] if elsewhere else [first.pointer, 16, 7])
    with pytest.raises(ValueError, match="no address"):  # and what is not like the first is looked at again
        described(OnGpu(16), OnGpu(8), second)


@pytest.mark.parametrize("index", [-1, 1], ids=["cpu", "another-gpu"])
def test_tensors_elsewhere_are_for_triton_to_judge(index, launched):
    launch, seen = launched
    first, other = OnGpu(16), OnGpu(16, index)
    for _ in range(2):
        launch(first, other)
    assert seen == [(5, 1, 1, "stream 0", "function", "metadata", None, None, None, first, other, 7)]


def test_hooks_of_triton_see_launches(launched):
    from triton import knobs

    launch, seen = launched
    launch(OnGpu(16))
    hook = print
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        launch(OnGpu(16))
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == [("whole", 16, 7)]
