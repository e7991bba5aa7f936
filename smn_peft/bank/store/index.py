# SPDX-License-Identifier: Apache-2.0
"""The index's file: an SQLite database that many processes read and one at a time writes.

It is SQLite's rollback mode, not its write-ahead log: a store is then one file and a folder, can be read from a disk
that cannot be written, and its lock ends with the process that has it. What a writer does becomes visible at its
commit, all at once; a writer that was killed before is undone by whoever comes next.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...storage import AdapterFileError
from .locks import ForkLock
from .schema import check_schema, create_schema, is_new

__all__ = ["Index", "StoreBusyError"]

INDEX_NAME = "index.sqlite"
SHARDS_NAME = "shards"
_WRITER_NAME = "writer"  # who holds the lock, for the message of those who do not get it
_PATIENCE = 30.0  # seconds for which a reader waits for a commit, which takes milliseconds
_AT_ONCE = 0.2  # seconds after which a second writer is refused: longer than a commit or the undoing of one
_MAX_VALUE = 1 << 26  # bytes of a single value: a damaged database can promise gigabytes
_STEPS, _MAX_SECONDS = 1_000_000, 60.0  # a damaged database can be a circle too

_orphans: list[object] = []  # connections of a parent process: closing them would undo what the parent is writing


class StoreBusyError(RuntimeError):
    """Another process is writing to the store."""


@dataclass
class _Reader:
    connection: sqlite3.Connection
    lock: ForkLock
    process: int


class Index:
    """The database in a store's folder. Safe from any thread, and after a fork."""

    def __init__(self, folder: Path, *, read_only: bool) -> None:
        """Open it; an empty one is made where there is none, unless `read_only`.

        Raises:
            AdapterFileError: If it is damaged, or lost while the shards are there.
            FileNotFoundError: If there is none and `read_only`.
            ValueError: If there is another database, or the folder holds something else.
        """
        self.path = folder / INDEX_NAME
        self.read_only = read_only
        self._writing = ForkLock()
        self._closed = False
        if not self.path.is_file() or not self.path.stat().st_size:
            self._create()
        self._reader = self._open_reader()

    def _create(self) -> None:
        shards = self.path.parent / SHARDS_NAME
        held = sorted(os.listdir(shards)) if shards.is_dir() else []
        if held and not (self.path.is_file() and self.path.stat().st_size):  # else another process was faster
            raise AdapterFileError(
                f"{shards} holds {len(held)} files ({held[0]}), and {self.path} is lost or empty: put the index back "
                "from a copy, or build the bank anew in another folder. Nothing was changed."
            )
        if self.read_only:
            raise FileNotFoundError(f"{self.path.parent} holds no bank: name its folder, or make one: smn bank build.")
        with suppress(FileNotFoundError):
            if unknown := sorted(
                set(os.listdir(self.path.parent)) - {INDEX_NAME, f"{INDEX_NAME}-journal", SHARDS_NAME}
            ):
                raise ValueError(
                    f"{self.path.parent} is no bank and holds other files ({unknown[0]}): name another folder."
                )
        shards.mkdir(parents=True, exist_ok=True)
        with self._translated(), closing(self._connect("rwc", _PATIENCE)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            if is_new(connection):  # another process may have been faster
                create_schema(connection)
            connection.execute("COMMIT")

    def _open_reader(self) -> _Reader:
        # One that may write can undo what a killed writer left; it is not used for anything else.
        mode = "rw" if os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK) else "ro"
        with self._translated():
            connection = self._connect(mode, _PATIENCE)
            try:
                connection.execute("PRAGMA query_only = ON")
                check_schema(connection, self.path)
            except BaseException:
                connection.close()
                raise
        return _Reader(connection, ForkLock(), os.getpid())

    def _connect(self, mode: str, timeout: float) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=timeout,
            isolation_level=None,
            check_same_thread=False,
        )
        if hasattr(connection, "setlimit"):  # Python 3.11
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE)
        for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "synchronous = EXTRA", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """All rows of a query, of one state of the store.

        Raises:
            AdapterFileError: If the database is damaged.
            StoreBusyError: If a writer's commit does not end.
            ValueError: If the store was closed.
        """
        reader = self._reader
        if reader.process != os.getpid():
            _orphans.append(reader)
            reader = self._reader = self._open_reader()
        with self._translated(), reader.lock:
            if self._closed:
                raise ValueError(f"The bank at {self.path.parent} is closed.")
            end = time.monotonic() + _MAX_SECONDS
            reader.connection.set_progress_handler(lambda: time.monotonic() > end, _STEPS)
            return reader.connection.execute(query, values).fetchall()

    def bounded_rows(self, query: str) -> list[tuple[Any, ...]]:
        """All rows of a query that gives one per task, and no more than the file has room for."""
        limit = self.path.stat().st_size // 64 + 1
        found = self.rows(f"{query} LIMIT {limit}")
        if len(found) == limit:
            raise AdapterFileError(f"{self.path} is damaged: it has more tasks than bytes. Fetch the bank again.")
        return found

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: committed at the end of the block, undone if it raises or the process dies.

        Raises:
            OSError: If the disk is full or read-only.
            PermissionError: If the store was opened read-only.
            StoreBusyError: If another process, or another `DiskStore` of this one, is writing.
        """
        if self.read_only:
            raise PermissionError(f"The bank at {self.path.parent} was opened read-only.")
        with self._writing, self._translated(), closing(self._connect("rw", _AT_ONCE)) as connection:
            connection.execute("PRAGMA cache_spill = OFF")  # a spill would lock readers out until the commit
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                raise (self._busy() if "locked" in str(error) else error) from error
            writer = self.path.parent / _WRITER_NAME
            try:
                with suppress(OSError):  # a note for others, nothing hangs on it
                    writer.write_text(str(os.getpid()))
                connection.execute(f"PRAGMA busy_timeout = {int(1000 * _PATIENCE)}")
                yield connection
            finally:
                with suppress(OSError):
                    writer.unlink()
            connection.execute("COMMIT")

    def vacuum(self) -> None:
        """Give the room of removed rows back, if they had a good part of it and nobody is writing."""
        ((pages,),), ((unused,),) = self.rows("PRAGMA page_count"), self.rows("PRAGMA freelist_count")
        if 4 * unused > pages:
            with suppress(StoreBusyError), self._translated(), closing(self._connect("rw", _AT_ONCE)) as connection:
                connection.execute("VACUUM")

    def _busy(self) -> StoreBusyError:
        try:
            who = f"process {int((self.path.parent / _WRITER_NAME).read_text())}"
        except (OSError, ValueError):
            who = "another process"
        return StoreBusyError(
            f"{who} is writing to the bank at {self.path.parent}, which only one can: try again when it is "
            "done, or end it. Nothing was changed."
        )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """SQLite's errors as the package's own."""
        try:
            yield
        except sqlite3.OperationalError as error:
            text = str(error)
            if "locked" in text:
                raise StoreBusyError(f"{self.path} stays locked by another process: try again.") from error
            if "readonly" in text or "unable to open" in text:
                raise PermissionError(
                    f"{self.path} cannot be opened ({text}): check its permissions. If its writer was killed, whoever "
                    "may write to the folder has to open it once."
                ) from error
            if "full" in text or "disk I/O" in text:
                raise OSError(f"Cannot write {self.path} ({text}): free some space. The bank is as it was.") from error
            raise self._damaged(text) from error
        except (sqlite3.DatabaseError, OverflowError) as error:  # numbers beyond what a database can hold
            raise self._damaged(str(error)) from error

    def _damaged(self, text: str) -> AdapterFileError:
        return AdapterFileError(f"{self.path} is damaged ({text}): fetch the bank again, or build it anew.")

    def close(self) -> None:
        """Let go of the file."""
        with self._reader.lock:
            self._closed = True
            if self._reader.process == os.getpid():
                self._reader.connection.close()
