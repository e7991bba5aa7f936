# SPDX-License-Identifier: Apache-2.0
"""`evaluate_run`: evaluate a saved run, or its frozen base, on any labelled dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .._options import did_you_mean
from ..backbones import Backbone
from ..evaluation import (
    PAPER_DECAY,
    EvalReport,
    Features,
    evaluate_accuracy,
    evaluate_knn,
    extract_features,
    linear_probe,
    low_shot_reports,
)
from ..objectives import list_objectives
from .arguments import TrainArguments
from .assemble import build_objective, evaluation_of
from .images import build_images
from .run import RUN_NAME, RunSummary
from .saved import load_run
from .task import TrainingTask

METRICS = ("knn", "linear_probe", "accuracy")


def evaluate_run(
    folder: str | Path,
    *,
    base: bool = False,
    backbone: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    metrics: Sequence[str] = (),
    low_shot: Sequence[float] = (),
    seeds: int = 3,
    batch_size: int | None = None,
    num_workers: int | None = None,
    limit: int | None = None,
    eval_fraction: float | None = None,
    image_size: int | None = None,
    accelerator: Accelerator | None = None,
) -> list[EvalReport]:
    """Evaluate what a run saved, on its own dataset as at the end of training; what is None is as in the run.

    Args:
        folder: The run's `output_dir`, or a folder with an adapter, whose `dataset` must then be named.
        base: Evaluate the frozen base instead; it has accuracy under zero-shot only.
        backbone: Where the base is now, if not where the folder says.
        dataset: Another dataset, as `load_images` takes it.
        split: Split to test on.
        metrics: Of `METRICS`. None given: k-NN, and accuracy where there is a classifier.
        low_shot: Fractions of the labels to fit linear probes on, over `seeds` seeds each.
        seeds: Number of seeds.
        batch_size: Images per forward.
        num_workers: Processes that read images.
        limit: Use a seeded choice of at most this many images on either side.
        eval_fraction: Test on this part of the training split's images, held out as in training.
        image_size: Another side of the images than in training; a warning says so.
        accelerator: Names the device and shares the work; None: a new one.
    """
    check_metrics(metrics)
    if wrong := [fraction for fraction in low_shot if not 0 < fraction <= 1]:
        raise ValueError(f"A low-shot fraction must lie in (0, 1]; got {wrong[0]}: 10 % of the labels is 0.1.")
    counts = {"seeds": seeds, "limit": limit, "batch_size": batch_size, "image_size": image_size}
    for what, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{what} must be at least 1; got {count}.")
    run, loaded = load_run(folder, base=base, backbone=backbone, image_size=image_size)
    facts = RunSummary.load(folder).arguments if run is not None else {}
    arguments = evaluation_arguments(run, loaded, Path(folder), dataset, split, limit, eval_fraction)
    zero_shot = run is not None and run.objective == "zero_shot"
    has_head = facts.get("head_classes") is not None
    chosen = list(dict.fromkeys(metrics))
    if not chosen and not low_shot:
        same = run is not None and arguments.dataset == run.dataset
        chosen = ["knn", "accuracy"] if zero_shot or (has_head and same) else ["knn"]
    if base and has_head:
        chosen = [name for name in chosen if name != "accuracy"]
    if "accuracy" in chosen and not (zero_shot or has_head):
        raise ValueError(f"{folder} holds no classifier, so there is no accuracy: take knn or linear_probe.")
    if not chosen and not low_shot:
        raise ValueError("The frozen base has no head of its own, so no accuracy: take knn or linear_probe.")
    images = build_images(arguments)
    assert images.bank is not None
    assert images.test is not None
    accelerator = accelerator or Accelerator(cpu=arguments.cpu)
    loaded.model.to(accelerator.device)
    extract = partial(
        extract_features,
        loaded.model,
        transform=evaluation_of(loaded),
        batch_size=batch_size or arguments.batch_size,
        num_workers=arguments.num_workers if num_workers is None else num_workers,
        accelerator=accelerator,
    )
    settings = {
        "backbone": loaded.name,
        "adapt": "none" if base else run.adapt if run else "mask",
        "training_images": len(images.bank),
        "test_images": len(images.test),
    }
    label = f"{loaded.name} (frozen)" if base else Path(folder).resolve().name
    if "accuracy" in chosen:
        if not zero_shot and facts.get("classes") != images.train.classes:
            other = f"for other classes than those of {arguments.dataset}"
            raise ValueError(f"The head of {folder} was trained {other}: take knn or linear_probe.")
        kind = replace(arguments, objective="zero_shot" if zero_shot else "cross_entropy", objective_options={})
        objective = build_objective(kind, loaded, images.num_classes, images.train.classes)
        task = TrainingTask(loaded.model, objective.to(accelerator.device))
    test = extract(dataset=images.test)
    if low_shot or chosen != ["accuracy"]:
        bank = extract(dataset=images.bank)
    reports = []
    for metric in chosen:
        more: dict[str, Any] = {}
        if metric == "knn":
            value, more = evaluate_knn(bank, test, k=arguments.knn_k), {"k": arguments.knn_k}
        elif metric == "linear_probe":
            value = linear_probe(bank, test, seed=arguments.subset_seed)
        else:
            value = evaluate_accuracy(Features(task.logits_of(test.features), test.labels))
        facts = {**settings, **more}
        reports.append(EvalReport.of(images.test, label=label, metric=metric, values=(value,), settings=facts))
    for fraction in dict.fromkeys(low_shot):
        per_class = fraction * len(bank) / (images.num_classes or 1)
        options: dict[str, Any] = {"decays": [PAPER_DECAY]} if per_class < 1.5 else {}  # none left to choose on
        where: dict[str, Any] = {name: getattr(images.test, name) for name in ("split", "revision")}
        where |= {"dataset": images.test.name, "label": label, "metric": f"linear_probe@{fraction:g}"}
        more = {"seeds": range(seeds), "probe": options, "settings": settings}
        reports += low_shot_reports(bank, test, fractions=[fraction], **more, **where)
    return reports


def check_metrics(metrics: Sequence[str], known: Sequence[str] = METRICS) -> None:
    """Raise ValueError for a metric that is not known, naming those that are."""
    for name in metrics:
        if name not in known:
            raise ValueError(f"Unknown metric {name!r}; there are {', '.join(known)}.{did_you_mean(name, known)}")


def evaluation_arguments(
    run: TrainArguments | None,
    loaded: Backbone,
    folder: Path,
    dataset: str | None,
    split: str | None,
    limit: int | None,
    eval_fraction: float | None = None,
) -> TrainArguments:
    """Arguments that name the images to evaluate a run on: its own, or another dataset read as a fresh run would."""
    if run is None:
        if dataset is None:
            raise ValueError(f"{folder} has no {RUN_NAME} that says what it was trained on: name a dataset.")
        arguments = TrainArguments(backbone=loaded.name, dataset=dataset, objective="swav")
    elif dataset is None or dataset == run.dataset:
        arguments = run
    else:
        fresh = TrainArguments(backbone=run.backbone, dataset=dataset)
        own = "dataset_revision image_column label_column train_split eval_split eval_fraction templates".split()
        own += ["limit", "class_limit"]
        arguments = replace(run, dataset=dataset, **{name: getattr(fresh, name) for name in own})
    changes: dict[str, Any] = {"fraction": 1.0, "indices_file": None}
    changes["eval_split"] = split or arguments.eval_split or "test"
    if split is not None or eval_fraction is not None:
        changes["eval_fraction"] = eval_fraction
    if arguments.objective not in list_objectives():
        changes["objective"] = "swav"  # evaluation takes none: a user's own may be gone
    if limit is not None:
        changes |= {"eval_limit": limit, "knn_limit": limit}
    return replace(arguments, **changes)
