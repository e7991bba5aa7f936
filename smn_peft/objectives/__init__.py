# SPDX-License-Identifier: Apache-2.0
"""Objectives: a batch in, ``{"loss": …}`` out, for any model of images; a user's own is a registered class."""

from __future__ import annotations

from .base import (
    Batch,
    Model,
    NoOptions,
    Objective,
    create_objective,
    list_objectives,
    objective_class,
    register_objective,
)
from .distillation import Distillation, DistillationOptions
from .infonce import InfoNCE, InfoNCEOptions
from .supervised import CrossEntropy, CrossEntropyOptions, ZeroShot
from .swav import SwAV, SwAVOptions

__all__ = [
    "Batch",
    "CrossEntropy",
    "CrossEntropyOptions",
    "Distillation",
    "DistillationOptions",
    "InfoNCE",
    "InfoNCEOptions",
    "Model",
    "NoOptions",
    "Objective",
    "SwAV",
    "SwAVOptions",
    "ZeroShot",
    "create_objective",
    "list_objectives",
    "objective_class",
    "register_objective",
]
