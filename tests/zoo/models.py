# SPDX-License-Identifier: Apache-2.0
"""Other people's vision models, small and with random weights: a family of timm or a class of transformers each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.models import metaformer as _metaformer
from torch import Tensor, nn

__all__ = ["BY_NAME", "CLASSES", "FEW", "ZOO", "Entry"]

CLASSES = 5


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        library: "timm", "transformers" or "torchvision".
        family: Module of timm, or what the class is called without its library's endings.
        name: Of the model or class.
        size: Side of its input.
        make: Makes it, with weights of the global random stream.
    """

    library: str
    family: str
    name: str
    size: int
    make: Callable[[], nn.Module] = field(repr=False)

    def build(self) -> nn.Module:
        """The model in eval mode, frozen; the same weights in every call and every process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make()
            _make_everything_matter(model)
        return model.eval().requires_grad_(False)

    def inputs(self, count: int = 3) -> Tensor:
        """(count, 3, size, size)."""
        return torch.randn(count, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))


def _make_everything_matter(model: nn.Module) -> None:
    """Statistics that are no identity; and weights, gains, layer scales and biases that hide no branch."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() in (2, 4):
                wanted = (parameter.numel() / len(parameter)) ** -0.5
                if 0 < float(parameter.std()) < wanted / 2:  # layer by layer, signals would fade
                    parameter.normal_(0, wanted)
            if parameter.numel() < 2 or not bool((parameter == parameter.flatten()[0]).all()):
                continue
            value = float(parameter.flatten()[0])
            if value == 0.0 and parameter.dim() == 1:  # a bias
                parameter.normal_(0, 0.05)
            elif value == 0.0:  # a branch that starts as nothing
                parameter.normal_(0, 0.02)
            else:  # a gain, or a layer scale of 1e-6
                parameter.uniform_(0.8, 1.2)


def _timm(name: str, size: int, **options: Any) -> Entry:
    import timm
    from timm.models import _registry

    def make() -> nn.Module:
        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)

    return Entry("timm", _registry._model_to_module[name], name, size, make)


def _timm_class(family: str, name: str, size: int, **options: Any) -> Entry:
    """A class of timm whose named variants fix what makes them large."""
    module = importlib.import_module(f"timm.models.{family}")
    options = {key: getattr(module, value[1:]) if str(value)[:1] == "$" else value for key, value in options.items()}
    options["num_classes"] = CLASSES
    return Entry("timm", family, name, size, lambda: getattr(module, name)(**options))


def _transformers(config: str, model: str, size: int = 32, **options: Any) -> Entry:
    import transformers

    def make() -> nn.Module:
        found = getattr(transformers, config)(**options)
        found.num_labels = CLASSES
        return getattr(transformers, model)(found)

    family = config.removesuffix("Config").removesuffix("Vision")
    return Entry("transformers", family, model, size, make)


def _torchvision(family: str, size: int, make: Callable[[], nn.Module]) -> Entry:
    return Entry("torchvision", family, f"torchvision {family}", size, make)


def _torchvision_swin(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    more = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if version == 2 else {}
    return swin.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=CLASSES, **more)


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=CLASSES)


def _torchvision_resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


_MIXERS = [*[_metaformer.SepConv] * 2, *[_metaformer.Attention] * 2]
_NORMS = [*[_metaformer.LayerNorm2dNoBias] * 2, *[_metaformer.LayerNormNoBias] * 2]
_SHALLOW: dict[str, Any] = {"depths": (1, 1, 1, 1)}
_SWIN: dict[str, Any] = {"depths": (2, 1), "embed_dim": 24, "num_heads": (2, 4), "img_size": 64, "window_size": 4}
_TIMM = [
    _timm("beit_base_patch16_224", 32, img_size=32, embed_dim=48, depth=2, num_heads=3),
    _timm("beitv2_base_patch16_224", 32, img_size=32, embed_dim=48, depth=2, num_heads=3),
    _timm("lambda_resnet26t", 64),
    _timm("botnet26t_256", 256),
    _timm("test_byobnet", 64),
    _timm("repvgg_a0", 64),
    _timm("mobileone_s0", 64),
    _timm("cait_xxs24_224", 32, img_size=32, depth=2),
    _timm("coat_tiny", 64, img_size=64),
    _timm("coat_lite_tiny", 64, img_size=64),
    _timm("convit_tiny", 32, img_size=32, depth=3, local_up_to_layer=2),
    _timm("convmixer_768_32", 28),
    _timm("test_convnext", 64),
    _timm("convnextv2_atto", 64),
    _timm("cpubone_nano", 64),
    _timm("crossvit_tiny_240", 240),
    _timm("cs3darknet_s", 64),
    _timm("cspresnet50", 64),
    _timm("cspnext_tiny", 64),
    _timm("davit_tiny", 64, **_SHALLOW, embed_dims=(24, 48, 96, 192), num_heads=(1, 2, 3, 6)),
    _timm("deit_tiny_distilled_patch16_224", 32, img_size=32, depth=2),
    _timm("densenet121", 64, growth_rate=8, block_config=(2, 2, 2, 2)),
    _timm("dla60x_c", 64),
    _timm("dla34", 64),
    _timm("dpn48b", 64),
    _timm("edgenext_xx_small", 64),
    _timm("efficientformer_l1", 224),
    _timm("efficientformerv2_s0", 64, img_size=64),
    _timm("test_efficientnet", 64),
    _timm("tf_efficientnetv2_b0", 64),
    _timm("mixnet_s", 64),
    _timm("efficientvim_m1", 64),
    _timm("efficientvit_b0", 64),
    _timm("efficientvit_m0", 224),
    _timm("eva02_tiny_patch14_224", 28, img_size=28, depth=2),
    _timm("fasternet_t0", 64),
    _timm("fastvit_t8", 64),
    _timm_class("focalnet", "FocalNet", 64, **_SHALLOW, embed_dim=24),
    _timm_class("gcvit", "GlobalContextVit", 64, img_size=64, **_SHALLOW, embed_dim=16, num_heads=(1, 2, 4, 8)),
    _timm("ghostnet_050", 64),
    _timm("hardcorenas_a", 64),
    _timm("hgnetv2_b0", 64),
    _timm("hiera_tiny_224", 64, img_size=(64, 64), embed_dim=24, num_heads=1, stages=(1, 1, 1, 1)),
    _timm("hrnet_w18_small", 64),
    _timm("iformer_t", 64),
    _timm("inception_next_atto", 64),
    _timm("inception_v3", 96),
    _timm("lcnetv2_small", 64),
    _timm("levit_128", 224),
    _timm("lowformer_b0", 64),
    _timm("test_mambaout", 64),
    _timm("test_maxvit", 160),
    _timm("test_coatnet", 160),
    _timm("poolformer_s12", 64),
    _timm_class(
        "metaformer", "MetaFormer", 64, **_SHALLOW, dims=(16, 32, 64, 128), token_mixers=_MIXERS, norm_layers=_NORMS
    ),
    _timm("gmlp_ti16_224", 32, img_size=32),
    _timm("mixer_s32_224", 32, img_size=32),
    _timm("mobilenetv3_small_050", 64),
    _timm("mobilevit_xxs", 64),
    _timm("mobilevitv2_050", 64),
    _timm("mvitv2_tiny", 64, img_size=64),
    _timm_class("nest", "Nest", 64, img_size=64, depths=(1, 1, 1), embed_dims=(24, 48, 96), num_heads=(1, 2, 4)),
    _timm("nextvit_small", 64, depths=(1, 1, 5, 1)),
    _timm("test_nfnet", 64),
    _timm("nf_regnet_b0", 64),
    _timm("pit_ti_224", 224),
    _timm("pvt_v2_b0", 64),
    _timm("rdnet_tiny", 64),
    _timm("regnetx_002", 64),
    _timm("regnety_002", 64),
    _timm("repghostnet_050", 64),
    _timm("repvit_m0_9", 64),
    _timm("res2net50_26w_4s", 64, layers=(1, 1, 1, 1)),
    _timm("resnest14d", 64),
    _timm("test_resnet", 64),
    _timm("resnetblur50", 64, layers=(1, 1, 1, 1)),
    _timm("resnetv2_18", 64),
    _timm_class("resnetv2", "ResNetV2", 64, layers=(1, 1, 1, 1), channels=(128, 128, 256, 256), stem_type="fixed"),
    _timm("rexnet_100", 64),
    _timm("selecsls42", 64),
    _timm("legacy_seresnet18", 64),
    _timm("sequencer2d_s", 32, img_size=32, layers=(1, 1, 1, 1)),
    _timm("shvit_s1", 64),
    _timm("skresnet18", 64),
    _timm("starnet_s1", 64),
    _timm("swiftformer_xs", 64),
    _timm("swin_tiny_patch4_window7_224", 64, **_SWIN),
    _timm("swinv2_tiny_window8_256", 64, **_SWIN),
    _timm("swinv2_cr_tiny_224", 64, **_SWIN),
    _timm("tiny_vit_5m_224", 224, depths=(1, 1, 1, 1)),
    _timm("tnt_s_legacy_patch16_224", 32, img_size=32, depth=2),
    _timm("tresnet_m", 64, layers=(1, 1, 1, 1)),
    _timm("twins_svt_small", 64, img_size=64, **_SHALLOW),
    _timm("twins_pcpvt_small", 64, img_size=64, **_SHALLOW),
    _timm_class("vgg", "VGG", 64, cfg=[8, "M", 16, "M", 24, "M"], norm_layer=nn.BatchNorm2d),
    _timm("visformer_tiny", 64, img_size=64),
    _timm("test_vit", 32, img_size=32),
    _timm("vit_tiny_patch16_224", 32, img_size=32, depth=2, class_token=False, global_pool="map"),
    _timm("vit_relpos_small_patch16_224", 32, img_size=32, depth=2),
    _timm("samvit_base_patch16_224", 64, img_size=64, embed_dim=48, depth=2, num_heads=3, global_attn_indexes=(1,)),
    _timm("vitamin_small_224", 64, img_size=64, depth=2),
    _timm_class(
        "volo", "VOLO", 64, img_size=64, layers=(1, 1, 1, 1), embed_dims=(24, 48, 48, 48), num_heads=(2, 4, 4, 4)
    ),
    _timm("ese_vovnet19b_slim_dw", 64),
    _timm("legacy_xception", 96),
    _timm("xception41", 96),
    _timm("xcit_nano_12_p16_224", 32, img_size=32, depth=2),
    _timm("mobilenetv4_conv_small_035", 64),
]

_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
_HF_SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
_TRANSFORMERS = [
    _transformers("ViTConfig", "ViTForImageClassification", **_VIT),
    _transformers("DeiTConfig", "DeiTForImageClassification", **_VIT),
    _transformers("BeitConfig", "BeitForImageClassification", **_VIT, use_relative_position_bias=True),
    _transformers("Data2VecVisionConfig", "Data2VecVisionForImageClassification", **_VIT),
    _transformers("ViTMSNConfig", "ViTMSNForImageClassification", **_VIT),
    _transformers("IJepaConfig", "IJepaForImageClassification", **_VIT),
    _transformers("YolosConfig", "YolosModel", **{**_VIT, "image_size": [32, 32]}, num_detection_tokens=3),
    _transformers("Dinov2Config", "Dinov2ForImageClassification", **_VIT),
    _transformers("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", **_VIT),
    _transformers("DINOv3ViTConfig", "DINOv3ViTModel", **_VIT),
    _transformers("DINOv3ConvNextConfig", "DINOv3ConvNextModel", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
    _transformers("CLIPVisionConfig", "CLIPVisionModel", **_VIT),
    _transformers("CLIPVisionConfig", "CLIPVisionModelWithProjection", **_VIT, projection_dim=16),
    _transformers("SiglipVisionConfig", "SiglipVisionModel", **_VIT),
    _transformers("AltCLIPVisionConfig", "AltCLIPVisionModel", **_VIT),
    _transformers("ChineseCLIPVisionConfig", "ChineseCLIPVisionModel", **_VIT),
    _transformers("XCLIPVisionConfig", "XCLIPVisionModel", **_VIT, num_frames=1, mit_hidden_size=32),
    _transformers("GroupViTVisionConfig", "GroupViTVisionModel", 32, **{
        key: value for key, value in _VIT.items() if key != "num_hidden_layers"
    }, depths=[1, 1, 1], num_group_tokens=[8, 4, 0], num_output_groups=[8, 4, 0]),
    _transformers("OwlViTVisionConfig", "OwlViTVisionModel", **_VIT),
    _transformers("BlipVisionConfig", "BlipVisionModel", **_VIT),
    _transformers("Aimv2VisionConfig", "Aimv2VisionModel", **_VIT),
    _transformers("MLCDVisionConfig", "MLCDVisionModel", **_VIT),
    _transformers("VitDetConfig", "VitDetModel", **{k: v for k, v in _VIT.items() if k != "intermediate_size"}),
    _transformers("SwinConfig", "SwinForImageClassification", **_HF_SWIN),
    _transformers("Swinv2Config", "Swinv2ForImageClassification", **_HF_SWIN),
    _transformers("Swin2SRConfig", "Swin2SRModel", **{**_HF_SWIN, "patch_size": 1, "num_heads": [2, 2]}),
    _transformers("DonutSwinConfig", "DonutSwinModel", **_HF_SWIN),
    _transformers("HieraConfig", "HieraForImageClassification", 64, image_size=[64, 64], embed_dim=16,
                  depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]),
    _transformers("ConvNextConfig", "ConvNextForImageClassification", hidden_sizes=[8, 16, 24, 32], depths=[1] * 4),
    _transformers("ConvNextV2Config", "ConvNextV2ForImageClassification", hidden_sizes=[8, 16, 24, 32],
                  depths=[1] * 4),
    _transformers("ResNetConfig", "ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16, 24, 32],
                  depths=[1] * 4),
    _transformers("RegNetConfig", "RegNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16, 24, 32],
                  depths=[1] * 4, groups_width=4),
    _transformers("BitConfig", "BitForImageClassification", embedding_size=16, hidden_sizes=[32, 64, 64, 64],
                  depths=[1] * 4, num_groups=4),
    _transformers("MobileNetV1Config", "MobileNetV1ForImageClassification", depth_multiplier=0.25,
                  classifier_dropout_prob=0.0),
    _transformers("MobileNetV2Config", "MobileNetV2ForImageClassification", depth_multiplier=0.35),
    _transformers("MobileViTConfig", "MobileViTForImageClassification", 64, image_size=64, hidden_sizes=[16, 24, 32],
                  neck_hidden_sizes=[8, 8, 16, 24, 32, 32, 64], initializer_range=0.2),
    _transformers("MobileViTV2Config", "MobileViTV2ForImageClassification", 64, image_size=64, width_multiplier=0.5),
    _transformers("EfficientNetConfig", "EfficientNetForImageClassification", 64, image_size=64,
                  width_coefficient=0.35, depth_coefficient=0.35, hidden_dim=448),
    _transformers("SegformerConfig", "SegformerForImageClassification", 64, depths=[1] * 4,
                  hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 2, 4]),
    _transformers("PvtConfig", "PvtForImageClassification", 64, image_size=64, depths=[1] * 4,
                  hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 2, 4]),
    _transformers("PvtV2Config", "PvtV2ForImageClassification", 64, image_size=64, depths=[1] * 4,
                  hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 2, 4]),
    _transformers("PoolFormerConfig", "PoolFormerForImageClassification", 64, depths=[1] * 4,
                  hidden_sizes=[8, 16, 24, 32]),
    _transformers("LevitConfig", "LevitForImageClassification", 64, image_size=64, hidden_sizes=[16, 32, 48],
                  num_attention_heads=[1, 2, 3], depths=[1, 1, 1], key_dim=[8, 8, 8]),
    _transformers("CvtConfig", "CvtForImageClassification", 64, embed_dim=[8, 16, 24], num_heads=[1, 2, 3],
                  depth=[1, 2, 3]),
    _transformers("FocalNetConfig", "FocalNetForImageClassification", 64, image_size=64, embed_dim=16,
                  depths=[1] * 4, hidden_sizes=[16, 32, 64, 128]),
    _transformers("TextNetConfig", "TextNetForImageClassification", 64, stem_out_channels=8,
                  hidden_sizes=[8, 8, 16, 16, 32]),
    _transformers("SwiftFormerConfig", "SwiftFormerForImageClassification", 64, embed_dims=[16, 24, 32, 48],
                  depths=[1] * 4),
    _transformers("GLPNConfig", "GLPNModel", 64, depths=[1] * 4, hidden_sizes=[8, 16, 24, 32],
                  num_attention_heads=[1, 2, 2, 4]),
]  # fmt: skip
_TORCHVISION = [
    _torchvision("Swin", 32, partial(_torchvision_swin, 1)),
    _torchvision("SwinV2", 32, partial(_torchvision_swin, 2)),
    _torchvision("ViT", 32, _torchvision_vit),
    _torchvision("ResNet", 64, _torchvision_resnet),
]

#: All models.
ZOO: list[Entry] = [*_TIMM, *_TRANSFORMERS, *_TORCHVISION]
BY_NAME = {entry.name: entry for entry in ZOO}
#: Families that every commit is tried on: BatchNorm, a fused qkv, weights that are read and not called, windows.
FEW = ("test_resnet", "test_vit", "beit_base_patch16_224", "torchvision Swin", "CLIPVisionModel")
