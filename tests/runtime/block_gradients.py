"""What the tests of blocks that record gradients share: dtypes, comparisons with fp64, and models that drop paths."""

from __future__ import annotations

import copy
import itertools

import helpers
import torch
import torch.nn.functional as F
from blocks import HALVES
from helpers import TRITON_DEVICE
from torch import nn

import swinaccel

# Of the residual stream, and of products: as in plain training, and under autocast before and after it was rounded.
DTYPES = [
    (torch.float32, torch.float32),
    *((half, half) for half in HALVES),
    *((torch.float32, half) for half in HALVES),
]


def leaves(*tensors):
    return [None if one is None else one.detach().clone().requires_grad_(one.is_floating_point()) for one in tensors]


def results(function, tensors, grads):
    """Outputs, and gradients of all that was given."""
    given = leaves(*tensors)
    outputs = [one for one in function(*given) if one is not None]
    torch.autograd.backward(outputs, [grad.to(one) for one, grad in zip(outputs, grads, strict=True)])
    return [*outputs, *(None if one is None else one.grad for one in given)]


def check(function, original, tensors, grads, dtype):
    """Ours and plain PyTorch's, against plain PyTorch in fp64."""
    exact = results(original, [None if one is None else one.double().cpu() for one in tensors], grads)
    found, own = results(function, tensors, grads), results(original, tensors, grads)
    for place, (one, other, expected) in enumerate(zip(found, own, exact, strict=True)):
        if expected is None or other is None:
            continue
        assert one.dtype == other.dtype, place
        if dtype == torch.float32:
            helpers.assert_close(one.double().cpu(), expected.cpu(), 2e-6)
        else:
            helpers.assert_no_worse(one.cpu(), other.cpu(), expected.cpu(), dtype)


def layer_norm(x, weight, bias):
    """As under autocast: in fp32, whatever comes in; fp64 stays."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (None if one is None else one.to(wide) for one in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, 1e-5)


def scaled(branch, scale):
    return branch if scale is None else branch * scale.detach().to(branch.dtype).view(-1, 1, 1)


def narrowed(y, dtype):
    return y if y.dtype == torch.float64 else y.to(dtype)


def autocast(dtype):
    return torch.autocast(TRITON_DEVICE, dtype, enabled=dtype is not None)


def gradients(model, x, dtype=None, seed=1):
    """Output, and gradients of input and parameters, by name."""
    leaf = x.to(TRITON_DEVICE).clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(seed)
    with autocast(dtype):
        outputs = [one for one in helpers.tensors(model(leaf)) if one.is_floating_point()]
    generator = torch.Generator().manual_seed(2)
    sum((one * torch.randn(one.shape, generator=generator).to(one)).sum() for one in outputs).backward()
    found = {"output": outputs[0].detach(), "input": leaf.grad}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def pair(model):
    model = model.to(TRITON_DEVICE).train()
    return model, swinaccel.accelerate(copy.deepcopy(model), backend="triton")


def drop_paths(model, rate=0.4):
    """Make every drop-path drop, two in a block at rates of their own; timm's replaces an Identity where none was."""
    from timm.layers import DropPath

    rates = itertools.cycle((rate, rate / 2))
    for part in model.modules():
        for name, child in list(part.named_children()):
            if name.startswith(("drop_path", "stochastic_depth")):
                if isinstance(child, nn.Identity):
                    setattr(part, name, DropPath(next(rates)))
                else:
                    setattr(child, "p" if hasattr(child, "p") else "drop_prob", next(rates))
    return model


X = torch.randn(4, 8, 8, 16, generator=torch.Generator().manual_seed(3))


def assert_alike(twin, model, x=X, dtype=None):
    found, expected = (gradients(one, x, dtype) for one in (twin, model))
    for key, one in expected.items():
        assert (one is None) == (found[key] is None), key
        if one is not None:
            helpers.assert_close(found[key], one, 1e-4 if dtype is None else 20 * torch.finfo(dtype).eps)


class PerToken(nn.Module):
    """Drops tokens, not samples."""

    def __init__(self):
        super().__init__()
        self.drop_prob = 0.5

    def forward(self, x):
        return x * torch.empty((*x.shape[:-1], 1), device=x.device).bernoulli_(1 - self.drop_prob)
