# SPDX-License-Identifier: Apache-2.0
"""`smn train`, `recipes` and `reproduce`: runs from options, a recipe or tasks, in one process or several."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from accelerate import PartialState
from accelerate.commands.launch import launch_command_parser

from .._options import merged, read_values
from ..data.loading import STOP_SIGNALS
from ..paper import ARTEFACTS, SCALES, artefact_named, listing, scale_named
from ..paper import reproduce as reproduce_artefact
from ..training import Interrupted, RunSummary, TrainArguments, list_recipes, load_recipe, plan, run, run_many
from ..training.arguments import read_recipe
from ..training.checkpoint import latest_checkpoint
from ..training.run import EXPECTED, check_tasks
from .options import PATH, field_options, given, help_all, one_line

# The options of TrainArguments that `--help` shows.
SHOWN = (
    "backbone dataset output_dir adapt objective image_size epochs batch_size lr head_lr eval_split seed cpu resume"
).split()
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


# --- Several processes -----------------------------------------------------------------------------------------------

# accelerate's own way in, without the traceback for a process that failed: that process has said why.
# The processes are waited for, since they save and then end. Several get their signals from accelerate's agent, which
# knows no SIGUSR1; a single one has had its own already.
_LAUNCHER = """
import signal, subprocess, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
if hasattr(signal, "SIGUSR1"):
    signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))
from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
try:
    main()
except ChildFailedError as failure:
    sys.exit(failure.get_first_failure()[1].exitcode)
except subprocess.CalledProcessError as failure:
    sys.exit(failure.returncode)
"""

_HANG_UP = tuple(getattr(signal, name) for name in ("SIGHUP",) if hasattr(signal, name))  # the terminal was closed

launch_option = click.option(
    "--launch", is_flag=True, help="Run through `accelerate launch`; options unknown here are passed on to it."
)


class Launchable(click.Command):
    """A command that keeps options unknown to it for `accelerate launch`, where `--launch` is given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the line; without `--launch` every unknown word is refused."""
        ctx.allow_extra_args = ctx.ignore_unknown_options = "--launch" in args
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.possibilities:
                raise
            text = f"{error.format_message()} Options of `accelerate launch` need --launch."
            raise click.UsageError(text, ctx) from error


def launch_processes(command: list[str], extra: list[str], *, cpu: bool) -> int:
    """Run the words that name a command through `accelerate launch`, whose options are `extra`; its exit code."""
    cpu = cpu or not torch.accelerator.is_available()
    rest, own = list(extra), []
    for word in sys.argv[sys.argv.index(command[-1]) + 1 :]:
        if rest and word == rest[0]:
            rest.pop(0)
        elif word != "--launch":
            own.append(word)
    # On the CPU accelerate starts one process whatever it is told, unless it takes its way of several GPUs.
    processes = launch_command_parser().parse_known_args([*extra, "-m", "smn_peft.cli"])[0].num_processes or 1
    several = ["--multi_gpu"] if cpu and processes > 1 and "--multi_gpu" not in extra else []
    line = [sys.executable, "-c", _LAUNCHER, *several, *extra, "-m", "smn_peft.cli", *command, *own]
    interrupted: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: Any = None) -> None:
        interrupted.append(number)
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (*STOP_SIGNALS, *_HANG_UP)}
    # On the CPU each process would otherwise look for a GPU and take itself for the only one.
    environment = {**os.environ, **({"ACCELERATE_USE_CPU": "true"} if cpu else {})}
    try:
        # In a session of their own the processes get each signal once, from here, whoever else its sender meant; here
        # they are waited for, since they save and then end.
        started.append(subprocess.Popen(line, env=environment, start_new_session=True))
        for number in list(interrupted):  # it came while they were started
            pass_on(number)
        code = started[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 130 if interrupted else code


# --- smn train -------------------------------------------------------------------------------------------------------

recipe_option = click.option("--recipe", help="Name of a recipe (`smn recipes` lists them), or a YAML file.")


def recipe_values(recipe: str | None) -> dict[str, Any]:
    """The training arguments that a recipe gives, converted."""
    return {} if recipe is None else read_values(TrainArguments, load_recipe(recipe), recipe)


@click.command("train", cls=Launchable)
@recipe_option
@field_options(TrainArguments, shown=SHOWN)
@click.option("--tasks", type=PATH, help="Train the tasks of this YAML file in turn; see below.")
@click.option("--part", metavar="I/N", help="Of --tasks only every N-th from the I-th on: a job's share.")
@click.option("--dry-run", is_flag=True, help="Load everything, try one batch, show the plan, train nothing.")
@launch_option
@help_all
@click.pass_context
def train(
    context: click.Context, recipe: str | None, tasks: Path | None, part: str | None, launch: bool, **options: Any
) -> None:
    """Adapt a backbone to a dataset, with labels or without, and save the adapter.

    Options on the line win over those of --recipe.

    --tasks takes a file such as `birds: {dataset: user/birds}`, a task per line with what it changes; each trains in
    its folder of --output-dir. Tasks that are finished are not trained again, interrupted ones go on: repeat the line.
    One that fails does not stop the others.
    """
    if part is not None and tasks is None:
        raise click.BadParameter("it is a share of --tasks, which is not given.", param_hint="--part")
    values = merged(recipe_values(recipe), given(context, TrainArguments))
    arguments = TrainArguments(**values)
    if launch:
        context.exit(launch_processes(["train"], context.args, cpu=arguments.cpu))
    chosen = {"": arguments} if tasks is None else _read_tasks(tasks, part, values)
    if options["dry_run"]:
        if sum([_show_plan(name, task) for name, task in chosen.items()]):
            context.exit(1)
        return
    new = tasks is None and arguments.resume and latest_checkpoint(arguments.output_dir) is None
    if new and os.environ.get("RANK", "0") == "0":
        click.echo(f"{arguments.output_dir} holds no checkpoint to resume: the run starts at step 0.", err=True)
    results = run_many(chosen) if tasks is not None else [("", run(arguments))]
    if sum(_show_result(name, result) for name, result in results):
        context.exit(1)


def _read_tasks(path: Path, part: str | None, shared: Mapping[str, Any]) -> dict[str, TrainArguments]:
    """The tasks of a YAML file, ``name: {dataset: …, seed: …}``; what a task does not say is as on the line."""
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--tasks takes a YAML file, such as tasks.yaml; got {path}.")
    folder = Path(shared.get("output_dir", TrainArguments.output_dir))
    tasks = {}
    for name, changes in read_recipe(path).items():
        where = f"{path}: task {name!r}"
        if not _TASK_NAME.fullmatch(str(name)):
            raise ValueError(f"{where}: a name is a folder's, of letters, digits, '.', '_' and '-'.")
        if not isinstance(changes, dict | None):
            raise ValueError(f"{where} must hold a mapping, such as {{seed: 1}}; it holds {changes!r}.")
        if "output_dir" in (changes or {}):
            raise ValueError(f"{where}: output_dir is the name's folder in --output-dir; leave it out.")
        values = merged(shared, read_values(TrainArguments, changes or {}, where))
        tasks[str(name)] = TrainArguments(**{**values, "output_dir": str(folder / str(name))})
    if not tasks:
        raise ValueError(f"{path} holds no task.")
    if part is not None:  # the jobs 1/N to N/N share the tasks
        found = re.fullmatch(r"(\d+)/(\d+)", part)
        index, count = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= index <= count:
            raise ValueError(f"--part is I/N with I from 1 to N, such as 1/4; got {part!r}.")
        tasks = dict(list(tasks.items())[index - 1 :: count])
    check_tasks(tasks)
    return tasks


def _show_plan(name: str, arguments: TrainArguments) -> bool:
    """Print what a run would do; returns whether it cannot."""
    try:
        click.echo(f"{name}\n{plan(arguments)}".lstrip())
    except EXPECTED as error:
        if not name:
            raise
        return _show_result(name, error)
    return False


def _show_result(name: str, result: RunSummary | Exception) -> bool:
    """Print how a run ended; returns whether it failed."""
    failed = isinstance(result, Exception)
    if PartialState().is_main_process:
        text = one_line(result) if isinstance(result, Exception) else result.text()
        click.echo(f"{name}: {text}" if name else text, err=failed)
    return failed


# --- smn recipes, smn reproduce --------------------------------------------------------------------------------------


@click.command("recipes")
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the recipes for `smn train --recipe`, or show the one that is named in full."""
    if name is None:
        for known in list_recipes():
            click.echo(f"{known:20} {read_recipe(known).get('description', '')}")
        return
    click.echo(yaml.safe_dump(read_recipe(name), sort_keys=False, allow_unicode=True).rstrip())


@click.command("reproduce")
@click.argument("names", nargs=-1)
@click.option("--scale", default="small", help=f"{' or '.join(SCALES)}: see --list.")
@click.option("--seeds", type=int, help="Number of seeds; the table's own if not given.")
@click.option("--output", type=PATH, default=Path("runs/paper"), help="Folder of all runs and of what is made.")
@click.option("--list", "show", is_flag=True, help="List all tables and figures with what they take.")
def reproduce(names: tuple[str, ...], scale: str, seeds: int | None, output: Path, show: bool) -> None:
    """Make tables and figures of the paper, such as table2 figure8; `--list` names them.

    What is done is not run again, and what was interrupted goes on.
    """
    if show:
        click.echo(listing(list(SCALES.values())))
        click.echo("\nRuns are shared: those of another table are not run again. Durations are rough, for")
        for known in SCALES.values():
            click.echo(f"  {known.name}: {known.machine}")
        return
    if not names:
        raise click.UsageError(f"name a table or figure, such as {next(iter(ARTEFACTS))}, or pass --list.")
    chosen, size, say = [artefact_named(name) for name in names], scale_named(scale), partial(click.echo, err=True)
    for artefact in chosen:
        try:
            made = reproduce_artefact(artefact, size, seeds=seeds, output=output, say=say)
        except Interrupted as stop:
            raise Interrupted(f"{stop} The same command goes on.") from stop
        click.echo(made.text)
        click.echo("\n".join(str(path) for path in made.files), err=True)
