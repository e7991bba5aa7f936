# SPDX-License-Identifier: Apache-2.0
"""`smn train --tasks`: a file of tasks, each by what it changes in the arguments of the line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from ..training import TrainArguments
from ..training.recipes import read_recipe
from .options import build, fields_of, flatten

__all__ = ["part_of", "read_tasks"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def read_tasks(path: Path, arguments: TrainArguments) -> dict[str, TrainArguments]:
    """The tasks of a YAML file, ``name: {dataset: …, seed: …}``; what a task does not say is as on the line.

    Args:
        path: The file.
        arguments: Of the line; every task trains in a folder of its name in their `output_dir`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not YAML, has no tasks, or a task has a name that is no folder's, an unknown key, a value of
            another type, or an `output_dir`.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--tasks takes a YAML file, such as tasks.yaml; got {path}.")
    fields = {field.path: field for field in fields_of(TrainArguments)}
    tasks = {}
    for name, changes in read_recipe(path).items():
        where = f"{path}: task {name!r}"
        if not _NAME.fullmatch(str(name)):
            raise ValueError(f"{where}: a name is a folder's, of letters, digits, '.', '_' and '-'.")
        if not isinstance(changes, dict | None):
            raise ValueError(f"{where} must hold a mapping, such as {{seed: 1}}; it holds {changes!r}.")
        if "output_dir" in (changes or {}):
            raise ValueError(f"{where}: output_dir is the name's folder in --output-dir; leave it out.")
        task = build(TrainArguments, flatten(changes or {}, fields, where), default=arguments)
        tasks[str(name)] = replace(task, output_dir=str(Path(arguments.output_dir) / str(name)))
    if not tasks:
        raise ValueError(f"{path} holds no task.")
    return tasks


def part_of(tasks: dict[str, TrainArguments], part: str) -> dict[str, TrainArguments]:
    """Every N-th task from the I-th on, for "I/N": the jobs 1/N to N/N share the tasks.

    Raises:
        ValueError: If that is not what `part` says.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= index <= count:
        raise ValueError(f"--part is I/N with I from 1 to N, such as 1/4; got {part!r}.")
    return dict(list(tasks.items())[index - 1 :: count])
