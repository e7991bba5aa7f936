# SPDX-License-Identifier: Apache-2.0
"""Composition of clusters, counted by hand."""

from __future__ import annotations

import pytest
import torch

from smn_peft.analysis import cluster_composition, plot_clusters


def test_counts_and_plot(tmp_path):
    assignments = torch.tensor([2, 2, 2, 2, 0, 0])
    labels = torch.tensor([1, 1, 1, 0, 2, 0])
    first, second = cluster_composition(assignments, labels, num_classes=4)
    assert (first.cluster, first.images, first.cumulative) == (0, 2, (0.5, 1.0, 1.0, 1.0))
    assert (second.cluster, second.images, second.cumulative) == (2, 4, (0.75, 1.0, 1.0, 1.0))
    plot_clusters([first, second], tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text("utf-8")
    for shown in ("cluster 1: 2 images", "cluster 3: 4 images", "images of the cluster (%)", "all classes alike"):
        assert f">{shown}</text>" in text


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        cluster_composition(torch.zeros(2).long(), torch.zeros(3).long())
