# SPDX-License-Identifier: Apache-2.0
"""Names of a task's classes: in its adapter's config, or in the ``run.json`` beside an adapter of an older version."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..storage import read_json

__all__ = ["CONFIG_KEY", "class_name", "class_names", "names_of_run"]

CONFIG_KEY = "id2label"
"""As transformers calls it, in adapter_config.json: {"0": "cat", …}."""
_LENGTH = 1000
_RUN = "run.json"


def class_name(config: Mapping[str, Any], index: int) -> str:
    """The name of one class, its number where the config has none; however many classes there are."""
    found = config.get(CONFIG_KEY)
    name = found.get(str(index), found.get(index)) if isinstance(found, Mapping) else None
    return str(index) if name is None else str(name)[:_LENGTH]


def class_names(config: Mapping[str, Any], count: int) -> list[str] | None:
    """The names of the first `count` classes; None where the config has none."""
    return [class_name(config, index) for index in range(count)] if config.get(CONFIG_KEY) else None


def names_of_run(folder: Path) -> list[str] | None:
    """The classes that `smn train` wrote down beside an adapter; None where it did not."""
    try:
        arguments = read_json(folder / _RUN)["arguments"]
        classes = arguments["classes"] if arguments.get("head_classes") else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return [str(name) for name in classes] if isinstance(classes, list) else None
