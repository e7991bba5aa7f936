# SPDX-License-Identifier: Apache-2.0
"""Figure 8: masks on the first stages only, and on a random share of every tensor's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .artefact import Artefact, Cell
from .run_spec import RunSpec
from .scale import Scale
from .selective import draw_shares
from .store import RunStore

__all__ = ["ARTEFACT"]

_STAGES, _RANDOM = "first stages", "random"


def _stages(scale: Scale) -> dict[int, RunSpec]:
    dataset = scale.choices["figure8"]
    return {count: scale.variation("mask", dataset, mask_stages=count) for count in scale.choices["figure8_stages"]}


def _cells(scale: Scale) -> list[Cell]:
    dataset = scale.choices["figure8"]
    whole, where = scale.variation("mask", dataset), scale.unsupervised[scale.varied].label
    cells = [Cell(where, "frozen base", "k-NN", whole, "frozen_knn"), Cell(where, "all weights", "k-NN", whole, "knn")]
    cells += [Cell(where, f"{_STAGES}: {count}", "k-NN", run, "knn") for count, run in _stages(scale).items()]
    for share in scale.choices["figure8_shares"]:
        run = scale.variation("mask", dataset, mask={"trainable_fraction": share})
        cells.append(Cell(where, f"{_RANDOM}: {100 * share:g} %", "k-NN", run, "knn"))
    return cells


def _details(store: RunStore, scale: Scale, seeds: Sequence[int]) -> Any:
    """Share of the weights that the first stages have, from the sizes of their packed masks."""
    seed, shares = seeds[0], {}
    whole = scale.variation("mask", scale.choices["figure8"]).seeded(seed)
    if store.failure(whole) is not None:
        return {}
    for count, run in _stages(scale).items():
        if store.failure(run.seeded(seed)) is None:
            sizes = [store.summary(spec).sizes["mask"] for spec in (run.seeded(seed), whole)]
            shares[f"{_STAGES}: {count}"] = sizes[0] / sizes[1]
    return shares


def _draw(record: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    return [draw_shares(record, folder / f"{stem}.png", record["details"])]


ARTEFACT = Artefact(
    "figure8",
    "Figure 8: the first stages, or a random share of the weights",
    _cells,
    {
        "CIFAR-10, k-NN, read off the figure": {
            "first stages: 1": {"k-NN": 0.79},
            "first stages: 2": {"k-NN": 0.853},
            "first stages: 3": {"k-NN": 0.919},
            "all weights": {"k-NN": 0.921},
            "random: 0.9 %": {"k-NN": 0.647},
            "random: 10 %": {"k-NN": 0.863},
            "random: 50 %": {"k-NN": 0.918},
        }
    },
    details=_details,
    draw=_draw,
)
