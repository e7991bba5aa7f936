# SPDX-License-Identifier: Apache-2.0
"""Embeddings laid out in the plane by t-SNE, coloured by class (the paper's Figure 10)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluation import Features
from .canvas import canvas

__all__ = ["EmbeddingMap", "embedding_map", "plot_embedding_maps"]


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """Points of a map.

    Attributes:
        label: What was embedded.
        points: fp32 (n, 2).
        labels: int64 (n,), the class of each point.
    """

    label: str
    points: Tensor
    labels: Tensor


def embedding_map(
    features: Features, label: str, *, classes: int | None = 20, perplexity: float = 30.0, seed: int = 0
) -> EmbeddingMap:
    """Lay L2-normalised features out by scikit-learn's t-SNE, started from their principal components.

    Distances between far points of such a map mean nothing, nor do its axes.

    Args:
        features: Labelled features.
        label: What they are features of.
        classes: Take the first so many classes only, as the figure does; None takes all.
        perplexity: t-SNE's, lowered where there are too few points for it.
        seed: Of t-SNE.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: There are no labels, or fewer than 4 points.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError(
            "An embedding map is made by scikit-learn, which is not installed: pip install 'smn_peft[eval]'."
        ) from error
    labels = features.labels_for("An embedding map")
    chosen = torch.ones_like(labels, dtype=torch.bool) if classes is None else labels < classes
    count = int(chosen.sum())
    if count < 4:
        raise ValueError(
            f"An embedding map needs 4 points at least; there are {count} of the first {classes} classes."
        )
    vectors = torch.nn.functional.normalize(features.features[chosen], dim=1).numpy()
    layout = TSNE(2, perplexity=min(perplexity, (count - 1) / 3), init="pca", random_state=seed)
    return EmbeddingMap(label, torch.from_numpy(layout.fit_transform(vectors)).float(), labels[chosen])


def plot_embedding_maps(
    maps: Sequence[EmbeddingMap], path: str | os.PathLike[str], *, names: Sequence[str] | None = None
) -> None:
    """The maps side by side, a colour per class; the axes have no unit.

    Args:
        maps: From [`embedding_map`], of the same classes.
        path: File to write.
        names: Name of every class, for the legend.
    """
    with canvas(path, columns=len(maps), size=(4.5, 4.5)) as found:
        import matplotlib

        axes = found if isinstance(found, list) else [found]
        present = sorted({int(label) for one in maps for label in one.labels.unique()})
        palette = matplotlib.colormaps["tab10" if len(present) <= 10 else "tab20"]
        for part, one in zip(axes, maps, strict=True):
            for index, label in enumerate(present):
                points = one.points[one.labels == label]
                name = names[label] if names is not None and label < len(names) else f"class {label}"
                part.scatter(points[:, 0], points[:, 1], s=8, color=palette(index % palette.N), label=name)
            part.set(title=one.label, xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[])
            part.grid(False)
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, markerscale=2, fontsize=8)
