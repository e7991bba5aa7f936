# SPDX-License-Identifier: Apache-2.0
"""`smn analyze density|similarity|loss|low-shot|embedding|compression`: what masks look like, as table, plot, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import analysis
from ..analysis.compression import adapter_compression, format_compression
from ..evaluation import EvalReport, extract_features, format_fraction, markdown_table
from ..storage import atomic_write, locate_adapter
from ..training import load_masks, load_run
from ..training.assemble import evaluation_of
from ..training.evaluate import evaluation_arguments
from ..training.images import build_images
from ..training.metrics import METRICS_NAME, read_metrics
from .values import output_file

__all__ = ["app"]

app = typer.Typer(help="Look at what runs learned: densities, similarity, losses, few labels, embeddings, bytes.")

Runs = Annotated[list[Path], typer.Argument(help="Output folders of `smn train`.")]
Backbone = Annotated[str | None, typer.Option(help="Where the base is now, if not where the folders say.")]
Plot = Annotated[Path | None, typer.Option(help="Draw into this .png, .svg or .pdf file.", callback=output_file)]
Json = Annotated[Path | None, typer.Option("--json", help="Write the data into this file.", callback=output_file)]


def _write(path: Path | None, data: Any) -> None:
    """Write a dataclass, or a list of them."""
    if path is not None:
        content = [asdict(row) for row in data] if isinstance(data, Sequence) else asdict(data)
        with atomic_write(path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' last names; as given where two would be alike."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


@app.command()
def density(
    runs: Runs,
    average: Annotated[
        bool, typer.Option("--average", help="Mean and standard deviation over the runs, not a line each.")
    ] = False,
    backbone: Backbone = None,
    plot: Plot = None,
    json_file: Json = None,
) -> None:
    """Fraction of active weights per layer (the paper's Figures 6 and 7, which call it sparsity)."""
    groups = {
        label: analysis.layer_densities(load_masks(folder, backbone=backbone))
        for label, folder in zip(_labels(runs), runs, strict=True)
    }
    if average:
        groups = {f"mean of {len(groups)}": analysis.average_densities(list(groups.values()))}
    rows = []
    for label, layers in groups.items():
        for layer in layers:
            shown = format_fraction(layer.density, layer.spread)
            rows.append({"run": label, "tensor": layer.name, "weights": f"{layer.weights:,}", "active %": shown})
        total = sum(layer.weights for layer in layers)
        active = sum(layer.weights * layer.density for layer in layers) / total
        rows.append({"run": label, "tensor": "all", "weights": f"{total:,}", "active %": format_fraction(active)})
    typer.echo(markdown_table(rows))
    _write(json_file, [layer for layers in groups.values() for layer in layers])
    if plot is not None:
        analysis.plot_densities(groups, plot, title="Density of the masks")


@app.command()
def similarity(runs: Runs, backbone: Backbone = None, plot: Plot = None, json_file: Json = None) -> None:
    """Which weights masks agree to switch off, against what masks of the same densities would by chance."""
    masks = {label: load_masks(folder, backbone=backbone) for label, folder in zip(_labels(runs), runs, strict=True)}
    found = analysis.similarity_matrix(masks)
    cells = [
        {
            "pair": f"{row.first}, {row.second}",
            "Jaccard of the inactive %": f"{100 * row.jaccard:.2f}",
            "by chance %": f"{100 * row.jaccard_chance:.2f}",
            "weights that differ %": f"{100 * row.hamming:.2f}",
            "by chance, %": f"{100 * row.hamming_chance:.2f}",
        }
        for row in found
    ]
    typer.echo(markdown_table(cells))
    _write(json_file, found)
    if plot is not None:
        analysis.plot_similarity(found, plot)


@app.command()
def loss(
    runs: Runs,
    window: Annotated[int, typer.Option(help="Logged lines that are averaged.")] = 1,
    plot: Plot = None,
    json_file: Json = None,
) -> None:
    """Training losses of runs, finished or not (the paper's Figure 5)."""
    curves = []
    for label, folder in zip(_labels(runs), runs, strict=True):
        lines = [line for line in read_metrics(folder / METRICS_NAME) if line.get("loss") is not None]
        if not lines:
            raise ValueError(f"{folder} has no losses in {METRICS_NAME}: name output folders of `smn train`.")
        values = analysis.smooth([line["loss"] for line in lines], window)
        curves.append(analysis.Series(label, tuple(line["step"] for line in lines), tuple(values)))
    cells = [
        {"run": c.label, "first": f"{c.y[0]:.4f}", "last": f"{c.y[-1]:.4f}", "at step": f"{c.x[-1]:g}"} for c in curves
    ]
    typer.echo(markdown_table(cells))
    _write(json_file, curves)
    if plot is not None:
        analysis.plot_curves({"Training loss": curves}, plot)


@app.command("low-shot")
def low_shot(
    reports: Annotated[list[Path], typer.Argument(help="Files that `smn eval --low-shot … --json FILE` wrote.")],
    plot: Plot = None,
) -> None:
    """Accuracy against the fraction of labelled images, a line per method (the paper's Figure 3)."""
    found = []
    for path in reports:
        try:
            content = json.loads(path.read_text("utf-8"))
            loaded = [EvalReport.from_json(json.dumps(item)) for item in content]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} holds no reports of `smn eval`: {error}") from error
        found += [report for report in loaded if "label_fraction" in report.settings]
    if not found:
        raise ValueError("None of the reports is of few labels: evaluate with --low-shot 0.1 --low-shot 0.01 ….")
    typer.echo(analysis.low_shot_table(found))
    if plot is not None:
        analysis.plot_low_shot(analysis.low_shot_series(found), plot, title=found[0].dataset)


@app.command()
def embedding(
    runs: Runs,
    plot: Annotated[Path, typer.Option(help="Draw into this .png, .svg or .pdf file.")],
    base: Annotated[bool, typer.Option("--base", help="Show the frozen base of the first run too.")] = False,
    backbone: Backbone = None,
    classes: Annotated[int, typer.Option(help="Show the first so many classes.")] = 20,
    perplexity: Annotated[float, typer.Option(help="t-SNE's perplexity.")] = 30.0,
    seed: Annotated[int, typer.Option(help="t-SNE's seed.")] = 0,
) -> None:
    """Features of the test images laid out by t-SNE (the paper's Figure 10)."""
    maps, names = [], None
    todo = [
        *([("frozen base", runs[0], True)] if base else []),
        *((n, f, False) for n, f in zip(_labels(runs), runs, strict=True)),
    ]
    for label, folder, frozen in todo:
        arguments, loaded = load_run(folder, base=frozen, backbone=backbone)
        if arguments is None:
            raise ValueError(
                f"{folder} does not say which images it was trained on: name an output folder of `smn train`."
            )
        if arguments.eval_split is None:
            raise ValueError(f"{folder} was trained without test images (eval_split): there is nothing to show.")
        images = build_images(evaluation_arguments(arguments, loaded, folder, None, None, None)).test
        assert images is not None
        features = extract_features(loaded.model, images, evaluation_of(loaded), batch_size=arguments.batch_size)
        maps.append(analysis.embedding_map(features, label, classes=classes, perplexity=perplexity, seed=seed))
        names = images.classes
    analysis.plot_embedding_maps(maps, plot, names=names)
    typer.echo(f"{plot}: {len(maps[0].points):,} images of {len(maps[0].labels.unique())} classes")


@app.command()
def compression(
    adapter: Annotated[str, typer.Argument(help="Adapter: folder, safetensors file, or user/name on the Hub.")],
    weights: Annotated[
        Path | None, typer.Option(help="Compress these weights too: a safetensors file, such as of full fine-tuning.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Folder of the adapter inside.")] = None,
    json_file: Json = None,
) -> None:
    """What compressors make of an adapter's masks, and of weights, beside their entropy (the paper's Tables 6, 7)."""
    table = adapter_compression(locate_adapter(adapter, revision, subfolder), weights)
    typer.echo(format_compression(table))
    _write(json_file, table)
