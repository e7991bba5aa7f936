# SPDX-License-Identifier: Apache-2.0
"""A change of a store: shards are on the disk before rows name them, and go when no row does."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .index import Index
from .located import Located, read_config_text
from .record import Record
from .shards import NewShard, Shards

__all__ = ["Change", "changing"]


class Change:
    """What a writer does inside one transaction.

    Attributes:
        connection: Of the transaction.
        written: Shards that were written in it.
        freed: Shards that no task lies in any more, once it is committed.
    """

    def __init__(self, connection: sqlite3.Connection, shards: Shards) -> None:
        """Begin without changes."""
        self.connection = connection
        self.written: list[str] = []
        self.freed: list[str] = []
        self._shards = shards
        self._left: set[int] = set()

    def find(self, name: str) -> tuple[int, int] | None:
        """Numbers of a task and of its shard."""
        found: tuple[int, int] | None = self.connection.execute(
            "SELECT id, shard FROM task WHERE name = ?", (name,)
        ).fetchone()
        return found

    def count(self) -> int:
        """Number of tasks, asked of the transaction itself: another connection could have to wait for it."""
        ((count,),) = self.connection.execute("SELECT count(*) FROM task").fetchall()
        return int(count)

    def delete(self, name: str) -> bool:
        """Take a task out, if there is one of this name."""
        if (found := self.find(name)) is None:
            return False
        self.connection.execute("DELETE FROM task WHERE id = ?", found[:1])
        self._left.add(found[1])
        return True

    def insert(self, records: Sequence[tuple[str, Record]]) -> None:
        """Write adapters into one shard, in place of those of the same names."""
        last = self.connection.execute(
            "SELECT CAST(seq AS INTEGER) FROM sqlite_sequence WHERE name = 'task'"
        ).fetchone()
        first = last[0] + 1 if last else 1
        numbered = [(first + index, record) for index, (_, record) in enumerate(records)]
        new = self._write(numbered)
        shard = self._insert_shard(new)
        added = int(time.time())
        for (name, record), (number, _), start in zip(records, numbered, new.starts, strict=True):
            self.delete(name)
            config, sizes = read_config_text(record.config), record.bytes_by_purpose()
            base, fingerprint = config.get("base_model_name_or_path"), config.get("base_fingerprint")
            values = {
                "id": number,
                "name": name,
                "shard": shard,
                "start": start,
                "size": record.size,
                "checksum": record.checksum,
                "added": added,
                "weights": record.weights,
                "inactive": record.inactive,
                **sizes,
                "base": base if isinstance(base, str) else None,
                "fingerprint": fingerprint if isinstance(fingerprint, str) else None,
                "codec": str(config.get("codec", "bits")),
                "tensors": record.table,
                "config": record.config,
            }
            places = ", ".join(f":{column}" for column in values)
            self.connection.execute(f"INSERT INTO task ({', '.join(values)}) VALUES ({places})", values)

    def move(self, records: Sequence[tuple[Located, Record]]) -> None:
        """Copy tasks as they are into one shard."""
        new = self._write([(row.id, record) for row, record in records])
        shard = self._insert_shard(new)
        for (row, _), start in zip(records, new.starts, strict=True):
            self.connection.execute("UPDATE task SET shard = ?, start = ? WHERE id = ?", (shard, start, row.id))
            self._left.add(row.shard)

    def _write(self, records: Sequence[tuple[int, Record]]) -> NewShard:
        new = self._shards.write(records)
        self.written.append(new.file)
        return new

    def _insert_shard(self, new: NewShard) -> int | None:
        return self.connection.execute(
            "INSERT INTO shard (file, size, header_size, header) VALUES (?, ?, ?, ?)",
            (new.file, new.size, new.header_size, new.header),
        ).lastrowid

    def free(self) -> None:
        """Take shards out that no task lies in any more."""
        for shard in self._left:
            if self.connection.execute("SELECT 1 FROM task WHERE shard = ? LIMIT 1", (shard,)).fetchone():
                continue
            self.freed += [f for (f,) in self.connection.execute("SELECT file FROM shard WHERE id = ?", (shard,))]
            self.connection.execute("DELETE FROM shard WHERE id = ?", (shard,))


@contextmanager
def changing(index: Index, shards: Shards, *, sweep: bool) -> Iterator[Change]:
    """A change, made at the end of the block or not at all.

    Args:
        index: The store's index.
        shards: Its shards.
        sweep: Remove files that a killed writer left, first.

    Raises:
        OSError: If the disk is full or read-only.
        StoreBusyError: If another process is writing.
    """
    with index.writing() as connection:
        if sweep:
            shards.sweep(file for (file,) in connection.execute("SELECT file FROM shard"))
        change = Change(connection, shards)
        try:
            yield change
            change.free()
        except BaseException:
            shards.remove(change.written)
            raise
    shards.remove(change.freed)
