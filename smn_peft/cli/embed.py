# SPDX-License-Identifier: Apache-2.0
"""`smn embed`: embeddings of a dataset in parts, over processes and jobs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click
from accelerate import Accelerator

from ..backbones import is_file_spec
from ..cascade import MODES
from ..data import ImageDataset, NoLabelsError, load_images
from ..embedding import FORMATS, Embedder, embed_dataset
from ..training import TrainArguments
from ..training.processes import together
from .options import PATH, field_options, given, read_part
from .train import Launchable, launch_option, launch_processes

_BASE = ("weights", "backbone_revision", "base_dtype", "image_size")
_DATASET = ("dataset", "dataset_revision", "image_column", "label_column")


@click.command("embed", cls=Launchable)
@click.argument("model")
@click.option("--backbone", help="Where the base of MODEL is now, or of an adapter or bank on the Hub.")
@field_options(TrainArguments, only=_DATASET)
@click.option("--split", default="train", help="Split of the dataset.")
@click.option("--out", "-o", type=PATH, required=True, help="Folder to write.")
@click.option("--mode", type=click.Choice(MODES), help="Which embedding of a cascade.  [default: conditional]")
@click.option("--format", type=click.Choice(FORMATS), default=FORMATS[0], help="Format of the parts.")
@click.option("--part-size", type=click.IntRange(1), default=8192, help="Images per file.")
@click.option("--part", metavar="I/N", default="1/1", help="Make the I-th of N shares only: a job's.")
@click.option("--batch-size", type=click.IntRange(1), default=64, help="Images per forward.")
@click.option("--num-workers", type=click.IntRange(0), default=0, help="Processes that load images, per process.")
@click.option("--cpu", is_flag=True, help="Stay on the CPU even where there is a GPU.")
@field_options(TrainArguments, only=_BASE)
@launch_option
@click.pass_context
def embed(context: click.Context, model: str, backbone: str | None, cpu: bool, launch: bool, **options: Any) -> None:
    """Embed every image of a dataset, in parquet files that processes and jobs share.

    MODEL is an output folder of `smn train`, an adapter, a cascade's folder, a bank's task as BANK:TASK, or a backbone
    as `smn train` takes it. On the Hub, without --backbone, it is a backbone.

    Parts that are there are not made again: repeat the line.
    """
    if launch:
        context.exit(launch_processes(["embed"], context.args, cpu=cpu))
    job, values = read_part(options["part"]), given(context, TrainArguments)
    if "dataset" not in values:
        raise click.MissingParameter(param_hint="--dataset", param_type="option")
    accelerator = Accelerator(cpu=cpu)
    named: tuple[str | None, str | None] = (backbone, model) if backbone or _is_saved(model) else (model, None)
    own: dict[str, Any] = {name: values[name] for name in _BASE if name in values}
    own |= {"mode": options["mode"], "batch_size": options["batch_size"], "device": accelerator.device}
    images = together(accelerator, lambda: _images(options["split"], values))
    embedder = together(accelerator, lambda: Embedder(*named, **own))
    made = {name: options[name] for name in ("part_size", "format", "num_workers")}
    found = embed_dataset(embedder, images, options["out"], job=job, accelerator=accelerator, **made)
    if accelerator.is_main_process:
        rate = f", {found.images / found.seconds:,.0f} images/s" if found.images else ""
        several = f" by process 1 of {accelerator.num_processes}" if accelerator.num_processes > 1 else ""
        here = f"{found.written} written{several}{rate}, {found.left} were there"
        click.echo(f"{options['out']}: {len(images):,} images in {found.parts} parts, dim {embedder.dim}; {here}")


def _images(split: str, values: dict[str, Any]) -> ImageDataset:
    """The dataset, with labels where it has some."""
    columns = {name: values.get(name) for name in ("image_column", "label_column")}
    options: dict[str, Any] = {"revision": values.get("dataset_revision"), **columns}
    try:
        return load_images(values["dataset"], split, **options)
    except NoLabelsError as error:
        warnings.warn(f"{str(error).partition(': ')[0]}: no labels are written.", stacklevel=2)
        return load_images(values["dataset"], split, **options, labelled=False)


def _is_saved(model: str) -> bool:
    """Whether a name is of an adapter, a cascade or a bank's task on this disk, and not of a backbone."""
    path = Path(model if Path(model).exists() else model.rpartition(":")[0] or model)
    return path.exists() and not is_file_spec(model) and not (path / "config.json").is_file()
