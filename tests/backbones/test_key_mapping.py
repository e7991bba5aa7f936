# SPDX-License-Identifier: Apache-2.0
"""An adapter of CLIP's vision tower alone loads on the whole model, and back."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel

from smn_peft import MaskConfig
from smn_peft.backbones import clip_key_mapping

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def whole() -> CLIPModel:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=32, patch_size=16, projection_dim=16, **SIZES)
    text = CLIPTextConfig(vocab_size=64, max_position_embeddings=8, projection_dim=16, **SIZES)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)).eval()


@pytest.fixture
def tower(whole: CLIPModel) -> CLIPVisionModel:
    model = CLIPVisionModel(whole.config.vision_config).eval()
    state = {key: value for key, value in whole.state_dict().items() if key.startswith("vision_model.")}
    own = model.state_dict()
    bare = {key.removeprefix("vision_model."): value for key, value in state.items()}
    model.load_state_dict({key: bare[key.removeprefix("vision_model.")] for key in own})
    return model


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_an_adapter_of_the_tower_loads_on_the_whole_model(whole, tower, tmp_path):
    masked = get_peft_model(tower, MaskConfig(init_weights=False, inference_mode=True))
    masked.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = masked(pixel_values=images).pooler_output
        before = whole.vision_model(pixel_values=images).pooler_output
    loaded = PeftModel.from_pretrained(whole, tmp_path, key_mapping=clip_key_mapping(whole))
    with torch.no_grad():
        after = loaded.get_base_model().vision_model(pixel_values=images).pooler_output
    assert torch.equal(after, expected)
    assert not torch.equal(before, expected)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_an_adapter_of_the_whole_model_loads_on_the_tower(whole, tower, tmp_path):
    masked = get_peft_model(whole, MaskConfig(init_weights=False, inference_mode=True))
    masked.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = masked.get_base_model().vision_model(pixel_values=images).pooler_output
        loaded = PeftModel.from_pretrained(tower, tmp_path, key_mapping=clip_key_mapping(tower))
        assert torch.equal(loaded(pixel_values=images).pooler_output, expected)


def test_without_the_mapping_the_error_names_it(whole, tower, tmp_path):
    get_peft_model(tower, MaskConfig(inference_mode=True)).save_pretrained(tmp_path)
    if any(name == "vision_model.encoder" for name, _ in tower.named_modules()):
        pytest.skip("this transformers has the same paths in both")
    with pytest.raises(ValueError, match="clip_key_mapping"):
        PeftModel.from_pretrained(whole, tmp_path)
