# SPDX-License-Identifier: Apache-2.0
"""`DiskStore`: a bank's adapters in one SQLite file, a row each, for many readers and one writer at a time."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from ..storage.files import AdapterFileError
from .database import VERSION, Database
from .row import MAX_BLOB, MAX_CONFIG, Adapter, StoreInfo, TaskCheck, TaskInfo, TaskRow, checked, encoded
from .source import MemorySource, StoredAdapter, check_name, unknown_task

__all__ = ["FILE_NAME", "DiskStore", "TaskSource", "open_store"]

FILE_NAME = "bank.sqlite"
"""The file in a bank's folder, and in its repository on the Hub."""
_ROW = (  # what is too large is not loaded
    f"SELECT name, facts, CASE WHEN length(config) <= {MAX_CONFIG} THEN config END, "
    f"CASE WHEN length(blob) <= {MAX_BLOB} THEN blob END FROM task WHERE "
)


class DiskStore:
    """Adapters in one file: a table of one row per task, of a name each. Safe from any thread.

    Opening reads nothing of the tasks, and a lookup is one search in the table's index. A change becomes visible to
    every process at once, or not at all if the writer fails or is killed; any number of processes and threads read
    meanwhile. At rest the file is all: it can be copied, and read where nothing can be written.

    Attributes:
        path: The file.
        read_only: Whether changes are refused.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False, immutable: bool = False) -> None:
        """Open a store; an empty one is made where there is none.

        Args:
            path: Its folder, which holds it as bank.sqlite; or its file, with the ending .sqlite.
            read_only: Make nothing, and refuse changes; FileNotFoundError if there is no store.
            immutable: Nobody writes to it, so it is read without locks; for a `read_only` one.
        """
        self.path = _file_of(Path(path))
        self.read_only = read_only
        self._database = Database(self.path, read_only=read_only, immutable=immutable)

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._allowed(name) for (name,) in self._bounded_rows("SELECT name FROM task"))

    def _allowed(self, name: object) -> str:
        try:
            check_name(name)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise AdapterFileError(f"{self.path} holds a task whose name is not allowed: {error}") from error
        return str(name)

    def _bounded_rows(self, query: str) -> list[tuple[Any, ...]]:
        """All rows of a query that gives one per task, and no more than the file has room for."""
        limit = self._database.size() // 64 + 1
        found = self._database.rows(f"{query} LIMIT {limit}")
        if len(found) == limit:
            raise AdapterFileError(f"{self.path} is damaged: it has more tasks than bytes. Fetch the bank again.")
        return found

    def __contains__(self, name: object) -> bool:
        return _is_text(name) and bool(self._database.rows("SELECT 1 FROM task WHERE name = ?", name))

    def __len__(self) -> int:
        # count(*) alone cannot be interrupted, and a hostile file's may never end
        ((count,),) = self._database.rows("SELECT count(*) FROM (SELECT 1 FROM task LIMIT 1000000000)")
        return int(count)

    def version(self, name: str) -> int:
        """Return a number that no other adapter of this store has had or will have; KeyError if there is no task."""
        return int(self._one(name, "SELECT id FROM task WHERE ")[0])

    def read(self, name: str) -> StoredAdapter:
        """Return an adapter; KeyError for an unknown name, AdapterFileError if its checksum is another."""
        row = self._row(name)
        with self._naming(name):
            return row.adapter()

    def _row(self, name: str) -> TaskRow:
        found, *values = self._one(name, _ROW)
        with self._naming(name):
            if self._allowed(found) != name:
                raise AdapterFileError(f"its row has the name {found!r}")
        return TaskRow(*values)

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except AdapterFileError as error:
            raise AdapterFileError(
                f"Task {name!r} in {self.path} is damaged: {error}. Other tasks are not concerned; put its adapter in "
                "again (smn bank add --replace), or remove it."
            ) from error

    def _one(self, name: str, query: str) -> tuple[Any, ...]:
        found = self._database.rows(f"{query}name = ?", name) if _is_text(name) else []
        if not found:
            raise unknown_task(name, len(self))
        return found[0]

    def add(self, name: str, adapter: Adapter, *, replace: bool = False) -> None:
        """Put an adapter under a name; see [`add_many`]."""
        self.add_many([(name, adapter)], replace=replace)

    def add_many(
        self,
        adapters: Iterable[tuple[str, Adapter]],
        *,
        replace: bool = False,
        progress: Callable[[], object] | None = None,
    ) -> None:
        """Put adapters in, all or none.

        Args:
            adapters: Names, and what they stand for: an adapter, its folder, or its Hub id. They are read one by one.
            replace: Put them in place of tasks of the same names.
            progress: Called after each.

        Raises:
            AdapterFileError: If an adapter is damaged.
            StoreBusyError: If another process is writing.
            ValueError: If a name is taken, not allowed or given twice, or an adapter holds no mask or is too large.
        """
        named = checked(adapters)
        rows: Iterable[tuple[str, TaskRow]] = encoded(named)
        if len(named) == 1:  # before others have to wait
            rows = list(rows)
        with self._database.writing() as connection:
            for name, _ in named:
                if not replace and _id_of(connection, name) is not None:
                    raise ValueError(
                        f"The bank has a task {name!r} already: remove it, or pass replace=True (--replace)."
                    )
            for name, row in rows:
                connection.execute("DELETE FROM task WHERE name = ?", (name,))
                values = (name, row.facts, row.config, row.blob)
                connection.execute("INSERT INTO task (name, facts, config, blob) VALUES (?, ?, ?, ?)", values)
                if progress is not None:
                    progress()

    def remove(self, name: str) -> None:
        """Take a task out; KeyError for an unknown one. New tasks fill its room, or compaction gives it back."""
        self.remove_many([name])

    def remove_many(self, names: Iterable[str]) -> None:
        """Take tasks out, all or none; KeyError if one is unknown."""
        with self._database.writing() as connection:
            names = list(names)
            for name in names:
                if _id_of(connection, name) is None:
                    raise unknown_task(name, len(self))
            connection.executemany("DELETE FROM task WHERE name = ?", [(name,) for name in names])

    def rename(self, old: str, new: str) -> None:
        """Give a task another name; KeyError for an unknown one, ValueError for one that is taken or not allowed."""
        check_name(new)
        with self._database.writing() as connection:
            if (found := _id_of(connection, old)) is None:
                raise unknown_task(old, len(self))
            if old != new and _id_of(connection, new) is not None:
                raise ValueError(f"The bank has a task {new!r} already: remove it first.")
            connection.execute("UPDATE task SET name = ? WHERE id = ?", (new, found))

    def info(self, name: str) -> TaskInfo:
        """Return what is known of a task; KeyError for an unknown name."""
        return self._info(*self._one(name, "SELECT name, facts FROM task WHERE "))

    def infos(self) -> list[TaskInfo]:
        """Return what is known of every task, sorted by name."""
        found = [self._info(*row) for row in self._bounded_rows("SELECT name, facts FROM task")]
        return sorted(found, key=lambda info: info.name)

    def _info(self, name: object, facts: object) -> TaskInfo:
        allowed = self._allowed(name)
        with self._naming(allowed):
            return TaskInfo.parse(allowed, facts)

    def summary(self) -> StoreInfo:
        """Describe the store as a whole."""
        (free,), (page,) = (self._database.rows(f"PRAGMA {name}")[0] for name in ("freelist_count", "page_size"))
        return StoreInfo(len(self), self._database.size(), free * page, VERSION)

    def verify(self) -> Iterator[TaskCheck]:
        """Check every task, down to the decoded masks; then the file, with AdapterFileError if that is damaged."""
        for (number,) in self._bounded_rows("SELECT id FROM task"):
            for name, *values in self._database.rows(f"{_ROW}id = ?", number):
                try:
                    self._allowed(name)
                    TaskRow(*values).check()
                except ValueError as error:
                    yield TaskCheck(str(name), str(error))
                else:
                    yield TaskCheck(name, None)
        if (found := self._database.rows("PRAGMA integrity_check(1)", seconds=inf)) != [("ok",)]:
            raise AdapterFileError(f"{self.path} is damaged ({found[0][0]}): fetch the bank again, or build it anew.")

    def compact(self) -> tuple[int, int]:
        """Give the room of removed tasks back to the disk; return the file's bytes before and after.

        The disk must have room for a second copy meanwhile.
        """
        before = self._database.size()
        self._database.vacuum()
        return before, self._database.size()

    def export(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Write an adapter's folder, as it came in: config to the letter, tensors to the bit; PEFT loads it.

        FileExistsError if the folder holds an adapter.
        """
        row = self._row(name)
        with self._naming(name):
            row.write(folder)

    def copy(self, path: str | os.PathLike[str]) -> None:
        """Write the bank as it is now to a new file, beside writers; FileExistsError if there is one."""
        if Path(path).exists():
            raise FileExistsError(f"{path} exists: name another file.")
        self._database.copy(Path(path))

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


TaskSource: TypeAlias = DiskStore | MemorySource
"""Where a bank's adapters lie."""


def _is_text(name: object) -> bool:
    """Whether SQLite takes it: text without lone surrogates."""
    return isinstance(name, str) and name.encode(errors="ignore").decode() == name


def _id_of(connection: sqlite3.Connection, name: str) -> int | None:
    query = "SELECT id FROM task WHERE name = ?"
    found = connection.execute(query, (name,)).fetchone() if _is_text(name) else None
    return found[0] if found else None


def _file_of(path: Path) -> Path:
    """The file of a bank; a folder may hold nothing else where one is to be made."""
    if path.is_file() or (path.suffix == ".sqlite" and not path.is_dir()):
        return path
    file = path / FILE_NAME
    others = sorted(os.listdir(path)) if path.is_dir() and not file.exists() else []
    if others and not others[0].startswith(FILE_NAME):
        raise ValueError(f"{path} is no bank and holds other files ({others[0]}): name another folder, or {file}.")
    return file


# --- On the Hub ------------------------------------------------------------------------------------------------------


def open_store(where: str | os.PathLike[str], *, read_only: bool = False, revision: str | None = None) -> DiskStore:
    """Open a bank of this disk (see [`DiskStore`]), or read-only of the Hub, where it is fetched if need be.

    `where` is "user/name" on the Hub if there is no such folder and no folder "user"; `revision` is a branch, tag or
    commit there. FileNotFoundError if there is no such bank, or none in the cache while offline.
    """
    if not _is_on_hub(where):
        return DiskStore(where, read_only=read_only)
    try:
        file = hf_hub_download(str(where), FILE_NAME, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise FileNotFoundError(
            f"There is no folder {where}, and no {FILE_NAME} in that repository of the Hub: {error} For a new bank on "
            f"this disk name ./{where}; for adapters on the Hub give a list of their names."
        ) from error
    return DiskStore(file, read_only=True, immutable=True)


def _is_on_hub(where: str | os.PathLike[str]) -> bool:
    if not isinstance(where, str) or where.count("/") != 1 or where.startswith((".", "/", "~")):
        return False
    return not (where.endswith((".sqlite", "/")) or Path(where).exists() or Path(where).parent.exists())
