# SPDX-License-Identifier: Apache-2.0
"""The paper's tables, and the ablations that it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ..analysis.compression import adapter_compression, format_compression
from ..training.run import MODEL_NAME
from .artefact import Artefact, Cell, artefact
from .runs import RunSpec, RunStore
from .scales import Scale, Setting

__all__ = ["ABLATIONS", "TABLES", "frozen_cells"]

_METRICS = (("knn", "k-NN"), ("linear_probe", "Linear probe"), ("density", "Density"))


def frozen_cells(section: str, column: str, run: RunSpec) -> list[Cell]:
    """The frozen base, as far as a run evaluates it."""
    rows = {"frozen_knn": "k-NN, frozen base", "frozen_linear_probe": "linear probe, frozen base"}
    shown = list(rows) if run.arguments.get("eval_probe") else ["frozen_knn"]
    return [Cell(section, rows[metric], column, run, metric) for metric in shown]


@artefact(
    "table1",
    "Table 1: masking with labels",
    note=(
        "Accuracy on the test images. Files hold the head too. The paper's fine-tuning of CLIP is another paper's and "
        "is not run; LoRA, the linear probe and statistics alone are not in the paper."
    ),
)
def _table1(scale: Scale) -> list[Cell]:
    methods = {
        "full": "full fine-tuning",
        "lora": "LoRA of at most the mask's bytes",
        "statistics": "new head, BatchNorm statistics alone",
        "mask_sgd": "mask, SGD and a random head",
        "mask": "mask",
    }
    cells = []
    for setting in scale.supervised.values():
        rows = {method: row for method, row in methods.items() if method in setting.methods}
        for dataset in setting.datasets:
            cells += frozen_cells(setting.label, dataset, scale.run(setting, "mask", dataset))
            for method, row in rows.items():
                cells.append(Cell(setting.label, row, dataset, scale.run(setting, method, dataset), "accuracy"))
        first = setting.datasets[0]
        for method, row in rows.items():
            cells.append(Cell(setting.label, row, f"file, {first}", scale.run(setting, method, first), "bytes"))
    return cells


@artefact(
    "table2",
    "Table 2: masking without labels, threshold against topk",
    note=(
        "topk ranks raw scores, as the authors' code does, or |S|, as Ramanujan et al.; both start from scores of "
        "Kaiming's uniform distribution. Fine-tuning and statistics alone are not in the paper."
    ),
)
def _table2(scale: Scale) -> list[Cell]:
    cells = []
    for key, ranks in scale.choices["table2"].items():
        setting = scale.unsupervised[key]
        for metric, name in _METRICS:
            section = f"{setting.label}: {name}"
            for dataset in setting.datasets:
                runs = _table2_runs(scale, setting, dataset, ranks)
                if metric == "density":
                    runs = {"threshold": runs["threshold"]}
                else:
                    cells.append(Cell(section, "frozen base", dataset, runs["threshold"], f"frozen_{metric}"))
                cells += [Cell(section, row, dataset, run, metric) for row, run in runs.items()]
    return cells


def _table2_runs(scale: Scale, setting: Setting, dataset: str, ranks: Sequence[str]) -> dict[str, RunSpec]:
    mask, runs = scale.run(setting, "mask", dataset), {}
    if "statistics" in setting.methods:
        runs["BatchNorm statistics alone"] = scale.run(setting, "statistics", dataset)
    runs["full fine-tuning"] = scale.run(setting, "full", dataset)
    for rank_by in ranks:
        name = {"score": "topk", "absolute": "topk by |S|"}[rank_by]
        topk = scale.run(setting, "topk", dataset, mask={"rank_by": rank_by})
        runs[f"{name} 50 %"] = topk.at(mask={"density": 0.5})
        runs[f"{name}, found density"] = replace(topk, found=mask)
    return {**runs, "threshold": mask}


@artefact(
    "table3",
    "Table 3: cascades",
    note="Whitening the dispatcher alone, and as many dispatchers of other seeds, are not in the paper.",
)
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


@artefact(
    "table5",
    "Table 5: prototypes, initialisation",
    note=(
        "k-NN. (b), masked norms, is not reproduced: they ruin a model. More prototypes than batch and queue have "
        "rows are refused elsewhere; here they are trained, as the paper did. At the small scale the initialisations "
        "are two networks."
    ),
)
def _table5(scale: Scale) -> list[Cell]:
    cells, label = [], scale.unsupervised[scale.varied].label
    for dataset in scale.choices["table5"]:
        run = scale.variation("mask", dataset)
        rows = run.arguments["batch_size"] + run.arguments["objective_options"]["queue_length"]
        for number in scale.choices["table5_prototypes"]:
            options = {"prototypes": number, **({"allow_few_rows": True} if number > rows else {})}
            varied = run.at(objective_options=options)
            cells.append(Cell(f"(a) Prototypes, {label}", str(number), dataset, varied, "knn"))
        for key in scale.choices["table5_initialisations"]:
            setting = scale.unsupervised[key]
            run = scale.run(setting, "mask", dataset)
            for row, metric in (("frozen base", "frozen_knn"), ("mask", "knn")):
                cells.append(Cell("(c) Initialisation", f"{setting.label}: {row}", dataset, run, metric))
    return cells


def _compression(name: str, title: str) -> Artefact:
    """A mask and fully fine-tuned weights under compressors."""

    @artefact(
        name,
        title,
        note=(
            "First seed. The paper's reductions of masks fit its own fractions of fp32 only if a mask before "
            "compression counts two bits for each weight; here a packed mask counts one."
        ),
        details=_compressed,
        seeds=1,
    )
    def table(scale: Scale) -> list[Cell]:
        key, dataset = scale.choices[name]
        setting = scale.unsupervised[key]
        mask, full = (scale.run(setting, method, dataset) for method in ("mask", "full"))
        return [
            Cell("", f"{setting.label}: mask", "file", mask, "bytes"),
            Cell("", f"{setting.label}: mask", "density", mask, "density"),
            Cell("", f"{setting.label}: full fine-tuning", "file", full, "bytes"),
        ]

    return table


def _compressed(store: RunStore, cells: Sequence[Cell], seeds: Sequence[int]) -> Any:
    mask, full = (cells[i].run.seeded(seeds[0]) for i in (0, -1))
    if store.failure(mask) is not None or store.failure(full) is not None:
        return None
    table = adapter_compression(store.path(mask), store.path(full) / MODEL_NAME)
    return {**asdict(table), "markdown": format_compression(table)}


@artefact(
    "table8",
    "Table 8: densities found with labels",
)
def _table8(scale: Scale) -> list[Cell]:
    return [
        Cell("", f"{setting.label}{name}", dataset, scale.run(setting, method, dataset), "density")
        for setting in scale.supervised.values()
        for method, name in (("mask", ""), ("mask_sgd", ", SGD and a random head"))
        if method in setting.methods
        for dataset in setting.datasets
    ]


@artefact(
    "table9",
    "Table 9: progressive topk",
)
def _table9(scale: Scale) -> list[Cell]:
    cells, label = [], scale.unsupervised[scale.varied].label
    for metric, name in _METRICS:
        for dataset in scale.choices["table9"]:
            mask = scale.variation("mask", dataset)
            topk = replace(scale.variation("topk", dataset, mask={"rank_by": "score"}), found=mask)
            progressive = topk.at(mask={"density_schedule": "linear"})
            runs = {"topk, progressive": progressive, "topk, found density": topk, "threshold": mask}
            cells += [Cell(f"{label}: {name}", row, dataset, run, metric) for row, run in runs.items()]
    return cells


@artefact(
    "table10",
    "Table 10: five runs",
    seeds=5,
    each_seed=True,
)
def _table10(scale: Scale) -> list[Cell]:
    datasets = scale.choices["table10"]
    return [Cell("", dataset, "k-NN", scale.self_supervised("mask", dataset), "knn") for dataset in datasets]


@artefact("ablations", "Ablations that the paper lacks")
def _ablations(scale: Scale) -> list[Cell]:
    cells, settings = (
        [],
        {
            "with labels": (scale.supervised[scale.resnet], "accuracy"),
            "without labels": (scale.unsupervised[scale.varied], "knn"),
        },
    )
    for kind in scale.choices["ablations_kinds"]:
        setting, metric = settings[kind]
        run = scale.run(setting, "mask", scale.choices["ablations"])
        variants = {
            "as it is": run,
            "no σ": run.at(mask={"scale": False}),
            "σ without gradient": run.at(mask={"scale_gradient": False}),
            "scores and momentum in bf16": run.at(score_dtype="bfloat16"),
        }
        if "statistics" in setting.methods:
            adapting = run.arguments.get("mask", {}).get("batch_norm") == "adapt"
            name, policy = ("held", "frozen") if adapting else ("adapting", "adapt")
            variants[f"BatchNorm statistics {name}"] = run.at(mask={"batch_norm": policy})
        for rate in scale.choices["ablations_rates"]:
            variants[f"learning rate × {rate:g}"] = run.at(lr=rate * run.arguments["lr"])
        for row, variant in variants.items():
            for name in (metric, "density"):
                cells.append(Cell(f"{setting.label}, {kind}", row, name, variant, name))
    return cells


TABLES = (
    _table1,
    _table2,
    _table3,
    _table5,
    _compression("table6", "Table 6: compression, CIFAR-100 in the paper"),
    _compression("table7", "Table 7: compression, SUN397 in the paper"),
    _table8,
    _table9,
    _table10,
)
ABLATIONS = _ablations
