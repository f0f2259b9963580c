"""The rule by which fuzzed calls are judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Times the cases of every run.
LENGTHS = {"quick": 1, "long": 12}
EACH_LENGTH = pytest.mark.parametrize("length", ["quick", pytest.param("long", marks=pytest.mark.long)])


def explore(cases: Any, check: Callable[[Any], None], count: int, length: str) -> None:
    """Judge so many cases of a strategy, the same at every run."""

    def judged(case: Any) -> None:
        check(case)

    judged.__qualname__ = f"{check.__module__}.{check.__qualname__}"  # what the choice of cases is made from
    run = hypothesis.given(cases)(judged)
    hypothesis.settings(max_examples=count * LENGTHS[length])(run)()


@dataclass
class Results:
    """Output and gradients of a call by name; by `size`, what rounding alone may make of numbers that vanish.

    That is of the size that one rounding of every weight, and of what the softmax's derivative subtracts from each
    other, has in a gradient; `exponent` is the largest score, which exponentials multiply the rounding of. Of weights
    that are `faint`, rounding decides whether they are zero, and so what an infinity makes of them.
    """

    tensors: dict[str, Tensor]
    sizes: dict[str, float] = field(default_factory=dict)
    exponent: float = 0.0
    faint: bool = False


def judge(
    results: Callable[[int], tuple[Results, Results, Results]], dtype: torch.dtype, has_infinities: bool = False
) -> None:
    """Assert the rule for a call: at most twice the largest error of plain PyTorch, and 1.1 times its mean error.

    A few numbers may miss that by chance. So a call that misses it is looked at again with other numbers, and the
    errors of all of them count together; NaN and infinities are judged at once.

    Args:
        results: from a seed, what is to be judged, the same by plain PyTorch in the same dtypes, and by it in fp64.
        dtype: what is computed in.
        has_infinities: some inputs are infinite.
    """
    tallies: dict[str, _Tally] = {}
    for seed in range(9):
        found, own, exact = results(seed)
        assert found.tensors.keys() == own.tensors.keys() == exact.tensors.keys()
        for name, expected in exact.tensors.items():
            tally = tallies.setdefault(name, _Tally(dtype))
            ours, theirs = found.tensors[name], own.tensors[name]
            assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} for {tuple(theirs.shape)}"
            assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype} for {theirs.dtype}"
            judged = _judged(name, ours, theirs, expected, has_infinities and exact.faint)
            tally.add(judged, ours, theirs, expected, exact.sizes.get(name, 0.0), exact.exponent)
        complaints = [f"{name}: {text}" for name, one in tallies.items() if (text := one.complaint()) is not None]
        if not complaints:
            return
    raise AssertionError("; ".join(complaints))


def _largest(tensor: Tensor) -> float:
    finite = tensor[torch.isfinite(tensor)]
    return finite.abs().max().item() if finite.numel() else 0.0


class _Tally:
    """Errors of one tensor, relative to the largest number in it, over several draws."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.draws, self.count = dtype, 0, 0
        self.largest, self.mean, self.least = [0.0, 0.0], [0.0, 0.0], 0.0  # sums over draws, ours and plain PyTorch's

    def add(self, judged: Tensor, found: Tensor, own: Tensor, exact: Tensor, least: float, exponent: float) -> None:
        self.eps = max(torch.finfo(self.dtype).eps, torch.finfo(found.dtype).eps)
        self.draws += 1
        size = max(_largest(exact), least)
        if not judged.any() or not size:
            return
        self.count += int(judged.sum())
        # Scores are held in fp32 at least.
        self.least += max(least / size, 0.5) * (self.eps + 2 * min(self.eps, torch.finfo(torch.float32).eps) * exponent)
        for place, one in enumerate((found, own)):
            error = (one.double() - exact)[judged].abs() / size
            self.largest[place] += error.max().item()
            self.mean[place] += error.mean().item()

    def complaint(self) -> str | None:
        """What is wrong with the errors so far, else None."""
        pairs = self.largest, self.mean
        (ours, own), (our_mean, own_mean) = ([one / self.draws for one in pair] for pair in pairs)
        least = self.least / self.draws
        if self.eps < 1e-5:
            least = max(1e-5 if self.eps > 1e-10 else 1e-12, 2 * least)
        if ours > max(2 * own, 2 * least):
            return f"largest error {ours:.1e}, and plain PyTorch's {own:.1e}"
        # A mean of so few errors is itself uncertain.
        if self.eps > 1e-5 and our_mean > (1.1 + 2 / math.sqrt(max(1, self.count))) * max(own_mean, least / 2):
            return f"mean error {our_mean:.1e}, and plain PyTorch's {own_mean:.1e}"
        return None


def _judged(name: str, found: Tensor, own: Tensor, exact: Tensor, is_vague: bool) -> Tensor:
    """Return where numbers are to be compared; assert that NaN and infinities are where the original has them.

    Where only one of plain PyTorch's two results is NaN or infinite, rounding decides, and either will do. Where all
    that is not finite `is_vague`, only that numbers stay numbers is asserted.
    """
    finite = own.isfinite() & exact.isfinite()
    assert found[finite].isfinite().all(), (
        f"{name}: {int((~found[finite].isfinite()).sum())} of {found.numel()} are not finite where the original is"
    )
    if is_vague:
        return finite
    must_be_nan = own.isnan() & exact.isnan()
    hidden = must_be_nan & ~found.isnan()
    assert not hidden.any(), f"{name}: {int(hidden.sum())} of {int(must_be_nan.sum())} NaN are hidden"
    made = found.isnan() & ~own.isnan() & ~exact.isnan()
    assert not made.any(), f"{name}: {int(made.sum())} of {made.numel()} are NaN where the original has numbers"
    infinite = own.isinf() & (exact == own)
    assert (found == own)[infinite].all(), f"{name}: infinities of the original are others"
    return finite


class _Softmax(TorchFunctionMode):
    """Keeps what a softmax is given and gives."""

    calls: list[tuple[Tensor, Tensor]]

    def __enter__(self) -> _Softmax:
        self.calls = []
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = _attend if func is F.scaled_dot_product_attention else func
        out = func(*args, **(kwargs or {}))
        if func is Tensor.softmax:
            self.calls.append((args[0], out))
        return out


def _attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any) -> Tensor:
    """`scaled_dot_product_attention`, by a softmax that is seen."""
    scale = options.get("scale")
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ v


def differentiate(
    call: Callable[..., Tensor],
    leaves: dict[str, Tensor],
    wanted: Iterable[str],
    grad: Tensor | None,
    is_exact: bool = False,
    parameters: dict[str, Tensor] | None = None,
) -> Results:
    """Return output and gradients of a call that is given leaves by name; without `grad` the output alone.

    Args:
        is_exact: the sizes of rounding are wanted too.
        parameters: what gradients are wanted of beside the leaves.
    """
    leaves = {name: one.detach().clone() for name, one in leaves.items()}
    inputs = {name: leaves[name].requires_grad_(grad is not None) for name in wanted}
    inputs |= parameters or {}
    if is_exact:
        with _Softmax() as mode:
            out = call(**leaves)
    else:
        out = call(**leaves)
    weights = [one for _, one in mode.calls] if is_exact else []
    exponent = max((_largest(scores) for scores, _ in mode.calls), default=0.0) if is_exact else 0.0
    faint = any(bool((scores.isfinite() & (one < 1e-4)).any()) for scores, one in (mode.calls if is_exact else ()))
    if grad is None or not out.requires_grad:
        return Results({"out": out.detach()}, {}, exponent, faint)
    found = torch.autograd.grad(
        out, (*inputs.values(), *weights), grad.to(out.dtype), allow_unused=True, retain_graph=is_exact
    )
    sizes = _rounding(mode.calls, found[len(inputs) :], inputs) if is_exact else {}
    tensors = {"out": out.detach()}
    for (name, leaf), one in zip(inputs.items(), found[: len(inputs)], strict=True):
        tensors[name] = torch.zeros_like(leaf) if one is None else one
    return Results(tensors, sizes, exponent, faint)


def _rounding(calls: list[tuple[Tensor, Tensor]], grads: Any, leaves: dict[str, Tensor]) -> dict[str, float]:
    """Return the size that roundings of a softmax's derivative have in each gradient, in units of a rounding."""
    noise = []
    for (_, weights), grad in zip(calls, grads, strict=True):
        grad = torch.zeros_like(weights) if grad is None else grad.abs().nan_to_num(0, 0)
        weights = weights.detach().nan_to_num(0)
        terms = weights * (grad + (weights * grad).sum(-1, keepdim=True))
        noise.append(terms * torch.randn(terms.shape, generator=torch.Generator().manual_seed(0)).to(terms))
    starts = [scores for scores, _ in calls if scores.requires_grad]
    if not starts:
        return {}
    found = torch.autograd.grad(starts, tuple(leaves.values()), noise, allow_unused=True)
    return {name: _largest(one) for name, one in zip(leaves, found, strict=True) if one is not None}
