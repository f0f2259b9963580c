"""Edits of modes, dtypes, parameters and buffers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edits.tables import buffer, chosen, edit, numbers, of_type, parameter, places

# Modes, dtypes, state dicts.


@edit
def train(model, number):
    model.train()


@edit
def evaluate(model, number):
    model.eval()


@edit
def train_a_part(model, number):
    chosen(list(model.modules()), number).train(number % 2 == 0)


def _noisy(model: nn.Module, number: int) -> dict[str, Tensor]:
    return {
        name: one + 0.3 * numbers(one, number + place)
        if one.is_floating_point() and "mask" not in name
        else one.clone()
        for place, (name, one) in enumerate(model.state_dict().items())
    }


@edit
def load(model, number):
    model.load_state_dict(_noisy(model, number))


@edit
def load_by_assigning(model, number):
    model.load_state_dict(_noisy(model, number), assign=True)


@edit
def half(model, number):
    model.half()


@edit
def bfloat16(model, number):
    model.bfloat16()


@edit
def double(model, number):
    model.double()


@edit
def single(model, number):
    model.float()


@edit
def one_part_double_and_back(model, number):
    chosen(list(model.modules()), number).double()
    model.float()


@edit
def channels_last(model, number):
    if not any(one.dim() == 5 for one in model.parameters()):
        model.to(memory_format=torch.channels_last)


# Parameters and buffers.


@edit
def data_copied(model, number):
    _, _, one = parameter(model, number)
    one.data.copy_(numbers(one, number))


@edit
def data_replaced(model, number):
    _, _, one = parameter(model, number)
    one.data = numbers(one, number)


@edit
def data_scaled(model, number):
    _, _, one = parameter(model, number)
    one.data *= 1.5


@edit
def in_place(model, number):
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(1.05)


@edit
def parameter_replaced(model, number):
    owner, name, one = parameter(model, number)
    setattr(owner, name, nn.Parameter(numbers(one, number)))


@edit
def parameter_transposed_in_memory(model, number):
    _, _, one = parameter(model, number)
    if one.dim() == 2:
        one.data = one.data.t().contiguous().t()


@edit
def bias_removed(model, number):
    place = chosen(places(model, of_type(nn.Linear)), number)
    if place is not None and place[2].bias is not None:
        place[2].bias = None


@edit
def frozen(model, number):
    for place, one in enumerate(model.parameters()):
        one.requires_grad_((number >> place % 8) & 1 == 0)


@edit
def unfrozen(model, number):
    model.requires_grad_()


@edit
def mask_edited(model, number):
    found = buffer(model, number, True)
    if found is not None and "mask" in found[1]:
        owner, name, one = found
        change = number % 4
        if change == 0:
            owner._buffers[name] = None
        elif change == 1:
            one.mul_(0.5)
        elif change == 2:
            setattr(owner, name, one + 0.5 * numbers(one, number))
        else:
            one.data = torch.zeros_like(one)


@edit
def index_permuted(model, number):
    found = buffer(model, number, False)
    if found is not None and "index" in found[1]:
        owner, name, one = found
        if number % 2:
            setattr(owner, name, one.flip(-1).contiguous())
        else:
            one.copy_(one.flip(0))


@edit
def table_of_one_column(model, number):
    found = [one for one in model.modules() if "relative_position_bias_table" in one._parameters]
    owner = chosen(found, number)
    if owner is not None:
        owner.relative_position_bias_table = nn.Parameter(numbers(owner.relative_position_bias_table[:, :1], number))


@edit
def logit_scale_of_one(model, number):
    owner = chosen([one for one in model.modules() if "logit_scale" in one._parameters], number)
    if owner is not None:
        owner.logit_scale = nn.Parameter(owner.logit_scale.detach().flatten()[:1].view(1, 1, 1).clone())


@edit
def not_a_number(model, number):
    _, _, one = parameter(model, number)
    one.data.view(-1)[number % one.numel()] = (math.nan, math.inf, -math.inf)[number % 3]
