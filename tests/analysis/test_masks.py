# SPDX-License-Identifier: Apache-2.0
"""Densities, similarity, clusters and maps, against counts by hand and scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import hamming_loss, jaccard_score

from smn_peft.analysis import (
    average_densities,
    embedding_map,
    layer_densities,
    similarity_matrix,
)
from smn_peft.analysis.masks import cluster_composition, mask_similarity
from smn_peft.evaluation import Features

SHAPES = {"a.weight": (40, 50), "b.weight": (3000,)}
DENSITIES = {"a.weight": 0.7, "b.weight": 0.95}
LABELS = torch.arange(4).repeat_interleave(15)
FEATURES = Features(
    4 * torch.eye(8)[LABELS] + 0.5 * torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), LABELS
)


def test_blocks_and_kinds():
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, :3] = True
    for name, block, kind in (
        ("backbone.timm_model.blocks.3.attn.qkv.weight", "blocks.3", "attn.qkv.weight"),
        ("vision_model.encoder.layers.11.self_attn.k_proj.bias", "layers.11", "self_attn.k_proj.bias"),
        ("layer2.0.downsample.0.weight", "layer2.0", "downsample.weight"),
        ("stages.1.blocks.5.conv2.weight", "stages.1.blocks.5", "conv2.weight"),
        ("conv1.weight", "", "conv1.weight"),
        ("stem.conv.weight", "", "stem.conv.weight"),
    ):
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


def drawn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < DENSITIES[name] for name, shape in SHAPES.items()}


def test_similarity_is_scikit_learns():
    one, two = drawn(0), drawn(1)
    two["a.weight"][:20] = one["a.weight"][:20]
    off = [torch.cat([~mask.flatten() for mask in masks.values()]).numpy() for masks in (one, two)]
    found = mask_similarity(one, two, ("x", "y"))
    assert found.jaccard == pytest.approx(jaccard_score(*off))
    assert found.hamming == pytest.approx(hamming_loss(*off))
    assert found.jaccard > 1.5 * found.jaccard_chance
    assert (found.first, found.second) == ("x", "y")


def test_random_masks_are_alike_by_chance_only():
    found = [mask_similarity(drawn(2 * seed), drawn(2 * seed + 1)) for seed in range(20)]
    for name in ("jaccard", "hamming"):
        measured, chance = (sum(getattr(row, field) for row in found) / 20 for field in (name, f"{name}_chance"))
        assert measured == pytest.approx(chance, rel=0.03)


def test_extremes_of_similarity():
    full = {"a": torch.ones(8, dtype=torch.bool)}
    same = mask_similarity(full, full)
    assert (same.jaccard, same.jaccard_chance, same.hamming, same.hamming_chance) == (1.0, 1.0, 0.0, 0.0)
    rows = similarity_matrix({name: full for name in "xyz"})
    assert [(row.first, row.second) for row in rows] == [("x", "y"), ("x", "z"), ("y", "z")]
    with pytest.raises(ValueError, match="mask other tensors, such as a"):
        mask_similarity(full, {"a": torch.ones(9, dtype=torch.bool)})
    with pytest.raises(ValueError, match="two masks or more; got 1"):
        similarity_matrix({"one": full})


def test_composition_of_clusters():
    assignments = torch.tensor([2, 2, 2, 2, 0, 0])
    labels = torch.tensor([1, 1, 1, 0, 2, 0])
    first, second = cluster_composition(assignments, labels)
    assert (first.cluster, first.images, first.cumulative) == (0, 2, (0.5, 1.0, 1.0))
    assert (second.cluster, second.images, second.cumulative) == (2, 4, (0.75, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        cluster_composition(torch.zeros(2).long(), torch.zeros(3).long())


def test_neighbours_on_a_map_are_of_the_same_class():
    found = embedding_map(FEATURES, "base", classes=3)
    assert found.points.shape == (45, 2)
    assert set(found.labels.tolist()) == {0, 1, 2}
    nearest = torch.cdist(found.points, found.points).fill_diagonal_(float("inf")).argmin(1)
    assert (found.labels[nearest] == found.labels).float().mean() > 0.95
    assert torch.equal(embedding_map(FEATURES, "base", classes=3).points, found.points)


def test_what_cannot_be_laid_out():
    with pytest.raises(ValueError, match="needs labels"):
        embedding_map(Features(torch.randn(9, 3)), "x")
    with pytest.raises(ValueError, match="needs 4 points; there are 3"):
        embedding_map(Features(torch.randn(3, 3), torch.zeros(3).long()), "x")
