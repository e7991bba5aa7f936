# SPDX-License-Identifier: Apache-2.0
"""Cascades: a dispatcher's mask, a router on its features, an expert's mask per cluster, and their joint embedding."""

from __future__ import annotations

from .cascade import MODES, Cascade, cascade_sizes
from .evaluate import evaluate_cascade
from .fit import CascadeArguments, prepare, train_experts
from .router import Router

__all__ = [
    "MODES",
    "Cascade",
    "CascadeArguments",
    "Router",
    "cascade_sizes",
    "evaluate_cascade",
    "prepare",
    "train_experts",
]
