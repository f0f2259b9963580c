"""The benchmark: its rows, on tiny models."""

from __future__ import annotations

import json

import helpers
import pytest
import torch
from torch import nn

import swinaccel
from swinaccel.cli import bench, timing
from swinaccel.runtime import precision

IMAGES = (torch.randn(2, 3, 56, 56),)


def test_rows_of_a_timm_model():
    model = helpers.timm_v1()
    steps: list[tuple[str, int, int]] = []
    result = bench.run(model, IMAGES, rounds=3, backend="torch", progress=lambda *step: steps.append(step))
    assert [row.name for row in result.variants] == ["original", "SDPA", "accelerated"]
    for row in result.variants:
        assert row.error is None
        assert row.p10_ms <= row.latency_ms <= row.p90_ms
        assert row.images_per_s == pytest.approx(2e3 / row.latency_ms)
        assert row.speedup == pytest.approx(result["original"].latency_ms / row.latency_ms)
        assert row.difference < 1e-4
        assert row.peak_memory_mib is None
    assert (result.batch, result.dtype, result.rounds) == (2, "float32", 3)
    assert [entry.fallbacks for entry in result.report] == [0] * 3
    assert steps[0] == ("warming up: original", 0, 6)
    assert steps[-1] == ("measuring", 5, 6)


def test_the_model_is_left_as_it_was():
    model = swinaccel.accelerate(helpers.timm_v1(), backend="torch").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bench.run(model, IMAGES, rounds=1, backend="torch")
    assert model.training
    assert len(swinaccel.report(model).accelerated) == 3
    assert not any(getattr(module, "fused_attn", False) for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_huggingface_is_measured_with_its_other_attention():
    model = helpers.huggingface("Swin")
    result = bench.run(model, (torch.randn(1, 3, 32, 32),), rounds=1, backend="torch")
    names = [row.name for row in result.variants]
    assert names[0] == "original"
    assert names[-1] == "accelerated"
    if "eager attention" in names:  # transformers 5
        assert result["eager attention"].difference < 1e-4
        assert model.config._attn_implementation == "sdpa"


def test_the_other_attention_is_another():
    name, switch = bench._other_attention(helpers.timm_v1())
    model = switch(helpers.timm_v1())
    assert name == "SDPA"
    assert [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")] == [True] * 3
    assert bench._other_attention(model) is None
    assert bench._other_attention(nn.Linear(2, 2)) is None
    found = bench._other_attention(model := helpers.huggingface("Swin"))
    if found is not None:  # transformers 5
        before = model.config._attn_implementation
        assert {before, found[1](model).config._attn_implementation} == {"eager", "sdpa"}


def test_variants_take_turns():
    calls: list[str] = []

    def start(name):
        return timing.Runner(lambda: calls.append(name) or torch.ones(1), (), torch.device("cpu"), graph=True)

    rows, rounds = timing.measure({name: lambda name=name: start(name) for name in "abc"}, 3)
    assert "".join(calls[-9:]) == "abcbcacab"
    assert (rounds, [row.timed for row in rows]) == (3, ["calls"] * 3)


def test_what_fails_is_a_row_with_its_reason(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler here\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    result = bench.run(helpers.timm_v1(), IMAGES, rounds=1, compile=True, backend="torch")
    assert result["torch.compile"].error == "RuntimeError: no compiler here"
    assert result["accelerated + torch.compile"].latency_ms is None
    assert result["accelerated"].latency_ms > 0
    assert "torch.compile failed: RuntimeError: no compiler here" in str(result)


def test_compiled_rows(monkeypatch):
    def compile(model, mode):
        assert mode == "reduce-overhead"
        return lambda *inputs: model(*inputs)

    monkeypatch.setattr(torch, "compile", compile)
    result = bench.run(
        helpers.timm_v1(), IMAGES, rounds=1, compile=True, compile_mode="reduce-overhead", backend="torch"
    )
    assert result["torch.compile reduce-overhead"].difference == 0
    assert 0 < result["accelerated + torch.compile reduce-overhead"].difference < 1e-4


def test_forms(tmp_path):
    result = bench.run(helpers.timm_v1(), IMAGES, rounds=1, backend="torch")
    found = json.loads(json.dumps(result.to_dict()))
    assert found["variants"][0]["name"] == "original"
    assert found["report"]["accelerated"] == 3
    assert "speed-up" in str(result)
    assert "Medians of 1 interleaved rounds" in str(result)
    result.plot(tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000
    with pytest.raises(KeyError, match="was not measured; there are original, SDPA, accelerated"):
        result["other"]


@pytest.mark.parametrize(
    ("inputs", "options", "error", "words"),
    [
        ((), {}, ValueError, "inputs must hold a tensor"),
        (IMAGES, {"rounds": 0}, ValueError, "rounds must be at least 1; got 0"),
        (IMAGES, {"autocast": torch.bfloat16}, ValueError, "autocast is for train=True"),
        (IMAGES, {"backend": "cuda"}, ValueError, "backend must be one of"),
        ((torch.randn(2, 5),), {}, RuntimeError, "the model does not run"),
    ],
)
def test_mistakes(inputs, options, error, words):
    with pytest.raises(error, match=words):
        bench.run(nn.Conv2d(3, 4, 1), inputs, **options)


@pytest.mark.gpu
def test_memory_and_compile_on_a_gpu():
    model = helpers.timm_v1().to("cuda", torch.float16)
    result = bench.run(model, (IMAGES[0].to("cuda", torch.float16),), rounds=3)
    for row in result.variants:
        assert row.error is None
        assert row.peak_memory_mib > 0
        assert row.difference < 2e-2
        assert row.timed == ("CUDA graph" if "graph" in row.name else "calls")
    names = [row.name for row in result.variants]
    has_eighth = precision.device_reason(torch.device("cuda")) is None
    assert names == [
        "original", "original, CUDA graph", "SDPA", "torch.compile", "accelerated", "accelerated, CUDA graph",
        *(["accelerated, fp8", "accelerated, fp8, CUDA graph"] if has_eighth else []),
        "accelerated + torch.compile",
    ]  # fmt: skip


def test_training_steps():
    model = helpers.timm_v1()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = bench.run(model, IMAGES, rounds=2, train=True, autocast=torch.bfloat16, backend="torch")
    assert [row.name for row in result.variants] == ["original", "SDPA", "accelerated"]
    assert all(row.error is None for row in result.variants)
    assert result["accelerated"].difference < 0.1
    assert (result.mode, result.dtype) == ("training", "float32, autocast to bfloat16")
    assert [entry.fallbacks for entry in result.report] == [0] * 3
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_is_called_accelerated_where_every_call_ran_the_original(monkeypatch):
    """Of training on a CPU, and of models without window attention."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for model, words in (
        (helpers.timm_v1(), "every call of 3 window attentions ran the original"),
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(4)), "no window attention found"),
    ):
        result = bench.run(model, [image.cpu() for image in IMAGES], rounds=2, train=True)
        assert not any(line.strip().startswith("accelerated") for line in str(result).splitlines())
        assert "swinaccel, originals" in str(result)
        assert "Nothing ran accelerated" in str(result)
        assert words in result.report.summary()
        assert result.to_dict()["effective"] is False
