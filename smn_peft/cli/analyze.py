# SPDX-License-Identifier: Apache-2.0
"""`smn eval` and `smn analyze`: what adapters are worth and what their masks look like, as table, plot, JSON."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from accelerate import Accelerator
from torch import Tensor

from .. import analysis
from ..analysis.compression import adapter_compression, format_compression
from ..evaluation import extract_features, format_fraction, markdown_table, report_table
from ..storage.hub_files import locate_adapter
from ..training import load_masks, load_run
from ..training.assemble import METRICS, build_images, evaluation_of
from ..training.metrics import METRICS_NAME, read_metrics
from ..training.saved import evaluate_run, evaluation_arguments
from .options import (
    PATH,
    Group,
    backbone_option,
    evaluation_options,
    json_file,
    output_file,
    place_options,
    read_reports,
    write_json,
)

_runs = click.argument("runs", nargs=-1, required=True, type=PATH)


_plot = partial(
    click.option, "--plot", type=PATH, callback=output_file, help="Draw into this .png, .svg or .pdf file."
)


@click.command("eval")
@click.argument("folder", type=PATH)
@click.option("--base", is_flag=True, help="Evaluate the frozen base too, to compare.")
@evaluation_options(METRICS, "knn, and accuracy of a classifier,")
@click.option("--eval-fraction", type=float, help="Test on this part of the training images, held out.")
@click.option("--low-shot", type=float, multiple=True, help="Linear probe on this part of the labels; repeatable.")
@click.option("--seeds", type=int, default=3, help="Seeds of each low-shot fraction.")
@click.option("--image-size", type=int, help="Another side of the images in pixels than they had in training.")
def evaluate(folder: Path, base: bool, cpu: bool, json_file: Path | None, **options: Any) -> None:
    """Evaluate what `smn train` saved: k-NN, linear probe, accuracy, and probes on few labels.

    FOLDER is an output folder of `smn train`, or a folder with an adapter.
    """
    accelerator = Accelerator(cpu=cpu)
    reports = evaluate_run(folder, base=True, accelerator=accelerator, **options) if base else []
    reports += evaluate_run(folder, accelerator=accelerator, **options)
    if accelerator.is_main_process:
        click.echo(report_table(reports))
        write_json(json_file, [report.to_dict() for report in reports])


@click.group("analyze", cls=Group)
def analyze() -> None:
    """Look at what runs learned: densities, similarity, losses, few labels, embeddings, bytes.

    RUNS are output folders of `smn train`.
    """


def _labelled(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by their last names, or as given where two would be alike."""
    named = {folder.resolve().name: folder for folder in folders}
    return named if len(named) == len(folders) else {str(folder): folder for folder in folders}


def _masks(folders: Sequence[Path], backbone: str | None) -> dict[str, dict[str, Tensor]]:
    return {label: load_masks(folder, backbone=backbone) for label, folder in _labelled(folders).items()}


@analyze.command("density")
@_runs
@click.option("--average", is_flag=True, help="Mean and standard deviation over the runs, not a line each.")
@backbone_option
@_plot()
@json_file
def _density(
    runs: tuple[Path, ...], average: bool, backbone: str | None, plot: Path | None, json_file: Path | None
) -> None:
    """Fraction of active weights per layer (the paper's Figures 6 and 7, which call it sparsity)."""
    groups = {label: analysis.layer_densities(masks) for label, masks in _masks(runs, backbone).items()}
    if average:
        groups = {f"mean of {len(groups)}": analysis.average_densities(list(groups.values()))}
    rows = []
    for label, layers in groups.items():
        total = sum(layer.weights for layer in layers)
        active = sum(layer.weights * layer.density for layer in layers) / total
        lines = [(layer.name, layer.weights, format_fraction(layer.density, layer.spread)) for layer in layers]
        for name, weights, shown in [*lines, ("all", total, format_fraction(active))]:
            rows.append({"run": label, "tensor": name, "weights": f"{weights:,}", "active %": shown})
    click.echo(markdown_table(rows))
    write_json(json_file, [layer for layers in groups.values() for layer in layers])
    if plot is not None:
        analysis.plot_densities(groups, plot, title="Density of the masks")


@analyze.command("similarity")
@_runs
@backbone_option
@_plot()
@json_file
def _similarity(runs: tuple[Path, ...], backbone: str | None, plot: Path | None, json_file: Path | None) -> None:
    """Which weights masks agree to switch off, against what masks of the same densities would by chance."""
    found = analysis.similarity_matrix(_masks(runs, backbone))
    names = ("Jaccard of the inactive %", "by chance %", "weights that differ %", "by chance, %")
    cells = []
    for row in found:
        values = (row.jaccard, row.jaccard_chance, row.hamming, row.hamming_chance)
        shown = {name: f"{100 * value:.2f}" for name, value in zip(names, values, strict=True)}
        cells.append({"pair": f"{row.first}, {row.second}", **shown})
    click.echo(markdown_table(cells))
    write_json(json_file, found)
    if plot is not None:
        analysis.plot_similarity(found, plot)


@analyze.command("loss")
@_runs
@click.option("--window", default=1, help="Logged lines that are averaged.")
@_plot()
@json_file
def _loss(runs: tuple[Path, ...], window: int, plot: Path | None, json_file: Path | None) -> None:
    """Training losses of runs, finished or not (the paper's Figure 5)."""
    curves, cells = [], []
    for label, folder in _labelled(runs).items():
        lines = [line for line in read_metrics(folder / METRICS_NAME) if line.get("loss") is not None]
        if not lines:
            raise ValueError(f"{folder} has no losses in {METRICS_NAME}: name output folders of `smn train`.")
        values = analysis.smooth([line["loss"] for line in lines], window)
        steps = tuple(line["step"] for line in lines)
        curves.append(analysis.Series(label, steps, tuple(values)))
        first, last = f"{values[0]:.4f}", f"{values[-1]:.4f}"
        cells.append({"run": label, "first": first, "last": last, "at step": f"{steps[-1]:g}"})
    click.echo(markdown_table(cells))
    write_json(json_file, curves)
    if plot is not None:
        analysis.plot_curves({"Training loss": curves}, plot)


@analyze.command("low-shot")
@click.argument("reports", nargs=-1, required=True, type=PATH)
@_plot()
def _low_shot(reports: tuple[Path, ...], plot: Path | None) -> None:
    """Accuracy against the fraction of labelled images, a line per method (the paper's Figure 3).

    REPORTS are files that `smn eval --low-shot … --json FILE` wrote.
    """
    found = [report for path in reports for report in read_reports(path) if "label_fraction" in report.settings]
    if not found:
        raise ValueError("None of the reports is of few labels: evaluate with --low-shot 0.1 --low-shot 0.01 ….")
    click.echo(analysis.low_shot_table(found))
    if plot is not None:
        analysis.plot_low_shot(analysis.low_shot_series(found), plot, title=found[0].dataset)


@analyze.command("embedding")
@_runs
@_plot(required=True)
@click.option("--base", is_flag=True, help="Show the frozen base of the first run too.")
@backbone_option
@click.option("--classes", default=20, help="Show the first so many classes.")
@click.option("--perplexity", default=30.0, help="t-SNE's perplexity.")
@click.option("--seed", default=0, help="t-SNE's seed.")
def _embedding(
    runs: tuple[Path, ...], plot: Path, base: bool, backbone: str | None, classes: int, perplexity: float, seed: int
) -> None:
    """Features of the test images laid out by t-SNE (the paper's Figure 10)."""
    maps, names = [], None
    shown = [(label, folder, False) for label, folder in _labelled(runs).items()]
    for label, folder, frozen in [("frozen base", runs[0], True), *shown] if base else shown:
        arguments, loaded = load_run(folder, base=frozen, backbone=backbone)
        if arguments is None:
            raise ValueError(f"{folder} names no training images: name an output folder of `smn train`.")
        if arguments.eval_split is None:
            raise ValueError(f"{folder} was trained without test images (eval_split): there is nothing to show.")
        images: Any = build_images(evaluation_arguments(arguments, loaded, folder, None, None, None)).test
        features = extract_features(loaded.model, images, evaluation_of(loaded), batch_size=arguments.batch_size)
        maps.append(analysis.embedding_map(features, label, classes=classes, perplexity=perplexity, seed=seed))
        names = images.classes
    analysis.plot_embedding_maps(maps, plot, names=names)
    click.echo(f"{plot}: {len(maps[0].points):,} images of {len(maps[0].labels.unique())} classes")


@analyze.command("compression")
@click.argument("adapter")
@click.option("--weights", type=PATH, help="Compress these weights too: a safetensors file, as of full fine-tuning.")
@place_options
@json_file
def _compression(adapter: str, weights: Path | None, json_file: Path | None, **place: str | None) -> None:
    """What compressors make of an adapter's masks, and of weights, beside their entropy (the paper's Tables 6, 7).

    ADAPTER is a folder, a safetensors file, or user/name on the Hub.
    """
    table = adapter_compression(locate_adapter(adapter, **place), weights)
    click.echo(format_compression(table))
    write_json(json_file, table)
