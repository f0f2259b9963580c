"""Training real models with the kernels: every gradient, dropout, autocast, checkpointing, and fresh biases after."""

from __future__ import annotations

import copy
from typing import Any

import helpers
import pytest
import torch
from helpers import TRITON_DEVICE
from torch import Tensor, nn

import swinaccel

KEEPS_VERDICTS = True

# name: (model, input shape)
MODELS = {
    "timm": (lambda: helpers.timm_v1(40, 5, embed_dim=16), (2, 3, 40, 40)),
    "timm-v2": (lambda: helpers.timm_v2(40, 5, embed_dim=16), (2, 3, 40, 40)),
    "torchvision": (helpers.torchvision_model, (2, 3, 32, 48)),
    "torchvision-v2": (lambda: helpers.torchvision_model(v2=True), (2, 3, 36, 32)),
    "hf-swin": (lambda: helpers.huggingface("Swin"), (2, 3, 32, 32)),
    "hf-swinv2": (lambda: helpers.huggingface("Swinv2"), (2, 3, 32, 32)),
    "microsoft": (lambda: helpers.microsoft_block((8, 8), shift=2), (2, 64, 16)),
    "microsoft-v2": (lambda: helpers.microsoft_block((8, 8), shift=2, v2=True), (2, 64, 16)),
    "timm-v2-large-window": (lambda: helpers.timm_block((9, 20), window=10, shift=3, v2=True), (2, 9, 20, 16)),
    "timm-large-window": (lambda: helpers.timm_block((12, 20), window=(6, 12), shift=(3, 4)), (2, 12, 20, 16)),
}
every_model = pytest.mark.parametrize("name", MODELS)


pytestmark = pytest.mark.usefixtures("strict_kernels")


def make(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model on the kernels' device, its accelerated copy, both in train mode, and an input."""
    build, shape = MODELS[name]
    model = build().to(TRITON_DEVICE).train()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    torch.manual_seed(1)
    return model, twin, torch.randn(shape).to(TRITON_DEVICE)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Of the input and of every parameter, where the loss weighs all outputs differently."""
    leaf = x.clone().requires_grad_()
    outputs = [out for out in helpers.tensors(model(leaf)) if out.is_floating_point()]
    generator = torch.Generator().manual_seed(2)
    sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs).backward()
    found = {"input": leaf.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    model.zero_grad(set_to_none=True)
    return found


def assert_gradients_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Relative to each gradient's size, or to a thousandth of the largest: k's bias has none in exact arithmetic."""
    assert found.keys() == expected.keys()
    largest = max(one.abs().max().item() for one in expected.values() if one is not None)
    for name, one in expected.items():
        if one is None:
            assert found[name] is None or not found[name].any(), name
            continue
        assert found[name] is not None, name
        size = max(one.abs().max().item(), 1e-3 * largest)
        error = (found[name] - one).abs().max().item() / size
        assert error <= tolerance, f"{name} differs by {error:.1e}"


@every_model
def test_gradients_of_models(name):
    model, twin, x = make(name)
    assert_gradients_close(gradients(twin, x), gradients(model, x), 1e-3)
    helpers.assert_accelerated(twin)


def attention_parameters(model: nn.Module, part: str) -> list[nn.Parameter]:
    """Those with a role: the bias (table or its MLP), the scale, the projections."""
    words = {
        "bias": ("bias_table", "cpb_mlp", "continuous_position_bias_mlp", "position_bias.mlp"),
        "scale": ("logit_scale",),
        "projection": ("proj", "attention.output.dense", "o_proj"),
    }[part]
    return [p for name, p in model.named_parameters() if any(word in name for word in words)]


@pytest.mark.parametrize("part", ["bias", "scale", "projection", "nothing"])
@pytest.mark.parametrize("name", ["timm", "timm-v2", "torchvision-v2", "hf-swin"])
def test_frozen_but_for_a_part(name, part):
    model, twin, x = make(name)
    found = []
    for one in (model, twin):
        one.requires_grad_(False)
        trained = [] if part == "nothing" else attention_parameters(one, part)
        for parameter in trained:
            parameter.requires_grad_(True)
        if part == "scale" and not trained:
            pytest.skip("no logit_scale here")
        found.append(gradients(one, x))
    assert_gradients_close(found[1], found[0], 1e-3)
    helpers.assert_accelerated(twin)


class LoRA(nn.Module):
    """A frozen projection and a trained update of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_lora_on_qkv():
    model = helpers.timm_block((8, 8), shift=2).requires_grad_(False)
    model.attn.qkv = LoRA(model.attn.qkv)
    model = model.to(TRITON_DEVICE).train()
    twin = swinaccel.accelerate(copy.deepcopy(model), backend="triton")
    x = torch.randn(2, 8, 8, 16).to(TRITON_DEVICE)
    expected = gradients(model, x)
    assert expected["attn.qkv.up.weight"].any()
    assert_gradients_close(gradients(twin, x), expected, 1e-3)
    helpers.assert_accelerated(twin)


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing(dropout, reentrant):
    """Recomputed with the same random numbers: gradients are those without checkpointing."""
    from torch.utils.checkpoint import checkpoint

    model = helpers.timm_block((8, 8), shift=2, attn_drop=dropout).to(TRITON_DEVICE).train()
    swinaccel.accelerate(model, backend="triton")
    x = torch.randn(2, 8, 8, 16).to(TRITON_DEVICE)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=reentrant)

    found = []
    for one in (model, Checkpointed()):
        torch.manual_seed(3)
        found.append({name.removeprefix("block."): grad for name, grad in gradients(one, x).items()})
    assert_gradients_close(found[1], found[0], 1e-5)
    helpers.assert_accelerated(model)


@pytest.mark.parametrize("name", ["timm", "timm-v2", "torchvision", "hf-swin", "microsoft"])
def test_attention_dropout_in_models(name):
    """With everything dropped nothing is left of the attention, as in the original."""
    model, twin, x = make(name)
    for one in (model, twin):
        for module in one.modules():
            for attribute in ("attn_drop", "dropout"):
                drop = getattr(module, attribute, None)
                if isinstance(drop, nn.Dropout) and hasattr(
                    module, "num_heads" if attribute == "attn_drop" else "query"
                ):
                    drop.p = 1.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 1.0
    expected = helpers.tensors(model(x))[0]
    found = helpers.tensors(twin(x))[0]
    assert bool(torch.isfinite(found).all())
    if bool(torch.isfinite(expected).all()):  # PyTorch's fused attention on GPUs makes NaN where all is dropped
        helpers.assert_close(found, expected, 1e-4)
    helpers.assert_accelerated(twin)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("timm-large-window", lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
        ("timm-v2-large-window", lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)),
    ],
    ids=["fused", "foreach"],
)
def test_train_then_eval_is_fresh(name, optimizer):
    """Whatever writes the parameters, optimizer or average, the next call uses what was written."""
    _, twin, x = make(name)
    swinaccel.accelerate(twin, backend="triton", bias="factors", bias_energy=0.999999)
    step = optimizer(list(twin.parameters()))
    average_fn = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    average = torch.optim.swa_utils.AveragedModel(twin, multi_avg_fn=average_fn)
    for _ in range(2):
        for one in (twin, average.module):
            one.eval()
            plain = swinaccel.restore(copy.deepcopy(one))
            with torch.no_grad():
                helpers.assert_close(one(x), plain(x), 1e-2)  # factors hold all but a millionth of the energy
        twin.train()
        twin(x).square().sum().backward()
        step.step()
        step.zero_grad()
        average.update_parameters(twin)


@pytest.mark.parametrize("name", ["timm-v1", "timm-v2", "torchvision-v2"])
def test_training_under_compile(name):
    model, x = (one.to(TRITON_DEVICE) for one in helpers.small_model(name, depths=(1, 1)))
    twin = swinaccel.accelerate(copy.deepcopy(model.train()), backend="triton")
    expected = gradients(model, x)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    found = gradients(compiled, x)
    assert_gradients_close({key.removeprefix("_orig_mod."): g for key, g in found.items()}, expected, 1e-3)


def test_training_lowers_the_loss_alike():
    """A few steps of the original and of the accelerated model stay together."""
    model, twin, x = make("hf-swin")
    losses: list[list[float]] = []
    for one in (model, twin):
        step = torch.optim.AdamW(one.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(5):
            loss = helpers.tensors(one(x))[0].square().mean()
            loss.backward()
            step.step()
            step.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


# On the GPU only.


@pytest.mark.gpu
@every_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(name, dtype):
    """Errors of gradients under autocast against fp64, with GradScaler's scale: no larger than the original's."""
    model, twin, x = make(name)
    scale = 64.0 if dtype == torch.float16 else 1.0  # with more, gradients of the originals overflow

    class Scaled(nn.Module):
        def __init__(self, one: nn.Module) -> None:
            super().__init__()
            self.model = one

        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cuda", dtype):
                return [out * scale for out in helpers.tensors(self.model(x)) if out.is_floating_point()]

    exact = gradients(copy.deepcopy(model).double(), x.double())
    squares: dict[str, Tensor] = {}  # of errors and of gradients; together for few numbers, whose errors are chance
    for place, one in enumerate((model, twin)):
        for key, found in gradients(Scaled(one), x).items():
            true = exact[key.removeprefix("model.")]
            if true is not None and true.any():
                group = squares.setdefault(key if true.numel() >= 8 else "few numbers", torch.zeros(2, 2).to(true))
                group[place] += torch.stack([(found.double() / scale - true).norm(), true.norm()]).square()
    helpers.assert_accelerated(twin)
    both = torch.stack(list(squares.values()))
    own, ours = (both[:, :, 0] / both[:, :, 1]).sqrt().T
    keep = own < 0.5  # where the original's own gradient is noise there is nothing to compare
    assert ours[keep].mean() <= 1.1 * own[keep].mean()
    too_much = keep & (ours > 2 * own.clamp_min(own[keep].median()))
    names = list(squares)
    assert not too_much.any(), [(names[at], own[at].item(), ours[at].item()) for at in too_much.nonzero().flatten()]


@pytest.mark.gpu
def test_cuda_graph_of_a_training_step():
    """A captured step replays with new random numbers each time, and with the gradients of an eager one without."""
    model = helpers.timm_block((14, 14), window=7, shift=3, attn_drop=0.2).cuda().train()
    swinaccel.accelerate(model)
    x = torch.randn(4, 14, 14, 16, device="cuda")
    for _ in range(3):
        model(x).square().sum().backward()
    model.zero_grad(set_to_none=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model(x).square().sum().backward()
        model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(x)
        out.square().sum().backward()
    outs = []
    for _ in range(2):
        graph.replay()
        outs.append(out.detach().clone())
    assert not torch.equal(outs[0], outs[1])
    model.eval()
    model(x)  # a mode that is new must run once before it is captured
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        model(x).square().sum().backward()
    graph.replay()
    captured = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        helpers.assert_close(captured[name], parameter.grad, 1e-4)
