# SPDX-License-Identifier: Apache-2.0
"""`evaluate_cascade`: dispatcher, whitened dispatcher, cascade in both modes and ensemble of seeds, as reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..evaluation import EvalReport, Features, evaluate_knn, linear_probe
from ..training.assemble import build_images
from ..training.saved import check_metrics, evaluation_arguments
from .cascade import ENSEMBLE, Cascade, Mode
from .folder import CASCADE_NAME

METRICS = ("knn", "linear_probe")
_LABELS: dict[Mode, str] = {
    "dispatcher": "dispatcher",
    "whitened": "dispatcher, whitened",
    "conditional": "cascade, conditional",
    "unconditional": "cascade, unconditional",
}


def evaluate_cascade(
    folder: str | Path,
    *,
    backbone: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    metrics: Sequence[str] = METRICS,
    batch_size: int | None = None,
    num_workers: int | None = None,
    limit: int | None = None,
    accelerator: Accelerator | None = None,
) -> list[EvalReport]:
    """Evaluate every embedding of a saved cascade (Table 3), beside the controls that the paper lacks.

    These are the dispatcher's features whitened in the same way, and, where one was trained in the folder, the
    ensemble of as many dispatchers with other seeds. The linear probes see features of mean 0 and standard deviation
    1, so that the scale that whitening gives does not act as another decay.

    `backbone` is where the base is now, if not where the folder says; `dataset`, `split`, `batch_size` and
    `num_workers` are by default the dispatcher's; `limit` takes a seeded choice of so many images on either side.
    """
    check_metrics(metrics, METRICS)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}.")
    folder = Path(folder)
    cascade = Cascade.load(folder, backbone=backbone)
    arguments = evaluation_arguments(cascade.arguments, cascade.backbone, folder, dataset, split, limit)
    images = build_images(arguments)
    assert images.bank is not None
    assert images.test is not None
    options: dict[str, Any] = {
        "batch_size": batch_size or arguments.batch_size,
        "num_workers": arguments.num_workers if num_workers is None else num_workers,
        "accelerator": accelerator or Accelerator(cpu=arguments.cpu),
    }
    bank, test = (cascade.embed_all(part, **options) for part in (images.bank, images.test))
    rows: dict[str, tuple[Features, Features]] = {_LABELS[mode]: (bank[mode], test[mode]) for mode in cascade.modes}
    if (folder / ENSEMBLE / CASCADE_NAME).is_file():
        ensemble = Cascade.load(folder / ENSEMBLE, backbone=backbone)
        both = [ensemble.embed(part, "unconditional", **options) for part in (images.bank, images.test)]
        rows[f"dispatchers of {len(ensemble.adapters)} seeds"] = both[0], both[1]
    settings = {
        "backbone": cascade.backbone.name,
        "experts": len(cascade.adapters) - 1,
        "router": cascade.router.kind if cascade.router is not None else None,
        "training_images": len(images.bank),
        "test_images": len(images.test),
    }
    found = []
    for metric in dict.fromkeys(metrics):
        for label, (train, held) in rows.items():
            if metric == "knn":
                value, more = evaluate_knn(train, held, k=arguments.knn_k), {"k": arguments.knn_k}
            else:
                value = linear_probe(train, held, seed=arguments.subset_seed, standardise=True)
                more = {"standardised": True}
            mine = {**settings, "dim": train.features.shape[1], **more}
            found.append(EvalReport.of(images.test, label=label, metric=metric, values=(value,), settings=mine))
    return found
