# SPDX-License-Identifier: Apache-2.0
"""The paper's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from ..analysis.compression import adapter_compression, format_compression
from ..training.run import MODEL_NAME
from .artefact import Cell, artefact
from .runs import RunSpec, RunStore
from .scales import Scale, Setting

_METRICS = (("knn", "k-NN"), ("linear_probe", "Linear probe"), ("density", "Density"))


def frozen_cells(section: str, column: str, run: RunSpec) -> list[Cell]:
    """The frozen base, as far as a run evaluates it."""
    cells = [
        Cell(section, "k-NN, frozen base", column, run, "frozen_knn"),
        Cell(section, "linear probe, frozen base", column, run, "frozen_linear_probe"),
    ]
    return cells if run.arguments.get("eval_probe") else cells[:1]


@artefact("table1")
def _table1(scale: Scale) -> list[Cell]:
    methods = {
        "full": "full fine-tuning",
        "statistics": "new head, BatchNorm statistics alone",
        "mask_sgd": "mask, SGD and a random head",
        "mask": "mask",
    }
    cells = []
    for setting in scale.supervised.values():
        rows = {row: method for method, row in methods.items() if method in setting.methods}
        columns = [(dataset, dataset, "accuracy") for dataset in setting.datasets]
        columns += [(f"file, {dataset}", dataset, "bytes") for dataset in setting.datasets[:1]]
        for column, dataset, metric in columns:
            if metric == "accuracy":
                cells += frozen_cells(setting.label, dataset, scale.run(setting, "mask", dataset))
            for row, method in rows.items():
                cells.append(Cell(setting.label, row, column, scale.run(setting, method, dataset), metric))
    return cells


@artefact("table2")
def _table2(scale: Scale) -> list[Cell]:
    cells = []
    for key, ranks in scale.choices["table2"].items():
        setting = scale.unsupervised[key]
        for metric, name in _METRICS:
            section = f"{setting.label}: {name}"
            for dataset in setting.datasets:
                mask = scale.run(setting, "mask", dataset)
                if metric != "density":
                    cells.append(Cell(section, "frozen base", dataset, mask, f"frozen_{metric}"))
                    controls = _controls(scale, setting, dataset, mask, ranks)
                    cells += [Cell(section, row, dataset, run, metric) for row, run in controls.items()]
                cells.append(Cell(section, "threshold", dataset, mask, metric))
    return cells


def _controls(scale: Scale, setting: Setting, dataset: str, mask: RunSpec, ranks: Sequence[str]) -> dict[str, RunSpec]:
    methods = {"statistics": "BatchNorm statistics alone", "full": "full fine-tuning"}
    runs = {row: scale.run(setting, name, dataset) for name, row in methods.items() if name in setting.methods}
    for rank_by in ranks:
        name = {"score": "topk", "absolute": "topk by |S|"}[rank_by]
        topk = scale.run(setting, "topk", dataset, mask={"rank_by": rank_by})
        runs[f"{name} 50 %"] = topk.at(mask={"density": 0.5})
        runs[f"{name}, found density"] = replace(topk, found=mask)
    return runs


@artefact("table3")
def _table3(scale: Scale) -> list[Cell]:
    rows = ["dispatcher", "dispatcher, whitened", "cascade, conditional", "cascade, unconditional"]
    options = scale.choices["cascade"]
    if options["ensemble"]:
        rows.append(f"dispatchers of {options['experts'] + 1} seeds")
    runs = {dataset: scale.cascade(dataset) for dataset in scale.choices["table3"]}
    places = [(name, row, f"cascade_{metric}@{row}") for metric, name in _METRICS[:2] for row in rows]
    sizes = {"masks": "masks", "total": "all files", "paper": "(K + 1) β/32, as the paper counts"}
    places += [("Storage", row, f"cascade_bytes@{part}") for part, row in sizes.items()]
    return [Cell(name, row, dataset, run, metric) for name, row, metric in places for dataset, run in runs.items()]


@artefact("table5")
def _table5(scale: Scale) -> list[Cell]:
    cells = []
    for dataset in scale.choices["table5"]:
        run = scale.run(scale.varied, "mask", dataset)
        rows = run.arguments["batch_size"] + run.arguments["objective_options"]["queue_length"]
        for number in scale.choices["table5_prototypes"]:
            options = {"prototypes": number, **({"allow_few_rows": True} if number > rows else {})}
            varied = run.at(objective_options=options)
            cells.append(Cell(f"(a) Prototypes, {scale.varied.label}", str(number), dataset, varied, "knn"))
        for setting in (each for each in scale.unsupervised.values() if dataset in each.datasets):
            run = scale.run(setting, "mask", dataset)
            for row, metric in (("frozen base", "frozen_knn"), ("mask", "knn")):
                cells.append(Cell("(c) Initialisation", f"{setting.label}: {row}", dataset, run, metric))
    return cells


def _compressed(store: RunStore, cells: Sequence[Cell], seeds: Sequence[int]) -> Any:
    """A mask and fully fine-tuned weights under compressors."""
    mask, full = (store.path(cells[i].run.seeded(seeds[0])) for i in (0, -1))
    table = adapter_compression(mask, full / MODEL_NAME)
    return {**asdict(table), "markdown": format_compression(table)}


def _compression_cells(name: str, scale: Scale) -> list[Cell]:
    key, dataset = scale.choices[name]
    setting = scale.unsupervised[key]
    mask, full = (scale.run(setting, method, dataset) for method in ("mask", "full"))
    return [
        Cell("", f"{setting.label}: mask", "file", mask, "bytes"),
        Cell("", f"{setting.label}: mask", "density", mask, "density"),
        Cell("", f"{setting.label}: full fine-tuning", "file", full, "bytes"),
    ]


for _name in ("table6", "table7"):
    artefact(_name, details=_compressed, seeds=1)(partial(_compression_cells, _name))


@artefact("table8")
def _table8(scale: Scale) -> list[Cell]:
    return [
        Cell("", f"{setting.label}{name}", dataset, scale.run(setting, method, dataset), "density")
        for setting in scale.supervised.values()
        for method, name in (("mask", ""), ("mask_sgd", ", SGD and a random head"))
        if method in setting.methods
        for dataset in setting.datasets
    ]


@artefact("table9")
def _table9(scale: Scale) -> list[Cell]:
    cells = []
    for metric, name in _METRICS:
        for dataset in scale.choices["table9"]:
            mask = scale.run(scale.varied, "mask", dataset)
            topk = replace(scale.run(scale.varied, "topk", dataset, mask={"rank_by": "score"}), found=mask)
            progressive = topk.at(mask={"density_schedule": "linear"})
            runs = {"topk, progressive": progressive, "topk, found density": topk, "threshold": mask}
            cells += [Cell(f"{scale.varied.label}: {name}", row, dataset, run, metric) for row, run in runs.items()]
    return cells


@artefact("table10", seeds=5, each_seed=True)
def _table10(scale: Scale) -> list[Cell]:
    datasets = scale.choices["table10"]
    return [Cell("", dataset, "k-NN", scale.run(scale.main, "mask", dataset), "knn") for dataset in datasets]
