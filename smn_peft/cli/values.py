# SPDX-License-Identifier: Apache-2.0
"""Values of options from the text of a command line: by their type, and files to write results into."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from ..objectives.values import NONE, describe, members_of

__all__ = ["choices_of", "from_text", "is_optional", "output_file"]


def is_optional(annotation: Any) -> bool:
    """Whether None is a value."""
    return type(None) in members_of(annotation)


def choices_of(annotation: Any) -> list[str]:
    """What can be completed: the values of Literals, and "none" where None is one."""
    found = [
        str(value) for member in members_of(annotation) if get_origin(member) is Literal for value in get_args(member)
    ]
    return [*found, NONE[0]] if found and is_optional(annotation) else found


def from_text(text: str, annotation: Any) -> Any:
    """One word of the command line as a value of the type.

    Raises:
        ValueError: If it is none.
    """
    members = members_of(annotation)
    if is_optional(annotation) and text.lower() in NONE:
        return None
    # A number where it can be one: text comes last.
    for member in sorted(members, key=lambda member: member is str):
        if get_origin(member) is Literal:
            known = {str(value): value for value in get_args(member)}
            if text in known:
                return known[text]
        elif member is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        elif member in (int, float, str, Path):
            try:
                return member(text)
            except ValueError:
                continue
    raise ValueError(f"must be {describe(annotation)}; got {text!r}")


def output_file(path: Path | None) -> Path | None:
    """The file that an option names for the results, refused before the work if it cannot be written.

    Raises:
        typer.BadParameter: If its folder does not exist, or it is one.
    """
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder: name a file.")
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} does not exist: make it first.")
    return path
