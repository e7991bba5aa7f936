# SPDX-License-Identifier: Apache-2.0
"""What a run was told, as JSON, and the refusal to take a run of other settings for the same one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .loop_arguments import HARMLESS, LoopArguments

__all__ = ["as_facts", "check_same", "evaluated_alike"]

_EVALUATION = ("eval_split", "eval_limit", "knn_k", "knn_limit")


def as_facts(arguments: LoopArguments, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments and `more`, as they come back from a JSON file."""
    facts: dict[str, Any] = json.loads(json.dumps({**asdict(arguments), **(more or {})}, default=_jsonable))
    return facts


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: object) -> None:
    """Refuse to go on with a run under other settings than it was started with.

    Args:
        saved: Facts that the run wrote.
        wanted: Facts that it would have to have written.
        where: What it wrote, for the message.

    Raises:
        ValueError: If they differ in more than what moves no weight; every difference is named.
    """
    # Without labels the names of the classes are known only where something is evaluated.
    unknown = {"classes"} if saved.get("classes") is None or wanted.get("classes") is None else set()
    names = sorted((set(saved) | set(wanted)) - HARMLESS - unknown)
    if differing := [name for name in names if saved.get(name) != wanted.get(name)]:
        lines = "\n".join(f"  {name}: was {saved.get(name)!r}, is {wanted.get(name)!r}" for name in differing)
        raise ValueError(
            f"{where} was written by a run with other settings, so going on would not be the same run:\n{lines}\n"
            "Resume with the old ones, or start anew in another output_dir."
        )


def evaluated_alike(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether both evaluate on the same images in the same way, so that their numbers may stand side by side."""
    return all(saved.get(name) == wanted.get(name) for name in _EVALUATION)
