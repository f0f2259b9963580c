"""Edits of the attention of a block, and whether its kernels follow them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import helpers
import torch
import torch.nn.functional as F
from helpers import TRITON_DEVICE
from part_edits import (
    KEPT,
    Doubled,
    Edit,
    all_data,
    all_hooks,
    class_method,
    compiled,
    data,
    hook,
    in_place,
    loaded,
    method,
    new,
    other,
    parametrized,
    quietly,
    replaced,
    setting,
    tensor,
)
from timm.models import swin_transformer_v2_cr
from torch import nn

import swinaccel


def other_mask(change: Callable[[torch.Tensor], Any]) -> Callable:
    """Change a mask in place, or put another in its place where the function returns one."""

    def edit(model: nn.Module, _: Any) -> None:
        made = change(model.attn_mask)
        if made is not None:
            model.attn_mask = made

    return edit


def one_entry(mask: torch.Tensor) -> None:
    mask[0, 0, 0] = 1.0


def some_infinite(mask: torch.Tensor) -> None:
    mask[-1, :, ::3] = float("-inf")


def new_container(model: nn.Module, _: Any) -> None:
    model.attn._parameters = {name: new(one) for name, one in model.attn._parameters.items() if one is not None}


def known_softmax(model: nn.Module, _: Any) -> None:
    """Put an Identity there, with which another attention is known to be right."""
    known = swin_transformer_v2_cr.SwinTransformerV2CrBlock(16, 2, (8, 8), (4, 4))
    swinaccel.accelerate(helpers.randomize(known), backend="torch")
    model.attn.softmax = nn.Identity()


def doubled(layer: nn.Module) -> nn.Linear:
    made = Doubled(layer.in_features, layer.out_features)
    made.load_state_dict(layer.state_dict())
    return made


CHANGED = "was changed after accelerate()"

OF_ANY_ATTENTION = {
    "parameter": Edit(tensor("attn.qkv", "weight", new), KEPT),
    "data": Edit(all_data("attn"), KEPT),
    "in-place": Edit(in_place("attn", lambda one: one.copy_(other(one))), KEPT),
    "load": Edit(loaded(False), KEPT),
    "load-assign": Edit(loaded(True), KEPT),
    "buffer": Edit(tensor("attn", "relative_position_index", lambda one: one.flip(-1).contiguous()), KEPT),
    "buffer-data": Edit(data("attn", "relative_position_index", lambda one: one.flip(-1).contiguous()), KEPT),
    "mask-data": Edit(data("", "attn_mask", other), KEPT),
    "mask": Edit(other_mask(lambda mask: mask + 0.5 * other(mask)), KEPT),
    "no-mask": Edit(setting("", "attn_mask", None), KEPT),
    "projection": Edit(replaced("attn.proj", lambda one: helpers.randomize(nn.Linear(16, 16))), KEPT),
    "no-bias": Edit(setting("attn.proj", "bias", None), KEPT),
    "mode": Edit(quietly(lambda model: model.train()), KEPT),
}
ATTENTION = {
    **OF_ANY_ATTENTION,
    "table": Edit(tensor("attn", "relative_position_bias_table", new), KEPT),
    "container": Edit(new_container, None),
    "scale": Edit(setting("attn", "scale", 2.0), None),
    "mask-entry": Edit(other_mask(one_entry), KEPT),
    "mask-zeros": Edit(other_mask(lambda mask: (mask.zero_(), None)[1]), KEPT),
    "mask-infinite": Edit(other_mask(some_infinite), KEPT),
    "mask-half": Edit(other_mask(lambda mask: (mask / 20).half()), KEPT),
    "mask-size": Edit(
        setting("", "attn_mask", torch.zeros(1, 16, 16, device=TRITON_DEVICE)), reason="belongs to another image size"
    ),
    "mask-bool": Edit(other_mask(lambda mask: mask != 0), reason="the mask is of torch.bool"),
    "mask-int64": Edit(other_mask(lambda mask: (mask != 0).long()), reason="the mask is of torch.int64"),
    "index-flat": Edit(tensor("attn", "relative_position_index", torch.flatten), None),
    "index-negative": Edit(quietly(lambda model: model.attn.relative_position_index.sub_(49)), reason="from -49 to -1"),
    **{
        f"{kind}-{part}": Edit(hook(part, f"{kind}_hook"), reason="hooks")
        for part in ("attn", "attn.qkv", "attn.proj", "attn.softmax", "attn.proj_drop")
        for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre")
    },
    "all-hooks": Edit(all_hooks(nn.Softmax), reason="global module hook"),
    "compiled-attn": Edit(compiled("attn"), reason="compiled by itself"),
    "compiled-attn.qkv": Edit(compiled("attn.qkv"), KEPT),
    "compiled-attn.softmax": Edit(compiled("attn.softmax"), reason="compiled by itself"),
    "forward-attention": Edit(method("attn"), reason="has a forward of its own"),
    "forward-projection": Edit(method("attn.proj"), reason="has a forward of its own"),
    "method": Edit(method("attn", "_get_rel_pos_bias"), reason="has a _get_rel_pos_bias of its own"),
    "class-attention": Edit(class_method("attn"), reason="was changed"),
    "class-softmax": Edit(class_method("attn.softmax"), reason="was changed"),
    "class-projection": Edit(class_method("attn.qkv"), reason="was changed"),
    "class-one-qkv": Edit(class_method("attn.qkv", only=True), reason="was changed"),
    "class-one-projection": Edit(class_method("attn.proj", only=True), reason="was changed"),
    "softmax-known": Edit(known_softmax, reason=CHANGED),
    "softmax-axis": Edit(setting("attn", "softmax", nn.Softmax(dim=-2)), reason=CHANGED),
    "projection-class": Edit(replaced("attn.qkv", doubled), reason="after accelerate()"),
    "class": Edit(setting("attn.proj", "__class__", Doubled), reason=CHANGED),
    "parametrized": Edit(parametrized("attn.qkv"), None),
}
ATTENTION_V2 = {
    **OF_ANY_ATTENTION,
    "table": Edit(tensor("attn.cpb_mlp.0", "weight", new), KEPT),
    "logit-scale": Edit(tensor("attn", "logit_scale", new), KEPT),
}
TORCHVISION_ATTENTION = {
    "shift": Edit(lambda model, _: model.shift_size.__setitem__(0, 0), KEPT),
    "shift-outside": Edit(setting("", "shift_size", [5, 5]), reason="does not lie inside the window"),
    "method": Edit(method("", "get_relative_position_bias"), reason="of its own"),
}
# Code of nobody's library, whose every setting may be a switch.
UNKNOWN_ATTENTION = {
    "tensor": Edit(setting("attn", "extra", other(torch.empty(2, 16, 16)).to(TRITON_DEVICE)), reason="was changed"),
    "flag": Edit(setting("attn", "flag", True), reason="was changed"),
    "function": Edit(setting("attn", "fn", F.softmin), reason="was changed"),
    "parameter": Edit(
        setting("attn", "gate", nn.Parameter(torch.full((16,), 2.0, device=TRITON_DEVICE))), reason="was changed"
    ),
}
