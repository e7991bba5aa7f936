# SPDX-License-Identifier: Apache-2.0
"""The bias of an attention's keys adds the same to all scores of a query: softmax removes it, its mask never flips."""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import CLIPVisionConfig, CLIPVisionModel

from smn_peft import MaskConfig
from smn_peft.tuner import MaskLayer

PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def clip() -> CLIPVisionModel:
    torch.manual_seed(0)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            attention_dropout=0.0,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            torch.nn.init.normal_(parameter)
    return model.double()


def test_key_biases_never_flip_while_others_do():
    model = get_peft_model(clip(), MaskConfig(mask_bias=True))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MaskLayer)}
    bias = {
        name: layer.smn_bias_scores["default"]
        for name, layer in layers.items()
        if name.endswith(("q_proj", "k_proj", "v_proj"))
    }
    assert len(bias) == 6
    weights = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0, momentum=0.9)
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        (model(pixel_values=PIXELS.double()).pooler_output * weights).sum().backward()
        for name, scores in bias.items():
            size = float(scores.grad.abs().max())
            # The gradient of θ̂ is 0 up to rounding; through σ its sum over the tensor is then 0 as well.
            assert size < 1e-12 if "k_proj" in name else size > 1e-6
        optimizer.step()
    masks = {name: mask for name, mask in model.base_model.masks().items() if name.endswith("_proj.bias")}
    assert all(mask.all() for name, mask in masks.items() if "k_proj" in name)
    for kind in ("q_proj", "v_proj"):
        assert not all(mask.all() for name, mask in masks.items() if kind in name)
    assert not all(mask.all() for name, mask in model.base_model.masks().items() if "k_proj.weight" in name)
