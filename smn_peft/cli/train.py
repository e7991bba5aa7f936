# SPDX-License-Identifier: Apache-2.0
"""`smn train`: adapt a backbone to a dataset, from options or a recipe, here or through `accelerate launch`."""

from __future__ import annotations

from typing import Annotated

import typer
from accelerate import PartialState

from ..training import Interrupted, TrainArguments, load_recipe, plan, run
from .launch import SETTINGS, check_rest, launch_processes
from .options import with_options

__all__ = ["SETTINGS", "command"]


@with_options(recipe=load_recipe)
def command(
    context: typer.Context,
    arguments: TrainArguments,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load everything, try one batch, show the plan, train nothing.")
    ] = False,
    launch: Annotated[
        bool,
        typer.Option("--launch", help="Run through `accelerate launch`; options unknown here are passed on to it."),
    ] = False,
) -> None:
    """Adapt a backbone to a dataset, with labels or without, and save the adapter.

    `--recipe` takes the name of a recipe (`smn recipes` lists them) or a YAML file; options on the line win over it.
    """
    if launch:
        raise typer.Exit(launch_processes(["train"], context.args, cpu=arguments.cpu))
    check_rest(context)
    if dry_run:
        typer.echo(plan(arguments))
        return
    try:
        summary = run(arguments)
    except Interrupted as stop:
        typer.echo(str(stop), err=True)
        raise typer.Exit(130) from stop
    if PartialState().is_main_process:
        typer.echo(summary.text())
