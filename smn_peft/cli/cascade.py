# SPDX-License-Identifier: Apache-2.0
"""`smn cascade train|embed|eval`: a dispatcher, a router and experts, whole or an expert per job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from accelerate import Accelerator, PartialState
from safetensors.torch import save

from .._options import merged
from ..cascade import MODES, Cascade, CascadeArguments, cascade_sizes, evaluate_cascade, prepare, train_experts
from ..cascade.evaluate import METRICS
from ..data import load_images
from ..evaluation import report_table
from ..storage.files import atomic_write
from ..training import TrainArguments
from .options import (
    PATH,
    Group,
    backbone_option,
    evaluation_options,
    field_options,
    given,
    help_all,
    loading_options,
    write_json,
)
from .train import SHOWN, Launchable, launch_option, launch_processes, recipe_option, recipe_values

_folder = click.argument("folder", type=PATH)


@click.group("cascade", cls=Group)
def cascade() -> None:
    """Several masks for one dataset: a dispatcher, a router, an expert per cluster.

    FOLDER is the output folder of `smn cascade train`, or a saved cascade.
    """


@cascade.command("train", cls=Launchable)
@recipe_option
@field_options(CascadeArguments)
@field_options(TrainArguments, shown=[name for name in SHOWN if name not in ("adapt", "resume")])
@click.option("--prepare", "prepare_only", is_flag=True, help="Train the dispatcher and fit the router only.")
@click.option("--expert", type=int, multiple=True, help="Train this expert alone, after --prepare; may be repeated.")
@launch_option
@help_all
@click.pass_context
def _train(
    context: click.Context, recipe: str | None, prepare_only: bool, expert: tuple[int, ...], launch: bool, **_: Any
) -> None:
    """Train what is not trained yet, and fit the embedding; the same line again goes on where it was.

    An expert per job: once with --prepare, then a job each with --expert 0, --expert 1 …, then without either.
    """
    arguments = TrainArguments(**merged(recipe_values(recipe), given(context, TrainArguments)))
    options = CascadeArguments(**given(context, CascadeArguments))
    if launch:
        context.exit(launch_processes(["cascade", "train"], context.args, cpu=arguments.cpu))
    if expert and prepare_only:
        raise click.UsageError("--prepare comes before --expert: give one of them.")
    if expert:
        train_experts(arguments, options, expert)
        text = f"done: {', '.join(f'expert {number}' for number in expert)}"
    elif prepare_only:
        router, images = prepare(arguments, options)
        text = f"{len(images)} images in clusters of {', '.join(map(str, router.sizes))}"
    else:
        fitted = Cascade.fit(arguments, options)
        assert fitted.router is not None
        clusters, sizes = ", ".join(map(str, fitted.router.sizes)), cascade_sizes(arguments.output_dir).text()
        text = f"clusters of {clusters}\n{arguments.output_dir}: {sizes}"
    if PartialState().is_main_process:
        click.echo(text)


@cascade.command("embed")
@_folder
@click.option("--dataset", required=True, help="Dataset to embed, as `smn train` takes it.")
@click.option("--output", type=PATH, required=True, help="The safetensors file to write.")
@click.option("--split", default="test", help="Split of the dataset.")
@click.option("--mode", type=click.Choice(MODES), default="conditional", help="Which embedding.")
@click.option("--labelled/--no-labelled", default=True, help="Write the labels too.")
@backbone_option
@loading_options
def _embed(folder: Path, dataset: str, output: Path, mode: Any, cpu: bool, **options: Any) -> None:
    """Write the embeddings of a dataset, in its order, as `embeddings` (n, dim) and `labels` (n,)."""
    loaded = Cascade.load(folder, backbone=options["backbone"])
    images = load_images(dataset, options["split"], labelled=options["labelled"])
    accelerator = Accelerator(cpu=cpu)
    loading = {
        name: getattr(loaded.arguments, name) if options[name] is None else options[name]
        for name in ("batch_size", "num_workers")
    }
    found = loaded.embed(images, mode, accelerator=accelerator, **loading)
    if accelerator.is_main_process:
        tensors = {"embeddings": found.features.contiguous()}
        with atomic_write(output) as file:
            file.write(save(tensors if found.labels is None else {**tensors, "labels": found.labels}))
        click.echo(f"{len(found)} embeddings of dim {found.features.shape[1]} in {output}")


@cascade.command("eval")
@_folder
@evaluation_options(METRICS, "All")
def _evaluate(folder: Path, metrics: tuple[str, ...], cpu: bool, json_file: Path | None, **options: Any) -> None:
    """Compare the cascade's embeddings with its dispatcher's, whitened or not, and with an ensemble of seeds."""
    accelerator = Accelerator(cpu=cpu)
    reports = evaluate_cascade(folder, metrics=metrics or METRICS, accelerator=accelerator, **options)
    if accelerator.is_main_process:
        click.echo(report_table(reports))
        write_json(json_file, [report.to_dict() for report in reports])
