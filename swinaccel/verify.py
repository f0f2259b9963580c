"""Compare an accelerated model with the original, on this machine, for these inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from . import api
from .config import CAPTURED_CALL, Options, takes_options
from .report import Report

MAX_RATIO, MEAN_RATIO = 2.0, 1.1
_FLOOR = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the output's size: about one rounding of it


@dataclass(frozen=True)
class VerifyResult:
    """Errors against a reference of higher precision, over all output tensors.

    Attributes:
        passed: the accelerated model errs at most twice (max) and 1.1 times (mean) as much as the original does, or
            less than one rounding of the output, where original and reference are finite, and somewhere they are;
            its infinities and NaNs are the original's; something was accelerated, and none of it ran its original.
            The result's truth is this. With `precision="fp8"` all of it is asked of the model accelerated without.
        max_error, mean_error: of the accelerated model, relative to the reference's largest absolute value.
        original_max_error, original_mean_error: likewise of the original.
        reference: dtype of the reference, "float64" or "float32".
        report: what was accelerated, and whether it ran; with `precision="fp8"` that.
        fp8_max_error, fp8_mean_error: likewise with `precision="fp8"`, which is shown and not judged; None without.
    """

    passed: bool
    max_error: float
    mean_error: float
    original_max_error: float
    original_mean_error: float
    reference: str
    report: Report
    fp8_max_error: float | None = None
    fp8_mean_error: float | None = None

    def __bool__(self) -> bool:
        return self.passed

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self) | {"report": self.report.to_dict()}

    def __str__(self) -> str:
        errors = (
            f"against {self.reference}, max error {self.max_error:.2e} (original {self.original_max_error:.2e}), mean"
            f" {self.mean_error:.2e} (original {self.original_mean_error:.2e})"
        )
        if self.fp8_max_error is not None:
            errors += f"; with fp8 max {self.fp8_max_error:.2e}, mean {self.fp8_mean_error:.2e}, which is not judged"
        return f"{'passed' if self.passed else 'FAILED'}: {errors}; {self._advice() or self.report.summary()}"

    def _advice(self) -> str | None:
        """Return what to do where nothing was compared but the original with itself, or None."""
        if not self.report.entries:
            return (
                "no window attention was found, so the original was compared with itself; see the supported models in"
                " the documentation, or give the part of the model that holds the attention"
            )
        if not self.report.is_effective:
            reason = next((entry.reason for entry in self.report if entry.reason), "no call reached its attention")
            return f"nothing ran accelerated, so the original was compared with itself: {reason}"
        return None


@takes_options
def verify(model: nn.Module, *example_inputs: Any, **options: Unpack[Options]) -> VerifyResult:
    """Run a model accelerated, as it was, and in fp64, on the same inputs, and compare.

    Where calls are replayed as CUDA graphs, it is a replay that is compared.

    Args:
        model: accelerated or not; one that is not is accelerated, with `options`, for the time of the call. It is
            run in eval mode and handed back in the mode it came in.
        *example_inputs: what the model is called with.
        **options: the fields of `AccelConfig`.
    Returns:
        A `VerifyResult`; its truth is `passed`.
    Raises:
        ValueError: where no example input is given, or an output holds no floating-point tensor.
    """
    if not example_inputs:
        raise ValueError("verify needs the inputs to call the model with: verify(model, images)")
    is_fp8 = options.get("precision") == "fp8"
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), api.accelerated(model, **options):
            before = list(api.report(model))
            with api.disabled():
                original = _flat(model(*example_inputs))
            if api.report(model).graphs:  # what is compared shall be a replay, after other inputs
                for _ in range(CAPTURED_CALL):
                    model(*_changed(example_inputs, lambda one: one + 1))
            found = _flat(model(*example_inputs))
            with api.disabled():
                reference, dtype = _reference(model, example_inputs)
            report = api.report(model)
            eighth = found
            if is_fp8:
                with api.accelerated(model, **cast(Options, {**options, "precision": "model"})):
                    found = _flat(model(*example_inputs))
    finally:
        for module, training in modes:
            module.training = training
    if not found:
        raise ValueError("the model's output holds no floating-point tensor to compare")
    where = [one.isfinite() & exact.isfinite() for one, exact in zip(original, reference, strict=True)]
    max_error, mean_error = _errors(found, reference, where)
    original_max, original_mean = _errors(original, reference, where)
    fp8_errors = _errors(eighth, reference, where) if is_fp8 else (None, None)
    floor = max(_FLOOR.get(tensor.dtype, 1e-5) for tensor in found)
    passed = (
        any(bool(compared.any()) for compared in where)
        and all(torch.equal(_kinds(one), _kinds(other)) for one, other in zip(found, original, strict=True))
        and max_error <= max(MAX_RATIO * original_max, floor)
        and mean_error <= max(MEAN_RATIO * original_mean, floor / 4)
        and bool(report.accelerated)
        and all(entry.fallbacks == earlier.fallbacks for entry, earlier in zip(report, before, strict=True))
    )
    name = str(dtype).split(".")[-1]
    return VerifyResult(passed, max_error, mean_error, original_max, original_mean, name, report, *fp8_errors)


def _reference(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[Tensor], torch.dtype]:
    dtype = torch.float32 if any(p.device.type == "mps" for p in model.parameters()) else torch.float64
    twin = copy.deepcopy(model)
    twin.to(dtype)
    return _flat(twin(*_changed(inputs, lambda one: one.to(dtype)))), dtype


def _changed(inputs: Iterable[Any], change: Callable[[Tensor], Tensor]) -> list[Any]:
    """Return inputs of a model, with a change of all that are floating-point tensors."""
    return [change(one) if isinstance(one, Tensor) and one.is_floating_point() else one for one in inputs]


def _flat(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of an output, in whatever containers."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _flat(part)]


def _kinds(tensor: Tensor) -> Tensor:
    """Return what every element is: 0 for a number, and something else for each infinity and NaN."""
    return tensor.isposinf() + 2 * tensor.isneginf() + 3 * tensor.isnan()


def _errors(outputs: list[Tensor], references: list[Tensor], where: list[Tensor]) -> tuple[float, float]:
    """Return the largest and the mean error, relative to the reference's size, of the elements that `where` says."""
    largest = mean = 0.0
    for output, reference, compared in zip(outputs, references, where, strict=True):
        exact = reference[compared]
        if exact.numel() == 0:
            continue
        # Comparisons with NaN are false, and max(0.0, nan) is 0.0.
        error = (output[compared].to(exact.dtype) - exact).abs().nan_to_num(math.inf, math.inf)
        size = exact.abs().max().clamp_min(1e-30)
        largest = max(largest, (error.max() / size).item())
        mean = max(mean, (error.mean() / size).item())
    return largest, mean
