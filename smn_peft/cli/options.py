# SPDX-License-Identifier: Apache-2.0
"""Command-line options from dataclasses: names, types, defaults and help are the fields', written once.

A field `batch_size` becomes `--batch-size`, a field of a nested dataclass `--mask.density`, in a recipe
`mask: {density: …}`. A value comes from the command line, else from the recipe, else it is the default.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click
import yaml
from click.core import ParameterSource
from click.shell_completion import CompletionItem
from pydantic import TypeAdapter, ValidationError

from .._options import did_you_mean
from ..evaluation import EvalReport
from ..storage import atomic_write

__all__ = [
    "PATH",
    "Group",
    "backbone_option",
    "evaluation_options",
    "field_options",
    "given",
    "help_all",
    "json_file",
    "merge",
    "one_line",
    "output_file",
    "place_options",
    "read_reports",
    "read_values",
    "write_json",
]

PATH = click.Path(path_type=Path)
# Fields of a mask's configuration that are written by the package, not by users.
_WRITTEN = ("preprocessing", "id2label", "format_version", "base_fingerprint", "unmasked_fingerprint")


class Group(click.Group):
    """A group that lists its commands in the order of their definition."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names of the commands."""
        return list(self.commands)


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; another type alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_list(hint: Any) -> bool:
    """Whether a type holds any number of values: list, set or tuple[T, …]."""
    return get_origin(hint) in (list, set) or (get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis)


def describe(hint: Any) -> str:
    """The type in a user's words, such as "int or none"."""
    members, inner = _members(hint), get_args(hint)
    if len(members) > 1:
        return " or ".join(map(describe, members))
    if get_origin(hint) is Literal:
        return "|".join(map(str, inner))
    if _is_list(hint):
        return f"list of {describe(inner[0])}"
    if get_origin(hint) is tuple:
        return f"({', '.join(map(describe, inner))})"
    return {NoneType: "none", bool: "true or false", dict: "key=value"}.get(
        get_origin(hint) or hint, getattr(hint, "__name__", str(hint))
    )


def _from_words(words: Sequence[str], hint: Any) -> Any:
    """Words of the command line as a value of the type; "none" is None where the type allows it.

    Raises:
        ValueError: If they are not of the type.
    """
    members = _members(hint)
    if NoneType in members and [word.lower() for word in words] in (["none"], ["null"]):
        return None
    if any(get_origin(member) is dict for member in members):
        if not all(re.match("[^=]+=", word) for word in words):
            raise ValueError("not key=value")
        return {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}
    adapter: TypeAdapter[Any] = TypeAdapter(hint)
    if len(words) == 1:  # one word is one value where the type takes that: a regex
        with suppress(ValidationError):
            return adapter.validate_python(words[0])
    return adapter.validate_python(list(words))


@dataclasses.dataclass(frozen=True)
class _Field:
    """A field that can be set: its dotted name, as in "mask.density", type, default and help."""

    path: str
    hint: Any
    default: Any
    help: str

    @property
    def parameter(self) -> str:
        """The name of the option among a command's parameters."""
        return self.path.replace(".", "__")

    def option(self, hidden: bool) -> Callable[[Any], Any]:
        """The decorator that gives a command this field's option."""
        flag = f"--{self.path.replace('_', '-')}"
        unsaid = self.default is False or self.default in (None, "", (), [], {})
        text = self.help if unsaid else f"{self.help} [{self.default}]"
        settings: dict[str, Any] = {"help": text, "hidden": hidden, "default": None}
        if self.hint is bool:
            return click.option(self.parameter, f"{flag}/--no-{flag[2:]}", **settings)
        fixed = get_origin(self.hint) is tuple and not _is_list(self.hint)
        return click.option(
            self.parameter,
            flag,
            **settings,
            metavar=f"<{describe(self.hint)}>",
            nargs=len(get_args(self.hint)) if fixed else 1,
            multiple=any(_is_list(member) or get_origin(member) is dict for member in _members(self.hint)),
            callback=self._convert,
            shell_complete=self._complete,
        )

    def _convert(self, context: click.Context, parameter: click.Parameter, words: Any) -> Any:
        given = [words] if isinstance(words, str) else words
        try:
            return _from_words(given, self.hint) if given else None
        except (ValueError, yaml.YAMLError) as error:
            raise click.BadParameter(f"must be {describe(self.hint)}; got {' '.join(given)!r}.") from error

    def _complete(self, context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The values of Literals, and "none" where None is one."""
        choices = [
            value for member in _members(self.hint) if get_origin(member) is Literal for value in get_args(member)
        ]
        choices += ["none"] if NoneType in _members(self.hint) else []
        return [CompletionItem(choice) for choice in choices if choice.startswith(incomplete)]


def _fields_of(kind: type, prefix: str = "") -> Iterator[_Field]:
    """Every field with help, nested ones by their dotted names.

    Fields that a dataclass inherits from another library are left out: they are that library's, not the user's.
    """
    hints, package = get_type_hints(kind), kind.__module__.partition(".")[0]
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] == package]
    own = {name for base in bases for name in inspect.get_annotations(base)} - set(_WRITTEN)
    for field in dataclasses.fields(kind):
        if "help" not in field.metadata or field.name not in own:
            continue
        path, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _fields_of(hint, f"{path}.")
        else:
            factory: Any = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            yield _Field(path, hint, default, field.metadata["help"])


def field_options(kind: type, *, only: Sequence[str] = (), shown: Sequence[str] = ()) -> Callable[[Any], Any]:
    """Decorate a command with an option per field of a dataclass; [`given`] collects what the line says.

    Args:
        kind: The dataclass.
        only: Dotted names of the fields to offer, if not all.
        shown: Dotted names of the options in `--help`, if not all; [`help_all`] shows the others.
    """
    fields = {field.path: field for field in _fields_of(kind)}
    order = only or [*shown, *(path for path in fields if path not in shown)]

    def decorate(function: Any) -> Any:
        for path in reversed(order):
            function = fields[path].option(hidden=bool(shown) and path not in shown)(function)
        return function

    return decorate


def help_all(function: Any) -> Any:
    """Decorate a command with `--help-all`, which lists the hidden options too."""

    def show(context: click.Context, _: click.Parameter, wanted: bool) -> None:
        if wanted:
            for parameter in context.command.params:
                parameter.hidden = False  # type: ignore[attr-defined]
            click.echo(context.get_help())
            context.exit()

    settings: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": show}
    return click.option("--help-all", help="Show every option and exit.", **settings)(function)


def given(context: click.Context, kind: type) -> dict[str, Any]:
    """What the command line says of a dataclass, nested as in a recipe."""
    values: dict[str, Any] = {}
    for field in _fields_of(kind):
        if context.get_parameter_source(field.parameter) is ParameterSource.COMMANDLINE:
            *outer, name = field.path.split(".")
            inner = values
            for part in outer:
                inner = inner.setdefault(part, {})
            inner[name] = context.params[field.parameter]
    return values


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values, of which the second mapping's win."""
    merged = dict(first)
    for key, value in second.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def read_values(content: Mapping[str, Any], kind: type, where: str) -> dict[str, Any]:
    """What a YAML file says of a dataclass, each value checked against its field.

    Raises:
        ValueError: For an unknown key, with those that are close, or a value of another type; names `where`.
    """
    return _read(content, {field.path: field.hint for field in _fields_of(kind)}, where, "")


def _read(content: Mapping[str, Any], hints: Mapping[str, Any], where: str, prefix: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in content.items():
        path = f"{prefix}{key}"
        if path in hints:
            values[key] = _typed(value, hints[path], f"{where}: {path}")
        elif not any(name.startswith(f"{path}.") for name in hints):
            raise ValueError(f"{where}: unknown key {path!r}.{did_you_mean(path, hints)}")
        elif not isinstance(value, Mapping):
            raise ValueError(f"{where}: {path} has values of its own, such as {path}: {{…}}; got {value!r}.")
        else:
            values[key] = _read(value, hints, where, f"{path}.")
    return values


def _typed(value: Any, hint: Any, where: str) -> Any:
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        if isinstance(value, str):  # such as 1e-3, which YAML does not take for a number
            with suppress(ValueError):
                return _from_words([value], hint)
        raise ValueError(f"{where} must be {describe(hint)}; got {value!r}.") from error


def one_line(error: BaseException) -> str:
    """The message without line breaks; for the system's own errors what happened to which file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


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


def place_options(function: Any) -> Any:
    """Decorate a command with the options of an adapter's place, for `locate_adapter`."""
    function = click.option("--subfolder", help="Folder of the adapter inside.")(function)
    return click.option("--revision", help="Branch, tag or commit on the Hub.")(function)


def evaluation_options(metrics: Sequence[str], unsaid: str) -> Callable[[Any], Any]:
    """Decorate a command with what every evaluation of a folder takes; `unsaid` is measured without `--metric`."""
    named = f"{', '.join(metrics)}; may be repeated. {unsaid} if not given."
    options = (
        backbone_option,
        click.option("--dataset", help="Another dataset than the run's."),
        click.option("--split", help="Split to test on; the run's if not given."),
        click.option("--metric", "metrics", multiple=True, help=named),
        click.option("--batch-size", type=int, help="Images per forward; the run's if not given."),
        click.option("--num-workers", type=int, help="Processes that load images; the run's if not given."),
        click.option("--limit", type=int, help="A seeded choice of at most this many training and test images."),
        click.option("--cpu", is_flag=True, help="Stay on the CPU even where there is a GPU."),
        json_file,
    )

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def write_json(path: Path | None, data: Any) -> None:
    """Write dataclasses, or what JSON can hold, if a file is named."""
    if path is not None:
        with atomic_write(path) as file:
            file.write((json.dumps(data, indent=1, default=dataclasses.asdict) + "\n").encode())


def read_reports(path: Path) -> list[EvalReport]:
    """The reports of a file that `smn eval --json` wrote.

    Raises:
        ValueError: If the file holds something else; names it.
    """
    try:
        return [EvalReport.from_json(json.dumps(item)) for item in json.loads(path.read_text("utf-8"))]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no reports of `smn eval`: {error}") from error
