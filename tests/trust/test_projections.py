"""Layers that are no plain ones any more are called what they are."""

from __future__ import annotations

import helpers
import pytest
import torch
from torch import nn

import swinaccel
from swinaccel.trust import projections


class Own(nn.Module):
    def forward(self, x):
        return x


def block():
    return helpers.timm_block((8, 8), shift=2)


def foreign(package):
    """A class that claims to be of another package."""
    return type("Linear8", (nn.Linear,), {"__module__": f"{package}.layers"})


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("bitsandbytes.nn", "quantised by bitsandbytes"),
        ("peft.tuners.lora", "adapted by peft"),
        ("torchao", "quantised by torchao"),
        ("torch.ao.nn.qat", "prepared for quantisation by torch.ao"),
        ("torch.ao.nn.quantized", "quantised by torch.ao"),
        ("hqq.core", "quantised by hqq"),
    ],
)
@pytest.mark.parametrize("kind", ["layer", "weight"])
def test_packages_are_named(package, words, kind):
    attention = block().attn
    if kind == "layer":
        attention.proj = foreign(package)(16, 16)
        expected = f"its projection proj is {words} (a Linear8)"
    else:
        tensor = type("Int8", (torch.Tensor,), {"__module__": f"{package}.tensors"})
        attention.proj._parameters["weight"] = torch.zeros(16, 16).as_subclass(tensor)
        expected = f"its projection proj is {words} (its weight is a Int8)"
    assert projections.unusual_layer(attention) == expected


@pytest.mark.filterwarnings("ignore")  # torch.ao's time is running out
def test_a_quantised_model():
    quantised = torch.ao.quantization.quantize_dynamic(block(), {nn.Linear}, dtype=torch.qint8)
    reason = projections.name_layer(quantised.attn, "Linear.forward has to do with float16")
    assert reason.startswith(
        "its projection qkv is quantised by torch.ao (a Linear), and Linear.forward has to do with"
    )
    assert "its results are right" in reason
    assert "plain nn.Linear it is accelerated" in reason
    assert projections.name_layer(quantised.attn, None) is None


@pytest.mark.filterwarnings("ignore")
def test_the_report_names_what_was_quantised():
    model = torch.ao.quantization.quantize_dynamic(block(), {nn.Linear}, dtype=torch.qint8)
    (entry,) = swinaccel.plan(model)
    assert (entry.family, entry.status) == ("timm", "original")
    assert entry.reason.startswith("its projection qkv is quantised by torch.ao")


def test_unknown_layers_in_the_place_of_a_projection():
    attention = block().attn
    attention.qkv = Own()
    assert projections.unusual_layer(attention) == "its projection qkv is a Own, and no nn.Linear"


@pytest.mark.parametrize("change", ["none", "lazy", "subclass", "container", "elsewhere"])
def test_plain_layers_are_no_matter(change):
    module = block()
    if change == "lazy":
        module.attn.qkv = nn.LazyLinear(48)
    elif change == "subclass":
        module.attn.qkv = type("Mine", (nn.Linear,), {})(16, 48)
    elif change == "container":
        module.attn.qkv = nn.Sequential(nn.Linear(16, 48))
    elif change == "elsewhere":
        module.mlp.fc1 = foreign("bitsandbytes")(16, 64)
    assert projections.unusual_layer(module.attn) is None
    assert projections.name_layer(module.attn, "its forward is another") == "its forward is another"
