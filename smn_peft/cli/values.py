# SPDX-License-Identifier: Apache-2.0
"""Values of options by their type, from the text of a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..objectives.values import NONE, describe, members_of

__all__ = ["choices_of", "from_text", "is_optional"]


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
