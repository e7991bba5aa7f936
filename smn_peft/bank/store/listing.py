# SPDX-License-Identifier: Apache-2.0
"""What the index says of tasks and of the whole store."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from ...storage import AdapterFileError, AdapterSizes
from .index import Index
from .info import StoreInfo, TaskInfo
from .schema import LAYOUT

__all__ = ["store_info", "task_infos", "task_names"]

_QUERY = (
    "SELECT name, base, fingerprint, codec, weights, inactive, added, mask, head, statistics, scores, "
    "length(tensors) + length(config) FROM task"
)
_TEXTS, _NUMBERS = slice(0, 4), slice(4, None)


def task_names(index: Index) -> list[str]:
    """Names of all tasks, sorted.

    Raises:
        AdapterFileError: If the index is damaged.
    """
    names = [name for (name,) in index.bounded_rows("SELECT name FROM task")]
    if not all(isinstance(name, str) for name in names):
        raise AdapterFileError(f"{index.path} is damaged: a task's name is no text. Fetch the bank again.")
    return sorted(names)


def task_infos(index: Index, name: str | None = None) -> list[TaskInfo]:
    """All tasks, sorted by name; or the one of this name, if there is one.

    Raises:
        AdapterFileError: If the index is damaged.
    """
    rows = index.bounded_rows(_QUERY) if name is None else index.rows(f"{_QUERY} WHERE name = ?", name)
    return sorted((_info(index, row) for row in rows), key=lambda info: info.name)


def _info(index: Index, row: tuple[Any, ...]) -> TaskInfo:
    name, base, fingerprint, codec = row[_TEXTS]
    texts = isinstance(name, str) and isinstance(codec, str)
    texts = texts and all(text is None or isinstance(text, str) for text in (base, fingerprint))
    if not texts or not all(isinstance(number, int) and 0 <= number < 1 << 50 for number in row[_NUMBERS]):
        raise AdapterFileError(f"{index.path}: the row of {str(name)[:200]!r} is damaged. Fetch the bank again.")
    weights, inactive, added, mask, head, statistics, scores, extra = row[_NUMBERS]
    sizes = AdapterSizes(mask, head, statistics, scores, total=mask + head + statistics + scores + extra)
    density = (weights - inactive) / max(weights, 1)
    try:
        moment = datetime.fromtimestamp(added, timezone.utc)
    except (ValueError, OverflowError, OSError):  # a year that no calendar has
        moment = datetime.fromtimestamp(0, timezone.utc)
    return TaskInfo(name, base, fingerprint, codec, weights, density, sizes, moment.isoformat())


def store_info(index: Index) -> StoreInfo:
    """The store as a whole."""
    ((tasks, live),) = index.rows("SELECT count(*), total((CAST(size AS INTEGER) + 7) / 8 * 8) FROM task")
    ((shards, size, headers),) = index.rows(
        "SELECT count(*), total(CAST(size AS INTEGER)), total(CAST(header_size AS INTEGER)) FROM shard"
    )
    return StoreInfo(
        tasks=tasks,
        shards=shards,
        bytes=int(size) + index.path.stat().st_size,
        dead=max(0, int(size - headers - live)),
        version=LAYOUT,
    )
