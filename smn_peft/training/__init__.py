# SPDX-License-Identifier: Apache-2.0
"""Training: one loop over accelerate for every objective, whole runs from arguments, recipes, exact resume."""

from __future__ import annotations

from .arguments import LoopArguments, TrainArguments, list_recipes, load_recipe
from .conversion import convert
from .metrics import TrainingFailure
from .run import FolderInUse, RunSummary, plan, run, run_many
from .saved import evaluate_run, load_masks, load_run
from .task import TrainingTask
from .trainer import ExactResumeCallback, Interrupted, Trainer

__all__ = [
    "ExactResumeCallback",
    "FolderInUse",
    "Interrupted",
    "LoopArguments",
    "RunSummary",
    "TrainArguments",
    "Trainer",
    "TrainingFailure",
    "TrainingTask",
    "convert",
    "evaluate_run",
    "list_recipes",
    "load_masks",
    "load_recipe",
    "load_run",
    "plan",
    "run",
    "run_many",
]
