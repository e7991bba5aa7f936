# SPDX-License-Identifier: Apache-2.0
"""Images of another size beside a model's own: ViTs resample, what cannot says so, and nothing else moves."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers

from smn_peft.backbones import accept_size, load_backbone, pooled_features

from .tiny import TINY, VIT


def accepting(backbone, size=16):
    """The backbone once it takes `size` too; at its own size it gives the same bits from the same weights."""
    own = torch.randn(2, 3, backbone.image_size, backbone.image_size, generator=torch.Generator().manual_seed(0))
    weights = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    before = backbone.features(own)
    accept_size(backbone, size)
    assert torch.equal(backbone.features(own), before)
    assert not backbone.model.training
    after = backbone.model.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in weights.items())
    return backbone


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"]
)
def test_a_vit_of_timm_is_the_one_that_timm_makes_for_any_size(name):
    backbone = accepting(load_backbone(name, pretrained=False, image_size=48, **VIT), 32)
    reference = timm.create_model(name, num_classes=0, img_size=48, dynamic_img_size=True, **VIT).eval()
    reference.load_state_dict(backbone.model.timm_model.state_dict())
    for size in (32, 48):
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            assert torch.equal(pooled_features(backbone.model, images), reference(images))


def test_clip_and_vit_of_transformers(clip_folder, tmp_path):
    transformers.ViTModel(transformers.ViTConfig(**TINY)).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    for folder in (clip_folder, tmp_path):
        backbone = accepting(load_backbone(folder))
        assert pooled_features(backbone.model, torch.zeros(2, 3, 16, 16)).shape == (2, 32)


def test_a_convolutional_network_takes_any():
    accepting(load_backbone("resnet10t", pretrained=False, image_size=32), 20)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [("mixer_s32_224", {"mlp_ratio": (0.1, 0.1)}, "height"), ("vit_tiny_patch16_224", VIT, "divisible")],
)
def test_what_takes_one_size_says_so(name, options, reason):
    backbone = load_backbone(name, pretrained=False, **options)
    with pytest.raises(
        ValueError, match=rf"{name} takes images of 224 pixels, and none of 90 beside them: .*{reason}"
    ):
        accept_size(backbone, 90)
