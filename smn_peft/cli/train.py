# SPDX-License-Identifier: Apache-2.0
"""`smn train`: adapt a backbone to a dataset, from options or a recipe, here or through `accelerate launch`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from accelerate import PartialState

from ..training import (
    Interrupted,
    RunSummary,
    TrainArguments,
    load_recipe,
    plan,
    run,
    run_many,
)
from ..training.checkpoint import latest_checkpoint
from ..training.run import EXPECTED, check_tasks
from .errors import one_line
from .launch import SETTINGS, check_rest, launch_processes
from .options import with_options
from .tasks import part_of, read_tasks

__all__ = ["SETTINGS", "command"]


@with_options(recipe=load_recipe)
def command(
    context: typer.Context,
    arguments: TrainArguments,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load everything, try one batch, show the plan, train nothing.")
    ] = False,
    tasks: Annotated[
        Path | None,
        typer.Option(help="Train the tasks of this YAML file in turn, each in its folder of --output-dir; see below."),
    ] = None,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="Of --tasks only every N-th from the I-th on: a job's share.")
    ] = None,
    launch: Annotated[
        bool,
        typer.Option("--launch", help="Run through `accelerate launch`; options unknown here are passed on to it."),
    ] = False,
) -> None:
    """Adapt a backbone to a dataset, with labels or without, and save the adapter.

    `--recipe` takes the name of a recipe (`smn recipes` lists them) or a YAML file; options on the line win over it.

    `--tasks` takes a file such as `birds: {dataset: user/birds}`, a task per line with what it changes. Tasks that are
    finished are not trained again, interrupted ones go on: repeat the line. One that fails does not stop the others.
    """
    if part is not None and tasks is None:
        raise typer.BadParameter("it is a share of --tasks, which is not given.", param_hint="--part")
    if launch:
        raise typer.Exit(launch_processes(["train"], context.args, cpu=arguments.cpu))
    check_rest(context)
    if tasks is None:
        chosen = {"": arguments}
    else:
        chosen = read_tasks(tasks, arguments) if part is None else part_of(read_tasks(tasks, arguments), part)
        check_tasks(chosen)
    if dry_run:
        if sum([_planned(name, task) for name, task in chosen.items()]):
            raise typer.Exit(1)
        return
    new = tasks is None and arguments.resume and latest_checkpoint(arguments.output_dir) is None
    if new and os.environ.get("RANK", "0") == "0":
        typer.echo(f"{arguments.output_dir} holds no checkpoint to resume: the run starts at step 0.", err=True)
    try:
        came = run_many(chosen) if tasks is not None else [("", run(arguments))]
        failed = sum(_said(name, each) for name, each in came)
    except Interrupted as stop:
        typer.echo(str(stop), err=True)
        raise typer.Exit(130) from stop
    if failed:
        raise typer.Exit(1)


def _planned(name: str, arguments: TrainArguments) -> bool:
    """Say what a run would do; returns whether it cannot."""
    try:
        typer.echo(f"{name}\n{plan(arguments)}".lstrip())
    except EXPECTED as error:
        if not name:
            raise
        return _said(name, error)
    return False


def _said(name: str, came: RunSummary | Exception) -> bool:
    """Say what came of a run; returns whether it failed."""
    failed = isinstance(came, Exception)
    if PartialState().is_main_process:
        text = one_line(came) if isinstance(came, Exception) else came.text()
        typer.echo(f"{name}: {text}" if name else text, err=failed)
    return failed
