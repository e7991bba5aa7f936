# SPDX-License-Identifier: Apache-2.0
"""`smn eval`: what a saved adapter is worth, beside its frozen base if wanted, as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from accelerate import Accelerator

from ..evaluation import report_table
from ..storage import atomic_write
from ..training.evaluate import METRICS, evaluate_run
from .values import output_file

__all__ = ["command"]


def command(
    folder: Annotated[Path, typer.Argument(help="Output folder of `smn train`, or a folder with an adapter.")],
    base: Annotated[bool, typer.Option("--base", help="Evaluate the frozen base too, to compare.")] = False,
    backbone: Annotated[str | None, typer.Option(help="Where the base is now, if not where the folder says.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Another dataset than the run's.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to test on; the run's if not given.")] = None,
    eval_fraction: Annotated[
        float | None, typer.Option(help="Test on this part of the training images, held out; as the run if not given.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(METRICS)}; may be repeated. Not given: knn, and accuracy of a classifier.",
            autocompletion=lambda: list(METRICS),
        ),
    ] = None,
    low_shot: Annotated[
        list[float] | None, typer.Option(help="Linear probe on this fraction of the labels; may be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of each low-shot fraction.")] = 3,
    batch_size: Annotated[int | None, typer.Option(help="Images per forward; the run's if not given.")] = None,
    num_workers: Annotated[
        int | None, typer.Option(help="Processes that load images; the run's if not given.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="A seeded choice of at most this many training and test images.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Another side of the images in pixels than they had in training.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Stay on the CPU even where there is a GPU.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the reports into this file.", callback=output_file)
    ] = None,
) -> None:
    """Evaluate what `smn train` saved: k-NN, linear probe, accuracy, and probes on few labels."""
    accelerator = Accelerator(cpu=cpu)
    reports = [
        report
        for frozen in ([True, False] if base else [False])
        for report in evaluate_run(
            folder,
            base=frozen,
            backbone=backbone,
            dataset=dataset,
            split=split,
            eval_fraction=eval_fraction,
            metrics=metric or (),
            low_shot=low_shot or (),
            seeds=seeds,
            batch_size=batch_size,
            num_workers=num_workers,
            limit=limit,
            image_size=image_size,
            accelerator=accelerator,
        )
    ]
    if not accelerator.is_main_process:
        return
    typer.echo(report_table(reports))
    if json_file is not None:
        with atomic_write(json_file) as file:
            file.write(json.dumps([json.loads(report.to_json()) for report in reports], indent=1).encode())
