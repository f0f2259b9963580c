"""Models that FSDP2 shards or DDP wraps, in a group of one process: accelerated before or after, and in training."""

import copy

import helpers
import pytest
import torch
import torch.distributed as dist
from tape import Tape
from torch import nn

import swinaccel
from swinaccel.runtime.graphs import capture
from swinaccel.trust.libraries import is_of_library

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


class Microsoft(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(*(helpers.microsoft_block((8, 8), shift=shift) for shift in (0, 2)))
        helpers.randomize(self)

    def forward(self, x):
        return self.blocks(self.embed(x).flatten(2).transpose(1, 2))


MODELS = {
    "SwinTransformerBlock": Microsoft,
    "SwinLayer": lambda: helpers.huggingface("Swin", "ForImageClassification"),
    "Swinv2Layer": lambda: helpers.huggingface("Swinv2", "ForImageClassification"),
}


@pytest.fixture(scope="module")
def shard():
    fsdp, mesh = pytest.importorskip("torch.distributed.fsdp"), pytest.importorskip("torch.distributed.device_mesh")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    devices = mesh.init_device_mesh("cpu", (1,))

    def fully_shard(model, name):
        for part in [part for part in model.modules() if type(part).__name__ == name]:
            fsdp.fully_shard(part, mesh=devices)
        return fsdp.fully_shard(model, mesh=devices)

    yield fully_shard
    dist.destroy_process_group()


def step(model):
    """Return the output of a call that is trained on, and the gradients."""
    model.zero_grad()
    output = helpers.tensors(model(X))[0]
    output.square().sum().backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    whole = {name: one.full_tensor() if hasattr(one, "full_tensor") else one for name, one in gradients.items()}
    return output.detach(), whole


@pytest.mark.parametrize("is_first", [True, False], ids=["accelerated, sharded", "sharded, accelerated"])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_that_are_sharded(shard, name, is_first):
    model = MODELS[name]()
    expected, gradients = step(copy.deepcopy(model))
    if is_first:
        swinaccel.accelerate(model, backend="torch")
    shard(model, name)
    if not is_first:
        swinaccel.accelerate(model, backend="torch")
    for _ in range(2):
        output, found = step(model)
        helpers.assert_close(output, expected)
        assert found.keys() == gradients.keys()
        for key, gradient in gradients.items():
            if "key.bias" not in key and "k_proj.bias" not in key:  # which is 0, but for rounding
                helpers.assert_close(found[key], gradient, 2e-5)
    report = swinaccel.report(model)
    assert len(report.accelerated) == len(report) > 1
    assert all(entry.calls == 2 and not entry.fallbacks for entry in report)


def test_a_projection_sharded_by_itself_runs_the_original(shard):
    model = MODELS["SwinLayer"]()
    expected, _ = step(copy.deepcopy(model))
    shard(model, "Linear")
    swinaccel.accelerate(model, backend="torch")
    with pytest.warns(UserWarning, match="shard the whole block in its place"):
        output, _ = step(model)
    assert torch.equal(output, expected)


def test_code_of_a_user_stays_a_user_s_when_it_is_sharded(shard):
    model = shard(Microsoft(), "SwinTransformerBlock")
    assert not is_of_library(model.blocks[0])
    assert is_of_library(shard(nn.Sequential(nn.Linear(4, 4)), "Linear")[0])


@pytest.mark.parametrize("is_first", [True, False], ids=["accelerated, sharded", "sharded, accelerated"])
@pytest.mark.parametrize("name", ["SwinTransformerBlock", "nothing but the model"])
def test_what_is_sharded_is_no_graph(shard, name, is_first, monkeypatch):
    monkeypatch.setitem(capture.ENGINES, "cpu", Tape)
    model = Microsoft()
    expected, gradients = step(copy.deepcopy(model))
    if is_first:
        swinaccel.accelerate(model, backend="torch", graphs=True)
    shard(model, name)
    if not is_first:
        swinaccel.accelerate(model, backend="torch", graphs=True)
    for _ in range(4):
        output, found = step(model)
        helpers.assert_close(output, expected)
        helpers.assert_close(found["embed.weight"], gradients["embed.weight"])
    (trained,) = swinaccel.report(model).graphs
    with torch.no_grad():
        for _ in range(4):
            helpers.assert_close(model(X), expected)
    (graph,) = swinaccel.report(model).graphs
    assert not trained.captured + graph.captured
    assert "FSDP2 shards it" in trained.reason
    assert "FSDP2 shards it" in graph.reason


@pytest.mark.parametrize("is_first", [True, False], ids=["accelerated, wrapped", "wrapped, accelerated"])
def test_gradients_of_replays_go_through_ddp(shard, is_first, monkeypatch):
    monkeypatch.setitem(capture.ENGINES, "cpu", Tape)
    model, wrap = Microsoft(), nn.parallel.DistributedDataParallel
    expected, gradients = step(copy.deepcopy(model))
    if is_first:
        wrapped = wrap(swinaccel.accelerate(model, backend="torch", graphs=True))
    else:
        wrapped = swinaccel.accelerate(wrap(model), backend="torch", graphs=True)
    wrapped.register_comm_hook(None, tripled)  # in the place of the average over ranks
    for _ in range(4):
        output, found = step(wrapped)
        helpers.assert_close(output, expected)
        for name, gradient in gradients.items():
            helpers.assert_close(found[f"module.{name}"], 3 * gradient)
    assert [graph.replays for graph in swinaccel.report(wrapped).graphs] == [3]


def tripled(_, bucket):
    done = torch.futures.Future()
    done.set_result(3 * bucket.buffer())
    return done
