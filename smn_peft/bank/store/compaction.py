# SPDX-License-Identifier: Apache-2.0
"""Compaction: small shards are merged, and what was removed is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...storage import AdapterFileError
from .change import changing
from .index import Index
from .listing import store_info
from .located import Located
from .record import Record, read_table
from .shards import SHARD_BYTES, SHARD_TASKS, Shards

__all__ = ["Compaction", "compact"]


@dataclass(frozen=True)
class Compaction:
    """What compaction did.

    Attributes:
        moved: Tasks that lie in another shard after it.
        damaged: Names of tasks that were left where they are, as their bytes are not what they should be.
        before: Bytes on disk before.
        after: Bytes on disk after.
    """

    moved: int
    damaged: tuple[str, ...]
    before: int
    after: int


def compact(index: Index, shards: Shards, progress: Callable[[int, int], object] | None = None) -> Compaction:
    """Copy the tasks of small shards, and of those with dead bytes, into full ones, a shard at a time.

    Readers go on: what they have mapped stays, what they look up next lies elsewhere. Each shard is a change of its
    own: a compaction that is killed has done a part of its work.

    Args:
        index: The store's index.
        shards: Its shards.
        progress: Called with the number of tasks that are done, and that there are.

    Raises:
        OSError: If the disk is full: one shard more must fit.
        StoreBusyError: If another process is writing.
    """
    before = store_info(index).bytes
    todo, done, moved = _todo(index), 0, 0
    damaged: list[str] = []
    for number, batch in enumerate(_batches(todo)):
        with changing(index, shards, sweep=number == 0) as change:
            records: list[tuple[Located, Record]] = []
            for task, shard, _ in batch:
                found = change.connection.execute(f"{Located.QUERY}task.id = ? AND shard = ?", (task, shard))
                if (values := found.fetchone()) is None:
                    continue  # removed or replaced meanwhile
                row = Located(*values)
                try:
                    records.append((row, _record(row, shards)))
                except (AdapterFileError, FileNotFoundError):
                    damaged.append(row.name)
            if records:
                change.move(records)
        moved += len(records)
        done += len(batch)
        if progress is not None:
            progress(done, len(todo))
    index.vacuum()
    return Compaction(moved, tuple(damaged), before, store_info(index).bytes)


def _todo(index: Index) -> list[tuple[int, int, int]]:
    """Number, shard and bytes of the tasks that are to move."""
    found = index.rows(
        "SELECT shard.id, CAST(shard.size AS INTEGER), count(*), CAST(shard.size AS INTEGER) "
        "- CAST(header_size AS INTEGER) - total((CAST(task.size AS INTEGER) + 7) / 8 * 8) "
        "FROM shard JOIN task ON task.shard = shard.id GROUP BY shard.id"
    )
    chosen = {
        shard: dead > 0
        for shard, size, count, dead in found
        if dead > 0 or (size < SHARD_BYTES // 2 and count < SHARD_TASKS // 2)
    }
    if len(chosen) < 2 and not any(chosen.values()):
        return []
    rows = index.bounded_rows("SELECT id, shard, CAST(size AS INTEGER) FROM task ORDER BY id")
    return [(task, shard, size) for task, shard, size in rows if shard in chosen]


def _batches(todo: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    batch: list[tuple[int, int, int]] = []
    size = 0
    for item in todo:
        batch.append(item)
        size += item[2]
        if size >= SHARD_BYTES or len(batch) == SHARD_TASKS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _record(row: Located, shards: Shards) -> Record:
    """A task's bytes, checked, as they go into another shard."""
    row.check()
    data = row.data(shards)
    row.check_bytes(data)
    entries = read_table(row.table, row.size)
    return Record(row.config, row.table, entries, (data.numpy().data,), row.size, row.checksum, 0, 0)
