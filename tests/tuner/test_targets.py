# SPDX-License-Identifier: Apache-2.0
"""Default targets per architecture, the shorthands, and the report."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from smn_peft.tuner.targets import default_targets, exact_targets, explain_targets, matching_names, resolve_targets

from .nets import Net

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_TEXT = {**TINY, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}


@pytest.fixture(autouse=True)
def _meta():
    """Architectures without weights: nothing here computes."""
    with torch.device("meta"):
        yield


def selected(model: nn.Module, **kwargs) -> list[str]:
    return matching_names(model, resolve_targets(model, None, **kwargs))


def weights(model: nn.Module, names: list[str]) -> int:
    layers = dict(model.named_modules())
    return sum(layers[name].weight.numel() for name in names)


def clip(name: str, **vision) -> nn.Module:
    config = transformers.CLIPVisionConfig(**{**TINY, **vision})
    if name == "CLIPModel":
        config = transformers.CLIPConfig(vision_config=config.to_dict(), text_config=TINY_TEXT)
    return getattr(transformers, name)(config)


# --- Numbers of the paper --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count", "total"), [("resnet18", 20, 11_166_912), ("resnet50", 53, 23_454_912)])
@pytest.mark.parametrize("create", [timm.create_model, lambda name: getattr(torchvision.models, name)()])
def test_resnets_mask_every_convolution(create, name, count, total):
    model = create(name)
    names = selected(model)
    assert len(names) == count
    assert weights(model, names) == total
    assert {"conv1", "layer2.0.downsample.0"} <= set(names)
    assert resolve_targets(model, "all-conv") == resolve_targets(model, None)


def test_clip_masks_the_papers_85_017_600_values():
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig())
    report = explain_targets(model, SimpleNamespace(mask_bias=True), verbose=False)
    assert report.masked_weights == 85_017_600
    assert report.total_parameters == 87_456_000
    assert report.packed_bytes == 85_017_600 // 8
    without_biases = explain_targets(model, verbose=False)
    assert without_biases.masked_weights == weights(model, selected(model)) == 84_934_656


# --- Transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel"])
def test_clip_targets_are_the_same_regex_for_every_class_and_size(name):
    model = clip(name)
    pattern = default_targets(model)
    assert pattern == default_targets(clip("CLIPVisionModel", num_hidden_layers=3))
    names = matching_names(model, pattern)
    assert {part.rpartition(".")[2] for part in names} == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert len(names) == 2 * 6
    assert not any("text_model" in part for part in names)


@pytest.mark.parametrize(
    "prefix", ["", "vision_model.", "base_model.model.", "base_model.model.vision_model.", "clip.vision_model."]
)
def test_the_clip_regex_accepts_any_prefix_but_the_text_tower(prefix):
    pattern = default_targets(clip("CLIPVisionModel"))
    assert re.fullmatch(pattern, f"{prefix}encoder.layers.11.mlp.fc1")
    for other in ("encoder.layers.11.mlp", "encoder.layers.11.layer_norm1", "embeddings.patch_embedding"):
        assert not re.fullmatch(pattern, prefix + other)
    assert not re.fullmatch(pattern, "text_model.encoder.layers.0.mlp.fc1")
    assert not re.fullmatch(pattern, "base_model.model.text_model.encoder.layers.0.mlp.fc1")


VISION_TRANSFORMERS = {
    "vit": ("ViTModel", {}, 2 * 6),
    "vit classifier": ("ViTForImageClassification", {}, 2 * 6),
    "vit with decoder": ("ViTMAEForPreTraining", {}, 2 * 6),
    "deit": ("DeiTModel", {}, 2 * 6),
    "beit": ("BeitModel", {}, 2 * 6),
    "msn": ("ViTMSNModel", {}, 2 * 6),
    "dinov2": ("Dinov2Model", {}, 2 * 6),
    "dinov2 registers": ("Dinov2WithRegistersModel", {}, 2 * 6),
    "dinov3": ("DINOv3ViTModel", {}, 2 * 6),
    "siglip": ("SiglipVisionModel", {}, 2 * 6),
    "siglip classifier": ("SiglipForImageClassification", {}, 2 * 6),
}


@pytest.mark.parametrize("case", VISION_TRANSFORMERS)
def test_vision_transformers_mask_every_linear_of_their_layers(case):
    name, options, count = VISION_TRANSFORMERS[case]
    model_class = getattr(transformers, name)
    config_class = transformers.SiglipConfig if name == "SiglipForImageClassification" else model_class.config_class
    settings = {"vision_config": TINY, "text_config": TINY_TEXT} if name == "SiglipForImageClassification" else TINY
    model = model_class(config_class(**settings, **options))
    names = selected(model)
    layers = dict(model.named_modules())
    assert len(names) == count
    assert all(type(layers[part]) is nn.Linear and re.search(r"layers?\.\d", part) for part in names)
    assert isinstance(default_targets(model), str)


def test_swin_keeps_position_biases_frozen():
    config = transformers.Swinv2Config(embed_dim=8, depths=[1, 1], num_heads=[1, 1], image_size=32, window_size=4)
    names = selected(transformers.Swinv2Model(config))
    assert any(name.endswith("downsample.reduction") for name in names)
    assert not any("position_bias" in name or "embedding" in name for name in names)


def test_transformers_resnet_with_classifier():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    model = transformers.ResNetForImageClassification(config)
    convolutions = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    assert selected(model) == convolutions


TIMM = {
    "vit_tiny_patch16_224": (48, "blocks.0.attn.qkv", "patch_embed.proj"),
    "deit_tiny_distilled_patch16_224": (48, "blocks.0.attn.proj", "head_dist"),
    "eva02_tiny_patch14_224": (48, "blocks.0.mlp.fc2", "head"),
    "vit_base_patch16_siglip_224": (48, "blocks.11.mlp.fc1", "attn_pool.q"),
    "swin_tiny_patch4_window7_224": (51, "layers.1.downsample.reduction", "head.fc"),
    "mixer_s32_224": (32, "blocks.0.mlp_tokens.fc1", "stem.proj"),
    "resnetv2_50x1_bit": (53, "stem.conv", "head.fc"),
    "convnext_atto": (40, "stages.0.blocks.0.mlp.fc1", "head.fc"),
    "convnextv2_atto": (40, "stem.0", "head.fc"),
    "mobilenetv3_small_100": (53, "conv_head", "classifier"),
    "tf_efficientnet_b0": (81, "conv_stem", "classifier"),
    "regnety_002": (70, "s1.b1.se.fc1", "head.fc"),
    "densenet121": (120, "features.conv0", "classifier"),
    "vgg11": (8, "features.0", "pre_logits.fc1"),
    "nfnet_f0": (81, "stem.conv1", "head.fc"),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_architectures(name):
    count, inside, outside = TIMM[name]
    names = selected(timm.create_model(name))
    assert len(names) == count
    assert inside in names
    assert outside not in names


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_timm_inside_transformers(name):
    model = transformers.TimmWrapperModel(transformers.TimmWrapperConfig(architecture=name))
    raw = timm.create_model(name)
    assert selected(model) == [f"timm_model.{part}" for part in selected(raw)]
    if name.startswith("vit"):
        assert default_targets(model) == default_targets(raw)


def test_timm_models_built_from_their_class_are_known():
    model = timm.models.resnetv2.ResNetV2(layers=(1, 1), channels=(128, 256), num_classes=0)
    assert "stem.conv" in selected(model)


@pytest.mark.parametrize(
    ("name", "count", "outside"),
    [("vit_b_16", 36, "conv_proj"), ("swin_t", 51, "features.0.0"), ("convnext_tiny", 58, "classifier.2"),
     ("squeezenet1_0", 25, "classifier.1"), ("mobilenet_v3_small", 52, "classifier.0")],
)  # fmt: skip
def test_torchvision(name, count, outside):
    names = selected(getattr(torchvision.models, name)())
    assert len(names) == count
    assert outside not in names


class Tower(nn.Module):
    """The names of OpenCLIP's transformers."""

    def __init__(self, layers: int, **extra: nn.Module) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList()
        for _ in range(layers):
            block = nn.Module()
            block.ln_1, block.attn = nn.LayerNorm(8), nn.MultiheadAttention(8, 2)
            block.mlp = nn.Sequential()
            block.mlp.add_module("c_fc", nn.Linear(8, 16))
            block.mlp.add_module("c_proj", nn.Linear(16, 8))
            self.transformer.resblocks.append(block)
        for name, module in extra.items():
            self.add_module(name, module)


def test_open_clip_targets_the_attention_itself_in_the_vision_tower():
    model = Tower(1, visual=Tower(2, conv1=nn.Conv2d(3, 8, 4)), token_embedding=nn.Embedding(10, 8))
    names = selected(model)
    assert names == [
        f"visual.transformer.resblocks.{block}.{part}"
        for block in (0, 1)
        for part in ("attn", "mlp.c_fc", "mlp.c_proj")
    ]
    assert selected(model.visual) == [name.removeprefix("visual.") for name in names]


# --- Unknown models and shorthands -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [lambda: nn.Sequential(nn.Linear(2, 2)), lambda: transformers.BertModel(
    transformers.BertConfig(**TINY_TEXT))])  # fmt: skip
def test_unknown_architectures_are_named_with_the_way_out(model):
    with pytest.raises(ValueError, match=r"(Sequential|BertModel) has no default target modules.*target_modules=.*"
                       r"'all-linear' or 'all-conv'; explain_targets"):  # fmt: skip
        default_targets(model())


def test_nothing_maskable():
    model = transformers.BitModel(
        transformers.BitConfig(hidden_sizes=[32, 32], depths=[1, 1], embedding_size=32, num_groups=8)
    )
    with pytest.raises(ValueError, match="BitModel has no layer in its blocks that can be masked"):
        default_targets(model)


def test_all_conv_takes_supported_convolutions_and_not_the_classifier():
    model = Net()
    targets = resolve_targets(model, "all-conv")
    assert matching_names(model, targets) == ["conv", "up"]
    assert matching_names(model, ["conv", "up"]) == ["conv", "stage.conv", "up"]  # the trap it avoids
    assert resolve_targets(model, "ALL-CONV") == targets


def test_all_conv_without_convolutions():
    with pytest.raises(ValueError, match=r"all-conv.* finds no convolution that can be masked in Linear"):
        resolve_targets(nn.Linear(2, 2), "all-conv")


def test_exact_targets_stay_a_list_where_that_is_exact():
    assert exact_targets(Net(), ["up", "fc"]) == ["up", "fc"]


def test_other_targets_are_left_alone():
    model = Net()
    for targets in ("all-linear", r".*\.conv", {"conv"}, ["conv"]):
        assert resolve_targets(model, targets) == targets


@pytest.mark.parametrize("indices", [1, [1], [0, 1]])
def test_layers_to_transform_reduces_the_default(indices):
    model = transformers.ViTModel(transformers.ViTConfig(**{**TINY, "num_hidden_layers": 3}))
    names = selected(model, layers_to_transform=indices)
    wanted = {indices} if isinstance(indices, int) else set(indices)
    assert {int(name.split(".")[1]) for name in names} == wanted
    assert len(names) == 6 * len(wanted)


def test_layers_pattern():
    model = timm.create_model("resnet18")
    names = selected(model, layers_to_transform=[0], layers_pattern=["layer1", "layer2"])
    assert names == ["layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"]
    with pytest.raises(ValueError, match=r"layers_to_transform=\[0\].*'blocks'.*named like 'conv1'"):
        selected(model, layers_to_transform=[0], layers_pattern="blocks")
