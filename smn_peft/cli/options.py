# SPDX-License-Identifier: Apache-2.0
"""Options of a command from dataclasses: names, types, defaults and help are the fields', written once.

A command takes dataclasses as parameters; `with_options` gives it one option per field instead. A field `lr` becomes
`--lr`, a field of a nested dataclass `--mask.density`, in a recipe `mask: {density: …}`. Options are the fields that
have help. A value comes from the command line, else from the recipe, else it is the default.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from ..objectives.values import describe, from_yaml, is_list, is_mapping, members_of
from .values import choices_of, from_text, is_optional

__all__ = ["Field", "build", "fields_of", "flatten", "with_options"]

_RECIPE = "recipe"
_MISSING = "is missing, and no recipe gives it"
_PLAIN = (int, float, str, Path)


@dataclasses.dataclass(frozen=True)
class Field:
    """A field that can be set, possibly of a nested dataclass.

    Attributes:
        path: Its dotted name, "mask.density".
        type: Its type, with every name resolved.
        default: Its value if nothing is said, `dataclasses.MISSING` if something must be.
        help: Its help.
    """

    path: str
    type: Any
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """The option's name."""
        return f"--{self.path.replace('_', '-')}"

    @property
    def parameter(self) -> str:
        """The name of the Python parameter that typer fills."""
        return self.path.replace(".", "__")


def fields_of(cls: type, prefix: str = "", default: Any = None) -> Iterator[Field]:
    """Every field with help, nested ones by their dotted names.

    Fields that a dataclass inherits from another library are left out: they are that library's, not the user's.

    Args:
        cls: A dataclass.
        prefix: What the dotted names start with.
        default: An instance whose values are the defaults.
    """
    hints, own = get_type_hints(cls), cls.__module__.partition(".")[0]
    declared = {
        name
        for base in cls.__mro__
        if base.__module__.partition(".")[0] == own
        for name in inspect.get_annotations(base)
    }
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata or not field.init or field.name not in declared:
            continue
        path, value = f"{prefix}{field.name}", _default_of(field)
        if default is not None:
            value = getattr(default, field.name)
        if dataclasses.is_dataclass(kind := hints[field.name]) and isinstance(kind, type):
            yield from fields_of(kind, f"{path}.", None if value is dataclasses.MISSING else value)
        else:
            yield Field(path, kind, value, field.metadata["help"])


def flatten(content: Mapping[str, Any], fields: Mapping[str, Field], where: str, prefix: str = "") -> dict[str, Any]:
    """A recipe's values by dotted name, each checked against its field.

    Args:
        content: What the recipe holds.
        fields: The fields by dotted name.
        where: The recipe's name, for messages.
        prefix: Dotted name of what `content` is the value of, ending in a dot.

    Raises:
        ValueError: For an unknown key, with those that are close, or a value of another type.
    """
    values: dict[str, Any] = {}
    for key, value in content.items():
        path = f"{prefix}{key}"
        if path in fields:
            values[path] = from_yaml(value, fields[path].type, f"{where}: {path}")
        elif not any(name.startswith(f"{path}.") for name in fields):
            close = difflib.get_close_matches(path, fields, n=3)
            close += [name for name in fields if name.rpartition(".")[2] == str(key) and name not in close][:3]
            hint = f"; did you mean {', '.join(close)}?" if close else "."
            raise ValueError(f"{where}: unknown key {path!r}{hint}")
        elif not isinstance(value, Mapping):
            raise ValueError(f"{where}: {path} has values of its own, such as {path}: {{…}}; got {value!r}.")
        else:
            values.update(flatten(value, fields, where, f"{path}."))
    return values


def build(cls: type, values: Mapping[str, Any], prefix: str = "", default: Any = None) -> Any:
    """The dataclass from values by dotted name; where nothing is said, from its defaults."""
    hints, arguments = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        path, kind = f"{prefix}{field.name}", hints[field.name]
        if path in values:
            arguments[field.name] = values[path]
        elif any(name.startswith(f"{path}.") for name in values):
            inner = _default_of(field) if default is None else getattr(default, field.name)
            arguments[field.name] = build(kind, values, f"{path}.", None if inner is dataclasses.MISSING else inner)
    return cls(**arguments) if default is None else dataclasses.replace(default, **arguments)


def with_options(
    *,
    only: Collection[str] | None = None,
    hidden: Collection[str] = (),
    recipe: Callable[[str], Mapping[str, Any]] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command: its parameters that are dataclasses become options.

    Args:
        only: Dotted names of the fields to offer; None offers all.
        hidden: Dotted names of fields not to offer.
        recipe: Reads what `--recipe` names, as `smn_peft.training.load_recipe` does; None gives no such option.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        hints = get_type_hints(command, include_extras=True)
        owners = {
            name: kind for name, kind in hints.items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)
        }
        fields: dict[str, Field] = {}
        for field in (field for kind in owners.values() for field in fields_of(kind)):
            if field.path in hidden or not (only is None or field.path in only):
                continue
            if field.path in fields or field.path in hints:
                raise TypeError(f"Two parameters of {command.__name__} are called {field.path!r}.")
            fields[field.path] = field
        if unknown := sorted({*(only or ()), *hidden} - {f.path for kind in owners.values() for f in fields_of(kind)}):
            raise TypeError(f"{command.__name__} has no fields {', '.join(unknown)}.")

        @functools.wraps(command)
        def run(**given: Any) -> Any:
            values: dict[str, Any] = {}
            if (name := given.pop(_RECIPE, None)) is not None and recipe is not None:
                values = flatten(recipe(name), fields, str(name))
            for path, field in fields.items():
                value = given.pop(field.parameter, None)
                if value is not None and value != []:
                    said = _from_command_line(value, field)
                    values[path] = {**values.get(path, {}), **said} if isinstance(said, dict) else said
                elif field.default is dataclasses.MISSING and path not in values:
                    raise typer.BadParameter(_MISSING if recipe else "is missing", param_hint=field.flag)
            for name, kind in owners.items():
                mine = {field.path for field in fields_of(kind)}
                given[name] = build(kind, {path: value for path, value in values.items() if path in mine})
            return command(**given)

        parameters = [
            parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(command).parameters.items()
            if name not in owners
        ]
        if recipe is not None:
            parameters.append(_parameter(_RECIPE, str | None, typer.Option(help="Recipe with options: YAML file.")))
        parameters += [_parameter(field.parameter, *_annotation(field)) for field in fields.values()]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del run.__wrapped__
        return run

    return decorate


def _default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _parameter(name: str, annotation: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )


def _annotation(field: Field) -> tuple[Any, Any]:
    """The type for typer, where None means that the option was not given, and the option."""
    import rich.markup

    choices = choices_of(field.type)
    shown = field.default
    settings: dict[str, Any] = {
        "help": rich.markup.escape(field.help),
        "show_default": False if shown in (None, "", dataclasses.MISSING) or shown in ([], (), {}) else str(shown),
    }
    if "." in field.path:
        settings["rich_help_panel"] = field.path.rpartition(".")[0]
    if field.type is bool:
        return bool | None, typer.Option(f"{field.flag}/--no-{field.flag[2:]}", **settings)
    fixed = get_origin(field.type) is tuple and not is_list(field.type)
    if field.type in _PLAIN or fixed or (get_origin(field.type) is Literal and _all_text(field.type)):
        return field.type | None, typer.Option(field.flag, **settings)
    settings |= {"metavar": "<key=value>" if is_mapping(field.type) else f"<{describe(field.type)}>"}
    if choices:
        settings["autocompletion"] = _completion(choices)
    several = is_mapping(field.type) or any(is_list(member) for member in members_of(field.type))
    return list[str] | None if several else str | None, typer.Option(field.flag, **settings)


def _all_text(literal: Any) -> bool:
    return all(isinstance(value, str) for value in get_args(literal))


def _completion(choices: list[str]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def _from_command_line(value: Any, field: Field) -> Any:
    """What typer gives, as the field's type."""
    members = members_of(field.type)
    try:
        if is_mapping(field.type):
            return dict(_pair(text) for text in value)
        listed = next((member for member in members if is_list(member)), None)
        if listed is not None:
            alone = tuple(member for member in members if not is_list(member) and member is not type(None))
            none = len(value) == 1 and is_optional(field.type) and value[0].lower() in ("none", "null")
            if none or (len(value) == 1 and alone):  # one word is one value where the field takes that: a regex
                return from_text(value[0], field.type)
            items = get_args(listed) or (str,)
            return (get_origin(listed) or listed)(from_text(text, items[0]) for text in value)
        return from_text(value, field.type) if isinstance(value, str) else value
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=field.flag) from error


def _pair(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"must be key=value; got {text!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"must be key=value, the value in YAML; got {text!r}") from error
