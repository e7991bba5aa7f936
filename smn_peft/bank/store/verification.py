# SPDX-License-Identifier: Apache-2.0
"""Whether every task of a store is whole, down to the decoded masks."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from ...storage import AdapterFileError, purpose_of
from ...storage.codec import BLOB_NAME
from .index import Index
from .located import Located
from .record import check_blob
from .shards import Shards

__all__ = ["TaskCheck", "verify"]


@dataclass(frozen=True)
class TaskCheck:
    """What verification found of a task.

    Attributes:
        name: Its name.
        shard: File name of its shard.
        error: What is wrong; None if nothing is.
    """

    name: str
    shard: str
    error: str | None


def verify(index: Index, shards: Shards) -> Iterator[TaskCheck]:
    """Check the index, then every task: its bytes against their checksum, its table, config and masks.

    Tasks that are removed meanwhile are left out. Masks of which only the selected weights are coded are compared
    with the store's checksum, not with their own, which takes the base.

    Raises:
        AdapterFileError: If the index itself is damaged.
    """
    if (found := index.rows("PRAGMA integrity_check(1)")) != [("ok",)]:
        raise AdapterFileError(f"{index.path} is damaged ({found[0][0]}): fetch the bank again, or build it anew.")
    headers: dict[int, str | None] = {}
    for (task,) in index.bounded_rows("SELECT id FROM task ORDER BY shard, start"):
        for values in index.rows(f"{Located.QUERY}task.id = ?", task):
            row = Located(*values)
            error = _error(row, shards)
            if error is None and row.shard not in headers:
                headers[row.shard] = _header_error(row, index, shards)
            yield TaskCheck(str(row.name), str(row.file), error or headers[row.shard])


def _error(row: Located, shards: Shards) -> str | None:
    try:
        row.check()
        data = row.data(shards)
        row.check_bytes(data)
        for key, tensor in row.adapter(data).tensors.items():
            if key.rpartition(".")[2] == BLOB_NAME and purpose_of(key) == "mask":
                check_blob(tensor.numpy().data)
    except FileNotFoundError:
        return "its shard is missing"
    except ValueError as error:
        return str(error)
    return None


def _header_error(row: Located, index: Index, shards: Shards) -> str | None:
    """What is wrong with the safetensors header of a task's shard."""
    ((size, checksum),) = index.rows("SELECT header_size, header FROM shard WHERE id = ?", row.shard)
    if not isinstance(size, int) or not 0 <= size <= row.file_size:
        return "its shard's row in the index is wrong"
    header = shards.map(row.file, row.file_size)[:size]
    return None if zlib.crc32(header.numpy().data) == checksum else "its shard's header is damaged"
