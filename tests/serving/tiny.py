# SPDX-License-Identifier: Apache-2.0
"""A small server's parts: a ViT of 32 pixels, adapters with random masks, images, and what each task says of them."""

from __future__ import annotations

import io
import json

import numpy as np
import torch
from PIL import Image

from smn_peft.backbones import Backbone
from smn_peft.bank.bank import MaskBank
from smn_peft.data import evaluation_transform
from smn_peft.data.decoding import decode_rgb
from smn_peft.serving.bank import ServedModel, add_folder
from smn_peft.serving.limits import Limits
from smn_peft.serving.service import Service
from smn_peft.storage.adapter_config import CONFIG_NAME
from tests.bank.tiny import adapter, build

SIZE, DIM = 32, 32
MEAN = STD = (0.5, 0.5, 0.5)
KEY, URL = "open sesame ü", "http://localhost"
NAMES = {"birds": ["crow", "gull", "owl", "wren"], "ships": None, "weather": None}
DENSITIES = {"birds": 0.999, "ships": 0.7, "weather": 0.995}


def image(seed, size=(48, 40), kind="PNG", **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


IMAGES = [image(seed) for seed in range(4)]


def prepared(data):
    return evaluation_transform(SIZE, MEAN, STD)(decode_rgb(data, "image"))


def save_adapters(root):
    """Folders of adapters, and each one's logits and features of IMAGES, computed by PEFT alone."""
    inputs = torch.stack([prepared(data) for data in IMAGES])
    logits, features = {}, {}
    for seed, (name, density) in enumerate(DENSITIES.items()):
        _, model = adapter("vit", density, seed)
        model.save_pretrained(root / name)
        with torch.no_grad():
            logits[name] = model(inputs)
            vit = model.base_model.model
            features[name] = vit.forward_head(vit.forward_features(inputs), pre_logits=True)
    with torch.no_grad():
        features["__base__"] = _headless()(inputs)
    path = root / "birds" / CONFIG_NAME
    names = {str(index): name for index, name in enumerate(NAMES["birds"])}
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": names}))
    return logits, features


def _headless():
    vit = build("vit")
    vit.reset_classifier(0)
    return vit


def backbone():
    vit = _headless()
    vit.name_or_path = "tiny ViT"
    return Backbone(ServedModel(vit, DIM), lambda image: image, DIM, "tiny ViT", SIZE, MEAN, STD)


def service(root, *, limits=None, names=tuple(DENSITIES), **options):
    served = backbone()
    bank = MaskBank.open([], served.model, exclusive=True)
    for name in names:
        add_folder(bank, name, root / name)
    return Service(bank, served, limits=limits or Limits(), **options)
