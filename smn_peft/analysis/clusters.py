# SPDX-License-Identifier: Apache-2.0
"""What a router's clusters are made of: the share of each cluster's most common classes (the paper's Figure 11)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .canvas import COLOURS, canvas

__all__ = ["ClusterComposition", "cluster_composition", "plot_clusters"]


@dataclass(frozen=True)
class ClusterComposition:
    """One cluster.

    Attributes:
        cluster: Its number.
        images: Number of images in it.
        cumulative: Share of its images that belong to its most common class, its two most common, and so on.
    """

    cluster: int
    images: int
    cumulative: tuple[float, ...]


def cluster_composition(
    assignments: Tensor, labels: Tensor, num_classes: int | None = None
) -> list[ClusterComposition]:
    """Composition of every cluster that has an image.

    Args:
        assignments: Integers (n,), the cluster of each image.
        labels: Integers (n,), the class of each image.
        num_classes: Number of classes; None: as many as the labels say.

    Raises:
        ValueError: If there are no images, or the two do not fit together.
    """
    if assignments.ndim != 1 or assignments.shape != labels.shape or not len(labels):
        raise ValueError(
            f"Assignments and labels must be (n,) of the same images; got {tuple(assignments.shape)} and "
            f"{tuple(labels.shape)}."
        )
    count = int(labels.max()) + 1 if num_classes is None else num_classes
    found = []
    for cluster in assignments.unique().tolist():
        mine = torch.bincount(labels[assignments == cluster], minlength=count).sort(descending=True).values
        shares = (mine.cumsum(0).double() / mine.sum()).tolist()
        found.append(ClusterComposition(int(cluster), int(mine.sum()), tuple(shares)))
    return found


def plot_clusters(clusters: Sequence[ClusterComposition], path: str | os.PathLike[str], *, title: str = "") -> None:
    """A line per cluster, and the line of a cluster in which all classes are equally common.

    Args:
        clusters: From [`cluster_composition`].
        path: File to write.
        title: Title of the picture.
    """
    with canvas(path) as axes:
        classes = max(len(cluster.cumulative) for cluster in clusters)
        x = range(1, classes + 1)
        for index, cluster in enumerate(clusters):
            label = f"cluster {cluster.cluster + 1}: {cluster.images:,} images"
            style = {"color": COLOURS[index % len(COLOURS)], "linestyle": "-" if index < len(COLOURS) else "--"}
            axes.plot(x, [100 * share for share in cluster.cumulative], label=label, **style)
        axes.plot(x, [100 * count / classes for count in x], color="0.4", linestyle=":", label="all classes alike")
        axes.set(xlabel="most common classes of the cluster", ylabel="images of the cluster (%)", title=title)
        axes.set_ylim(0, 103)
        axes.legend(frameon=False, loc="lower right")
