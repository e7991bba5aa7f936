# SPDX-License-Identifier: Apache-2.0
"""Cascades of Table 3 and Figures 10 and 11: trained with their controls, measured once, looked at by the figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..analysis import cluster_composition, embedding_map
from ..evaluation import Features, extract_features
from ..storage import atomic_write
from ..training import TrainArguments
from ..training.assemble import build_images, evaluation_of, load_base
from .run_spec import RunSpec
from .scale import Scale

__all__ = ["RESULT_NAME", "cascade_of", "clusters_of", "maps_of", "read_result", "train_cascade"]

RESULT_NAME = "cascade_result.json"
#: What Figure 10 shows side by side.
_LABELS = ("base", "dispatcher", "cascade")


def cascade_of(scale: Scale, dataset: str) -> RunSpec:
    """The cascade of a dataset: dispatcher, experts, and at some scales the ensemble of other seeds."""
    dispatcher = scale.self_supervised("mask", dataset, **scale.choices["table3_options"].get(dataset, {}))
    options = scale.choices["cascade"]
    masks = 1 + options["experts"] * (2 if options["ensemble"] else 1)
    return RunSpec(dispatcher.arguments, cascade=options, minutes=dispatcher.minutes * masks)


def train_cascade(arguments: TrainArguments, options: Mapping[str, Any]) -> None:
    """Fit a cascade in `output_dir`, and write what its embeddings are worth and its sizes beside it.

    Raises:
        ValueError: If a cluster has fewer images than a batch.
        Interrupted: After Ctrl-C; the same call goes on.
    """
    from ..cascade import Cascade, CascadeArguments, cascade_sizes, evaluate_cascade

    folder = Path(arguments.output_dir)
    Cascade.fit(arguments, CascadeArguments(**options))
    values: dict[str, dict[str, float]] = {}
    for report in evaluate_cascade(folder, backbone=arguments.backbone):
        values.setdefault(report.metric, {})[report.label] = report.value
    result = {"values": values, "sizes": asdict(cascade_sizes(folder))}
    with atomic_write(folder / RESULT_NAME) as file:
        file.write(json.dumps(result, indent=1).encode())


def read_result(folder: Path) -> dict[str, Any]:
    """What [`train_cascade`] wrote: "values" by metric and label, "sizes" in bytes."""
    result: dict[str, Any] = json.loads((folder / RESULT_NAME).read_text("utf-8"))
    return result


def maps_of(folder: Path, backbone: str, classes: int, images: int) -> list[dict[str, Any]]:
    """Test images laid out by t-SNE under the base, the dispatcher and the whole cascade (Figure 10).

    Args:
        folder: A cascade's.
        backbone: Its base by name.
        classes: Show the first so many classes.
        images: Show at most so many images of these.
    """
    from ..cascade import Cascade

    cascade = Cascade.load(folder, backbone=backbone)
    arguments = cascade.arguments
    test = build_images(arguments).test
    assert test is not None
    assert test.labels is not None
    chosen = (test.labels < classes).nonzero().squeeze(1)
    evenly = torch.linspace(0, len(chosen) - 1, min(images, len(chosen))).long()  # a dataset may be sorted by class
    shown = test.subset(chosen[evenly].tolist())
    base = load_base(arguments)
    options: dict[str, Any] = {"batch_size": arguments.batch_size}
    features: list[Features] = [
        extract_features(base.model, shown, evaluation_of(base), **options),
        cascade.embed(shown, "dispatcher", **options),
        cascade.embed(shown, "unconditional", **options),
    ]
    found = []
    for label, part in zip(_LABELS, features, strict=True):
        layout = embedding_map(part, label, classes=None)
        points = [[round(float(value), 2) for value in point] for point in layout.points]
        found.append({"label": label, "points": points, "labels": layout.labels.tolist(), "names": test.classes})
    return found


def clusters_of(folder: Path, backbone: str) -> list[dict[str, Any]]:
    """Composition of the router's clusters on the training images (Figure 11)."""
    from ..cascade import Cascade

    cascade = Cascade.load(folder, backbone=backbone)
    images = build_images(cascade.arguments)
    features = cascade.embed(images.train, "dispatcher", batch_size=cascade.arguments.batch_size)
    assert cascade.router is not None
    labels = features.labels_for("Figure 11")
    return [asdict(row) for row in cluster_composition(cascade.router.assign(features.features), labels)]
