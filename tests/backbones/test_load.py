# SPDX-License-Identifier: Apache-2.0
"""Backbones from folders, files and timm names: what they are, how images enter, what features come out."""

from __future__ import annotations

import io
import json
import warnings

import numpy as np
import pytest
import timm
import torch
import transformers
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from smn_peft.backbones import Backbone, base_name, load_backbone, pooled_features

from .tiny import TINY, VIT

# --- transformers ----------------------------------------------------------------------------------------------------


def test_clip_gives_the_vision_tower(clip_folder, image):
    backbone = load_backbone(clip_folder)
    assert isinstance(backbone, Backbone)
    assert type(backbone.model) is transformers.CLIPVisionModel
    assert not backbone.model.training
    assert (backbone.feature_dim, backbone.image_size, backbone.name) == (32, 32, str(clip_folder))
    assert backbone.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    pixel_values = backbone.transform(image)
    processor = transformers.AutoImageProcessor.from_pretrained(clip_folder)
    assert torch.equal(pixel_values, processor(image, return_tensors="pt")["pixel_values"][0])
    whole = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        expected = whole.vision_model(pixel_values[None]).pooler_output
        torch.testing.assert_close(backbone.features(pixel_values[None]), expected)


def test_clip_with_projection_is_the_image_embedding(clip_folder):
    backbone = load_backbone(clip_folder, projection=True)
    assert backbone.feature_dim == 16
    pixel_values = torch.randn(2, 3, 32, 32)
    whole = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        hidden = whole.vision_model(pixel_values).pooler_output
        torch.testing.assert_close(backbone.features(pixel_values), whole.visual_projection(hidden))


def test_grey_and_transparent_images_become_rgb(clip_folder, timm_folder, image):
    for folder in (clip_folder, timm_folder):
        backbone = load_backbone(folder)
        for mode in ("L", "RGBA", "P"):
            assert backbone.transform(image.convert(mode)).shape == (3, backbone.image_size, backbone.image_size)


FAMILIES = {
    "vit": ("ViTModel", TINY),
    "deit": ("DeiTModel", TINY),
    "beit": ("BeitModel", TINY),
    "mae": ("ViTMAEModel", TINY),
    "ijepa": ("IJepaModel", TINY),
    "dinov2": ("Dinov2Model", TINY),
    "dinov3": ("DINOv3ViTModel", TINY),
    "siglip": ("SiglipVisionModel", TINY),
    "resnet": ("ResNetModel", {"embedding_size": 8, "hidden_sizes": [8, 32], "depths": [1, 1]}),
    "convnext": ("ConvNextModel", {"hidden_sizes": [8, 32], "depths": [1, 1], "num_stages": 2}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_at_another_size(family, tmp_path, image, perturbed):
    name, settings = FAMILIES[family]
    model_class = getattr(transformers, name)
    perturbed(model_class(model_class.config_class(**settings))).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"has no preprocessor_config\.json: images are prepared as \w+Processor"):
        backbone = load_backbone(tmp_path, image_size=64)
    pixel_values = backbone.transform(image)[None]
    assert pixel_values.shape == (1, 3, 64, 64)
    features = backbone.features(pixel_values)
    assert features.shape == (1, backbone.feature_dim) == (1, 32)
    torch.testing.assert_close(features, backbone.features(pixel_values))  # no hidden patches, no dropout


def test_a_classifier_checkpoint_gives_the_class_token(tmp_path, perturbed):
    model = perturbed(transformers.ViTForImageClassification(transformers.ViTConfig(**TINY)))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone = load_backbone(tmp_path)
    assert backbone.model.pooler is None
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.vit(pixel_values).last_hidden_state[:, 0]
        torch.testing.assert_close(backbone.features(pixel_values), expected)
        # The same rule for a model that somebody else loaded, with its pooler.
        torch.testing.assert_close(pooled_features(model.vit, pixel_values), expected)
        assert hasattr(transformers.AutoModel.from_pretrained(tmp_path).pooler, "dense")


def test_position_embeddings_are_resampled_in_every_forward(clip_folder):
    native, larger = load_backbone(clip_folder), load_backbone(clip_folder, image_size=48)
    pixel_values = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = native.model(pixel_values, interpolate_pos_encoding=True).pooler_output
        torch.testing.assert_close(larger.model(pixel_values).pooler_output, expected)
        with pytest.raises(ValueError, match="48"):
            native.model(pixel_values)
        adapted = get_peft_model(larger.model, LoraConfig(target_modules=["q_proj"]))
        torch.testing.assert_close(adapted(pixel_values=pixel_values).pooler_output, expected)


def test_dtype(clip_folder, timm_folder):
    for folder in (clip_folder, timm_folder):
        backbone = load_backbone(folder, dtype="bfloat16")
        assert {value.dtype for value in backbone.model.parameters()} == {torch.bfloat16}
        assert backbone.features(torch.randn(1, 3, backbone.image_size, backbone.image_size)).dtype == torch.bfloat16


def test_random_weights_have_no_name(clip_folder):
    backbone = load_backbone(clip_folder, pretrained=False)
    assert backbone.name == str(clip_folder)
    assert not backbone.model.name_or_path
    assert not torch.equal(
        backbone.model.post_layernorm.weight, load_backbone(clip_folder).model.post_layernorm.weight
    )


# --- timm ------------------------------------------------------------------------------------------------------------


def test_timm_repository(timm_folder, image):
    backbone = load_backbone(timm_folder)
    assert type(backbone.model) is transformers.TimmWrapperModel
    assert (backbone.feature_dim, backbone.image_size, backbone.name) == (32, 224, str(timm_folder))
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)
    raw = timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT).eval()
    raw.load_state_dict(load_file(timm_folder / "model.safetensors"))
    data = timm.data.resolve_data_config({}, model=raw)
    pixel_values = backbone.transform(image)
    assert torch.equal(pixel_values, timm.data.create_transform(**data)(image))
    with torch.no_grad():
        expected = raw.forward_head(raw.forward_features(pixel_values[None]), pre_logits=True)
        torch.testing.assert_close(backbone.features(pixel_values[None]), expected)
        torch.testing.assert_close(pooled_features(raw, pixel_values[None]), expected)


def test_num_classes_among_timms_arguments(timm_folder, tmp_path):
    """`save_for_hf` of a model with its own number of classes writes it there; transformers alone cannot load that."""
    config = json.loads((timm_folder / "config.json").read_text())
    config["model_args"] = {**VIT, "num_classes": 10}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((timm_folder / "model.safetensors").read_bytes())
    pixel_values = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = load_backbone(timm_folder).features(pixel_values)
        torch.testing.assert_close(load_backbone(tmp_path).features(pixel_values), expected)


def test_timm_at_another_size_is_what_timm_resamples(timm_folder, image, tmp_path):
    backbone = load_backbone(timm_folder, image_size=64)
    weights = load_file(timm_folder / "model.safetensors")
    raw = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, pretrained=True, num_classes=10,
        pretrained_cfg_overlay={"state_dict": weights, "num_classes": 10}, **VIT,
    ).eval()  # fmt: skip
    pixel_values = backbone.transform(image)[None]
    assert pixel_values.shape == (1, 3, 64, 64)
    with torch.no_grad():
        expected = pooled_features(raw, pixel_values)
        torch.testing.assert_close(backbone.features(pixel_values), expected)
        # The resampled model as a folder of its own is complete: weights, size and transform.
        backbone.model.save_pretrained(tmp_path)
        again = load_backbone(tmp_path)
        assert again.image_size == 64
        assert torch.equal(again.features(pixel_values), backbone.features(pixel_values))
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
        assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], again.transform(image)[None])


@pytest.mark.parametrize("name", ["resnet10t", "timm/resnet10t.c3_in1k", "hf-hub:timm/resnet10t.c3_in1k"])
def test_timm_names_without_weights(name):
    backbone = load_backbone(name, pretrained=False, image_size=32)
    assert (backbone.name, backbone.feature_dim, backbone.image_size) == (name, 512, 32)
    assert not backbone.model.name_or_path
    assert backbone.model.config.architecture == "resnet10t"


def test_state_dict_in_half_precision(timm_folder, tmp_path):
    weights = load_file(timm_folder / "model.safetensors")
    path = tmp_path / "weights.safetensors"
    save_file({key: value.half() if value.ndim > 1 else value for key, value in weights.items()}, path)
    backbone = load_backbone("vit_tiny_patch16_224", state_dict=path, image_size=64, **VIT)
    assert backbone.model.dtype == torch.float32
    assert "head" not in dict(backbone.model.timm_model.named_parameters())
    loaded = backbone.model.timm_model.state_dict()
    assert torch.equal(loaded["blocks.0.attn.qkv.weight"], weights["blocks.0.attn.qkv.weight"].half().float())
    # Cast before resampling: the other way round the result is rounded to half precision.
    source = weights["pos_embed"].half().float()
    assert torch.equal(loaded["pos_embed"], timm.layers.resample_abs_pos_embed(source, [4, 4], num_prefix_tokens=1))
    from_tensors = load_backbone("vit_tiny_patch16_224", state_dict=weights, **VIT)
    assert torch.equal(from_tensors.model.timm_model.pos_embed, weights["pos_embed"])


def test_state_dict_without_classifier_is_strict_too(timm_folder):
    weights = {key: value for key, value in load_file(timm_folder / "model.safetensors").items() if "head" not in key}
    assert load_backbone("vit_tiny_patch16_224", state_dict=weights, **VIT).feature_dim == 32
    del weights["norm.weight"]
    with pytest.raises(ValueError, match=r'do not fit vit_tiny_patch16_224[^Z]*Missing key.*"norm\.weight"'):
        load_backbone("vit_tiny_patch16_224", state_dict=weights, **VIT)


def test_real_vit(assets):
    path = assets / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors"
    backbone = load_backbone("vit_tiny_patch16_224", state_dict=path)
    assert (backbone.feature_dim, backbone.image_size, backbone.mean) == (192, 224, (0.5, 0.5, 0.5))
    with np.load(assets / "imagenet_photos17.npz") as data:
        jpeg, offsets, classes = data["jpeg"], data["offsets"], torch.from_numpy(data["imagenet_index"]).long()
    photos = [Image.open(io.BytesIO(jpeg[offsets[index] : offsets[index + 1]].tobytes())) for index in range(6)]
    with torch.no_grad():
        features = backbone.features(torch.stack([backbone.transform(photo) for photo in photos]))
    raw = timm.create_model("vit_tiny_patch16_224").eval()
    raw.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=raw))
    with torch.no_grad():
        logits = raw(torch.stack([transform(photo) for photo in photos]))
        torch.testing.assert_close(raw.head(features), logits)
    # The first photo, a cock, is a hen to this model under every usual crop.
    assert torch.equal(logits.argmax(dim=1)[1:], classes[1:6])


# --- Adapters find their base again ----------------------------------------------------------------------------------


def test_auto_peft_model_finds_a_timm_base(timm_folder, tmp_path):
    backbone = load_backbone(timm_folder)
    model = get_peft_model(backbone.model, LoraConfig(target_modules=["qkv"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == backbone.name
    again = AutoPeftModel.from_pretrained(tmp_path).eval()
    assert isinstance(again, PeftModel)
    pixel_values = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        adapted = backbone.features(pixel_values)
        torch.testing.assert_close(pooled_features(again, pixel_values), adapted)
        with model.disable_adapter():
            assert not torch.allclose(backbone.features(pixel_values), adapted)


def test_base_name():
    with torch.device("meta"):
        assert base_name(timm.create_model("resnet50.a2_in1k")) == "timm/resnet50.a2_in1k"
        assert base_name(timm.create_model("resnet18")) == "timm/resnet18.a1_in1k"
        model = timm.create_model("resnet18")
    model.pretrained_cfg = {"architecture": "resnet18", "tag": "mine"}
    assert base_name(model) == "resnet18.mine"
    model.pretrained_cfg = {"architecture": "resnet18", "tag": ""}
    assert base_name(model) == "resnet18"
    model.name_or_path = "/somewhere"
    assert base_name(model) == "/somewhere"
    assert base_name(torch.nn.Linear(1, 1)) is None
