"""Replay calls of a whole model as a CUDA graph, while all that the graph was captured from is as it was.

A graph runs what was captured, on the memory that was captured, and looks at nothing. So each is kept under all that
decides what a call runs (its signature), and holds on to the memory that it reads. Whether the module is what it was,
where its parameters lie, its hooks and its settings, is compared while the device works, before the result is given
out. In-place changes of numbers need nothing: a replay reads them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...backends.triton.launches import first_line
from ...config import CAPTURED_CALL, AccelConfig
from ...layers import PLAIN_TENSORS
from ...ops.observed import count_modes
from ..plan import State
from .capture import ENGINES, Capture, NotCapturable, NotNow, Run, distinct
from .rehearsal import compile_ahead
from .training import TrainingCapture

logger = logging.getLogger("swinaccel")

MOST = 8  # signatures of one module
PATIENCE = 64  # calls that a capture is to be worth, where others had to go or one has failed
# How products sum up.
_ACCUMULATIONS = (
    "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation",
)  # fmt: skip


class Graphs:
    """The captured signatures of one module, the latest used last.

    Attributes:
        reason: why the latest signature that is no graph is none, or None.
        replays: calls that were replays.
    """

    def __init__(self) -> None:
        self.captures: OrderedDict[tuple, Capture] = OrderedDict()
        self.reason: str | None = None
        self.replays = 0
        self._latest: tuple[tuple, Capture] | None = None
        self._goes_ahead = True
        self._seen: dict[tuple, int] = {}
        self._made = self._others = 0  # graphs, and calls that were no replays
        self._refused: dict[tuple, str] = {}
        self._rehearsed: set[bool] = set()

    @property
    def nbytes(self) -> int:
        """Return how much device memory the graphs take."""
        return sum(one.nbytes for one in self.captures.values())

    def replay_ahead(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], trained: bool
    ) -> tuple[Any] | None:
        """Return what `replay` does if the call has the signature of the latest replay, else None.

        The graph is launched when the only input looks like that one's; all else is compared while the device works.
        """
        if self._latest is None or not self._goes_ahead or len(args) != 1 or kwargs:
            return None
        key, capture = self._latest
        if not capture.fits(*args) or not capture.looks_after or not _may_replay(args[0].device.type):
            return None
        if not capture.is_free() or not capture.is_safe():
            return None
        result = capture.replay([args[0]])
        found = signature(args, kwargs, trained)
        # Signatures that take turns would launch each other's graphs: after the first such call none goes ahead.
        self._goes_ahead = found is not None and found[0] == key
        if self._goes_ahead and capture.holds(module):
            return self._count(capture, result)
        capture.undo()
        if self._goes_ahead:
            self._drop(key, capture)
        return None

    def replay(self, module: nn.Module, key: tuple, inputs: list[Tensor]) -> tuple[Any] | None:
        """Return the result of a replay, alone in a tuple, or None where there is no graph, or none that holds."""
        capture = self.captures.get(key)
        if capture is None or not capture.is_free():
            return None
        if capture.is_safe() and (capture.looks_after or capture.holds(module)):
            result = capture.replay(inputs)
            if not capture.looks_after or capture.holds(module):
                with suppress(KeyError):  # another thread took it away
                    self.captures.move_to_end(key)
                    self._latest = key, capture
                return self._count(capture, result)
            capture.undo()
        self._drop(key, capture)
        return None

    def _drop(self, key: tuple, capture: Capture) -> None:
        """Forget a graph that does not hold any more; its signature may be captured anew."""
        self._latest = None
        self.captures.pop(key, None)
        self._seen.pop(key, None)
        if not capture.replays:
            self.refuse(key, "something in it changes at every call")

    def _count(self, capture: Capture, result: Any) -> tuple[Any]:
        capture.count()
        self.replays += 1
        return (result,)

    def is_first(self) -> bool:
        """Return True once without, and once with gradients: sizes that come later find most kernels compiled."""
        mode = torch.is_grad_enabled()
        if mode in self._rehearsed:
            return False
        self._rehearsed.add(mode)
        return True

    def is_due(self, key: tuple, first: int) -> bool:
        """Return True if a call of this signature, which is counted here, is the first that should be captured."""
        if key in self._refused:
            self.reason = self._refused[key]
            return False
        self._others += 1
        if len(self._seen) > 16 * MOST:  # sizes that never come back
            self._seen.clear()
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] < first or key in self.captures:
            return False
        # More sizes than there may be graphs would take each other's places at every call.
        return self._made < MOST or self.replays + self._others >= PATIENCE * (self._made - MOST + 1)

    def capture(self, module: nn.Module, key: tuple, run: Run, inputs: list[Tensor], limit: float) -> None:
        """Capture a call, if it can be captured, in at most so much of the device's memory."""
        try:
            capture = (TrainingCapture if torch.is_grad_enabled() else Capture)(module, run, inputs)
        except NotNow as error:
            self.reason, self._seen[key] = str(error), -PATIENCE
            return
        except Exception as error:  # of the call itself it will be raised again, by the call
            reason = str(error) if isinstance(error, NotCapturable) else f"capturing failed: {first_line(error)}"
            self.refuse(key, reason)
            return
        self._made += 1
        while self.captures and (len(self.captures) >= MOST or self.nbytes + capture.nbytes > limit):
            self._latest = None
            self.captures.popitem(last=False)
        if capture.nbytes > limit:
            self.refuse(key, f"its graph takes {capture.nbytes / 2**20:.0f} MiB; raise graphs_memory for it")
            return
        self.reason, self.captures[key] = None, capture

    def refuse(self, key: tuple, reason: str) -> None:
        """Run calls of a signature without a graph from now on."""
        if len(self._refused) > 16 * MOST:
            self._refused.clear()
        self._refused[key] = self.reason = reason
        logger.info("swinaccel: no graph, and results are right: %s", reason)


def call(
    state: State,
    module: nn.Module,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: AccelConfig,
) -> Any:
    """Run one call of a module whose calls may be captured.

    Args:
        run: the module's own forward, unbound.
    """
    trained = config.graphs is True
    graphs = state.graphs = state.graphs or Graphs()
    result = graphs.replay_ahead(module, args, kwargs, trained)
    if result is not None:
        return result[0]
    found = signature(args, kwargs, trained)
    if found is None:
        return run(module, *args, **kwargs)
    key, inputs = found
    result = graphs.replay(module, key, inputs)
    if result is not None:
        return result[0]
    if "_is_replica" in module.__dict__:  # of DataParallel, which makes another for each call
        return run(module, *args, **kwargs)
    again = _again(run, args, kwargs)
    if graphs.is_first():
        compile_ahead(module, again, inputs)
    if graphs.is_due(key, CAPTURED_CALL - (config.graphs is True)):
        graphs.capture(module, key, again, inputs, config.graphs_memory * memory_of(inputs[0].device))
        result = graphs.replay(module, key, inputs)
    return run(module, *args, **kwargs) if result is None else result[0]


def _again(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
    """Return a function that makes a call anew, of another module and other tensors."""
    leaves, form = _flat(args, kwargs)
    places, _ = distinct(leaves)
    others = [None if isinstance(one, Tensor) else one for one in leaves]  # which does not keep the tensors alive

    def again(module: nn.Module, tensors: list[Tensor]) -> Any:
        given = [one if place is None else tensors[place] for one, place in zip(others, places, strict=True)]
        args, kwargs = _nested(given, form)
        result = run(module, *args, **kwargs)
        after, form_after = _flat(args, kwargs)
        if form_after != form or not all(map(is_, after, given)):
            raise NotCapturable("it writes to a list or a dictionary that it is given")
        return result

    return again


def memory_of(device: torch.device) -> float:
    """Return how much memory a device has, in bytes."""
    return float("inf") if device.type != "cuda" else torch.cuda.get_device_properties(device).total_memory


def signature(args: tuple[Any, ...], kwargs: dict[str, Any], trained: bool) -> tuple[tuple, list[Tensor]] | None:
    """Return all that decides what a call runs, beside the module, and its tensors; None for a call that is no graph.

    Args:
        trained: calls that record gradients may be graphs, too.
    """
    leaves, form = _flat(args, kwargs)
    places, inputs = distinct(leaves)
    if not inputs or not all(map(_is_input, inputs)):
        return None
    if not all(place is not None or _is_plain(one) for one, place in zip(leaves, places, strict=True)):
        return None
    device, is_recorded = inputs[0].device.type, torch.is_grad_enabled()
    if device not in ENGINES or not _may_replay(device):
        return None
    if is_recorded and not trained:
        return None
    if not is_recorded and any(one.requires_grad for one in inputs):
        return None
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    rest = tuple(
        (type(one), one, repr(one)) if place is None else place for one, place in zip(leaves, places, strict=True)
    )
    kinds = tuple(
        (one.shape, one.stride(), one.dtype, one.device, one.requires_grad, one.is_inference()) for one in inputs
    )
    modes = is_recorded, torch.is_inference_mode_enabled(), autocast
    return (kinds, form, rest, modes, _settings()), inputs


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Return the leaves of a call's arguments and their form; `tree_flatten` would be half of what replays wait for."""
    leaves = [*args, *kwargs.values()]
    if all(isinstance(one, Tensor) or _is_plain(one) for one in leaves):
        return leaves, (len(args), tuple(kwargs))
    return tree_flatten((args, kwargs))


def _nested(leaves: list[Any], form: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments whose leaves and form `_flat` has found."""
    if isinstance(form, tuple):
        count, names = form
        return tuple(leaves[:count]), dict(zip(names, leaves[count:], strict=True))
    return tree_unflatten(leaves, form)


def _may_replay(device: str) -> bool:
    """Return True unless the call is inside a backward, a checkpoint, or what observes or captures its operators."""
    return (
        not count_modes()
        and not parametrize._cache_enabled
        and torch._C._current_graph_task_id() == -1
        and (not torch.is_grad_enabled() or _is_ordinary_training())
        and not (device == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def _is_input(x: Tensor) -> bool:
    is_dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return type(x) in PLAIN_TENSORS and is_dense and x.numel() > 0 and not x.__dict__  # which code may read


def _is_ordinary_training() -> bool:
    """Return True unless someone is shown what is saved for the backward, or searches it for anomalies."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None and not torch.is_anomaly_enabled()


def _settings() -> tuple[Any, ...]:
    """Return PyTorch's own settings that decide which kernels run."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    try:
        precision: Any = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # the process configures precision through torch.backends.*.fp32_precision
        parts: tuple[Any, ...] = torch.backends, cuda.matmul, *(getattr(cudnn, name, None) for name in ("conv", "rnn"))
        precision = tuple(getattr(part, "fp32_precision", None) for part in parts)
    return (
        precision,
        torch.get_deterministic_debug_mode(),
        torch.get_default_dtype(),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        tuple(map(cuda.matmul.__getattr__, _ACCUMULATIONS)),
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str, type(None))) or (type(value) is tuple and all(map(_is_plain, value)))
