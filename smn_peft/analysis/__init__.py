# SPDX-License-Identifier: Apache-2.0
"""What masks look like: functions that return data, and a plot for each."""

from __future__ import annotations

from .masks import (
    ClusterComposition,
    EmbeddingMap,
    LayerDensity,
    Similarity,
    average_densities,
    cluster_composition,
    embedding_map,
    layer_densities,
    mask_similarity,
    similarity_matrix,
)
from .plots import (
    SelectiveRow,
    Series,
    low_shot_series,
    low_shot_table,
    mean_curve,
    plot_clusters,
    plot_curves,
    plot_densities,
    plot_embedding_maps,
    plot_low_shot,
    plot_selective,
    plot_similarity,
    selective_series,
    smooth,
)

__all__ = [
    "ClusterComposition",
    "EmbeddingMap",
    "LayerDensity",
    "SelectiveRow",
    "Series",
    "Similarity",
    "average_densities",
    "cluster_composition",
    "embedding_map",
    "layer_densities",
    "low_shot_series",
    "low_shot_table",
    "mask_similarity",
    "mean_curve",
    "plot_clusters",
    "plot_curves",
    "plot_densities",
    "plot_embedding_maps",
    "plot_low_shot",
    "plot_selective",
    "plot_similarity",
    "selective_series",
    "similarity_matrix",
    "smooth",
]
