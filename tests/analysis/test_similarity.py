# SPDX-License-Identifier: Apache-2.0
"""Similarity of masks: against scikit-learn, and chance against masks that are really drawn at random."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import hamming_loss, jaccard_score

from smn_peft.analysis import mask_similarity, plot_similarity, similarity_matrix

SHAPES = {"a.weight": (40, 50), "b.weight": (3000,)}
DENSITIES = {"a.weight": 0.7, "b.weight": 0.95}


def drawn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < DENSITIES[name] for name, shape in SHAPES.items()}


def test_against_scikit_learn():
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


def test_extremes():
    full = {"a": torch.ones(8, dtype=torch.bool)}
    assert mask_similarity(full, full).jaccard == 1.0
    assert mask_similarity(full, full).hamming == mask_similarity(full, full).hamming_chance == 0.0
    with pytest.raises(ValueError, match="mask other tensors, such as a"):
        mask_similarity(full, {"a": torch.ones(9, dtype=torch.bool)})
    with pytest.raises(ValueError, match="two masks or more; got 1"):
        similarity_matrix({"one": full})


def test_every_pair_once_and_drawn(tmp_path):
    rows = similarity_matrix({name: drawn(seed) for seed, name in enumerate("xyz")})
    assert [(row.first, row.second) for row in rows] == [("x", "y"), ("x", "z"), ("y", "z")]
    plot_similarity(rows, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text("utf-8")
    shown = [f"{100 * row.jaccard:.1f}" for row in rows] + ["Jaccard index of the inactive weights (%)"]
    assert all(f">{value}</text>" in text for value in shown)
