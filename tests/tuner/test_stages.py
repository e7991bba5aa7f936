# SPDX-License-Identifier: Apache-2.0
"""The first stages of a network, counted against the architectures' own numbers."""

from __future__ import annotations

import pytest
import timm
import torch

from smn_peft import MaskConfig, explain_targets
from smn_peft.tuner.targets import stage_of, stage_targets


def empty(name: str) -> torch.nn.Module:
    """A model of which only the shapes are there."""
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0)


def masked_weights(model: torch.nn.Module, stages: int) -> int:
    config = MaskConfig(target_modules=stage_targets(model, None, stages))
    return explain_targets(model, config, verbose=False).masked_weights


def test_resnet50_has_the_papers_shares():
    model = empty("resnet50")
    counts = [masked_weights(model, stages) for stages in (1, 2, 3, 4)]
    # By hand: bottlenecks of (64, 64, 256) with a shortcut, and so on; the stem's 9,408 weights lie in no stage.
    assert counts[0] == 64 * 64 + 2 * 256 * 64 + 3 * 9 * 64 * 64 + 3 * 64 * 256 + 64 * 256 == 212_992
    assert counts[3] == 23_454_912 - 9_408
    assert [round(count / 23_454_912, 3) for count in counts[:2]] == [0.009, 0.061]


def test_blocks_where_there_are_no_stages():
    assert masked_weights(empty("vit_tiny_patch16_224"), 3) == 3 * 192 * 192 * 12


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("layer3.0.downsample.0", 3),
        ("backbone.stages.1.blocks.0.conv1", 1),
        ("timm_model.blocks.11.attn.qkv", 11),
        ("vision_model.encoder.layers.4.mlp.fc1", 4),
        ("stem.conv", None),
        ("conv1", None),
    ],
)
def test_the_stage_of_a_name(name, stage):
    assert stage_of(name) == stage


def test_more_stages_than_there_are():
    model = empty("resnet18")
    with pytest.raises(
        ValueError, match=r"mask_stages=5: the targets lie in 4 numbered stages or blocks, such as 'conv1'"
    ):
        stage_targets(model, None, 5)
