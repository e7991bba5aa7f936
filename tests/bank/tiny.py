# SPDX-License-Identifier: Apache-2.0
"""Small models and adapters with random masks of a wanted density."""

from __future__ import annotations

import timm
import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from smn_peft import MaskConfig
from smn_peft.storage.adapter_config import SETTINGS_NAME, read_config, settings_tensor
from smn_peft.storage.adapter_file import BASE_PREFIX, WEIGHTS_NAME, purpose_of

MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}),
    "resnet": ("resnet18", {}),
}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(name, num_classes=4):
    torch.manual_seed(0)
    architecture, options = MODELS[name]
    return timm.create_model(architecture, num_classes=num_classes, **options).eval()


def adapter(name, density, seed, **options):
    """An adapter's tensors, random bits of a density, and the model that PEFT makes of it."""
    head = "head" if name == "vit" else "fc"
    model = get_peft_model(build(name), MaskConfig(modules_to_save=[head], seed=seed, **options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "smn_" in key:
                parameter.copy_(density - torch.rand(parameter.shape, generator=generator))
            elif "modules_to_save" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for key, buffer in model.named_buffers():
            if "smn_running" in key:
                buffer.add_(torch.rand(buffer.shape, generator=generator))
    return get_peft_model_state_dict(model), model


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def save_sealed(folder, tensors):
    """Write a weights file whose checksum is right, as an adapter that was made on purpose has it."""
    key = f"{BASE_PREFIX}{SETTINGS_NAME}"
    tensors = {name: tensor for name, tensor in tensors.items() if name != key}
    rest = [tensor for name, tensor in tensors.items() if purpose_of(name) != "mask"]
    save_file({**tensors, key: settings_tensor(read_config(folder), rest)}, folder / WEIGHTS_NAME)
