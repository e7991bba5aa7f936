# SPDX-License-Identifier: Apache-2.0
"""Ablations that the paper lacks: σ, its gradient, the BatchNorm policy, bf16 scores, learning rate and density."""

from __future__ import annotations

from collections.abc import Sequence

from .artefact import Artefact, Cell
from .run_spec import RunSpec
from .scale import Scale

__all__ = ["ARTEFACT"]


def _variants(run: RunSpec, rates: Sequence[float], *, statistics: bool) -> dict[str, RunSpec]:
    lr = run.arguments["lr"]
    variants = {
        "as it is": run,
        "no σ": run.at(mask={"scale": False}),
        "σ without gradient": run.at(mask={"scale_gradient": False}),
        "scores and momentum in bf16": run.at(score_dtype="bfloat16"),
    }
    if statistics:
        adapting = run.arguments.get("mask", {}).get("batch_norm") == "adapt"
        name, policy = ("held", "frozen") if adapting else ("adapting", "adapt")
        variants[f"BatchNorm statistics {name}"] = run.at(mask={"batch_norm": policy})
    return variants | {f"learning rate × {rate:g}": run.at(lr=rate * lr) for rate in rates}


def _cells(scale: Scale) -> list[Cell]:
    dataset, rates, cells = scale.choices["ablations"], scale.choices["ablations_rates"], []
    settings = {
        "with labels": (scale.supervised[scale.resnet], "accuracy"),
        "without labels": (scale.unsupervised[scale.varied], "knn"),
    }
    for kind in scale.choices["ablations_kinds"]:
        setting, metric = settings[kind]
        run = scale.run(setting, "mask", dataset)
        for row, variant in _variants(run, rates, statistics=setting.has_statistics).items():
            for name in (metric, "density"):
                cells.append(Cell(f"{setting.label}, {kind}", row, name, variant, name))
    return cells


ARTEFACT = Artefact("ablations", "Ablations that the paper lacks", _cells)
