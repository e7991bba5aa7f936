# SPDX-License-Identifier: Apache-2.0
"""Cascades: a dispatcher's mask, a router on its features, an expert's mask per cluster, and their joint embedding."""

from __future__ import annotations

from .cascade import MODES, Cascade, CascadeSizes, Mode, cascade_sizes
from .evaluate import evaluate_cascade
from .fit import CascadeArguments, prepare, train_experts
from .router import Router, fit_router

__all__ = [
    "MODES",
    "Cascade",
    "CascadeArguments",
    "CascadeSizes",
    "Mode",
    "Router",
    "cascade_sizes",
    "evaluate_cascade",
    "fit_router",
    "prepare",
    "train_experts",
]
