# SPDX-License-Identifier: Apache-2.0
"""`smn cascade train|embed|eval`: a dispatcher, a router and experts, whole or an expert per job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from accelerate import Accelerator, PartialState
from safetensors.torch import save

from ..cascade import MODES, Cascade, CascadeArguments, cascade_sizes, evaluate_cascade, prepare, train_experts
from ..cascade.evaluate import METRICS
from ..data import load_images
from ..evaluation import report_table
from ..storage import atomic_write
from ..training import Interrupted, TrainArguments, load_recipe
from .launch import SETTINGS, check_rest, launch_processes
from .options import with_options

__all__ = ["app"]

app = typer.Typer(help="Several masks for one dataset: a dispatcher, a router, an expert per cluster.")

Folder = Annotated[Path, typer.Argument(help="Output folder of `smn cascade train`, or a saved cascade.")]
BackboneName = Annotated[str | None, typer.Option(help="Where the base is, if not where the folder says.")]
BatchSize = Annotated[int | None, typer.Option(help="Images per forward; the dispatcher's if not given.")]
NumWorkers = Annotated[int | None, typer.Option(help="Processes that load images; the dispatcher's if not given.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU even where there is a GPU.")]


@app.command("train", context_settings=SETTINGS)
@with_options(recipe=load_recipe, hidden=("resume", "adapt", "init_from", "indices_file"))
def train(
    context: typer.Context,
    arguments: TrainArguments,
    options: CascadeArguments,
    prepare_only: Annotated[
        bool, typer.Option("--prepare", help="Train the dispatcher and fit the router; the experts follow as jobs.")
    ] = False,
    expert: Annotated[
        list[int] | None, typer.Option(help="Train this expert alone, after --prepare; from 0, may be repeated.")
    ] = None,
    launch: Annotated[
        bool,
        typer.Option("--launch", help="Run through `accelerate launch`; options unknown here are passed on to it."),
    ] = False,
) -> None:
    """Train what is not trained yet, and fit the embedding; the same line again goes on where it was.

    An expert per job: once with `--prepare`, then a job each with `--expert 0`, `--expert 1` …, then without either.
    """
    if launch:
        raise typer.Exit(launch_processes(["cascade", "train"], context.args, cpu=arguments.cpu))
    check_rest(context)
    if expert and prepare_only:
        raise typer.BadParameter("--prepare comes before --expert: give one of them.", ctx=context)
    try:
        if expert:
            train_experts(arguments, options, expert)
            text = f"done: {', '.join(f'expert {number}' for number in expert)}"
        elif prepare_only:
            router, images = prepare(arguments, options)
            text = f"{len(images)} images in clusters of {_words(router.sizes)}"
        else:
            cascade = Cascade.fit(arguments, options)
            assert cascade.router is not None
            sizes = cascade_sizes(arguments.output_dir).text()
            text = f"clusters of {_words(cascade.router.sizes)}\n{arguments.output_dir}: {sizes}"
    except Interrupted as stop:
        typer.echo(str(stop), err=True)
        raise typer.Exit(130) from stop
    if PartialState().is_main_process:
        typer.echo(text)


@app.command("embed")
def embed(
    folder: Folder,
    dataset: Annotated[str, typer.Option(help="Dataset to embed, as `smn train` takes it.")],
    output: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "test",
    mode: Annotated[
        str, typer.Option(help=f"{', '.join(MODES)}.", autocompletion=lambda: list(MODES))
    ] = "conditional",
    labelled: Annotated[bool, typer.Option(help="Write the labels too.")] = True,
    backbone: BackboneName = None,
    batch_size: BatchSize = None,
    num_workers: NumWorkers = None,
    cpu: Cpu = False,
) -> None:
    """Write the embeddings of a dataset, in its order, as `embeddings` (n, dim) and `labels` (n,)."""
    if mode not in MODES:
        raise ValueError(f"There is no mode {mode!r}; there are {', '.join(MODES)}.")
    cascade = Cascade.load(folder, backbone=backbone)
    images, accelerator = load_images(dataset, split, labelled=labelled), Accelerator(cpu=cpu)
    options: dict[str, Any] = {
        "batch_size": batch_size or cascade.arguments.batch_size,
        "num_workers": cascade.arguments.num_workers if num_workers is None else num_workers,
    }
    found = cascade.embed(images, mode, accelerator=accelerator, **options)
    if accelerator.is_main_process:
        tensors = {"embeddings": found.features.contiguous()}
        with atomic_write(output) as file:
            file.write(save(tensors if found.labels is None else {**tensors, "labels": found.labels}))
        typer.echo(f"{len(found)} embeddings of dim {found.features.shape[1]} in {output}")


@app.command("eval")
def evaluate(
    folder: Folder,
    backbone: BackboneName = None,
    dataset: Annotated[str | None, typer.Option(help="Another dataset than the dispatcher's.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to test on; the dispatcher's if not given.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(METRICS)}; may be repeated. All if not given.", autocompletion=lambda: METRICS),
    ] = None,
    batch_size: BatchSize = None,
    num_workers: NumWorkers = None,
    limit: Annotated[
        int | None, typer.Option(help="A seeded choice of at most this many training and test images.")
    ] = None,
    cpu: Cpu = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the reports into this file.")] = None,
) -> None:
    """Compare the cascade's embeddings with its dispatcher's, whitened or not, and with an ensemble of seeds."""
    accelerator = Accelerator(cpu=cpu)
    reports = evaluate_cascade(
        folder,
        backbone=backbone,
        dataset=dataset,
        split=split,
        metrics=metric or METRICS,
        batch_size=batch_size,
        num_workers=num_workers,
        limit=limit,
        accelerator=accelerator,
    )
    if not accelerator.is_main_process:
        return
    typer.echo(report_table(reports))
    if json_file is not None:
        with atomic_write(json_file) as file:
            file.write(json.dumps([json.loads(report.to_json()) for report in reports], indent=1).encode())


def _words(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))
