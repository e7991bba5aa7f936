# SPDX-License-Identifier: Apache-2.0
"""Embedding maps: classes that lie apart stay apart, the same seed gives the same map."""

from __future__ import annotations

import pytest
import torch

from smn_peft.analysis import embedding_map, plot_embedding_maps
from smn_peft.evaluation import Features

LABELS = torch.arange(4).repeat_interleave(15)
FEATURES = Features(
    4 * torch.eye(8)[LABELS] + 0.5 * torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), LABELS
)


def test_neighbours_are_of_the_same_class():
    found = embedding_map(FEATURES, "base", classes=3)
    assert found.points.shape == (45, 2)
    assert set(found.labels.tolist()) == {0, 1, 2}
    nearest = torch.cdist(found.points, found.points).fill_diagonal_(float("inf")).argmin(1)
    assert (found.labels[nearest] == found.labels).float().mean() > 0.95
    assert torch.equal(embedding_map(FEATURES, "base", classes=3).points, found.points)


def test_plot(tmp_path):
    found = embedding_map(FEATURES, "adapted", classes=None)
    plot_embedding_maps([found, found], tmp_path / "a.svg", names=["cat", "dog"])
    text = (tmp_path / "a.svg").read_text("utf-8")
    for shown in ("adapted", "cat", "dog", "class 2", "t-SNE 1 (no unit)"):
        assert f">{shown}</text>" in text


def test_what_cannot_be_laid_out():
    with pytest.raises(ValueError, match="needs labels"):
        embedding_map(Features(torch.randn(9, 3)), "x")
    with pytest.raises(ValueError, match="needs 4 points at least; there are 3"):
        embedding_map(Features(torch.randn(3, 3), torch.zeros(3).long()), "x")
