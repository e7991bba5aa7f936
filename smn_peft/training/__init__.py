# SPDX-License-Identifier: Apache-2.0
"""Training: one loop over accelerate for every objective, whole runs from arguments, recipes, exact resume."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .arguments import LoopArguments, TrainArguments
from .evaluate import evaluate_run
from .guards import TrainingFailure
from .recipes import list_recipes, load_recipe
from .run import RunSummary, plan, run, run_many
from .saved import load_masks, load_run
from .task import TrainingTask
from .trainer import Interrupted, Trainer

if TYPE_CHECKING:
    from .trainer_callback import ExactResumeCallback

__all__ = [
    "ExactResumeCallback",
    "Interrupted",
    "LoopArguments",
    "RunSummary",
    "TrainArguments",
    "Trainer",
    "TrainingFailure",
    "TrainingTask",
    "evaluate_run",
    "list_recipes",
    "load_masks",
    "load_recipe",
    "load_run",
    "plan",
    "run",
    "run_many",
]


def __getattr__(name: str) -> Any:
    if name != "ExactResumeCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Imported on use: transformers' training side takes a while.
    from .trainer_callback import ExactResumeCallback

    return ExactResumeCallback
