# SPDX-License-Identifier: Apache-2.0
"""What masks look like: functions that return data, and a plot for each."""

from __future__ import annotations

from .clusters import ClusterComposition, cluster_composition, plot_clusters
from .curves import Series, mean_curve, plot_curves, smooth
from .density import LayerDensity, average_densities, layer_densities, plot_densities
from .embedding import EmbeddingMap, embedding_map, plot_embedding_maps
from .low_shot import low_shot_series, low_shot_table, plot_low_shot
from .selective import SelectiveRow, plot_selective, selective_series
from .similarity import Similarity, mask_similarity, plot_similarity, similarity_matrix

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
