# SPDX-License-Identifier: Apache-2.0
"""What load_backbone refuses, and that the message names the fix."""

from __future__ import annotations

import pickle
import re

import pytest
import transformers
from safetensors.torch import load_file, save_file

from smn_peft.backbones import load_backbone

from .tiny import TINY


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet5O", {}, r"Unknown backbone 'resnet5O'\. Did you mean resnet50.*a Hub id has a '/'"),
        ("timm/vit_tinny_patch16_224", {}, r"Did you mean vit_tiny_patch16_224"),
        ("resnet50.nope", {}, r"timm knows no weights 'resnet50\.nope'; it knows resnet50\.a1_in1k"),
        ("resnet50.nope", {"pretrained": False}, r"timm knows no weights"),
        ("vit_base_patch16_18x2_224", {}, r"timm has no weights for .*pretrained=False, or your own with state_dict"),
        ("weights.safetensors", {}, r"holds weights but no architecture.*state_dict="),
        ("weights.pth", {}, r"holds weights but no architecture"),
        ("resnet10t", {"state_dict": "weights.pth"}, r"weights\.pth is a pickle.*a pickle can run code.*save_file"),
        ("resnet10t", {"state_dict": "weights.npz"}, r"must be a \.safetensors file or a mapping"),
        ("openai/clip", {"state_dict": {}}, r"state_dict needs the name of a timm architecture, not 'openai/clip'"),
        ("resnet10t", {"num_classes": 10}, r"A backbone has no classifier"),
        ("resnet10t", {"pretrained": False, "projection": True}, r"timm model, which has no projection"),
    ],
)
def test_names_and_options_that_cannot_be(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet50", {}), ("timm/resnet50.a1_in1k", {"image_size": 96}), ("openai/clip-vit-base-patch32", {})],
)
def test_offline(name, options):
    with pytest.raises(
        OSError, match=rf"{re.escape(name)} is not in the local cache.*HF_HUB_OFFLINE is set.*Go online"
    ):
        load_backbone(name, **options)


def test_pickles_are_never_opened(tmp_path, clip_folder):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"holds its weights as a pickle \(pytorch_model\.bin\).*convert it"):
        load_backbone(tmp_path)
    disguised = tmp_path / "model.safetensors"
    disguised.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_backbone("resnet10t", state_dict=disguised)


def test_folders_that_are_no_backbone(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json: write the folder with model\.save_pretrained"):
        load_backbone(tmp_path)
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(**settings, vocab_size=10)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(bert\) is not a vision model"):
        load_backbone(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter, not a backbone.*PeftModel\.from_pretrained"):
        load_backbone(tmp_path)


def test_a_missing_state_dict():
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere\.safetensors"):
        load_backbone("resnet10t", state_dict="nowhere.safetensors")


def test_weights_of_another_architecture(timm_folder):
    path = timm_folder / "model.safetensors"
    with pytest.raises(ValueError, match=r"do not fit resnet10t[^Z]*Missing key[^Z]*Unexpected key") as caught:
        load_backbone("resnet10t", state_dict=path)
    assert len(str(caught.value)) < 1500
    with pytest.raises(ValueError, match="size mismatch for cls_token"):
        load_backbone("vit_tiny_patch16_224", state_dict=path, depth=1)


def test_a_checkpoint_with_missing_keys_is_refused(clip_folder, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((clip_folder / name).read_text())
    weights = load_file(clip_folder / "model.safetensors")
    del weights["vision_model.post_layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config: 1 missing \(post_layernorm\.weight\)"):
        load_backbone(tmp_path)


def test_no_projection_to_take(tmp_path):
    transformers.Dinov2Model(transformers.Dinov2Config(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Dinov2Model has no form with a projection"):
        load_backbone(tmp_path, projection=True)


def test_an_image_size_that_the_model_refuses():
    tiny = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)}
    with pytest.raises(ValueError, match="swin_tiny_patch4_window7_224 does not take images of 3 pixels"):
        load_backbone("swin_tiny_patch4_window7_224", pretrained=False, image_size=3, **tiny)
