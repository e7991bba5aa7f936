# SPDX-License-Identifier: Apache-2.0
"""Masked norms, the ablation: which they are, statistics beside masks through saving, merging and switching."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from peft import PeftModel, get_peft_model

from smn_peft import MaskConfig, explain_targets


def base():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=0, channels=[8, 8, 16, 16], zero_init_last=False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def trained(**options):
    """A model whose masks, and statistics where they adapt, have moved."""
    model = get_peft_model(base(), MaskConfig(mask_norms=True, init_weights=False, **options))
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 32, 32) * 2 + 1)
    return model.eval()


X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def reference(model, batch_norm):
    """The base with θ·M/σ for every masked tensor and the adapter's statistics, without the library's layers."""
    plain, masks = copy.deepcopy(base()), model.masks()
    with torch.no_grad():
        for name, mask in masks.items():
            parameter = plain.get_parameter(name)
            parameter.mul_(mask / mask.float().mean().sqrt())
    if batch_norm == "adapt":
        for name, module in model.get_base_model().named_modules():
            if hasattr(module, "smn_running_mean"):
                norm = plain.get_submodule(name)
                norm.running_mean.copy_(module.smn_running_mean["default"])
                norm.running_var.copy_(module.smn_running_var["default"])
    return plain


@pytest.mark.parametrize("batch_norm", ["frozen", "adapt"])
@pytest.mark.parametrize("mask_bias", [False, True])
def test_against_a_plain_model_and_through_a_file(tmp_path, batch_norm, mask_bias):
    model = trained(mask_bias=mask_bias, batch_norm=batch_norm)
    norms = [name for name, module in base().named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    masks = model.masks()
    assert {f"{name}.weight" for name in norms} <= set(masks)
    assert (f"{norms[0]}.bias" in masks) == mask_bias
    with torch.no_grad():
        expected = reference(model, batch_norm)(X)
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(base()(X), expected, atol=1e-2)
        model.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(base(), str(tmp_path))
        before = loaded(X)
        assert torch.equal(before, model(X))
        loaded.merge_adapter()
        torch.testing.assert_close(loaded(X), before, rtol=1e-5, atol=1e-5)
        loaded.unmerge_adapter()
        assert torch.equal(loaded(X), before)
        with loaded.disable_adapter():
            assert torch.equal(loaded(X), base()(X))
        state = base().state_dict()
        assert all(torch.equal(state[name], value) for name, value in loaded.unload().state_dict().items())


def test_scores_and_statistics_train():
    model = get_peft_model(base(), MaskConfig(mask_norms=True, mask_bias=True, batch_norm="adapt"))
    statistics = model.get_base_model().bn1.smn_running_mean["default"].clone()
    model.train()(X).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and ".bn1.smn_" in name}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in gradients} == {"smn_scores", "smn_bias_scores"}
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    assert not torch.equal(model.get_base_model().bn1.smn_running_mean["default"], statistics)


def test_adapters_with_and_without_share_a_model():
    model = trained(batch_norm="adapt")
    with torch.no_grad():
        masked = model(X)
        model.add_adapter("second_task", MaskConfig(batch_norm="frozen"))
        model.set_adapter("second_task")
        torch.testing.assert_close(model.eval()(X), base()(X), rtol=1e-5, atol=1e-5)
        model.set_adapter("default")
        assert torch.equal(model.eval()(X), masked)
        model.delete_adapter("default")
    plain = get_peft_model(base(), MaskConfig())
    with pytest.raises(ValueError, match="another adapter is on the model and does not mask 'bn1'"):
        plain.add_adapter("second_task", MaskConfig(mask_norms=True))


def test_the_report_and_what_is_left_out():
    config = MaskConfig(mask_norms=True, mask_bias=True, exclude_modules=["bn1"])
    rows = {row.name: row for row in explain_targets(base(), config, verbose=False).rows}
    assert (rows["layer1.0.bn2"].masked, rows["layer1.0.bn2"].reason) == (16, "masked")
    assert (rows["bn1"].masked, rows["bn1"].reason) == (0, "excluded")
    with pytest.raises(ValueError, match="leave layers_to_transform out"):
        MaskConfig(mask_norms=True, layers_to_transform=[1], target_modules=["conv1"])
