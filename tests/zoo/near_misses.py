"""What has window attention and is not Swin's."""

from __future__ import annotations

from collections.abc import Callable

import changed_models as changed
import descendant_models as descendants

from zoo.entries import NEAR_MISSES, Call, entry, images, library
from zoo.projects import tokens


def near_miss(library: str, name: str) -> Callable:
    return entry(library, name, NEAR_MISSES)


@near_miss("timm", "maxxvit_rmlp_nano_rw_256")
def _maxxvit(real: bool, batch: int) -> Call:
    narrow = {} if real else {"depths": (1,), "embed_dim": (32,), "stem_width": 8, "img_size": 64}
    model = library("timm").create_model("maxxvit_rmlp_nano_rw_256", num_classes=3, **narrow)
    return Call(model, (images(batch, 256 if real else 64),))


@near_miss("timm", "twins_svt_small")
def _twins(real: bool, batch: int) -> Call:
    narrow = {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (2, 2, 2, 2)}
    return Call(library("timm").create_model("twins_svt_small", **({} if real else narrow)), (images(batch, 224),))


@near_miss("timm", "hiera_tiny_224")
def _hiera(real: bool, batch: int) -> Call:
    narrow = {} if real else {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}
    return Call(library("timm").create_model("hiera_tiny_224", **narrow), (images(batch, 224),))


@near_miss("timm", "beitv2_base_patch16_224")
def _beit(real: bool, batch: int) -> Call:
    narrow = {} if real else {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 64}
    model = library("timm").create_model("beitv2_base_patch16_224", num_classes=3, **narrow)
    return Call(model, (images(batch, 224 if real else 64),))


@near_miss("Hugging Face", "Data2VecVisionModel")
def _data2vec(real: bool, batch: int) -> Call:
    hf = library("transformers")
    narrow = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    made = hf.Data2VecVisionConfig(image_size=64, use_relative_position_bias=True, **({} if real else narrow))
    return Call(hf.Data2VecVisionModel(made), (images(batch, 64),))


@near_miss("Hugging Face", "Florence2VisionBackbone")
def _florence2(real: bool, batch: int) -> Call:
    hf = library("transformers")
    narrow = {
        "depths": (1, 1), "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1), "embed_dim": (16, 32),
        "patch_prenorm": (False, True), "num_heads": (2, 2), "num_groups": (2, 2), "window_size": 4,
    }  # fmt: skip
    made = hf.Florence2VisionConfig(**({} if real else narrow))
    return Call(hf.Florence2VisionBackbone(made), (images(batch, 224 if real else 64),))


@near_miss("Hugging Face", "SamVisionModel")
def _sam(real: bool, batch: int) -> Call:
    hf = library("transformers")
    narrow = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 32, "output_channels": 16,
        "image_size": 64, "window_size": 3, "global_attn_indexes": [1],
    }  # fmt: skip
    made = hf.SamVisionConfig(**({} if real else narrow))
    return Call(hf.SamVisionModel(made), (images(batch, made.image_size),))


@near_miss("BiRefNet", "single-file copy, whose `scaled_dot_product_attention` has no bias")
def _birefnet_bare(real: bool, batch: int) -> Call:
    return Call(changed.SdpaStage(16, 2, 4, kind=changed.BareAttention), (tokens(batch, (9, 10), 16), 9, 10))


@near_miss("Restoration", "HAT's overlapping cross attention")
def _ocab(real: bool, batch: int) -> Call:
    dim, heads, size, window = (180, 6, (64, 64), 16) if real else (12, 2, (8, 12), 4)
    model = descendants.OCAB(dim, size, window, 0.5, heads)
    index = descendants.overlapping_index(model.overlap_win_size, window)
    return Call(model, (tokens(batch, size, dim), size, index))
