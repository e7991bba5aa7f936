# SPDX-License-Identifier: Apache-2.0
"""Table 2: masks learned without labels, by threshold and by topk, against the frozen base and controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .artefact import Artefact, Cell
from .run_spec import RunSpec
from .scale import Scale, Setting

__all__ = ["ARTEFACT", "methods_of"]

_COLUMNS = ("cifar10", "cifar100", "dtd", "eurosat", "flowers102", "sun397", "ucf101")

_RANKS = {"score": "topk", "absolute": "topk by |S|"}


def _row(*values: float) -> dict[str, float]:
    return dict(zip(_COLUMNS, values, strict=True))


_PAPER = {
    "k-NN": {
        "frozen base (Table 1)": _row(0.832, 0.497, 0.693, 0.754, 0.728, 0.535, 0.604),
        "topk 50 %": _row(0.891, 0.564, 0.465, 0.968, 0.403, 0.460, 0.439),
        "topk, found density": _row(0.908, 0.630, 0.671, 0.973, 0.903, 0.519, 0.572),
        "threshold": _row(0.921, 0.656, 0.674, 0.971, 0.920, 0.518, 0.549),
    },
    "Linear probe": {
        "topk 50 %": _row(0.913, 0.678, 0.536, 0.980, 0.800, 0.565, 0.548),
        "topk, found density": _row(0.940, 0.747, 0.733, 0.984, 0.985, 0.630, 0.690),
        "threshold": _row(0.950, 0.769, 0.714, 0.983, 0.983, 0.631, 0.697),
    },
    "Density": {"threshold": _row(0.914, 0.925, 0.988, 0.967, 0.986, 0.944, 0.957)},
}


def methods_of(scale: Scale, setting: Setting, dataset: str, ranks: Sequence[str]) -> dict[str, RunSpec]:
    """The runs of a dataset by the rows that they give; `ranks` are those of topk: "score", "absolute"."""
    mask = scale.run(setting, "mask", dataset)
    runs = {}
    if "statistics" in setting.methods:
        runs["BatchNorm statistics alone"] = scale.run(setting, "statistics", dataset)
    runs["full fine-tuning"] = scale.run(setting, "full", dataset)
    for rank_by in ranks:
        name = _RANKS[rank_by]
        topk = scale.run(setting, "topk", dataset, mask={"rank_by": rank_by})
        runs[f"{name} 50 %"] = topk.at(mask={"density": 0.5})
        runs[f"{name}, found density"] = replace(topk, found=mask)
    return {**runs, "threshold": mask}


def _cells(scale: Scale) -> list[Cell]:
    cells = []
    for key, ranks in scale.choices["table2"].items():
        setting = scale.unsupervised[key]
        for metric, name in (("knn", "k-NN"), ("linear_probe", "Linear probe"), ("density", "Density")):
            section = f"{setting.label}: {name}"
            for dataset in setting.datasets:
                runs = methods_of(scale, setting, dataset, ranks)
                if metric != "density":
                    mask = runs["threshold"]
                    cells.append(Cell(section, "frozen base", dataset, mask, f"frozen_{metric}"))
                    cells += [Cell(section, row, dataset, run, metric) for row, run in runs.items()]
                else:
                    cells.append(Cell(section, "threshold", dataset, runs["threshold"], metric))
    return cells


ARTEFACT = Artefact(
    "table2",
    "Table 2: masking without labels, threshold against topk",
    _cells,
    _PAPER,
    note=(
        "topk ranks raw scores, as the authors' code does, or |S|, as Ramanujan et al.; both start from scores of "
        "Kaiming's uniform distribution. Fine-tuning and statistics alone are not in the paper."
    ),
)
