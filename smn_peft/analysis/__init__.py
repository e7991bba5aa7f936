# SPDX-License-Identifier: Apache-2.0
"""What masks look like: functions that return data, and a plot for each."""

from __future__ import annotations

from .masks import average_densities, embedding_map, layer_densities, similarity_matrix
from .plots import (
    Series,
    low_shot_series,
    low_shot_table,
    pareto_front,
    plot_curves,
    plot_densities,
    plot_embedding_maps,
    plot_low_shot,
    plot_similarity,
    plot_sizes,
    smooth,
)

__all__ = [
    "Series",
    "average_densities",
    "embedding_map",
    "layer_densities",
    "low_shot_series",
    "low_shot_table",
    "pareto_front",
    "plot_curves",
    "plot_densities",
    "plot_embedding_maps",
    "plot_low_shot",
    "plot_similarity",
    "plot_sizes",
    "similarity_matrix",
    "smooth",
]
