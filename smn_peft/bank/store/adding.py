# SPDX-License-Identifier: Apache-2.0
"""Adapters on their way into a store: checked before anything is written, coded one after the other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from ...storage import CONFIG_NAME, AdapterFileError, check_adapter_file
from ...storage.repack import read_config
from ..source import StoredAdapter, read_adapter
from .change import Change
from .located import read_config_text
from .names import check_name
from .record import Record, record_of
from .shards import SHARD_BYTES, SHARD_TASKS

__all__ = ["Adapter", "Named", "checked", "code", "insert_all"]

Adapter: TypeAlias = StoredAdapter | str | os.PathLike[str]
"""An adapter, its folder, or its Hub id."""
Named: TypeAlias = tuple[str, Adapter]


def checked(adapters: Iterable[Named]) -> list[Named]:
    """Adapters under names that are allowed and differ; of folders header and config are read.

    Raises:
        AdapterFileError: If an adapter's file or config is damaged.
        FileNotFoundError: If a folder holds no adapter.
        ValueError: If a name is given twice or not allowed.
    """
    adapters, seen = list(adapters), set()
    for name, adapter in adapters:
        check_name(name)
        if name in seen:
            raise ValueError(f"Two adapters are to be the task {name!r}: give them different names.")
        seen.add(name)
        if not isinstance(adapter, StoredAdapter) and Path(adapter).is_dir():
            read_config(adapter)
            check_adapter_file(adapter)
    return adapters


def code(adapters: Iterable[Named]) -> Iterator[tuple[str, Record]]:
    """Read and code adapters, each when it is asked for.

    Raises:
        AdapterFileError: If one is damaged.
        ValueError: If one holds no mask, or its format is not known.
    """
    for name, adapter in adapters:
        try:
            text, stored = _content(adapter)
            read_config_text(text)
            record = record_of(text, stored.tensors)
        except AdapterFileError as error:
            raise AdapterFileError(f"The adapter for the task {name!r} is damaged: {error}") from error
        except ValueError as error:
            raise ValueError(f"The adapter for the task {name!r} cannot be taken: {error}") from error
        yield name, record


def _content(adapter: Adapter) -> tuple[bytes, StoredAdapter]:
    """A folder's config to the letter; another as PEFT writes it."""
    stored = adapter if isinstance(adapter, StoredAdapter) else read_adapter(adapter)
    if not isinstance(adapter, StoredAdapter) and Path(adapter).is_dir():
        return (Path(adapter) / CONFIG_NAME).read_bytes(), stored
    return json.dumps(dict(stored.config), indent=2, sort_keys=True).encode(), stored


def insert_all(
    change: Change,
    names: Sequence[str],
    records: Iterable[tuple[str, Record]],
    *,
    replace: bool,
    progress: Callable[[], object] | None = None,
) -> None:
    """Insert adapters into as few shards as they fit.

    Raises:
        ValueError: If a name is taken and `replace` is false.
    """
    for name in names:
        if not replace and change.find(name) is not None:
            raise ValueError(f"The bank has a task {name!r} already: remove it, or pass replace=True (--replace).")
    batch: list[tuple[str, Record]] = []
    size = 0
    for name, record in records:
        batch.append((name, record))
        size += record.size
        if len(batch) == SHARD_TASKS or size >= SHARD_BYTES:
            change.insert(batch)
            batch, size = [], 0
        if progress is not None:
            progress()
    if batch:
        change.insert(batch)
