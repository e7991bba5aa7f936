# SPDX-License-Identifier: Apache-2.0
"""`smn train`, `cascade`, `recipes`, `compare` and `reproduce`: from options, recipes or tasks to runs and tables."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from .._options import merged, read_values
from ..cascade import Cascade, CascadeArguments, cascade_sizes, evaluate_cascade, prepare, train_experts
from ..cascade.evaluate import METRICS
from ..data.loading import STOP_SIGNALS
from ..evaluation import report_table
from ..paper import ARTEFACTS, SCALES, Reproduction, artefact_named, listing, scale_named
from ..paper import compare as compare_methods
from ..paper import reproduce as reproduce_artefact
from ..training import (
    FolderInUse,
    Interrupted,
    RunSummary,
    TrainArguments,
    list_recipes,
    load_recipe,
    plan,
    run,
    run_many,
)
from ..training import convert as convert_run
from ..training.arguments import read_recipe
from ..training.checkpoint import latest_checkpoint
from ..training.run import EXPECTED, check_tasks
from .options import (
    PATH,
    Group,
    evaluation_options,
    field_options,
    given,
    help_all,
    one_line,
    read_part,
    write_json,
)

# The options of TrainArguments that `--help` shows.
SHOWN = (
    "backbone dataset output_dir adapt objective image_size epochs batch_size lr head_lr eval_split seed cpu resume"
).split()
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

launch_option = click.option(
    "--launch", is_flag=True, help="Run through `accelerate launch`; options unknown here are passed on to it."
)


class Launchable(click.Command):
    """A command that keeps options unknown to it for `accelerate launch`, where `--launch` is given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the line; without `--launch` every unknown word is refused."""
        ctx.allow_extra_args = ctx.ignore_unknown_options = "--launch" in args
        try:
            rest = super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            text = f"{error.format_message()} Options of `accelerate launch` need --launch."
            raise click.UsageError(text, ctx) from error
        for argument in (one for one in self.params if isinstance(one, click.Argument)):
            if str(ctx.params[str(argument.name)]).startswith("-"):
                text = f"{argument.make_metavar(ctx)} comes before the options of `accelerate launch`."
                raise click.UsageError(text, ctx)
        return rest


def launch_processes(command: list[str], extra: list[str], *, cpu: bool) -> int:
    """Run the words that name a command through `accelerate launch`, whose options are `extra`; its exit code."""
    cpu = cpu or not torch.accelerator.is_available()
    rest, own = list(extra), []
    for word in sys.argv[sys.argv.index(command[-1]) + 1 :]:
        if rest and word == rest[0]:
            rest.pop(0)
        elif word != "--launch":
            own.append(word)
    # On the CPU accelerate starts one process whatever it is told, unless it takes its way of several GPUs; with that
    # it would forget an engine, which the processes refuse there.
    told = launch_command_parser().parse_known_args([*extra, "-m", "smn_peft.cli"])[0]
    several = ["--multi_gpu"] if cpu and (told.num_processes or 1) > 1 and not _names_engine(told) else []
    line = [sys.executable, "-c", _LAUNCHER, *several, *extra, "-m", "smn_peft.cli", *command, *own]
    # On the CPU each process would otherwise look for a GPU and take itself for the only one.
    environment = {**os.environ, **({"ACCELERATE_USE_CPU": "true"} if cpu else {})}
    interrupted: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: Any = None) -> None:
        interrupted.append(number)
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    hang_up = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # the terminal was closed
    before = {number: signal.signal(number, pass_on) for number in (*STOP_SIGNALS, *hang_up)}
    try:
        # In a session of their own the processes get each signal once, from here, whoever else its sender meant; they
        # are waited for, since they save and then end.
        started.append(subprocess.Popen(line, env=environment, start_new_session=True))
        for number in list(interrupted):  # it came while they were started
            pass_on(number)
        code = started[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 130 if interrupted else code


def _names_engine(told: Namespace) -> bool:
    """Whether options of `accelerate launch`, or the file that they name, say how processes share the work."""
    if told.multi_gpu or told.use_fsdp or told.use_deepspeed or told.use_megatron_lm:
        return True
    engines = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    return told.config_file is not None and load_config_from_file(told.config_file).distributed_type in engines


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
    its folder of --output-dir. Tasks that are finished are not trained again, interrupted ones go on, and one that
    fails does not stop the others: repeat the line. Jobs that share the disk share the tasks by the same line: each
    takes the next that none is at work on.
    """
    if part is not None and tasks is None:
        raise click.BadParameter("it is a share of --tasks, which is not given.", param_hint="--part")
    values = merged(recipe_values(recipe), given(context, TrainArguments))
    arguments = TrainArguments(**values)
    if launch:
        context.exit(launch_processes(["train"], context.args, cpu=arguments.cpu))
    results: Iterable[tuple[str, str | RunSummary | Exception]]
    if tasks is not None:
        chosen = _read_tasks(tasks, part, values)
        results = _plans(chosen) if options["dry_run"] else run_many(chosen)
    elif options["dry_run"]:
        results = [("", plan(arguments))]
    else:
        if arguments.resume and latest_checkpoint(arguments.output_dir) is None and os.environ.get("RANK", "0") == "0":
            click.echo(f"{arguments.output_dir} holds no checkpoint to resume: the run starts at step 0.", err=True)
        results = [("", run(arguments))]
    if sum(_show(name, result) for name, result in results):
        context.exit(1)


@click.command("convert", cls=Launchable)
@click.argument("model")
@recipe_option
@field_options(TrainArguments, shown="backbone output_dir dataset limit eval_split max_bytes epochs lr".split())
@launch_option
@help_all
@click.pass_context
def convert(context: click.Context, model: str, recipe: str | None, launch: bool, **options: Any) -> None:
    """Make a mask of a fine-tuned model.

    MODEL is the output folder of `smn train` with any --adapt but mask; or, with its base as --backbone, a classifier
    of transformers or timm: a Hub id, a folder or a safetensors file. Without --dataset the mask is the nearest to its
    weights. With a dataset, whose labels are not needed, a mask is trained by the recipe `distill` until its outputs
    follow the model's; options are those of `smn train`.
    """
    values = merged(recipe_values(recipe), given(context, TrainArguments))
    if launch:
        context.exit(launch_processes(["convert"], context.args, cpu=bool(values.get("cpu"))))
    output, own = values.pop("output_dir", "output"), values.pop("backbone", None)
    _show("", convert_run(model, output, values, backbone=own))


def _read_tasks(path: Path, part: str | None, shared: Mapping[str, Any]) -> dict[str, TrainArguments]:
    """The tasks of a YAML file, ``name: {dataset: …, seed: …}``; what a task does not say is as on the line."""
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--tasks takes a YAML file, such as tasks.yaml; got {path}.")
    folder = Path(shared.get("output_dir", TrainArguments.output_dir))
    tasks = {}
    for name, changes in read_recipe(path).items():
        where, changes = f"{path}: task {name!r}", {} if changes is None else changes
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(name)):
            raise ValueError(f"{where}: a name is a folder's, of letters, digits, '.', '_' and '-'.")
        if not isinstance(changes, dict):
            raise ValueError(f"{where} must hold a mapping, such as {{seed: 1}}; it holds {changes!r}.")
        if "output_dir" in changes:
            raise ValueError(f"{where}: output_dir is the name's folder in --output-dir; leave it out.")
        values = merged(shared, read_values(TrainArguments, changes, where))
        tasks[str(name)] = TrainArguments(**{**values, "output_dir": str(folder / str(name))})
    if not tasks:
        raise ValueError(f"{path} holds no task.")
    if part is not None:  # the jobs 1/N to N/N share the tasks
        index, count = read_part(part)
        tasks = dict(list(tasks.items())[index - 1 :: count])
    check_tasks(tasks)
    return tasks


def _plans(tasks: Mapping[str, TrainArguments]) -> Iterator[tuple[str, str | Exception]]:
    for name, task in tasks.items():
        try:
            yield name, plan(task)
        except EXPECTED as error:
            yield name, error


def _show(name: str, result: str | RunSummary | Exception) -> bool:
    """Print what a run would do, or how it ended; returns whether it failed."""
    if PartialState().is_main_process:
        text = result.text() if isinstance(result, RunSummary) else result
        if isinstance(result, Exception):
            text = one_line(result)
        between = "\n" if isinstance(result, str) else ": "
        click.echo(f"{name}{between}{text}" if name else text, err=isinstance(result, Exception))
    return isinstance(result, Exception) and not isinstance(result, FolderInUse)


_cascade_folder = click.argument("folder", type=PATH)


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
def _train_cascade(
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


@cascade.command("eval")
@_cascade_folder
@evaluation_options(METRICS, "All")
def _evaluate(folder: Path, metrics: tuple[str, ...], cpu: bool, json_file: Path | None, **options: Any) -> None:
    """Compare the cascade's embeddings with its dispatcher's, whitened or not, and with an ensemble of seeds."""
    accelerator = Accelerator(cpu=cpu)
    reports = evaluate_cascade(folder, metrics=metrics or METRICS, accelerator=accelerator, **options)
    if accelerator.is_main_process:
        click.echo(report_table(reports))
        write_json(json_file, [report.to_dict() for report in reports])


@click.command("recipes")
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the recipes for `smn train --recipe`, or show the one that is named in full."""
    if name is None:
        for known in list_recipes():
            click.echo(f"{known:20} {read_recipe(known).get('description', '')}")
        return
    click.echo(yaml.safe_dump(read_recipe(name), sort_keys=False, allow_unicode=True).rstrip())


# What a comparison decides itself, and what would make its runs unequal.
_DECIDED = "output_dir resume adapt peft lr seed eval_fraction init_from save_dtype eval_probe fraction_seed".split()


@click.command("compare")
@click.argument("recipe")
@field_options(
    TrainArguments, without=_DECIDED, shown="backbone dataset epochs batch_size image_size limit cpu".split()
)
@click.option("--methods", multiple=True, help="Compare these methods only; may be repeated.")
@click.option("--grid", type=PATH, help="A YAML file of methods and trials, in place of the package's methods.yaml.")
@click.option("--budget", "budgets", type=float, multiple=True, help="Largest file in kB; may be repeated.")
@click.option("--held-out", type=float, default=0.2, help="Part of the training images that trials are measured on.")
@click.option("--seeds", type=int, default=3, help="Number of seeds of the runs that are tested.")
@click.option("--output", type=PATH, default=Path("runs/compare"), help="Folder of all runs and of what is made.")
@help_all
@click.pass_context
def compare(context: click.Context, recipe: str, **options: Any) -> None:
    """Compare masks with other methods on a backbone and a dataset, with as many trials for each.

    RECIPE is what all share: a recipe's name, such as supervised-small or swav-small, or a YAML file. Trials are
    measured on held-out training images; within each size of file the best of each method is tested once.

    What is done is not run again, and what was interrupted goes on.
    """
    names = ("methods", "grid", "budgets", "held_out", "seeds", "output")
    values = merged(recipe_values(recipe), given(context, TrainArguments))
    chosen: dict[str, Any] = {name: options[name] for name in names}
    _show_made(partial(compare_methods, values, **chosen))


def _show_made(make: Callable[..., Reproduction]) -> None:
    """Print a table that is made, and the files of it."""
    try:
        made = make(say=partial(click.echo, err=True))
    except Interrupted as stop:
        raise Interrupted(f"{stop} The same command goes on.") from stop
    click.echo(made.text)
    click.echo("\n".join(str(path) for path in made.files), err=True)


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
    size = scale_named(scale)
    for artefact in [artefact_named(name) for name in names]:
        _show_made(partial(reproduce_artefact, artefact, size, seeds=seeds, output=output))
