"""Models of timm, torchvision, MONAI and Hugging Face."""

from __future__ import annotations

from typing import Any

import bias_models as biased
import torch
from torch import nn

from zoo.entries import Call, entry, images, library

# timm and torchvision.

_TIMM = {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32, "num_classes": 5}

for _name, _size, _small in (
    ("swin_base_patch4_window7_224", 224, {"img_size": 56}),
    ("swin_base_patch4_window12_384", 384, {"img_size": 48, "window_size": 6}),
    ("swin_s3_tiny_224", 224, {"img_size": 112, "window_size": (7, 14)}),
    ("swinv2_base_window8_256", 256, {"img_size": 64, "window_size": 4}),
    ("swinv2_base_window12to16_192to256", 256, {"img_size": 64, "window_size": 8}),
    ("swinv2_base_window12to24_192to384", 384, {"img_size": 64, "window_size": 8}),
    ("swinv2_cr_small_ns_256", 256, {"img_size": 64, "window_size": 4}),
    ("swinv2_cr_base_384", 384, {"img_size": 64, "window_size": 6, "strict_img_size": False}),
):

    @entry("timm", _name)
    def _timm(real: bool, batch: int, name: str = _name, size: int = _size, small: Any = _small) -> Call:
        model = library("timm").create_model(name, **({} if real else {**_TIMM, **small}))
        return Call(model, (images(batch, size if real else small["img_size"]),))


@entry("timm", "SwinV2-CR without its bias")
def _cr_without_bias(real: bool, batch: int) -> Call:
    dim, heads, size, window = (256, 8, (28, 28), 7) if real else (16, 2, (8, 8), 4)
    blocks = (biased.cr_without_bias(dim, heads, size, window, shift) for shift in (0, window // 2))
    return Call(nn.Sequential(*blocks), (torch.randn(batch, *size, dim),))


for _name, _size in (("swin_b", 224), ("swin_v2_b", 256)):

    @entry("torchvision", _name)
    def _torchvision(real: bool, batch: int, name: str = _name, size: int = _size) -> Call:
        kinds = library("torchvision.models.swin_transformer")
        if real:
            return Call(getattr(kinds, name)(), (images(batch, size),))
        blocks = (
            {"block": kinds.SwinTransformerBlockV2, "downsample_layer": kinds.PatchMergingV2} if "v2" in name else {}
        )
        return Call(kinds.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], **blocks), (images(batch, 44, 36),))


@entry("torchvision", "swin3d_b")
def _torchvision_video(real: bool, batch: int) -> Call:
    kinds = library("torchvision.models.video.swin_transformer")
    if real:
        return Call(kinds.swin3d_b(), (torch.randn(batch, 3, 16, 224, 224),))
    model = kinds.SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [2, 4, 4], num_classes=5)
    return Call(model, (torch.randn(batch, 3, 6, 44, 36),))


@entry("MONAI", "SwinUNETR")
def _swin_unetr(real: bool, batch: int) -> Call:
    library("einops")  # what MONAI needs for it, and does not say before the first call
    side, width = (96, 48) if real else (64, 12)
    kinds = library("monai.networks.nets.swin_unetr")
    model = kinds.SwinUNETR(1, 3, feature_size=width, **({} if real else {"window_size": 5}))
    return Call(model, (torch.randn(batch, 1, side, side, side),))


# Hugging Face: backbones.

_SMALL = {"patch_size": 4, "embed_dim": 16, "depths": [2, 1, 1, 1], "num_heads": [2, 2, 4, 4], "window_size": 4}
_TWO = {"depths": [2, 2], "num_heads": [2, 4]}


def config(kind: str, real: bool, size: int = 64, real_size: int = 224, **options: Any) -> Any:
    """A configuration of one of the Swins: tiny, or the library's own at `real_size`."""
    settings = {"image_size": real_size} if real else {"image_size": size, **_SMALL}
    return getattr(library("transformers"), f"{kind}Config")(**{**settings, **options})


for _kind, _head, _real in (
    ("Swin", "Model", {"real_size": 224}),
    ("Swin", "ForImageClassification", {"real_size": 224}),
    ("Swin", "Backbone", {"real_size": 512}),
    ("Swinv2", "Model", {"real_size": 256, "window_size": 8}),
    ("Swinv2", "Backbone", {"real_size": 256, "window_size": 8}),
    (
        "DonutSwin",
        "Model",
        {"real_size": 1280, "window_size": 10, "depths": [2, 2, 14, 2], "num_heads": [4, 8, 16, 32], "embed_dim": 128},
    ),
    ("MaskFormerSwin", "Backbone", {"real_size": 384, "window_size": 7}),
):

    @entry("Hugging Face", _kind + _head)
    def _backbone(real: bool, batch: int, kind: str = _kind, head: str = _head, options: Any = _real) -> Call:
        made = config(kind, real, **(options if real else {**_TWO}))
        size = options["real_size"] if real else 64
        return Call(getattr(library("transformers"), kind + head)(made), (images(batch, size),))


@entry("Hugging Face", "Swin2SRForImageSuperResolution")
def _swin2sr(real: bool, batch: int) -> Call:
    hf = library("transformers")
    small = {
        "image_size": 16,
        "patch_size": 1,
        "embed_dim": 12,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "window_size": 8,
    }
    made = hf.Swin2SRConfig(upscale=2, **({"image_size": 64} if real else small))
    return Call(hf.Swin2SRForImageSuperResolution(made), (images(batch, 64) if real else images(batch, 16, 24),))


@entry("Hugging Face", "ClapModel")
def _clap(real: bool, batch: int) -> Call:
    hf = library("transformers")
    ids = torch.tensor([[2, 5, 7, 3]] * batch)
    if real:
        return Call(
            hf.ClapModel(hf.ClapConfig()), (), {"input_ids": ids, "input_features": torch.randn(batch, 1, 1001, 64)}
        )
    audio = {
        "window_size": 4, "num_mel_bins": 16, "spec_size": 64, "hidden_size": 32, "depths": [2, 2],
        "num_attention_heads": [2, 4], "patch_embeds_hidden_size": 16, "patch_stride": [4, 4], "patch_size": 4,
        "projection_dim": 16,
    }  # fmt: skip
    text = {**_TEXT, "projection_dim": 16, "max_position_embeddings": 20}
    made = hf.ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
    return Call(hf.ClapModel(made), (), {"input_ids": ids, "input_features": torch.randn(batch, 1, 100, 16)})


# Hugging Face: models around a backbone.

_TEXT = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64,
}  # fmt: skip
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_NARROW = {
    "hidden_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32, "encoder_layers": 1, "decoder_layers": 2,
    "num_attention_heads": 2, "num_queries": 5,
}  # fmt: skip
_DETR = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5,
}  # fmt: skip


@entry("Hugging Face", "Mask2FormerForUniversalSegmentation")
def _mask2former(real: bool, batch: int) -> Call:
    hf = library("transformers")
    narrow = {} if real else {"feature_size": 32, "mask_feature_size": 32, **_NARROW}
    made = hf.Mask2FormerConfig(backbone_config=config("Swin", real, real_size=384, out_features=_STAGES), **narrow)
    return Call(hf.Mask2FormerForUniversalSegmentation(made), (images(batch, 384 if real else 64),))


@entry("Hugging Face", "MaskFormerForInstanceSegmentation")
def _maskformer(real: bool, batch: int) -> Call:
    hf = library("transformers")
    backbone = config("Swin", real, real_size=384, out_features=_STAGES)
    if real:
        made = hf.MaskFormerConfig(backbone_config=backbone)
    else:
        decoder = hf.DetrConfig(use_timm_backbone=False, backbone_config=hf.ResNetConfig(), backbone=None, **_DETR)
        narrow = {"fpn_feature_size": 32, "mask_feature_size": 32}
        made = hf.MaskFormerConfig(backbone_config=backbone, decoder_config=decoder, **narrow)
    return Call(hf.MaskFormerForInstanceSegmentation(made), (images(batch, 384 if real else 64),))


# Its decoder cuts masks off at thresholds: its own error against fp64 is 2.2e-5.
@entry("Hugging Face", "OneFormerForUniversalSegmentation", tolerance=1e-4)
def _oneformer(real: bool, batch: int) -> Call:
    hf = library("transformers")
    narrow = {
        "conv_dim": 32, "mask_dim": 32, "text_encoder_width": 32, "text_encoder_num_layers": 1, "task_seq_len": 7,
        "text_encoder_vocab_size": 50, "text_encoder_context_length": 7, "query_dec_layers": 1, **_NARROW,
    }  # fmt: skip
    backbone = config("Swin", real, real_size=512, out_features=_STAGES)
    made = hf.OneFormerConfig(backbone_config=backbone, is_training=False, **({} if real else narrow))
    task = torch.zeros(batch, made.task_seq_len, dtype=torch.long)
    return Call(hf.OneFormerForUniversalSegmentation(made), (images(batch, 512 if real else 64), task))


for _kind in ("Swin", "Swinv2"):

    @entry("Hugging Face", f"UperNetForSemanticSegmentation, {_kind}")
    def _upernet(real: bool, batch: int, kind: str = _kind) -> Call:
        hf = library("transformers")
        narrow = {"hidden_size": 32, "auxiliary_channels": 16, "pool_scales": [1, 2]}
        made = hf.UperNetConfig(
            backbone_config=config(kind, real, real_size=512, out_features=_STAGES),
            auxiliary_in_channels=384 if real else 64,
            **({} if real else narrow),
        )
        return Call(hf.UperNetForSemanticSegmentation(made), (images(batch, 512 if real else 64),))


for _kind in ("GroundingDino", "MMGroundingDino"):

    @entry("Hugging Face", f"{_kind}ForObjectDetection", tolerance=1e-3, watch="model.backbone")
    def _grounding_dino(real: bool, batch: int, kind: str = _kind) -> Call:
        hf = library("transformers")
        narrow = {"num_feature_levels": 3, "max_text_len": 16, **_DETR}
        made = getattr(hf, f"{kind}Config")(
            backbone_config=config("Swin", real, real_size=640, out_features=_STAGES[1:]),
            **({} if real else {"text_config": hf.BertConfig(**_TEXT), **narrow}),
        )
        ids = torch.tensor([[2, 5, 7, 3]] * batch)
        model = getattr(hf, f"{kind}ForObjectDetection")(made)
        return Call(model, (images(batch, 640 if real else 64),), {"input_ids": ids})


for _kind in ("timm", "Swin"):

    @entry("Hugging Face", f"OmDetTurboForObjectDetection, {_kind}", tolerance=1e-3, watch="vision_backbone")
    def _omdet_turbo(real: bool, batch: int, kind: str = _kind) -> Call:
        hf = library("transformers")
        options: dict[str, Any] = {"use_pretrained_backbone": False}
        if not real:
            channels = [192, 384, 768] if kind == "timm" else [32, 64, 128]
            text = hf.CLIPTextConfig(**{**_TEXT, "hidden_size": 48, "projection_dim": 48})
            options |= {
                "text_config": text, "image_size": 64, "encoder_hidden_dim": 32, "decoder_hidden_dim": 32,
                "vision_features_channels": [32] * 3, "encoder_in_channels": channels, "encoder_dim_feedforward": 32,
                "decoder_dim_feedforward": 32, "class_embed_dim": 48, "text_projection_in_dim": 48,
                "text_projection_out_dim": 48, "num_queries": 5, "decoder_num_layers": 1, "encoder_layers": 1,
                "num_projection_layers": 1, "task_encoder_hidden_dim": 32, "decoder_num_heads": 2,
                "encoder_attention_heads": 2,
            }  # fmt: skip
        if kind == "Swin":
            backbone = config("Swin", real, real_size=640, out_features=_STAGES[1:])
            options |= {"backbone_config": backbone, "use_timm_backbone": False, "backbone": None}
            options["apply_layernorm_after_vision_backbone"] = False
        words = {
            "classes_input_ids": torch.tensor([[1, 4, 2], [1, 5, 2]] * batch),
            "classes_attention_mask": torch.ones(2 * batch, 3, dtype=torch.long),
            "tasks_input_ids": torch.tensor([[1, 4, 6, 2]] * batch),
            "tasks_attention_mask": torch.ones(batch, 4, dtype=torch.long),
            "classes_structure": torch.tensor([2] * batch),
        }
        model = hf.OmDetTurboForObjectDetection(hf.OmDetTurboConfig(**options))
        return Call(model, (images(batch, 640 if real else 64),), words)


@entry("Hugging Face", "DPTForDepthEstimation, Swinv2")
def _dpt(real: bool, batch: int) -> Call:
    hf = library("transformers")
    widths = [96, 192, 384, 768] if real else [16, 32, 64, 128]
    options = {"neck_hidden_sizes": widths, "reassemble_factors": [1] * 4, "fusion_hidden_size": 256 if real else 16}
    backbone = config("Swinv2", real, real_size=384, out_features=_STAGES)
    made = hf.DPTConfig(backbone_config=backbone, is_hybrid=False, add_projection=False, **options)
    return Call(hf.DPTForDepthEstimation(made), (images(batch, 384 if real else 64),))


@entry("Hugging Face", "ZoeDepthForDepthEstimation, Swinv2", tolerance=1e-3)
def _zoedepth(real: bool, batch: int) -> Call:
    hf = library("transformers")
    widths = [96, 192, 384, 768] if real else [16, 32, 64, 128]
    narrow = {"fusion_hidden_size": 16, "bottleneck_features": 16, "num_relative_features": 16, "bin_embedding_dim": 16}
    backbone = config("Swinv2", real, real_size=384, out_features=_STAGES)
    made = hf.ZoeDepthConfig(backbone_config=backbone, neck_hidden_sizes=widths, **({} if real else narrow))
    return Call(hf.ZoeDepthForDepthEstimation(made), (images(batch, 384 if real else 64),))


@entry("Hugging Face", "DetrForObjectDetection, Swin")
def _detr(real: bool, batch: int) -> Call:
    hf = library("transformers")
    options = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    backbone = config("Swin", real, real_size=640, out_features=_STAGES[-1:])
    made = hf.DetrConfig(backbone_config=backbone, **options, **({} if real else _DETR))
    return Call(hf.DetrForObjectDetection(made), (images(batch, 640 if real else 64),))


for _kind in ("DonutSwin", "Swin"):

    @entry("Hugging Face", f"VisionEncoderDecoderModel, {_kind}")
    def _encoder_decoder(real: bool, batch: int, kind: str = _kind) -> Call:
        hf = library("transformers")
        width = {} if real else {"vocab_size": 50, "max_position_embeddings": 32}
        narrow = {**{name: value for name, value in _DETR.items() if name != "num_queries"}, "decoder_layers": 1}
        decoder = hf.MBartConfig(is_decoder=True, add_cross_attention=True, **width, **({} if real else narrow))
        encoder = config(kind, real, real_size=448, **({} if real else _TWO))
        made = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
        ids = torch.tensor([[2, 5, 7, 3]] * batch)
        return Call(
            hf.VisionEncoderDecoderModel(made), (images(batch, 448 if real else 64),), {"decoder_input_ids": ids}
        )
