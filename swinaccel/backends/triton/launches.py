"""Launch kernels: what is compiled for a kind of tensors is kept, and then only run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from .checks import check_dtypes

launches: dict[tuple, Any] = {}


def keep(key: tuple, value: Any) -> Any:
    if len(launches) >= 4096:  # sizes that never come back, such as those of a dynamic batch
        launches.clear()
    launches[key] = value
    return value


def first_line(error: Exception) -> str:
    """Return an error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


_prepared: threading.Event | None = None
_PATIENCE = 10.0  # seconds: a process that was forked meanwhile has no such thread


def prepare() -> threading.Event:
    """Begin to read Triton's sources, which take a second, and which the names of compiled kernels depend on.

    Returns:
        What is set when they are read.
    """
    global _prepared
    if _prepared is None:
        _prepared = threading.Event()
        threading.Thread(target=_read_sources, args=(_prepared,), daemon=True).start()
    return _prepared


def _read_sources(done: threading.Event) -> None:
    with suppress(Exception):
        from ...kernels.run import read_sources

        read_sources()
    done.set()


_THREADS = 8
_compilers: dict[int, tuple[ThreadPoolExecutor, set[tuple]]] = {}  # by stream: threads, and what they have begun


@contextmanager
def compiled_ahead(stream: torch.cuda.Stream) -> Iterator[None]:
    """Compile, at the same time, kernels that are launched on a stream inside, in whatever thread; they are not run.

    What others compute from their results is of no use. Kernels that were compiled before run.
    """
    try:
        with ThreadPoolExecutor(_THREADS) as threads:  # which waits until all is compiled
            _compilers[stream.cuda_stream] = threads, set()
            yield
    finally:
        _compilers.pop(stream.cuda_stream, None)


class Launch:
    """A kernel with all but its tensors decided: compiled once for each kind of those, and then only run.

    Triton's own launch path looks at every argument of every call again; here the integers are part of the key
    under which a launch is kept, so that only device, dtype and alignment of the tensors are left to look at.

    Attributes:
        names: of the tensors that come from outside, as `check_dtypes` takes them, "" for others.
        dependent: the last argument of a kernel that may be launched so, see `kernels.dependent`; None of others.
    """

    __slots__ = ("arguments", "described", "grid", "kernel", "latest", "names", "options", "runners")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        names: tuple[str, ...] = (),
        dependent: bool | None = None,
        **options: int,
    ) -> None:
        if dependent is not None:
            arguments = (*arguments, dependent)
        if dependent:
            options["launch_pdl"] = True
        self.kernel, self.arguments, self.names, self.options = kernel, arguments, names, options
        self.grid = (*grid, 1, 1)[:3]
        self.described: dict[int, tuple[type, dict[str, Any]]] = {}  # see `DescribedLaunch`
        self.runners: dict[tuple, tuple[Any, bool]] = {}
        self.latest: tuple[Any, tuple[Any, bool]] = None, _NOT_COMPILED  # of the runners, and what it is kept under

    def __call__(self, *tensors: Any) -> None:
        index = tensors[0].get_device()  # -1 on the CPU
        if index >= 0 and index != torch._C._cuda_getDevice():
            with torch.cuda.device(index):  # Triton launches on the current device, whatever its tensors say
                return self(*tensors)
        pointers, signature = _read(tensors)
        known, (run, takes_pointers) = self.latest
        if signature != known:
            run, takes_pointers = self.runners.get(tuple(signature), _NOT_COMPILED)
            self.latest = signature, (run, takes_pointers)
        if run is None:
            return self._compile(index, tensors, tuple(signature))
        if takes_pointers:
            for place, (cls, attributes) in self.described.items():
                descriptor: Any = object.__new__(cls)
                descriptor.__dict__ = {**attributes, "base": tensors[place]}
                pointers[place] = descriptor
            run(pointers)
        else:
            run(self._passed(tensors))

    def _compile(self, index: int, tensors: tuple[Tensor | None, ...], signature: tuple) -> None:
        check_dtypes(self.names, tensors)
        if _compilers and index >= 0:
            compilers = _compilers.get(torch._C._cuda_getCurrentRawStream(index))
            if compilers is not None:
                return self._compile_ahead(index, tensors, signature, *compilers)
        from ...kernels.run import launch_first, runner

        compiled = launch_first(self.kernel, self.grid, (*self._passed(tensors), *self.arguments), self.options)
        if compiled is not None:  # the interpreter compiles nothing
            # Triton asks the driver of each tensor's memory whether its GPU sees it. Of a pointer it does not ask, and
            # need not where all tensors are on the one device.
            is_here = index >= 0 and all(one is None or one.get_device() == index for one in tensors)
            stream_of = torch._C._cuda_getCurrentRawStream if index >= 0 else None
            run = runner(compiled, self.grid, self.arguments, stream_of, index)
            self.runners[signature] = run, is_here
            self.latest = list(signature), self.runners[signature]

    def _compile_ahead(
        self,
        index: int,
        tensors: tuple[Tensor | None, ...],
        signature: tuple,
        threads: ThreadPoolExecutor,
        begun: set[tuple],
    ) -> None:
        """Let a thread compile the kernel for such tensors, unless one has begun to."""
        if (key := (id(self), signature)) in begun:
            return
        begun.add(key)
        passed = self._passed(tensors)
        from ...kernels.run import compile_ahead

        def run() -> None:
            with suppress(Exception), torch.cuda.device(index):  # who runs it will be told
                prepare().wait(_PATIENCE)
                compile_ahead(self.kernel, self.grid, (*passed, *self.arguments), self.options)

        threads.submit(run)

    def _passed(self, tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        """Return what the kernel is given for its tensors."""
        return tensors


def _read(tensors: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """Return the addresses of tensors, and all else that a kernel is compiled for."""
    pointers: list[int | None] = []
    signature: list[Any] = []  # compared as a list, which takes less time than to hash it
    for tensor in tensors:
        if tensor is None:
            pointers.append(None)
            signature.append(None)
        else:
            pointer = tensor.data_ptr()
            pointers.append(pointer)
            signature += tensor.dtype, tensor.get_device(), not pointer & 15
    return pointers, signature


class BoundLaunch:
    """A launch by one caller, whose tensors have the same dtypes and devices at every call, or are None at every call.

    Left to look at is only whether all of them still lie on boundaries of 16 bytes.
    """

    __slots__ = ("_index", "_launch", "_run")

    def __init__(self, launch: Launch) -> None:
        self._launch, self._run, self._index = launch, None, -1

    def __call__(self, *tensors: Any) -> None:
        run = self._run
        if run is None or (self._index >= 0 and self._index != torch._C._cuda_getDevice()):
            return self._first(tensors)
        pointers: list[int | None] = []
        bits = 0
        for tensor in tensors:
            if tensor is None:
                pointers.append(None)
            else:
                pointer = tensor.data_ptr()
                bits |= pointer
                pointers.append(pointer)
        if bits & 15:
            return self._launch(*tensors)
        run(pointers)

    def _first(self, tensors: tuple[Any, ...]) -> None:
        launch = self._launch
        launch(*tensors)
        _, signature = _read(tensors)
        run, takes_pointers = launch.runners.get(tuple(signature), _NOT_COMPILED)
        if takes_pointers and not launch.described and False not in signature:
            self._index, self._run = tensors[0].get_device(), run  # in this order, for the sake of other threads


class DescribedLaunch(Launch):
    """A launch that gives some of its tensors, each of one shape and strides only, as descriptors.

    Triton's checks of a descriptor take as long as a launch: they are made once, when a kind of tensors is compiled
    for. From then on a descriptor is a copy of that one, about another tensor.
    """

    __slots__ = ("describe",)

    def __init__(self, describe: Mapping[int, Callable[[Any], Any]], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.describe = describe  # by place among the tensors

    def _passed(self, tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        passed: list[Any] = list(tensors)
        for place, describe in self.describe.items():
            passed[place] = one = describe(passed[place])
            self.described[place] = type(one), {**vars(one), "base": None}
        return tuple(passed)


_NOT_COMPILED = (None, False)
