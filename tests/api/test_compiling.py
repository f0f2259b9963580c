"""Dispatchers and markers under torch.compile, export, tracing and scripting."""

from __future__ import annotations

import helpers
import pytest
import torch
from helpers import randomize
from patched import MODELS, X, accelerate, every_model, is_accelerated, output

import swinaccel


class Graphs:
    """A dynamo backend that keeps the graphs and runs them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward

    def count(self, text):
        return sum(text in str(node.target) for graph in self.graphs for node in graph.graph.nodes)


@every_model
def test_compile_is_one_graph(name):
    model = accelerate(MODELS[name]())
    expected = output(model)
    graphs = Graphs()
    helpers.assert_close(output(torch.compile(model, backend=graphs, fullgraph=True)), expected)
    assert len(graphs.graphs) == 1


@pytest.mark.parametrize("name", MODELS)
def test_compile_contains_the_operator_of_the_kernels(name):
    """Under fullgraph each section is one opaque operator: a silent return to the original would show here."""
    model = swinaccel.accelerate(MODELS[name]().to(helpers.TRITON_DEVICE), backend="triton").requires_grad_(False)
    x = X.to(helpers.TRITON_DEVICE)[:1]
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    found = output(compiled, x)
    with swinaccel.disabled():
        helpers.assert_close(found, output(model, x), 1e-4)
    assert len(graphs.graphs) == 1
    assert graphs.count(OPERATOR) == len(swinaccel.report(model))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["timm", "torchvision", "microsoft"])
def test_compile_with_gradients(name, backend):
    model = accelerate(MODELS[name]()).double()
    x = X.double()
    gradients = []
    for one in (model, torch.compile(model, backend=backend, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        helpers.tensors(one(leaf))[0].square().sum().backward()
        gradients.append(leaf.grad)
    helpers.assert_close(gradients[1], gradients[0], 1e-9)


OPERATOR = "swinaccel.shifted_window_attention"


def on_triton(model):
    return swinaccel.accelerate(model, backend="triton")


def test_compiled_models_follow_accelerate_and_restore():
    """Where the class had its dispatcher when it was compiled, markers are guarded and code is never stale."""
    keeper, model = on_triton(tiny()), tiny()
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs)
    found = []
    for change in (lambda model: model, on_triton, swinaccel.restore):
        change(model)
        before = len(graphs.graphs), graphs.count(OPERATOR)
        output(compiled, IMAGE)
        found.append((len(graphs.graphs) - before[0], graphs.count(OPERATOR) - before[1]))
    assert found == [(1, 0), (1, 1), (1, 0)]
    assert is_accelerated(keeper, IMAGE)


def test_compiled_models_follow_disabled():
    graphs = Graphs()
    compiled = torch.compile(on_triton(tiny()), backend=graphs)
    output(compiled, IMAGE)
    assert graphs.count(OPERATOR) == 1
    with swinaccel.disabled():
        output(compiled, IMAGE)
    assert len(graphs.graphs) == 2
    assert graphs.count(OPERATOR) == 1


def test_compiled_models_keep_to_the_live_parameters():
    model = on_triton(tiny())
    compiled = torch.compile(model, backend=Graphs())
    output(compiled, IMAGE)
    randomize(model, 8)
    with swinaccel.disabled():
        expected = output(model, IMAGE)
    helpers.assert_close(output(compiled, IMAGE), expected)


IMAGE = torch.randn(1, 8, 8, 16).to(helpers.TRITON_DEVICE)


def tiny():
    return helpers.timm_block((8, 8), shift=2).to(helpers.TRITON_DEVICE).requires_grad_(False)


def test_batch_sizes_share_graphs():
    model = on_triton(tiny())
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs)
    for batch in (2, 3, 4, 5):
        x = torch.randn(batch, 8, 8, 16).to(helpers.TRITON_DEVICE)
        helpers.assert_close(output(compiled, x), output(model, x))
    assert len(graphs.graphs) <= 2
    assert graphs.count(OPERATOR) == len(graphs.graphs)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("name", ["timm", "timm-v2", "torchvision", "microsoft"])
def test_export(name, strict):
    model = accelerate(MODELS[name]())
    with torch.no_grad():
        program = torch.export.export(model, (X,), strict=strict)
    helpers.assert_close(helpers.tensors(program.module()(X))[0], output(model))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export_contains_the_operator_of_the_kernels(strict):
    model = on_triton(tiny())
    with torch.no_grad():
        program = torch.export.export(model, (IMAGE,), strict=strict)
    assert sum(OPERATOR in str(node.target) for node in program.graph.nodes) == 1
    helpers.assert_close(program.module()(IMAGE), output(model, IMAGE))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["timm", "torchvision", "microsoft"])
def test_jit_trace_takes_the_original(name):
    model = accelerate(MODELS[name]())
    with torch.no_grad():
        traced = torch.jit.trace(model, (X,), check_trace=False)
    swinaccel.restore(model)
    helpers.assert_close(output(traced), output(model))
    assert "roll" in str(traced.inlined_graph)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_takes_the_original():
    model = helpers.torchvision_model()
    expected = output(model)
    try:
        torch.jit.script(model)
    except Exception as error:
        pytest.skip(f"the original cannot be scripted either: {type(error).__name__}")
    scripted = torch.jit.script(accelerate(model))
    helpers.assert_close(output(scripted), expected)


def test_symbolic_trace_takes_the_original():
    model = helpers.torchvision_model()
    from torchvision.models.feature_extraction import create_feature_extractor

    expected = output(model)
    traced = create_feature_extractor(accelerate(model), {"head": "out"})
    with torch.no_grad():
        helpers.assert_close(traced(X)["out"], expected)


def test_a_model_that_was_compiled_before():
    """What was compiled runs no longer once it is of other forwards; and goes on where nothing changes."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model, x = helpers.timm_block((8, 8), shift=2).to(helpers.TRITON_DEVICE), torch.randn(2, 8, 8, 16)
    x = x.to(helpers.TRITON_DEVICE)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend=backend)
        for change, made in (
            (lambda: None, 1),
            (lambda: swinaccel.accelerate(compiled, backend="triton"), 2),
            (lambda: swinaccel.accelerate(compiled, backend="triton"), 2),
            (lambda: swinaccel.restore(compiled), 3),
        ):
            change()
            helpers.assert_close(compiled(x), expected)
            assert len(graphs) == made
    assert ["swinaccel" in graph.code for graph in graphs] == [False, True, False]
