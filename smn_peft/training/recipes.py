# SPDX-License-Identifier: Apache-2.0
"""Recipes: YAML files of training arguments that carry the results to expect of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..backbones import name_read_from
from .suggestion import did_you_mean
from .train_arguments import TrainArguments

__all__ = ["Recipe", "check_keys", "list_recipes", "load_recipe", "read_recipe"]

_NOTES = ("description", "source", "expected")


class Recipe(dict[str, Any]):
    """The arguments of a recipe, with what its file says of itself.

    Attributes:
        notes: `description`, `source` and `expected` of the file.
    """

    notes: dict[str, Any]


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files(__package__).joinpath("recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read_recipe(name: str | Path) -> dict[str, Any]:
    """The mapping that a recipe of the package or a YAML file of one's own holds.

    Raises:
        OSError: The file cannot be read.
        ValueError: For an unknown name, a file that is not YAML or not a mapping, or one that names a program.
    """
    path: Any = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in list_recipes():
            hint = did_you_mean(str(name), list_recipes())
            raise ValueError(f"Unknown recipe {name!r}; there are {', '.join(list_recipes())}, or a .yaml file.{hint}")
        path = resources.files(__package__).joinpath(f"recipes/{name}.yaml")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold a mapping, such as 'epochs: 10'; it holds {type(content).__name__}.")
    _refuse_programs(content, name)
    return content


def _refuse_programs(content: Any, where: str | Path) -> None:
    """A recipe may come from anybody: its base and objective are names; at any depth, since tasks are nested."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if key in ("backbone", "objective") and isinstance(value, str):
            name_read_from(where, value, f"--{key}", first="take it out there, and ")
        _refuse_programs(value, where)


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe of the package by name, or a YAML file of one's own, as training arguments.

    Raises:
        OSError: The file cannot be read.
        ValueError: As [`read_recipe`]; also for an unknown argument.
    """
    content = read_recipe(name)
    recipe = Recipe({key: value for key, value in content.items() if key not in _NOTES})
    recipe.notes = {key: content[key] for key in _NOTES if key in content}
    check_keys(TrainArguments, recipe, f"Recipe {name}")
    return recipe


def check_keys(kind: Any, values: Mapping[str, Any], where: str) -> None:
    """Refuse a key that no field of a dataclass, or of one nested in it, has.

    Raises:
        ValueError: Naming the key and the closest field.
    """
    known = {field.name: field for field in fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where}: unknown argument {key!r}.{did_you_mean(key, known)}")
        nested = known[key].default_factory
        if is_dataclass(nested) and isinstance(value, Mapping):
            check_keys(nested, value, f"{where}, {key}")
