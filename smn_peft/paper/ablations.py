# SPDX-License-Identifier: Apache-2.0
"""Ablations that the paper lacks: σ, its gradient, the BatchNorm policy, and the learning rate against the density."""

from __future__ import annotations

from .artefact import Artefact, Cell
from .run_spec import RunSpec
from .scale import Scale

__all__ = ["ARTEFACT"]

_RATES = (0.25, 0.5, 2.0, 4.0)


def _variants(run: RunSpec, *, statistics: bool) -> dict[str, RunSpec]:
    lr = run.arguments["lr"]
    variants = {
        "as it is": run,
        "no σ": run.at(mask={"scale": False}),
        "σ without gradient": run.at(mask={"scale_gradient": False}),
    }
    if statistics:
        adapting = run.arguments.get("mask", {}).get("batch_norm") == "adapt"
        name, policy = ("held", "frozen") if adapting else ("adapting", "adapt")
        variants[f"BatchNorm statistics {name}"] = run.at(mask={"batch_norm": policy})
    return variants | {f"learning rate × {rate:g}": run.at(lr=rate * lr) for rate in _RATES}


def _cells(scale: Scale) -> list[Cell]:
    dataset, cells = scale.choices["ablations"], []
    for setting, kind, metric in (
        (scale.supervised[scale.resnet], "with labels", "accuracy"),
        (scale.unsupervised[scale.varied], "without labels", "knn"),
    ):
        run = scale.run(setting, "mask", dataset)
        for row, variant in _variants(run, statistics=setting.has_statistics).items():
            for name in (metric, "density"):
                cells.append(Cell(f"{setting.label}, {kind}", row, name, variant, name))
    return cells


ARTEFACT = Artefact("ablations", "Ablations that the paper lacks", _cells)
