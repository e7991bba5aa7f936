# SPDX-License-Identifier: Apache-2.0
"""`smn train`: adapt a backbone to a dataset, from options or a recipe, here or through `accelerate launch`."""

from __future__ import annotations

import difflib
import signal
import subprocess
import sys
from typing import Annotated

import torch
import typer
from accelerate import PartialState

from ..training import Interrupted, TrainArguments, load_recipe, plan, run
from .options import with_options

__all__ = ["SETTINGS", "command"]

# accelerate's way in, without its traceback: a process that fails has said why.
_LAUNCHER = """
import subprocess, sys
from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
try:
    main()
except ChildFailedError as failure:
    sys.exit(failure.get_first_failure()[1].exitcode)
except subprocess.CalledProcessError as failure:
    sys.exit(failure.returncode)
"""

#: What belongs to `accelerate launch` is unknown here, and kept in the context.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


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
        raise typer.Exit(_launch(context.args, cpu=arguments.cpu or not torch.accelerator.is_available()))
    if context.args:
        known = [option for parameter in context.command.params for option in parameter.opts]
        close = difflib.get_close_matches(context.args[0], known, n=2)
        hint = f"Did you mean {' or '.join(close)}?" if close else "Those of `accelerate launch` need --launch."
        raise typer.BadParameter(f"No such option: {context.args[0]}. {hint}", ctx=context)
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


def _launch(extra: list[str], *, cpu: bool) -> int:
    """Hand what is left of the command line to `accelerate launch`; returns its exit code."""
    rest, own = list(extra), []
    for word in sys.argv[sys.argv.index("train") + 1 :]:
        if rest and word == rest[0]:
            rest.pop(0)
        elif word != "--launch":
            own.append(word)
    # On the CPU accelerate starts one process whatever it is told, unless it takes its way of several GPUs.
    several = ["--multi_gpu"] if cpu and _processes(extra) > 1 and "--multi_gpu" not in extra else []
    line = [sys.executable, "-c", _LAUNCHER, *several, *extra, "-m", "smn_peft.cli", "train", *own]
    interrupted: list[int] = []
    # Ctrl-C reaches the processes too; here they are waited for, since they save and then end.
    before = signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    try:
        code = subprocess.Popen(line).wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return 130 if interrupted else code


def _processes(extra: list[str]) -> int:
    """What `accelerate launch` is told of --num_processes."""
    for word, following in zip(extra, [*extra[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name.replace("-", "_") == "__num_processes" and (value or following).isdigit():
            return int(value or following)
    return 1
