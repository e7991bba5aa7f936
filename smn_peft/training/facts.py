# SPDX-License-Identifier: Apache-2.0
"""What a run was told, as JSON, and the refusal to take a run of other settings for the same one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .loop_arguments import HARMLESS, LoopArguments

__all__ = ["as_facts", "check_same", "evaluated_alike"]

# Facts about content, where both sides know them, take the place of what only names it: folders can be moved, and
# what lies at a path can change.
_CONTENT = {
    "base": ("backbone", "weights", "pretrained", "backbone_revision"),
    "data": ("dataset", "dataset_revision"),
}
_MEANING = {"base": "base (fingerprint of its weights)", "data": "data (digest of the training images and labels)"}
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
    # Without labels the names of the classes are known only where something is evaluated; earlier versions told
    # nothing of the rest.
    sometimes = ("classes", "preprocessing", *_CONTENT)
    left_out = {name for name in sometimes if saved.get(name) is None or wanted.get(name) is None}
    left_out |= {path for name, paths in _CONTENT.items() if name not in left_out for path in paths}
    names = sorted((set(saved) | set(wanted)) - HARMLESS - left_out)
    if differing := [name for name in names if _said(saved.get(name)) != _said(wanted.get(name))]:
        lines = "\n".join(
            f"  {_MEANING.get(name, name)}: was {saved.get(name)!r}, is {wanted.get(name)!r}" for name in differing
        )
        raise ValueError(
            f"{where} was written by a run with other settings, so going on would not be the same run:\n{lines}\n"
            "Resume with the old ones, or start anew in another output_dir."
        )


def _said(value: Any) -> Any:
    """An option that another version does not have is one that is not given."""
    return {key: v for key, v in value.items() if v is not None} if isinstance(value, Mapping) else value


def evaluated_alike(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether both evaluate on the same images in the same way, so that their numbers may stand side by side."""
    return all(saved.get(name) == wanted.get(name) for name in _EVALUATION)
