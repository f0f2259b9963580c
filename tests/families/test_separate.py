"""Hugging Face's q, k and v as one product over weights that are put together at each call, and where they are not."""

from __future__ import annotations

import copy
import types

import helpers
import pytest
import torch
from helpers import BACKENDS, check
from torch import nn

import swinaccel
from swinaccel.families.shared import separate

KINDS = ("Swin", "Swinv2", "DonutSwin")
NAMES = {"Swin": ("q_proj", "k_proj", "v_proj")}


@pytest.fixture
def packed(monkeypatch):
    """Every x is worth it; gives how many projections ran as one."""
    calls = []
    decide = separate._is_packed

    def counted(x, projections):
        calls.append(decide(x, projections))
        return calls[-1]

    monkeypatch.setattr(separate, "is_worth", lambda x, channels: True)
    monkeypatch.setattr(separate, "_is_packed", counted)
    return calls


def attention(model):
    inner = model.attention
    return getattr(inner, "self", inner)


def projections(model):
    attn = attention(model)
    names = ("q_proj", "k_proj", "v_proj") if hasattr(attn, "q_proj") else ("query", "key", "value")
    return [getattr(attn, name) for name in names]


def layer(kind, **options):
    return helpers.huggingface_layer(kind, shift=2, **options)


def tokens(size=(9, 10), batch=2):
    return torch.randn(batch, size[0] * size[1], 16), size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(8, 8), (9, 10)], ids=["whole", "padded"])
@pytest.mark.parametrize("biases", ["as they are", "none", "of k alone", "all but k's"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_product_is_the_three(kind, biases, size, backend, packed):
    model = layer(kind)
    for number, projection in enumerate(projections(model)):
        if biases != "as they are":
            keep = {"none": False, "of k alone": number == 1, "all but k's": number != 1}[biases]
            projection.bias = nn.Parameter(2 * torch.randn(16)) if keep else None
    x, _ = tokens(size)
    twin, found, expected = helpers.both(model, x, size, backend=backend)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double(), size)[0]
    helpers.assert_accelerated(twin, 1)
    assert packed
    assert all(packed)
    helpers.assert_close(found, expected)
    helpers.assert_close(found[0].cpu().double(), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_read_at_each_call(kind, packed):
    """Written to in ways that no version counter sees, and replaced."""
    model = layer(kind)
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="torch")
    x, size = tokens()
    with torch.no_grad():
        for change in ("data", "replaced"):
            before = twin(x, size)
            for one, other in zip(projections(model), projections(twin), strict=True):
                fresh = torch.randn(16, 16)
                for projection in (one, other):
                    if change == "data":
                        projection.weight.data.copy_(fresh)
                    else:
                        projection.weight = nn.Parameter(fresh.clone())
            assert helpers.difference(twin(x, size), before) > 1e-2
            helpers.assert_close(twin(x, size), model(x, size))
    assert all(packed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, backend, packed):
    """Input and every parameter, a padded image, against fp64."""
    model, (x, size) = layer(kind), tokens()
    model.train()
    twin = swinaccel.accelerate(copy.deepcopy(model).to(helpers.DEVICES[backend]), backend=backend)
    gradients = []
    for one in (twin, copy.deepcopy(model).double()):
        parameter = next(one.parameters())
        leaf = x.detach().clone().to(parameter.device, parameter.dtype).requires_grad_()
        one(leaf, size)[0].square().sum().backward()
        named = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        gradients.append({"x": leaf.grad, **named})
    helpers.assert_accelerated(twin, 1)
    assert packed
    assert all(packed)
    found, expected = gradients
    assert set(found) >= {name for name, grad in expected.items() if grad.abs().max() > 1e-9}
    scale = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        error = (found[name].cpu().double() - grad).abs().max().item() if name in found else 0.0
        assert error <= 1e-5 * max(grad.abs().max().item(), 1e-2 * scale), name


@pytest.mark.parametrize("mode", ["half", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision(kind, mode, packed):
    """The rounding is that of three products; autocast casts what was put together."""
    model, (x, size) = layer(kind), tokens((8, 8))
    exact = copy.deepcopy(model).double()(x.double(), size)[0]
    if mode == "half":
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        twin, found, expected = helpers.both(model, x, size)
    helpers.assert_accelerated(twin, 1)
    assert packed
    assert all(packed)
    helpers.assert_no_worse(found[0], expected[0], exact, torch.bfloat16)


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x


class Marked(torch.Tensor):
    pass


def adapt(linear):
    adapted = Adapted(16, 16, linear.bias is not None)
    adapted.load_state_dict(linear.state_dict())
    return adapted


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_plain_is_called(kind, which, packed):
    """As with LoRA and quantised layers, which do something else than their weight says."""
    model = layer(kind)
    attn, (x, size) = attention(model), tokens((8, 8))
    name = next(name for name, child in attn.named_children() if child is projections(model)[which])
    setattr(attn, name, adapt(getattr(attn, name)))
    check(model, x, size, count=1)
    assert packed
    assert not any(packed)


def plain(*shapes, bias=True, dtype=torch.float32):
    return tuple(nn.Linear(*shape, bias=bias, dtype=dtype) for shape in shapes)


def test_what_is_put_together_is_of_one_kind(packed):
    x, same = torch.randn(4, 16), ((16, 16),) * 3
    usual = plain(*same)
    with torch.no_grad():
        assert separate._is_packed(x, usual)
        assert not separate._is_packed(x, (*usual[:2], *plain((16, 8))))
        assert not separate._is_packed(x, (*usual[:2], *plain((16, 16), dtype=torch.bfloat16)))
        mixed = plain(*same)
        mixed[1].bias = nn.Parameter(mixed[1].bias.double())
        assert not separate._is_packed(x, mixed)
        special = plain(*same)
        special[2].weight = nn.Parameter(special[2].weight.detach().as_subclass(Marked))
        assert not separate._is_packed(x, special)
        parametrized = plain(*same)
        nn.utils.parametrizations.weight_norm(parametrized[0])
        assert not separate._is_packed(x, parametrized)


def test_training(packed):
    x, linears = torch.randn(4, 16), plain(*((16, 16),) * 3)
    assert separate._is_packed(x, linears)
    linears[1].requires_grad_(False)  # its gradient would be worked out for nothing
    assert not separate._is_packed(x, linears)
    for linear in linears:
        linear.requires_grad_(False)
    assert separate._is_packed(x.requires_grad_(), linears)


def test_where_it_is_worth_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def image(rows, channels, is_cuda=True):
        return types.SimpleNamespace(is_cuda=is_cuda, numel=lambda: rows * channels)

    for rows, channels in ((200704, 128), (50176, 256), (12544, 512)):  # measured to win
        assert separate.is_worth(image(rows, channels), channels)
        assert not separate.is_worth(image(rows, channels, is_cuda=False), channels)
    assert not separate.is_worth(image(3136, 1024), 1024)  # measured to lose
    assert not separate.is_worth(image(3136, 128), 128)  # waits for the host
    assert not separate.is_worth(image(2048, 512), 512)  # the weights are much of what is moved
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert separate.is_worth(image(3136, 128), 128)


@pytest.mark.parametrize("records", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind, records, monkeypatch):
    """One graph, with one product in the place of three."""
    monkeypatch.setattr(separate, "is_worth", lambda x, channels: True)
    device = helpers.TRITON_DEVICE
    model = swinaccel.accelerate(layer(kind).to(device), backend="triton").requires_grad_(records)
    x, size = tokens()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(records):
        found = torch.compile(model, backend=keep, fullgraph=True)(x.to(device), size)[0]
    with swinaccel.disabled(), torch.no_grad():
        helpers.assert_close(found.detach(), model(x.to(device), size)[0], 1e-4)
    assert len(graphs) == 1
    products = [
        node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
        for node in graphs[0].graph.nodes
        if node.op == "call_function" and node.target is nn.functional.linear
    ]
    together = [weight for weight in products if getattr(weight, "target", None) is torch.cat]
    assert len(together) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_it_happens_by_itself(kind, monkeypatch):
    model = helpers.huggingface_layer(kind, (64, 64), shift=2).cuda()
    seen = []
    decide = separate._is_packed
    monkeypatch.setattr(separate, "_is_packed", lambda *arguments: seen.append(decide(*arguments)) or seen[-1])
    x = torch.randn(16, 64 * 64, 16, device="cuda")
    check(model, x, (64, 64), backend="triton")
    assert seen[-1]
    assert not any(seen[:-1])  # the probe's calls are small, and on the CPU
