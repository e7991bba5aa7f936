# SPDX-License-Identifier: Apache-2.0
"""The paper's figures; ablations, and the small recipe against the paper's, which it lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..analysis import masks, plots
from ..cascade import Cascade
from ..evaluation import extract_features
from ..training import load_masks
from ..training.assemble import build_images, evaluation_of, load_base
from ..training.metrics import METRICS_NAME, read_metrics
from .artefact import Cell, Record, artefact, by_section
from .runs import RunSpec, RunStore
from .scales import Scale, Setting
from .tables import frozen_cells


def picture(stem: Path, plot: Callable[..., Any], data: Any, **options: Any) -> list[Path]:
    """Draw one picture, unless there is nothing to show."""
    if not data:
        return []
    path = Path(f"{stem}.png")
    plot(data, path, **options)
    return [path]


def mean_lines(cells: Sequence[Mapping[str, Any]]) -> list[plots.Series]:
    """A line per row: percent over the number that the column begins with, averaged over the seeds."""
    rows: dict[str, dict[float, list[float]]] = {}
    for cell in cells:
        if None not in cell["values"]:
            rows.setdefault(cell["row"], {})[float(cell["column"].split()[0])] = cell["values"]
    lines = []
    for row, points in rows.items():
        seeds = range(min(map(len, points.values())))
        lines.append(plots.mean_curve(row, [{x: 100 * y[seed] for x, y in points.items()} for seed in seeds]))
    return lines


# Factor of the learning rate λ, initial score S⁰, threshold μ; the first two are equivalent.
_HYPERPARAMETERS = ((1.0, 1.0, 0.0), (2.0, 2.5, 0.5), (2.0, 1.0, 0.0), (1.0, 2.0, 0.0), (1.0, 1.0, 0.5))


def _losses(store: RunStore, cells: Sequence[Cell], seeds: Sequence[int]) -> dict[str, Any]:
    """Steps and losses by row and seed."""
    curves = {}
    for row, run in {cell.row: cell.run for cell in cells}.items():
        logs = [read_metrics(store.path(run.seeded(seed)) / METRICS_NAME) for seed in seeds]
        curves[row] = [[[line["step"], line["loss"]] for line in log if line.get("loss") is not None] for log in logs]
    return curves


def _draw_losses(record: Record, stem: Path) -> list[Path]:
    lines = [
        plots.mean_curve(name, [{float(step): loss for step, loss in seed} for seed in seeds])
        for name, seeds in record["details"].items()
    ]
    panels = {"Equivalent": lines[:2], "One of them changed": [lines[0], *lines[2:]]}
    return picture(stem, plots.plot_curves, panels)


@artefact("figure5", details=_losses, draw=_draw_losses, seeds=1)
def _figure5(scale: Scale) -> list[Cell]:
    dataset, method = scale.choices["figure5"]
    run, cells = scale.run(scale.resnet, method, dataset), []
    for factor, score, threshold in _HYPERPARAMETERS:
        lr = factor * run.arguments["lr"]
        varied = run.at(lr=lr, mask={"init_score": score, "threshold": threshold})
        for metric, column in (("loss", "last loss"), ("density", "density"), ("accuracy", "accuracy")):
            cells.append(Cell("", f"λ = {lr:g}, S⁰ = {score:g}, μ = {threshold:g}", column, varied, metric))
    return cells


def _averaged_densities(store: RunStore, cells: Sequence[Cell], seeds: Sequence[int]) -> dict[str, Any]:
    """Density of every layer by row, over datasets and seeds."""
    rows: dict[str, list[list[masks.LayerDensity]]] = {cell.row: [] for cell in cells}
    for cell in cells:
        for spec in map(cell.run.seeded, seeds):
            loaded = load_masks(store.path(spec), backbone=spec.backbone)
            body = {name: mask for name, mask in loaded.items() if not name.startswith("head.")}
            rows[cell.row].append(masks.layer_densities(body))  # a head's size is its dataset's
    return {row: [asdict(one) for one in masks.average_densities(runs)] for row, runs in rows.items()}


def _draw_densities(record: Record, stem: Path) -> list[Path]:
    details = record["details"]
    groups = {row: [masks.LayerDensity(**layer) for layer in layers] for row, layers in details.items()}
    title = "Density per layer" if len(details) > 1 else f"{next(iter(details))}, with labels"
    return picture(stem, plots.plot_densities, groups, title=title)


@artefact("figure6", details=_averaged_densities, draw=_draw_densities)
def _figure6(scale: Scale) -> list[Cell]:
    return _density_cells(scale, {scale.vit.label: scale.vit})


@artefact("figure7", details=_averaged_densities, draw=_draw_densities)
def _figure7(scale: Scale) -> list[Cell]:
    return _density_cells(scale, {"without labels": scale.main, "with labels": scale.resnet})


def _density_cells(scale: Scale, settings: Mapping[str, Setting]) -> list[Cell]:
    return [
        Cell("", row, dataset, scale.run(setting, "mask", dataset), "density")
        for row, setting in settings.items()
        for dataset in scale.choices["densities"]
    ]


def _selective_cells(scale: Scale, dataset: str, varied: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    whole, where = scale.run(scale.varied, "mask", dataset), scale.varied.label
    cells = [Cell(where, "frozen base", "k-NN", whole, "frozen_knn"), Cell(where, "all weights", "k-NN", whole, "knn")]
    return cells + [Cell(where, row, "k-NN", whole.at(**changes), "knn") for row, changes in varied.items()]


def _shares(shares: Sequence[float], select: str) -> dict[str, dict[str, Any]]:
    return {f"{select}: {100 * s:g} %": {"mask": {"trainable_fraction": s, "select": select}} for s in shares}


def _stage_shares(store: RunStore, cells: Sequence[Cell], seeds: Sequence[int]) -> dict[str, float]:
    """Share of the weights in the first stages, from the sizes of the packed masks."""
    runs = {cell.row: cell.run.seeded(seeds[0]) for cell in cells if cell.row.startswith(("all", "first stages"))}
    sizes = {row: store.summary(spec).sizes["mask"] for row, spec in runs.items()}
    whole = sizes.pop("all weights")
    return {row: size / whole for row, size in sizes.items()}


def _draw_selective(record: Record, stem: Path) -> list[Path]:
    """Draw rows "label: share %" and those whose share is in the details; each line ends in all weights."""
    values = {cell["row"]: [value for value in cell["values"] if value is not None] for cell in record["cells"]}
    rows = []
    for row, accuracies in values.items():
        label, _, rest = row.partition(": ")
        share = float(rest[:-2]) / 100 if rest.endswith(" %") else (record["details"] or {}).get(row)
        rows += [(label, share, accuracy) for accuracy in accuracies if share is not None]
    labels = dict.fromkeys(label for label, _, _ in rows)
    rows += [(label, 1.0, accuracy) for label in labels for accuracy in values["all weights"]]
    frozen = next(iter(values["frozen base"]), None)
    return picture(stem, plots.plot_selective, plots.share_series(rows), frozen=frozen)


@artefact("figure8", details=_stage_shares, draw=_draw_selective)
def _figure8(scale: Scale) -> list[Cell]:
    stages = {f"first stages: {count}": {"mask_stages": count} for count in scale.choices["figure8_stages"]}
    shares = _shares(scale.choices["figure8_shares"], "random")
    return _selective_cells(scale, scale.choices["figure8"], {**stages, **shares})


@artefact("figure9", draw=_draw_selective)
def _figure9(scale: Scale) -> list[Cell]:
    random, largest = (_shares(scale.choices["figure9_shares"], select) for select in ("random", "magnitude"))
    return _selective_cells(scale, scale.choices["figure9"], {**random, **largest})


_IMAGES, _CLASSES = 1000, 20


def _cascade(store: RunStore, cells: Sequence[Cell], seeds: Sequence[int]) -> Cascade:
    spec = cells[0].run.seeded(seeds[0])
    return Cascade.load(store.path(spec), backbone=spec.backbone)


def _maps(store: RunStore, cells: Sequence[Cell], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Test images laid out by t-SNE under the base, the dispatcher and the whole cascade."""
    cascade = _cascade(store, cells, seeds)
    arguments = cascade.arguments
    test = build_images(arguments).test
    assert test is not None
    assert test.labels is not None
    chosen = (test.labels < _CLASSES).nonzero().squeeze(1)
    evenly = torch.linspace(0, len(chosen) - 1, min(_IMAGES, len(chosen))).long()  # a dataset may be sorted by class
    shown = test.subset(chosen[evenly].tolist())
    base = load_base(arguments)
    options: dict[str, Any] = {"batch_size": arguments.batch_size}
    features = {
        "base": extract_features(base.model, shown, evaluation_of(base), **options),
        "dispatcher": cascade.embed(shown, "dispatcher", **options),
        "cascade": cascade.embed(shown, "unconditional", **options),
    }
    found = []
    for label, part in features.items():
        layout = masks.embedding_map(part, label, classes=None)
        points = [[round(float(value), 2) for value in point] for point in layout.points]
        found.append({"label": label, "points": points, "labels": layout.labels.tolist(), "names": test.classes})
    return found


def _draw_maps(record: Record, stem: Path) -> list[Path]:
    found = record["details"]
    maps = [masks.EmbeddingMap(one["label"], *map(torch.tensor, (one["points"], one["labels"]))) for one in found]
    return picture(stem, plots.plot_embedding_maps, maps, names=found[0]["names"])


@artefact("figure10", details=_maps, draw=_draw_maps, seeds=1)
def _figure10(scale: Scale) -> list[Cell]:
    return [_cascade_cell(scale, row) for row in ("dispatcher", "cascade, unconditional")]


def _cascade_cell(scale: Scale, row: str) -> Cell:
    dataset = scale.choices["table3"][0]
    return Cell("", row, dataset, scale.cascade(dataset), f"cascade_knn@{row}")


def _clusters(store: RunStore, cells: Sequence[Cell], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Composition of the router's clusters on the training images."""
    cascade = _cascade(store, cells, seeds)
    images = build_images(cascade.arguments)
    features = cascade.embed(images.train, "dispatcher", batch_size=cascade.arguments.batch_size)
    assert cascade.router is not None
    labels = features.labels_for("Figure 11")
    return [asdict(row) for row in masks.cluster_composition(cascade.router.assign(features.features), labels)]


def _draw_clusters(record: Record, stem: Path) -> list[Path]:
    rows = [masks.ClusterComposition(**row) for row in record["details"]]
    return picture(stem, plots.plot_clusters, rows, title="Clusters of the training images")


@artefact("figure11", details=_clusters, draw=_draw_clusters, seeds=1)
def _figure11(scale: Scale) -> list[Cell]:
    return [_cascade_cell(scale, "cascade, conditional")]


@artefact("ablations")
def _ablations(scale: Scale) -> list[Cell]:
    settings = {"with labels": (scale.resnet, "accuracy"), "without labels": (scale.varied, "knn")}
    cells = []
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


def _lengths(recipe: RunSpec, lengths: Sequence[int]) -> dict[str, RunSpec]:
    """A run at other numbers of epochs, its warm-up the same share of each, by column."""
    found, rising = {}, recipe.arguments.get("warmup_epochs", 0)
    for epochs in lengths:
        warmup = {"warmup_epochs": rising * epochs / recipe.arguments["epochs"]} if rising else {}
        found[f"{epochs} {'epoch' if epochs == 1 else 'epochs'}"] = recipe.at(epochs=epochs, **warmup)
    return found


def _draw_recipes(record: Record, stem: Path) -> list[Path]:
    panels = {section: mean_lines(cells) for section, cells in by_section(record).items()}
    panels = {section: lines for section, lines in panels.items() if len({x for line in lines for x in line.x}) > 1}
    return picture(stem, plots.plot_curves, panels, xlabel="epochs", ylabel="accuracy (%)", markers=True)


@artefact("recipes", draw=_draw_recipes)
def _recipes(scale: Scale) -> list[Cell]:
    cells, rows = [], ("full fine-tuning", "mask, the paper's recipe", "mask, the small recipe")
    for key, dataset, lengths in scale.choices["recipes"]:
        setting = scale.supervised[key]
        section = f"{setting.label}, {dataset}"
        methods = dict(zip(rows, scale.choices["recipes_methods"], strict=True))
        runs = {row: _lengths(scale.run(setting, method, dataset), lengths) for row, method in methods.items()}
        for column, first in runs[rows[0]].items():
            cells += frozen_cells(section, column, first)
            cells += [Cell(section, row, column, found[column], "accuracy") for row, found in runs.items()]
    return cells


@artefact("steps", draw=_draw_recipes)
def _steps(scale: Scale) -> list[Cell]:
    cells = []
    for key, dataset, lengths in scale.choices["steps"]:
        setting = scale.unsupervised[key]
        for column, run in _lengths(scale.run(setting, "infonce", dataset), lengths).items():
            for row, metric in (("k-NN, frozen base", "frozen_knn"), ("k-NN, mask without labels", "knn")):
                cells.append(Cell(f"{setting.label}, {dataset}", row, column, run, metric))
    return cells
