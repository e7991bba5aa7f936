# SPDX-License-Identifier: Apache-2.0
"""Folders of tiny models, as transformers and timm write them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.models import save_for_hf

from .tiny import TINY, VIT


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """A model in which every key of the file matters: norms and biases are not at their initial values."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand_like(value), alpha=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    text = {**TINY, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "num_hidden_layers": 1}
    text = {key: value for key, value in text.items() if key not in ("image_size", "patch_size")}
    config = transformers.CLIPConfig(vision_config=TINY, text_config=text, projection_dim=16)
    _perturbed(transformers.CLIPModel(config)).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory) -> Path:
    """A repository as timm writes it to the Hub: its own config.json, keys without prefix, with a classifier."""
    folder = tmp_path_factory.mktemp("timm")
    model = _perturbed(timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT))
    save_for_hf(model, str(folder), model_args=VIT, safe_serialization=True)
    (folder / "pytorch_model.bin").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] = VIT  # as in timm's own repositories; see test_num_classes_among_timms_arguments
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def perturbed():
    """Function that moves every weight of a model off its initial value."""
    return _perturbed
