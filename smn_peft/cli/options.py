# SPDX-License-Identifier: Apache-2.0
"""Command-line options from dataclasses: names, types, defaults and help are the fields', written once.

A field `batch_size` becomes `--batch-size`, a field of a nested dataclass `--mask.density`, in a recipe
`mask: {density: …}`. A value comes from the command line, else from the recipe, else it is the default.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
import yaml
from click.core import ParameterSource

from .._options import describe, from_words, is_list, members_of, user_fields
from ..evaluation import EvalReport
from ..storage.files import atomic_write

PATH = click.Path(path_type=Path)


class Group(click.Group):
    """A group that lists its commands in the order of their definition."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names of the commands."""
        return list(self.commands)


def _fields_of(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Path, as in "mask.density", type and field of all that users set."""
    hints = get_type_hints(kind)
    for name, field in user_fields(kind).items():
        if dataclasses.is_dataclass(hints[name]):
            yield from _fields_of(hints[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hints[name], field


def _option(path: str, hint: Any, field: dataclasses.Field[Any], hidden: bool) -> Callable[[Any], Any]:
    """The decorator that gives a command a field's option."""
    flag, members, text = f"--{path.replace('_', '-')}", members_of(hint), field.metadata["help"]
    factory: Any = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    if default is not False and default not in (None, "", (), [], {}):
        text = f"{text} [{default}]"
    settings: dict[str, Any] = {"help": text, "hidden": hidden, "default": None}
    if hint is bool:
        return click.option(_parameter(path), f"{flag}/--no-{flag[2:]}", **settings)

    def convert(context: click.Context, parameter: click.Parameter, words: Any) -> Any:
        given = [words] if isinstance(words, str) else words
        try:
            return from_words(given, hint) if given else None
        except (ValueError, yaml.YAMLError) as error:
            raise click.BadParameter(f"must be {describe(hint)}; got {' '.join(given)!r}.") from error

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        choices = [value for member in members if get_origin(member) is Literal for value in get_args(member)]
        choices += ["none"] * (NoneType in members)
        return [choice for choice in choices if choice.startswith(incomplete)]

    fixed = get_origin(hint) is tuple and not is_list(hint)
    settings |= {"metavar": f"<{describe(hint)}>", "nargs": len(get_args(hint)) if fixed else 1}
    settings["multiple"] = any(is_list(member) or get_origin(member) is dict for member in members)
    return click.option(_parameter(path), flag, **settings, callback=convert, shell_complete=complete)


def _parameter(path: str) -> str:
    return path.replace(".", "__")


def combined(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Decorate a command with several options, in this order."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def field_options(
    kind: type, *, only: Sequence[str] = (), without: Sequence[str] = (), shown: Sequence[str] = ()
) -> Callable[[Any], Any]:
    """Decorate a command with an option per field of a dataclass; [`given`] collects what the line says.

    `only` are the fields to offer, if not all, or all but those `without`; `shown` those in `--help`, if not all:
    [`help_all`] shows the others.
    """
    fields = {path: (hint, field) for path, hint, field in _fields_of(kind) if path not in without}
    order = only or [*shown, *(path for path in fields if path not in shown)]
    return combined(*(_option(path, *fields[path], hidden=bool(shown) and path not in shown) for path in order))


def _show_all(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        click.echo(context.get_help())
        context.exit()


_text = "Show every option and exit."
help_all = click.option("--help-all", is_flag=True, is_eager=True, expose_value=False, callback=_show_all, help=_text)


def given(context: click.Context, kind: type) -> dict[str, Any]:
    """What the command line says of a dataclass, nested as in a recipe."""
    values: dict[str, Any] = {}
    for path, _, _ in _fields_of(kind):
        if context.get_parameter_source(_parameter(path)) is ParameterSource.COMMANDLINE:
            *outer, name = path.split(".")
            inner = values
            for part in outer:
                inner = inner.setdefault(part, {})
            inner[name] = context.params[_parameter(path)]
    return values


def one_line(error: BaseException) -> str:
    """The message without line breaks; for the system's own errors what happened to which file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def read_part(part: str) -> tuple[int, int]:
    """Read a job's share, "I/N" with I from 1 to N."""
    index, count = map(int, part.split("/")) if re.fullmatch(r"\d+/\d+", part) else (0, 0)
    if not 1 <= index <= count:
        raise ValueError(f"--part is I/N with I from 1 to N, such as 1/4; got {part!r}.")
    return index, count


def output_file(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file for results that cannot be written, before the work is done."""
    if path is not None and path.is_dir():
        raise click.BadParameter(f"{path} is a folder: name a file.")
    if path is not None and not path.parent.is_dir():
        raise click.BadParameter(f"the folder {path.parent} does not exist: make it first.")
    return path


json_file = click.option(
    "--json", "json_file", type=PATH, callback=output_file, help="Write the results into this file."
)
backbone_option = click.option("--backbone", help="Where the base is now, if not where the folder says.")
place_options = combined(
    click.option("--revision", help="Branch, tag or commit on the Hub."),
    click.option("--subfolder", help="Folder of the adapter inside."),
)
loading_options = combined(
    click.option("--batch-size", type=int, help="Images per forward; the run's if not given."),
    click.option("--num-workers", type=int, help="Processes that load images; the run's if not given."),
    click.option("--cpu", is_flag=True, help="Stay on the CPU even where there is a GPU."),
)


def evaluation_options(metrics: Sequence[str], unsaid: str) -> Callable[[Any], Any]:
    """Decorate a command with what every evaluation of a folder takes; `unsaid` is measured without `--metric`."""
    named = f"{', '.join(metrics)}; may be repeated. {unsaid} if not given."
    return combined(
        backbone_option,
        click.option("--dataset", help="Another dataset than the run's."),
        click.option("--split", help="Split to test on; the run's if not given."),
        click.option("--metric", "metrics", multiple=True, help=named),
        click.option("--limit", type=int, help="A seeded choice of at most this many training and test images."),
        loading_options,
        json_file,
    )


def write_json(path: Path | None, data: Any) -> None:
    """Write dataclasses, or what JSON can hold, if a file is named."""
    if path is not None:
        with atomic_write(path) as file:
            file.write((json.dumps(data, indent=1, default=dataclasses.asdict) + "\n").encode())


def read_reports(path: Path) -> list[EvalReport]:
    """The reports of a file that `smn eval --json` wrote; ValueError if it holds something else."""
    try:
        return [EvalReport.from_json(json.dumps(item)) for item in json.loads(path.read_text("utf-8"))]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no reports of `smn eval`: {error}") from error
