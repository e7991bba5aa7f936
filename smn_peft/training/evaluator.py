# SPDX-License-Identifier: Apache-2.0
"""`evaluator_of`: the function that the trainer calls to say what a task is worth on the run's own images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from peft import PeftModel

from ..backbones import Backbone
from ..data import ImageDataset
from ..evaluation import Features, evaluate_accuracy, evaluate_knn, extract_features, linear_probe
from .assemble import evaluation_of
from .checkpoint import latest_checkpoint
from .images import Images
from .shared import base_features
from .task import TrainingTask
from .train_arguments import TrainArguments

__all__ = ["evaluator_of"]


def evaluator_of(
    arguments: TrainArguments, images: Images, backbone: Backbone, accelerator: Accelerator
) -> Callable[[TrainingTask], dict[str, float]] | None:
    """k-NN, where asked for a linear probe, and of a classifier the accuracy; None if there is nothing to test on.

    The first call of a run that does not go on from a checkpoint is before any training, and of the frozen base: a
    mask that does not start with all ones is switched off for it. The base's features are shared with other runs on it
    (see `share`).

    Args:
        arguments: Of the run.
        images: Those that vote and those that are tested.
        backbone: How images are prepared.
        accelerator: Shares the work among its processes.
    """
    bank, test = images.bank, images.test
    if test is None or bank is None:
        return None
    transform, fresh = evaluation_of(backbone), latest_checkpoint(arguments.output_dir) is None
    options: dict[str, Any] = {
        "batch_size": arguments.batch_size,
        "accelerator": accelerator,
        "num_workers": arguments.num_workers,
    }

    def features_of(task: TrainingTask, part: ImageDataset, base: bool) -> Features:
        def extract() -> Features:
            return extract_features(task.model, part, transform, **options)

        return base_features(arguments, part, extract) if base else extract()

    def evaluate(task: TrainingTask) -> dict[str, float]:
        nonlocal fresh
        first, fresh = fresh, False
        started = arguments.init_from is not None or task.density() not in (None, 1)  # somewhere else than at the base
        if first and started and isinstance(task.model, PeftModel):
            with task.model.disable_adapter():
                return measure(task, True)
        return measure(task, first and not started)

    def measure(task: TrainingTask, base: bool) -> dict[str, float]:
        shared = base and accelerator.num_processes == 1
        voting, tested = (features_of(task, part, shared) for part in (bank, test))
        values = {"knn": evaluate_knn(voting, tested, k=arguments.knn_k)}
        if arguments.eval_probe:
            values["linear_probe"] = linear_probe(voting, tested, seed=arguments.subset_seed)
        if task.objective.needs_labels:
            values["accuracy"] = evaluate_accuracy(Features(task.logits_of(tested.features), tested.labels)).top1
        return values

    return evaluate
