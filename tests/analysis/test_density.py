# SPDX-License-Identifier: Apache-2.0
"""Densities per layer: numbers against a count by hand, blocks and kinds of real architectures' names."""

from __future__ import annotations

import pytest
import torch

from smn_peft.analysis import average_densities, layer_densities, plot_densities


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("backbone.timm_model.blocks.3.attn.qkv.weight", "blocks.3", "attn.qkv.weight"),
        ("vision_model.encoder.layers.11.self_attn.k_proj.bias", "layers.11", "self_attn.k_proj.bias"),
        ("layer2.0.downsample.0.weight", "layer2.0", "downsample.weight"),
        ("stages.1.blocks.5.conv2.weight", "stages.1.blocks.5", "conv2.weight"),
        ("conv1.weight", "", "conv1.weight"),
        ("stem.conv.weight", "", "stem.conv.weight"),
    ],
)
def test_blocks_and_kinds(name, block, kind):
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, :3] = True
    (row,) = layer_densities({name: mask})
    assert (row.name, row.block, row.kind, row.weights, row.density) == (name, block, kind, 16, 3 / 16)


def masks(*active: int) -> dict[str, torch.Tensor]:
    names = ["conv1.weight", "layer1.0.conv1.weight", "layer1.1.conv1.weight"]
    return {name: torch.arange(10) < count for name, count in zip(names, active, strict=True)}


def test_averages_over_runs():
    rows = average_densities([layer_densities(masks(10, 8, 6)), layer_densities(masks(10, 6, 2))])
    assert [row.density for row in rows] == pytest.approx([1.0, 0.7, 0.4])
    assert [row.spread for row in rows] == pytest.approx([0.0, 0.02**0.5, 0.08**0.5])
    assert average_densities([layer_densities(masks(1, 2, 3))])[0].spread is None
    with pytest.raises(ValueError, match="Only masks of the same layers"):
        average_densities([layer_densities(masks(1, 2, 3)), layer_densities({"other": torch.ones(2).bool()})])
    with pytest.raises(ValueError, match="There are no masks"):
        layer_densities({})


@pytest.mark.parametrize("several", [False, True])
def test_one_run_is_drawn_by_kind_and_several_by_run(tmp_path, several):
    rows = layer_densities(masks(10, 8, 6))
    plot_densities(
        {"with labels": rows, **({"without": rows} if several else {})}, tmp_path / "a.svg", title="A title"
    )
    text = (tmp_path / "a.svg").read_text("utf-8")
    legend = ["with labels", "without"] if several else ["conv1.weight"]
    for shown in (*legend, "layer1.0", "layer1.1", "active weights (%)", "A title"):
        assert f">{shown}</text>" in text
