# SPDX-License-Identifier: Apache-2.0
"""Attention that takes the weight of a masked layer and never calls it: timm's BEiT, EVA-02 and Swin V2."""

from __future__ import annotations

import pytest
import timm
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from smn_peft import MaskConfig

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"img_size": 32, "num_classes": 5}
VIT = {**SMALL, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
MODELS = {
    "beit_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
    "swinv2_tiny_window8_256": {**SMALL, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
}


def masked(name: str, **options) -> tuple[nn.Module, PeftModel]:
    torch.manual_seed(0)
    base = timm.create_model(name, **MODELS[name]).eval()
    for module in base.modules():
        if isinstance(module, nn.LayerNorm):  # Swin V2 starts with blocks that do nothing
            nn.init.ones_(module.weight)
    return base, get_peft_model(base, MaskConfig(init_weights=False, **options)).eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_mask_is_in_the_output_and_learns(name):
    _, model = masked(name)
    out = model(X)
    out.square().sum().backward()
    scores = {n: p.grad for n, p in model.named_parameters() if "smn_scores" in n}
    assert not [n for n, grad in scores.items() if grad is None or not grad.any()]
    with torch.no_grad():
        with model.disable_adapter():
            base_out = model(X)
            assert not torch.allclose(base_out, out, rtol=1e-3)
        model.merge_adapter()
        torch.testing.assert_close(model(X), out)
        with model.disable_adapter():
            assert torch.equal(model(X), base_out)  # disabling takes a merged adapter out, as everywhere


def test_the_gradient_is_that_of_a_layer_that_is_called():
    base, model = masked("beit_base_patch16_224")
    layer = base.blocks[0].attn.qkv
    x = torch.randn(3, 32)
    gradients = []
    for out in (layer(x), nn.functional.linear(x, layer.weight, layer.bias)):
        model.zero_grad()
        out.square().sum().backward()
        gradients.append(layer.smn_scores["default"].grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", MODELS)
def test_a_mixed_batch_gives_each_sample_its_weight(name):
    _, model = masked(name)
    with torch.no_grad():
        mixed, alone = model(X, adapter_names=["default", "__base__"]), model(X)
        with model.disable_adapter():
            base = model(X)
    torch.testing.assert_close(mixed, torch.stack([alone[0], base[1]]))
    assert not torch.allclose(alone[1], base[1], rtol=1e-4, atol=1e-8)
