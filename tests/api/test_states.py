"""Any sequence of what users do to a model: accelerated, it does at each step what an untouched twin does.

Output and gradients, the generator's state, the type of an exception and all attributes are alike; after `restore`
nothing tells them apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import helpers
import hypothesis
import pytest
import torch
import video_models
import zoo
from edits import EDITS, SCOPES, WAYS
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor, nn

import swinaccel
from swinaccel import patching

_TIMM = {"img_size": 32, "window": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
_HF = {"depths": [2], "num_heads": [2], "image_size": 32}


def _blocks(v2: bool) -> nn.Module:
    return zoo.Blocks(*(helpers.microsoft_block((8, 8), 4, shift, v2=v2) for shift in (0, 2)))


def _torchvision_3d() -> nn.Module:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    return SwinTransformer3d([2, 4, 4], 16, [2], [2], [2, 4, 4], num_classes=5)


def _timm_cr() -> nn.Module:
    import timm

    options = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,), "num_classes": 5}
    return timm.create_model("swinv2_cr_tiny_ns_224", **options)


# A model, and the shape of its input.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "timm": (lambda: helpers.timm_v1(**_TIMM), (1, 3, 32, 32)),
    "timm V2": (lambda: helpers.timm_v2(**_TIMM), (1, 3, 32, 32)),
    "timm CR": (_timm_cr, (1, 3, 32, 32)),
    "torchvision": (lambda: helpers.torchvision_model(depths=[2], num_heads=[2]), (1, 3, 28, 32)),
    "torchvision V2": (lambda: helpers.torchvision_model(True, depths=[2], num_heads=[2]), (1, 3, 32, 32)),
    "torchvision 3D": (_torchvision_3d, (1, 3, 2, 24, 32)),
    "Hugging Face": (lambda: helpers.huggingface("Swin", **_HF), (1, 3, 32, 32)),
    "Hugging Face V2": (lambda: helpers.huggingface("Swinv2", **_HF), (1, 3, 32, 32)),
    "Microsoft": (lambda: _blocks(False), (1, 64, 16)),
    "Microsoft V2": (lambda: _blocks(True), (1, 64, 16)),
    "video": (lambda: video_models.BasicLayer(16, 2, (2, 4, 4)), (1, 16, 2, 6, 8)),
}

OPTIONS = [{}, {"fuse": "attention"}, {"bias": "table"}, {"bias": "factors", "bias_energy": 0.9}]


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or the exception that it raises."""
    torch.manual_seed(1)
    try:
        return call()
    except Exception as error:
        return error


def flat(result: Any) -> dict[str, Any]:
    """All tensors of a result, and what is none, by where they are."""
    if isinstance(result, Tensor) or result is None:
        return {"": result}
    if isinstance(result, dict):
        parts = result.items()
    elif isinstance(result, (tuple, list)):
        parts = enumerate(result)
    else:
        return {}
    return {f"{key}.{rest}": one for key, part in parts for rest, one in flat(part).items()}


TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.3}


def assert_alike(found: Any, expected: Any, least: float = 0.0) -> None:
    """Two outcomes: alike in type, structure and numbers, whose rounding grows from step to step."""
    if isinstance(expected, RuntimeError) and ("dtype" in str(expected) or "scalar type" in str(expected)):
        return  # a mask that keeps its dtype breaks an original in half precision; kernels may take it
    if isinstance(found, Exception) or isinstance(expected, Exception):
        if type(found) is not type(expected):
            raise AssertionError(f"{found!r} for {expected!r}") from (
                found if isinstance(found, Exception) else expected
            )
        return
    left, right = flat(found), flat(expected)
    assert left.keys() == right.keys()
    largest = max((_size(one) for one in right.values()), default=0.0)
    for name, one in right.items():
        other = left[name]
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            assert one is other, f"{name}: {other} for {one}"
            continue
        assert (one.shape, one.dtype) == (other.shape, other.dtype), name
        odd = ~one.isfinite()
        if one.dtype in (torch.float16, torch.bfloat16):  # kernels keep to fp32 where originals overflow
            assert other[~odd].isfinite().all(), f"{name}: not finite where the original is"
        else:
            assert torch.equal(one.isnan(), other.isnan()), f"{name}: NaN elsewhere"
            assert torch.equal(odd, ~other.isfinite()), f"{name}: infinities elsewhere"
        if not odd.all():
            size = max(_size(one), 1e-2 * largest, 1e-6)
            error = (one.detach().double() - other.detach().double())[~odd].abs().max().item() / size
            assert error <= max(least, TOLERANCE.get(one.dtype, 0.0)), f"{name}: off by {error:.1e} of its size"


def _size(one: Any) -> float:
    if not isinstance(one, Tensor) or not one.numel():
        return 0.0
    return one.detach().double().nan_to_num(0, 0, 0).abs().max().item()


def attributes(model: nn.Module) -> dict[str, Any]:
    """What all modules of a model are made of, but for swinaccel's marker, and what the values look like."""
    return {
        f"{path}.{name}": _described(value)
        for path, module in model.named_modules(remove_duplicate=False)
        for name, value in module.__dict__.items()
        if name != patching.MARKER
    }


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.requires_grad, type(value)
    if isinstance(value, dict):
        return [(key, _described(one)) for key, one in value.items() if not isinstance(key, int)]
    if isinstance(value, (list, tuple)):
        return [_described(one) for one in value]
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    return type(value)


class States(RuleBasedStateMachine):
    """A model and its accelerated twin."""

    backend, device = "torch", "cpu"
    common: ClassVar[dict[str, Any]] = {}  # options of all
    calls = 1  # of each way
    is_random = False  # dropout is active, of which the README says that it draws otherwise

    @initialize(name=st.sampled_from(sorted(MODELS)), options=st.sampled_from(OPTIONS))
    def begin(self, name: str, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        make, self.shape = MODELS[name]
        self.twin = helpers.randomize(make()).to(self.device)
        self.model = copy.deepcopy(self.twin)
        self.accelerate(options)

    def accelerate(self, options: dict[str, Any]) -> None:
        swinaccel.accelerate(self.model, backend=self.backend, **self.common, **options)

    @rule(name=st.sampled_from(sorted(EDITS)), number=st.integers(0, 255))
    def edit(self, name: str, number: int) -> None:
        results = []
        for one in (self.twin, self.model):
            result = outcome(lambda one=one: EDITS[name](one, number))
            results.append(result)
        self.twin, self.model = (
            new if isinstance(new, nn.Module) else old
            for new, old in zip(results, (self.twin, self.model), strict=True)
        )
        errors = [type(one) if isinstance(one, Exception) else None for one in results]
        assert errors[0] == errors[1], errors
        if name == "dropouts":
            self.is_random = any(type(one) is nn.Dropout and one.p for one in self.twin.modules())
        self.compare("without_gradients")

    @rule(name=st.sampled_from(sorted(WAYS)))
    def call(self, name: str) -> None:
        if name != "in_threads_at_once" or self.backend == "torch":  # Triton's interpreter serves one thread
            self.compare(name)

    @rule(options=st.sampled_from(OPTIONS))
    def accelerate_again(self, options: dict[str, Any]) -> None:
        self.accelerate(options)
        self.compare("without_gradients")

    @rule(options=st.sampled_from(OPTIONS))
    def restore_and_accelerate(self, options: dict[str, Any]) -> None:
        swinaccel.restore(self.model)
        self.assert_restored()
        self.accelerate(options)
        self.compare("without_gradients")

    @rule(height=st.sampled_from([0, 4, 8]), width=st.sampled_from([0, 4, 8]), batch=st.integers(1, 2))
    def other_input(self, height: int, width: int, batch: int) -> None:
        if len(self.shape) > 3:
            start = next(shape for make, shape in MODELS.values() if len(shape) == len(self.shape))
            self.shape = (batch, *start[1:-2], start[-2] + height, start[-1] + width)
        else:
            self.shape = (batch, *self.shape[1:])
        self.compare("without_gradients")

    def compare(self, way: str) -> None:
        dtype = next((one.dtype for one in self.twin.parameters()), torch.float32)
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(3)).to(self.device, dtype)
        for _ in range(self.calls):
            expected = outcome(lambda: WAYS["without_gradients" if way in SCOPES else way](self.twin, (x,)))
            state = torch.get_rng_state()
            found = outcome(lambda: WAYS[way](self.model, (x,)))
            if self.is_random and self.twin.training:
                return
            assert_alike(found, expected, TOLERANCE[torch.bfloat16] if way == "under_autocast" else 0.0)
            assert torch.equal(torch.get_rng_state(), state), "the generator is elsewhere"
        assert attributes(self.model) == attributes(self.twin)
        if way.startswith("after_a_step"):  # Adam makes a whole step of a gradient that vanishes but for rounding
            for one, other in zip(self.model.parameters(), self.twin.parameters(), strict=True):
                one.data.copy_(other.data)

    def assert_restored(self) -> None:
        assert attributes(self.model) == attributes(self.twin)
        for module in self.model.modules():
            assert patching.MARKER not in module.__dict__

    def teardown(self) -> None:
        if hasattr(self, "model"):
            swinaccel.restore(self.model)
            self.assert_restored()
            self.compare("without_gradients")


# How many sequences, and how long they are.
QUICK = {"torch": (12, 10), "triton": (7, 8)}
LONG = {"torch": (400, 20), "triton": (100, 12)}


@pytest.mark.parametrize("counts", [QUICK, pytest.param(LONG, marks=pytest.mark.long)], ids=["quick", "long"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_states(backend, counts, monkeypatch):
    monkeypatch.setattr(States, "backend", backend)
    examples, steps = counts[backend]
    settings = hypothesis.settings(max_examples=examples, stateful_step_count=steps)
    run_state_machine_as_test(States, settings=settings)
