# SPDX-License-Identifier: Apache-2.0
"""Recipes: YAML files of training arguments that carry the results to expect of them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .._options import check_keys, did_you_mean
from ..backbones import name_read_from
from .arguments import TrainArguments

__all__ = ["Recipe", "list_recipes", "load_recipe", "read_recipe"]


_NOTES = ("description", "source", "expected")


class Recipe(dict[str, Any]):
    """The arguments of a recipe.

    Attributes:
        notes: `description`, `source` and `expected` of the file.
    """

    notes: dict[str, Any]


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files(__package__).joinpath("recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read_recipe(name: str | Path) -> dict[str, Any]:
    """Read the mapping of a recipe of the package, or of a YAML file; raises as [`load_recipe`]."""
    path: Any = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = list_recipes()
        if str(name) not in known:
            hint = did_you_mean(str(name), known)
            raise ValueError(f"Unknown recipe {name!r}; there are {', '.join(known)}, or a .yaml file.{hint}")
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
    """Refuse a base or objective that is a file, at any depth: a recipe may come from anybody."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if key in ("backbone", "objective") and isinstance(value, str):
            name_read_from(where, value, f"--{key}", first="take it out there, and ")
        _refuse_programs(value, where)


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe of the package by name, or a YAML file, as training arguments.

    Raises:
        OSError: The file cannot be read.
        ValueError: For an unknown name or argument, or a file that is not YAML, not a mapping, or names a program.
    """
    content = read_recipe(name)
    notes: dict[str, Any] = {key: content.pop(key) for key in _NOTES if key in content}
    check_keys(TrainArguments, content, f"Recipe {name}")
    recipe = Recipe(content)
    recipe.notes = notes
    return recipe
