# SPDX-License-Identifier: Apache-2.0
"""torch's fused path of TransformerEncoderLayer reads frozen weights: it must not go past the masks."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from smn_peft import MaskConfig
from smn_peft.tuner import MaskLayer

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
TARGETS = ["self_attn", "linear1", "linear2"]


def encoder(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, layers).eval()


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(X)


@pytest.mark.parametrize("targets", [TARGETS, ["self_attn"], ["linear1"], ["linear2"]], ids="-".join)
@pytest.mark.parametrize("packed", [False, True], ids=["scores", "packed"])
def test_the_fused_path_is_not_taken_past_the_masks(targets, packed):
    config = MaskConfig(target_modules=targets, init_weights=False, inference_mode=packed)
    model = get_peft_model(encoder(), config).eval()
    reference = copy.deepcopy(encoder())
    for name, layer in model.base_model.model.named_modules():
        for slot in layer.smn_info["default"].slots if isinstance(layer, MaskLayer) else ():
            parameter = reference.get_submodule(name).get_parameter(slot.path)
            mask = layer.mask("default", slot)
            parameter.data = parameter.data * mask / (mask.float().mean() ** 0.5)
    expected = run(reference)
    assert not torch.allclose(expected, run(encoder()), atol=1e-3)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)


def test_masked_by_a_bare_layer_too():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    base = run(layer)
    model = get_peft_model(layer, MaskConfig(target_modules=TARGETS, init_weights=False)).eval()
    assert not torch.allclose(run(model), base, atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(run(model), base, rtol=1e-5, atol=1e-5)


def test_a_loaded_adapter_gives_the_same(tmp_path):
    model = get_peft_model(encoder(), MaskConfig(target_modules=TARGETS, init_weights=False)).eval()
    expected = run(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(encoder(), tmp_path).eval()), expected)


def test_merging_gives_the_fused_path_back():
    model = get_peft_model(encoder(), MaskConfig(target_modules=TARGETS, init_weights=False)).eval()
    expected = run(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged), expected, rtol=1e-5, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in merged.modules())


def test_training_masks_every_layer():
    model = get_peft_model(encoder(), MaskConfig(target_modules=TARGETS)).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.6)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    for name, mask in model.base_model.masks().items():
        assert 0 < int(mask.sum()) < mask.numel(), name
