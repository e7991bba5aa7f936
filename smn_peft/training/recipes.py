# SPDX-License-Identifier: Apache-2.0
"""Recipes: YAML files of training arguments that carry the results to expect of them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .._options import did_you_mean, read_values
from ..backbones import name_read_from
from .arguments import TrainArguments

_NOTES = ("description", "source", "expected")  # what a recipe holds beside arguments


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files(__package__).joinpath("recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read_recipe(name: str | Path) -> dict[str, Any]:
    """Read the mapping of a recipe, notes included, or of another YAML file; raises as [`load_recipe`]."""
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


def load_recipe(name: str | Path) -> dict[str, Any]:
    """Read a recipe of the package by name, or a YAML file, as training arguments: as they are written, but checked.

    Raises:
        OSError: The file cannot be read.
        ValueError: For an unknown name or argument, a value of another type, or a file that is not YAML, not a
            mapping, or names a program.
    """
    content = {key: value for key, value in read_recipe(name).items() if key not in _NOTES}
    read_values(TrainArguments, content, f"Recipe {name}")
    return content  # unconverted: hashes of runs are of what is written
