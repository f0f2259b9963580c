"""Weather models: no bias and LoRA by step (Aurora), and a bias for every row of windows (Pangu)."""

from __future__ import annotations

import copy
import math

import helpers
import pytest
import torch
import weather_models as models
from helpers import DEVICES, both_backends, check, check_fallback, randomize
from torch import nn

import swinaccel

KEEPS_VERDICTS = True

SIZE, WINDOW = (3, 7, 9), (2, 3, 4)


# Aurora.


def aurora(steps=2, **options):
    model = randomize(models.AuroraLayer(16, 2, WINDOW, lora_steps=steps, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:  # scaled up inside: logits stay small, since what is off by large ones is chance
                parameter.mul_(0.25)
    return model


def tokens(size=SIZE, batch=2):
    return torch.randn(batch, size[0] * size[1] * size[2], 16), torch.randn(batch, 6), size


@both_backends
@pytest.mark.parametrize("steps", [0, 2])
def test_aurora_at_every_step(steps, backend):
    """Padded on both sides, and with a depth that one window covers; at steps of one LoRA, another, and none."""
    model = aurora(steps)
    outputs = [check(model, *tokens((2, 7, 9)), step, backend=backend, count=2) for step in range(3)]
    assert len(outputs) == 3
    check(model, *tokens(), backend=backend, count=2)


def test_aurora_steps_do_not_share_a_plan():
    """One module, called at one step after the other."""
    model = aurora()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    given = tokens()
    with torch.no_grad():
        outputs = [model(*given, step) for step in range(3)]
        for step in (0, 1, 2, 1, 0):
            helpers.assert_close(twin(*given, step), outputs[step])
    helpers.assert_accelerated(twin, 2)
    assert min(helpers.difference(outputs[step], outputs[step - 1]) for step in range(3)) > 0.01


@both_backends
@pytest.mark.parametrize("steps", [0, 2])
def test_aurora_gradients(steps, backend):
    helpers.check_gradients(aurora(steps), *tokens(), 1, backend=backend)


@pytest.mark.parametrize("tokens", [72, 144])
def test_aurora_windows_of_many_tokens(tokens):
    """Aurora's own have 144, which other kernels run; the bias's form is none."""
    attn = randomize(models.AuroraAttention(16, (1, 1, tokens), 2))
    mask = torch.where(torch.rand(2, tokens, tokens) < 0.3, -100.0, 0.0)
    for given in (mask, None):
        helpers.check_gradients(attn, torch.randn(4, tokens, 16), given, backend="triton")
    twin, _, _ = helpers.both(attn, torch.randn(4, tokens, 16), mask, backend="triton", bias="factors")
    helpers.assert_accelerated(twin)
    assert [entry.bias for entry in swinaccel.report(twin)] == ["none"]


@both_backends
def test_aurora_dropout_is_left_to_its_own_code(backend):
    model = randomize(models.AuroraAttention(16, WINDOW, 2, attn_drop=0.1))
    check_fallback(
        model, torch.randn(4, 24, 16), reason="attn_drop of its AuroraAttention is not zero", backend=backend
    )


def test_aurora_lora_dropout_draws_as_the_original():
    """The LoRA is called as the module that it is."""
    model = aurora(2, dropout=0.5).train()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    found = []
    with torch.no_grad():
        for one in (model, twin):
            torch.manual_seed(1)
            found.append(one(*(torch.ones(1, 189, 16), torch.ones(1, 6), SIZE), 1))
    helpers.assert_accelerated(twin, 2)
    helpers.assert_close(found[1], found[0])


def test_aurora_attention_that_is_safe_in_fp16_is_left_alone():
    model = aurora()
    for block in model.blocks:
        block.attn.use_fp16_safe_attention = True
    check_fallback(model, *tokens(), reason="safe in fp16")


@both_backends
def test_aurora_query_without_keys_is_left_to_the_original(backend):
    """It gets zeros there; a mask is looked at again when it was written to."""
    model = randomize(models.AuroraAttention(16, WINDOW, 2)).to(DEVICES[backend])
    x, mask = (one.to(DEVICES[backend]) for one in (torch.randn(2, 24, 16), torch.zeros(1, 24, 24)))
    mask[0, 2, 1:] = float("-inf")
    check(model, x, mask, backend=backend)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend=backend)
    with torch.no_grad():
        twin(x, mask)
        mask[0, 2, 0] = float("-inf")
        assert torch.equal(twin(x, mask), model(x, mask))
    assert [entry.fallbacks for entry in swinaccel.report(twin)] == [1]


class Mixing(nn.Module):
    """A LoRA over the windows of an image, and no token by itself."""

    def forward(self, x, step):
        return x.repeat(1, 1, 3) - x.repeat(1, 1, 3).mean(0, keepdim=True)


def test_aurora_lora_that_mixes_tokens_is_refused():
    model = aurora(0)
    model.blocks[0].attn.lora_qkv = Mixing()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    assert [entry.status for entry in swinaccel.report(twin)] == ["original", "accelerated"]


def check_errors(model, calls):
    """Check that calls raise what they raise of the original."""
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    for given in calls:
        messages = []
        for one in (model, twin):
            with pytest.raises((RuntimeError, ValueError)) as caught, torch.no_grad():
                one(*given)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_aurora_wrong_calls_raise_as_before():
    wrong = (torch.randn(16),), (torch.randn(4, 24, 16), torch.zeros(3, 24, 24))
    check_errors(randomize(models.AuroraAttention(16, WINDOW, 2)), wrong)


# Pangu's attention.


def earth(window=WINDOW, rows=3, **options):
    model = randomize(models.EarthAttention(16, window, 2, rows, **options))
    nn.init.normal_(model.earth_position_bias_table)
    return model


def earth_windows(window=WINDOW, rows=3, columns=2, batch=2):
    """Windows, and a mask that differs by column and row."""
    count = math.prod(window)
    mask = torch.where(torch.rand(columns, rows, count, count) < 0.3, -100.0, 0.0)
    return torch.randn(batch * columns, rows, count, 16), mask


@both_backends
@pytest.mark.parametrize("window", [WINDOW, (3, 4), (2, 5, 7)], ids=str)
def test_earth_with_gradients(window, backend):
    """Of two and three axes, small and large."""
    x, mask = earth_windows(window, rows=2, batch=1)
    for given in (mask, None):
        helpers.check_gradients(earth(window, rows=2), x, given, backend=backend)


@both_backends
@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 1, 2)], ids=str)
def test_earth_in_its_block(shift, backend):
    model = randomize(models.EarthBlock(16, SIZE, 2, WINDOW, shift))
    nn.init.normal_(model.attn.earth_position_bias_table)
    check(model, torch.randn(2, math.prod(SIZE), 16), backend=backend, count=1)


@both_backends
def test_earth_follows_its_live_table(backend):
    """Call after call by one plan, whatever form of the bias was asked for."""
    device = DEVICES[backend]
    model, (x, _) = earth((2, 5, 7)).to(device), earth_windows((2, 5, 7))
    twin, x = swinaccel.accelerate(copy.deepcopy(model), backend=backend, bias="factors"), x.to(device)
    with torch.no_grad():
        for number in range(4):
            if number > 1:
                for one in (model, twin):
                    one.earth_position_bias_table.data[:, number % 3] += 1.0
            helpers.assert_close(twin(x), model(x))
    helpers.assert_accelerated(twin, 1)
    assert [entry.bias for entry in swinaccel.report(twin)] == ["table"]


def test_earth_with_rows_that_its_bias_has_not_runs_the_original():
    """One bias is spread over all rows, which the original does by broadcasting."""
    model = earth(rows=1)
    check_fallback(model, earth_windows(rows=3)[0], reason="has not 1 windows along its second axis")
    check(model, earth_windows(rows=1)[0])


def test_earth_wrong_calls_raise_as_before():
    x, mask = earth_windows()
    check_errors(earth(), ((x[0],), (x[:3], mask), (x[:, :2],), (x, mask[:, :2])))


@pytest.mark.parametrize("kind", ["aurora", "earth"])
def test_weather_compiles_into_one_graph(kind):
    if kind == "aurora":
        model, given = randomize(models.AuroraAttention(16, WINDOW, 2, 2)), (torch.randn(4, 24, 16), None, 1)
    else:
        model, given = earth(), earth_windows()
    device, seen = DEVICES["triton"], []
    model, given = model.to(device), [one.to(device) if isinstance(one, torch.Tensor) else one for one in given]

    def look(graph, inputs):
        seen.extend(node for node in graph.graph.nodes if "swinaccel" in str(node.target))
        return graph

    torch._dynamo.reset()
    twin = torch.compile(swinaccel.accelerate(copy.deepcopy(model), backend="triton"), backend=look, fullgraph=True)
    with torch.no_grad():
        helpers.assert_close(twin(*given), model(*given))
    assert len(seen) == 1
