# SPDX-License-Identifier: Apache-2.0
"""Figure 5: the loss under equivalent hyper-parameters (Theorems 1 and 2), and with one of them changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..analysis import Series, mean_curve, plot_curves
from ..training.metrics import METRICS_NAME, read_metrics
from .artefact import Artefact, Cell
from .run_spec import RunSpec
from .scale import Scale
from .store import RunStore

__all__ = ["ARTEFACT"]

#: (factor of the learning rate λ, initial score S⁰, threshold μ).
_EQUIVALENT = ((1.0, 1.0, 0.0), (2.0, 2.5, 0.5))
_CHANGED = ((2.0, 1.0, 0.0), (1.0, 2.0, 0.0), (1.0, 1.0, 0.5))


def _runs(scale: Scale) -> dict[tuple[float, float, float], RunSpec]:
    setting = scale.supervised[scale.resnet]
    run = scale.run(setting, scale.choices["figure5_method"], scale.choices["figure5"])
    return {
        (factor, score, threshold): run.at(
            lr=factor * run.arguments["lr"], mask={"init_score": score, "threshold": threshold}
        )
        for factor, score, threshold in (*_EQUIVALENT, *_CHANGED)
    }


def _name(lr: float, score: float, threshold: float) -> str:
    return f"λ = {lr:g}, S⁰ = {score:g}, μ = {threshold:g}"


def _cells(scale: Scale) -> list[Cell]:
    cells = []
    for (_, score, threshold), run in _runs(scale).items():
        row = _name(run.arguments["lr"], score, threshold)
        for metric, column in (("loss", "last loss"), ("density", "density"), ("accuracy", "accuracy")):
            cells.append(Cell("", row, column, run, metric))
    return cells


def _details(store: RunStore, scale: Scale, seeds: Sequence[int]) -> dict[str, Any]:
    curves = {}
    for (_, score, threshold), run in _runs(scale).items():
        lines = [read_metrics(store.path(run.seeded(seed)) / METRICS_NAME) for seed in seeds]
        curves[_name(run.arguments["lr"], score, threshold)] = [
            [[line["step"], line["loss"]] for line in seed if line.get("loss") is not None] for seed in lines
        ]
    return curves


def _draw(record: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    lines: list[Series] = [
        mean_curve(name, [{float(step): loss for step, loss in seed} for seed in seeds])
        for name, seeds in record["details"].items()
    ]
    path = folder / f"{stem}.png"
    standard, count = lines[0], len(_EQUIVALENT)
    plot_curves({"Equivalent": lines[:count], "One of them changed": [standard, *lines[count:]]}, path)
    return [path]


ARTEFACT = Artefact(
    "figure5",
    "Figure 5: equivalent hyper-parameters",
    _cells,
    note=(
        "The first two rows are equivalent by Theorems 1 and 2, and so are the third and the last. On one machine "
        "without randomness they are the same runs up to rounding."
    ),
    details=_details,
    draw=_draw,
    seeds=1,
)
