# SPDX-License-Identifier: Apache-2.0
"""Names of a task's classes: in its adapter's config, or in the ``run.json`` beside the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..storage import read_json

__all__ = ["CONFIG_KEY", "class_names", "names_of_run"]

CONFIG_KEY = "id2label"
"""As transformers calls it, in adapter_config.json: {"0": "cat", …}."""
_RUN = "run.json"


def class_names(config: Mapping[str, Any]) -> list[str] | None:
    """The names by index, as far as a config has them; None where it has none."""
    found = config.get(CONFIG_KEY)
    if not isinstance(found, Mapping) or not found:
        return None
    try:
        by_index = {int(index): str(name) for index, name in found.items()}
    except (TypeError, ValueError):
        return None
    return [by_index.get(index, str(index)) for index in range(min(max(by_index) + 1, len(by_index)))]


def names_of_run(folder: Path) -> list[str] | None:
    """The classes that `smn train` wrote down beside an adapter; None where it did not."""
    try:
        arguments = read_json(folder / _RUN)["arguments"]
        classes = arguments["classes"] if arguments.get("head_classes") else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return [str(name) for name in classes] if isinstance(classes, list) else None
