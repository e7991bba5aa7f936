# SPDX-License-Identifier: Apache-2.0
"""Which types can be masked, and the report of what would be."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from peft import LoraConfig, get_peft_model
from torch import nn

from smn_peft.tuner.forms import (
    MASKABLE,
    Conv,
    Linear,
    LinearConv1D,
    Substituted,
    is_norm,
    iter_layers,
    mask_layer_for,
)
from smn_peft.tuner.targets import TargetReport, explain_targets, resolve_targets

from .nets import Net, Padded


@pytest.fixture(autouse=True)
def _meta():
    """Architectures without weights: nothing here computes."""
    with torch.device("meta"):
        yield


# --- Kinds -----------------------------------------------------------------------------------------------------------


def test_types_are_exact():
    assert mask_layer_for(nn.Linear(1, 1)) is Linear
    assert mask_layer_for(nn.ConvTranspose3d(1, 1, 1)) is Conv
    assert mask_layer_for(Padded(1, 1, 1)) is None
    assert mask_layer_for(nn.MultiheadAttention(4, 2).out_proj) is None
    assert mask_layer_for(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2, device="cpu"))) is None


def test_named_kinds_exist_under_these_names():
    from timm.layers.conv2d_same import Conv2dSame
    from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
    from transformers.models.efficientnet.modeling_efficientnet import EfficientNetDepthwiseConv2d
    from transformers.pytorch_utils import Conv1D

    substituted = [
        cls(4, 4, 3) for cls in (Conv2dSame, StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
    ]
    assert [mask_layer_for(layer) for layer in substituted] == [Substituted] * 5
    assert mask_layer_for(Conv1D(4, 4)) is LinearConv1D
    assert "forward" not in vars(EfficientNetDepthwiseConv2d)
    assert "_conv_forward" not in vars(EfficientNetDepthwiseConv2d)
    assert sum(isinstance(key, str) for key in MASKABLE) == len(substituted) + 2


def test_is_norm():
    from timm.layers import BatchNormAct2d, GroupNormAct, LayerNorm2d
    from transformers.models.aimv2.modeling_aimv2 import Aimv2RMSNorm
    from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

    norms = [nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm(4), nn.RMSNorm(4)]
    norms += [nn.GroupNorm(2, 4), BatchNormAct2d(4), GroupNormAct(4, 2), LayerNorm2d(4), Aimv2RMSNorm(4)]
    norms += [ConvNextLayerNorm(4), torchvision.ops.FrozenBatchNorm2d(4)]
    assert all(is_norm(norm) for norm in norms)

    class PreLayerNormBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

    for other in (nn.Linear(2, 2), nn.Conv2d(2, 2, 1), nn.Identity(), PreLayerNormBlock()):
        assert not is_norm(other)


def test_iter_layers_lists_an_attention_as_one_layer():
    assert [name for name, _ in iter_layers(nn.Sequential(nn.MultiheadAttention(4, 2), nn.ReLU()))] == ["", "0", "1"]


# --- The report ------------------------------------------------------------------------------------------------------


def test_report_gives_every_reason():
    model = timm.create_model("vit_tiny_patch16_224", depth=2)
    config = SimpleNamespace(
        target_modules="all-linear", modules_to_save=["head"], exclude_modules=["blocks.0.attn.qkv"]
    )
    report = explain_targets(model, config, verbose=False)
    reasons = {row.name: row.reason for row in report.rows}
    assert reasons["cls_token"] == reasons["pos_embed"] == reasons["patch_embed.proj"] == "embedding"
    assert reasons["blocks.0.norm1"] == "norm"
    assert reasons["blocks.0.attn.qkv"] == "excluded"
    assert reasons["head"] == "modules_to_save"
    assert reasons["blocks.1.attn.qkv"] == "masked"
    assert sum(row.parameters for row in report.rows) == sum(parameter.numel() for parameter in model.parameters())
    default = {row.name: row.reason for row in explain_targets(model, verbose=False).rows}
    assert default["head"] == "head"
    chosen = {
        row.name: row.reason
        for row in explain_targets(Net(), SimpleNamespace(target_modules=["conv"]), verbose=False).rows
    }
    assert chosen == {"conv": "masked", "stage.conv": "unsupported type Padded", "up": "not targeted", "fc": "head"}


def test_report_text(capsys):
    model = timm.create_model("resnet18")
    report = explain_targets(model)
    assert capsys.readouterr().out.strip() == str(report).strip()
    text = str(report).splitlines()
    assert re.match(r"conv1 +Conv2d +64×3×7×7 +9,408 +9,408 +masked$", text[1])
    assert text[-3:] == [
        "Conv2d: 20 layers, 11,166,912 masked weights",
        "masked: 11,166,912 of 11,689,512 parameters (95.53%)",
        "adapter file: 1.40 MB packed; scores while training: 44.67 MB (fp32)",
    ]


def test_report_of_an_unknown_model_still_lists_its_layers():
    report = explain_targets(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), verbose=False)
    assert isinstance(report, TargetReport)
    assert report.masked_weights == 0
    assert [row.reason for row in report.rows] == ["not targeted", "norm"]
    assert "has no default target modules" in str(report)


def test_report_counts_attention_and_biases():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    report = explain_targets(model, SimpleNamespace(target_modules=["attn"], mask_bias=True), verbose=False)
    attention = next(row for row in report.rows if row.name.endswith("attn"))
    assert attention.masked == attention.parameters == 4 * 8 * 8 + 4 * 8
    assert explain_targets(model, SimpleNamespace(target_modules=["attn"]), verbose=False).masked_weights == 4 * 8 * 8


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert explain_targets(model, verbose=False).total_parameters == 16 + 4 + 4


def test_adapters_already_there_do_not_change_the_answer():
    with torch.device("cpu"):
        model = timm.create_model("resnet18")
        before = resolve_targets(model, None)
        wrapped = get_peft_model(model, LoraConfig(target_modules=["conv1", "conv2"], modules_to_save=["fc"]))
    for peeled in (model, wrapped):
        assert resolve_targets(peeled, None) == before
        assert resolve_targets(peeled.get_base_model() if peeled is wrapped else peeled, "all-conv") == before
    report = explain_targets(wrapped, SimpleNamespace(modules_to_save=["fc"]), verbose=False)
    assert (report.masked_weights, report.total_parameters) == (11_166_912, 11_689_512)
    assert {row.reason for row in report.rows if row.name.startswith("fc")} == {"modules_to_save"}
