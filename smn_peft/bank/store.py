# SPDX-License-Identifier: Apache-2.0
"""`DiskStore`: a bank's adapters in one SQLite file, a row each, for many readers and one writer at a time."""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..storage.files import AdapterFileError
from .forking import forkable
from .remote import RemoteFile, is_remote
from .source import (
    FILE_NAME,
    MAX_BLOB,
    MAX_CONFIG,
    Adapter,
    MemorySource,
    StoredAdapter,
    TaskInfo,
    TaskRow,
    check_name,
    checked,
    encoded,
    unknown_task,
)

__all__ = ["FILE_NAME", "DiskStore", "StoreBusyError", "TaskSource", "open_store"]

_VERSION = 1  # of the schema, in the file's `user_version`
_APPLICATION = 0x534D4E42  # "SMNB", in the file's `application_id`
# Ids are never given twice: an id stands for one content. The blob is last: what a listing reads lies before it.
_SCHEMA = """CREATE TABLE task (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, facts TEXT NOT NULL,
config BLOB NOT NULL, blob BLOB NOT NULL)"""
_OWN = "CREATE TABLE sqlite_sequence(name,seq)"
_ROW = (  # what is too large is not loaded
    f"SELECT name, facts, CASE WHEN length(config) <= {MAX_CONFIG} THEN config END, "
    f"CASE WHEN length(blob) <= {MAX_BLOB} THEN blob END FROM task WHERE "
)
_DELETE = "DELETE FROM task WHERE name = ?"
_PATIENCE = 30.0  # seconds that a reader waits for a lock, which is held for milliseconds
_MAX_WAIT = 1e6  # seconds, which SQLite counts in milliseconds in 32 bits
_STEPS, _MAX_SECONDS = 1_000_000, 60.0  # of a query: a hostile file can have a tree that never ends
_MAX_LOG = 1 << 24  # bytes of the write-ahead log that a change may leave
_NETWORK = ("nfs", "cifs", "smb", "ceph", "lustre", "9p", "afs", "gpfs", "beegfs", "fuse.")
_orphans: list[sqlite3.Connection] = []


class StoreBusyError(RuntimeError):
    """Another process is writing to the bank."""


def _explanation(error: Exception, path: Path) -> Exception:
    """SQLite's error as the package's own, with what to do; only what says that the file is damaged is called so."""
    text, kind = str(error), getattr(error, "sqlite_errorname", "")  # Python 3.11
    if "locked" in text or "locking protocol" in text:
        return StoreBusyError(f"{path} stays locked by another process: try again.")
    if "unable to open" in text and not path.exists():
        return FileNotFoundError(f"{path} is gone: put the bank back, or open it anew.")
    if "unable to open" in text or "readonly" in text:
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as limit:
            return OSError(limit.errno, f"Cannot open {path}: {limit.strerror}. Close some, or raise ulimit -n")
        return PermissionError(
            f"{path} cannot be opened or written ({text}): check the permissions of the file and its folder. If its "
            "writer was killed, whoever may write there has to open it once."
        )
    if "full" in text:
        return OSError(f"Cannot write {path} ({text}): free some space. The bank is as it was.")
    if "LOCK" in kind:
        return OSError(f"{path} is on a disk without locks ({kind}): open a copy on another disk.")
    if "disk I/O" in text:
        return OSError(f"Cannot read or write {path} ({kind or text}): check the disk and its free space.")
    return AdapterFileError(f"{path} is damaged ({text}): fetch the bank again, or build it anew.")


@dataclass(frozen=True)
class StoreInfo:
    """A store as a whole; `free` are bytes of removed tasks, which new ones fill and compaction gives back."""

    tasks: int
    bytes: int
    free: int
    version: int


class TaskCheck(NamedTuple):
    """What verification found of a task; `error` is None if it is whole."""

    name: str
    error: str | None


class DiskStore:
    """Adapters in one file: a table of one row per task, of a name each. Safe from any thread, and after a fork.

    Opening reads nothing of the tasks, and a lookup is one search in the table's index. A change becomes visible to
    every process at once, or not at all if the writer fails or is killed; any number of processes and threads read
    meanwhile. While it is written the file is in SQLite's write-ahead mode; on a network disk, where that is unsafe,
    readers wait for commits. When the last process closes it, it is one plain file: it can be copied, and read where
    nothing can be written.

    Attributes:
        path: The file.
        read_only: Whether changes are refused.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        timeout: float = 5.0,
        copy: RemoteFile | None = None,
    ) -> None:
        """Open a store; an empty one is made where there is none.

        Args:
            path: Its folder, which holds it as bank.sqlite; or its file, with the ending .sqlite.
            read_only: Make nothing, and refuse changes; FileNotFoundError if there is no store.
            timeout: Seconds that a change waits while another process writes; StoreBusyError after that.
            copy: What `path` is a copy of: nobody writes to it, so it is read without locks; for a `read_only` one.
        """
        if not 0 <= timeout <= _MAX_WAIT:  # false for nan too
            raise ValueError(f"timeout must be from 0 to {_MAX_WAIT:g} seconds; got {timeout}.")
        self.path = _file_of(Path(path))
        self._file = Path(os.path.realpath(self.path))  # whose folder has the log
        self.read_only, self._timeout, self._remote = read_only, timeout, copy
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._closed = False
        self._deadline = 0.0
        self._counted: tuple[int, int] | None = None  # the connection's data_version, and tasks then
        if not self._file.is_file() or not self._file.stat().st_size:
            self._create()
        self._check_log()
        self._connection: sqlite3.Connection | None = self._reader()
        forkable.add(self)

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._allowed(name) for (name,) in self._bounded_rows("SELECT name FROM task"))

    def find(self, text: str = "", *, after: str = "", limit: int = 100) -> list[str]:
        """Return a page of the names that contain a text, sorted, from the next to `after` on.

        Letters from A to Z count as those from a to z.
        """
        query = "SELECT name FROM task WHERE name > ? AND instr(lower(name), lower(?)) ORDER BY name LIMIT ?"
        return [self._allowed(name) for (name,) in self._rows(query, after, text, limit)]

    def near(self, name: str, count: int) -> list[str]:
        """Return the names next to one in sorted order, `count` before it and as many from it on."""
        before = self._rows("SELECT name FROM task WHERE name < ? ORDER BY name DESC LIMIT ?", name, count)
        found = self._rows("SELECT name FROM task WHERE name >= ? ORDER BY name LIMIT ?", name, count)
        return [self._allowed(each) for (each,) in (*before[::-1], *found)]

    def _allowed(self, name: object) -> str:
        try:
            check_name(name)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise AdapterFileError(f"{self.path} holds a task whose name is not allowed: {error}") from error
        return str(name)

    def _bounded_rows(self, query: str) -> list[tuple[Any, ...]]:
        """All rows of a query that gives one per task, and no more than the file has room for."""
        limit = self._size() // 64 + 1
        found = self._rows(f"{query} LIMIT {limit}")
        if len(found) == limit:
            raise AdapterFileError(f"{self.path} is damaged: it has more tasks than bytes. Fetch the bank again.")
        return found

    def __contains__(self, name: object) -> bool:
        return _is_text(name) and bool(self._rows("SELECT 1 FROM task WHERE name = ?", name))

    def __len__(self) -> int:
        ((version,),) = self._rows("PRAGMA data_version")  # another once somebody has changed the bank
        if self._counted is None or self._counted[0] != version:
            # count(*) alone cannot be interrupted, and a hostile file's may never end
            ((count,),) = self._rows("SELECT count(*) FROM (SELECT 1 FROM task LIMIT 1000000000)")
            self._counted = version, int(count)
        return self._counted[1]

    def version(self, name: str) -> object:
        """Return what no other adapter of this store has had or will have; KeyError if there is no task."""
        return self._file, self._one(name, "SELECT id FROM task WHERE ")[0]

    def refresh(self) -> bool:
        """Fetch what this is a copy of if it has changed; return whether it had. An error leaves all as it was.

        False for a bank of this disk, whose changes are seen anyway.
        """
        if self._remote is None or (file := self._remote.fetch()) == self.path:
            return False
        DiskStore(file, read_only=True, copy=self._remote).close()  # raises unless it can be read
        with self._lock:
            connection, self._connection = self._connection, None
            self.path, self._file = file, Path(os.path.realpath(file))
            if connection is not None:
                connection.close()
        return True

    def __reduce__(self) -> Any:
        """Pickle by what it was opened with; a copy is fetched where it is unpickled."""
        where = os.path.abspath(self.path) if self._remote is None else self._remote
        return partial(open_store, read_only=self.read_only, timeout=self._timeout), (where,)

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
        found = self._rows(f"{query}name = ?", name) if _is_text(name) else []
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
        with self._change() as connection:
            for name, _ in named:
                if not replace and _id_of(connection, name) is not None:
                    raise ValueError(f"The bank has a task {name!r} already: remove it, or replace=True (--replace).")
            for name, row in rows:
                connection.execute(_DELETE, (name,))
                values = (name, row.facts, row.config, row.blob)
                connection.execute("INSERT INTO task (name, facts, config, blob) VALUES (?, ?, ?, ?)", values)
                if progress is not None:
                    progress()

    def remove(self, name: str) -> None:
        """Take a task out; KeyError for an unknown one. New tasks fill its room, or compaction gives it back."""
        self.remove_many([name])

    def remove_many(self, names: Iterable[str]) -> None:
        """Take tasks out, all or none; KeyError if one is unknown."""
        with self._change() as connection:
            for name in dict.fromkeys(names):
                if not _is_text(name) or not connection.execute(_DELETE, (name,)).rowcount:
                    raise unknown_task(name, len(self))

    def rename(self, old: str, new: str) -> None:
        """Give a task another name; KeyError for an unknown one, ValueError for one that is taken or not allowed."""
        check_name(new)
        with self._change() as connection:
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
        (free,), (page,) = (self._rows(f"PRAGMA {name}")[0] for name in ("freelist_count", "page_size"))
        return StoreInfo(len(self), self._size(), free * page, _VERSION)

    def verify(self) -> Iterator[TaskCheck]:
        """Check every task, down to the decoded masks; then the file, with AdapterFileError if that is damaged."""
        for (number,) in self._bounded_rows("SELECT id FROM task"):
            for name, *values in self._rows(f"{_ROW}id = ?", number):
                try:
                    self._allowed(name)
                    TaskRow(*values).check()
                except ValueError as error:
                    yield TaskCheck(str(name), str(error))
                else:
                    yield TaskCheck(name, None)
        if (found := self._rows("PRAGMA integrity_check(1)", seconds=inf)) != [("ok",)]:
            raise AdapterFileError(f"{self.path} is damaged ({found[0][0]}): fetch the bank again, or build it anew.")

    def compact(self) -> tuple[int, int]:
        """Give the room of removed tasks back to the disk; return the file's bytes before and after.

        Readers go on. The disk must have room for a second copy meanwhile.
        """
        before = self._size()
        with self._writer() as connection:
            connection.execute("VACUUM")
            self._empty_log(connection, 0)
        return before, self._size()

    def export(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Write an adapter's folder, as it came in: config to the letter, tensors to the bit; PEFT loads it.

        FileExistsError if the folder holds an adapter.
        """
        row = self._row(name)
        with self._naming(name):
            row.write(folder)

    def copy(self, path: str | os.PathLike[str]) -> None:
        """Write the bank as it is now to a new file, without free pages; FileExistsError if there is one.

        Readers and writers go on.
        """
        if Path(path).exists():
            raise FileExistsError(f"{path} exists: name another file.")
        with self._explained(), closing(self._reader()) as connection:
            connection.execute("PRAGMA query_only = OFF")
            connection.set_progress_handler(None, 0)
            connection.execute("VACUUM INTO ?", (str(path),))

    def close(self) -> None:
        """Let go of the file; the last to do so makes it one plain file."""
        with self._lock:
            self._closed, connection, self._connection = True, self._connection, None
            if connection is not None:
                with closing(connection), suppress(sqlite3.Error):  # others have it open
                    # user_version is read from the file, whose mode another connection may have changed
                    pragmas = "busy_timeout = 0", "query_only = OFF", "user_version", "journal_mode = DELETE"
                    for pragma in pragmas if not self.read_only and self._is_writable() else ():
                        connection.execute(f"PRAGMA {pragma}").fetchall()
        forkable.discard(self)

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _create(self) -> None:
        if self.read_only:
            raise FileNotFoundError(f"{self.path.parent} holds no bank: name its folder, or make one: smn bank build.")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._explained(), closing(self._connect("rwc", _PATIENCE)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:  # else one was faster
                connection.execute(_SCHEMA)
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            connection.execute("COMMIT")

    def _check_log(self) -> None:
        """Refuse a file that was put beside another copy's log, which SQLite would play into it.

        The file says whether it has a log. Reading it drops this process's locks on it, so only the first may.
        """
        before = self._log()
        opened = {other._file for other in list(forkable) if isinstance(other, DiskStore)}
        if before is None or not before.st_size or self._file in opened:
            return
        with self._file.open("rb") as file:
            mode = file.read(20)[18:]
        after = self._log()  # another process may have closed the bank meanwhile
        if mode == b"\1\1" and after and (before.st_ino, before.st_ctime) == (after.st_ino, after.st_ctime):
            raise AdapterFileError(
                f"{self._file}-wal belongs to another copy of {self._file.name}, perhaps the one that this was put in "
                "place of: move it away, then open the bank again."
            )

    def _log(self) -> os.stat_result | None:
        """The write-ahead log's size and times, if there is one."""
        with suppress(FileNotFoundError):
            return os.stat(f"{self._file}-wal")
        return None

    def _is_writable(self) -> bool:
        return self._remote is None and os.access(self._file, os.W_OK) and os.access(self._file.parent, os.W_OK)

    def _reader(self) -> sqlite3.Connection:
        """A connection for reading. Where it can, it may write: to undo what a killed writer left."""
        if self._remote is not None or self._is_writable():
            return self._checked("rw" if self._remote is None else "ro&immutable=1")
        try:
            return self._checked("ro")
        except OSError:  # there are no locks here, or no room for the files of the write-ahead mode
            if (log := self._log()) is not None and log.st_size:
                raise
            return self._checked("ro&immutable=1")

    def _checked(self, mode: str) -> sqlite3.Connection:
        with self._explained(), ExitStack() as undo:
            connection = undo.enter_context(closing(self._connect(mode, _PATIENCE)))
            connection.set_progress_handler(lambda: time.monotonic() > self._deadline, _STEPS)
            self._deadline = time.monotonic() + _MAX_SECONDS
            connection.execute("PRAGMA query_only = ON")
            self._check_schema(connection)
            undo.pop_all()
        return connection

    def _connect(self, mode: str, timeout: float) -> sqlite3.Connection:
        name = f"{self._file.as_uri()}?mode={mode}"
        connection = sqlite3.connect(name, timeout, isolation_level=None, check_same_thread=False, uri=True)
        if sys.version_info >= (3, 12):
            connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)
        # What is no text is refused as a name, by name.
        connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "synchronous = EXTRA", "secure_delete = OFF"):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def _check_schema(self, connection: sqlite3.Connection) -> None:
        """Refuse all but the one table: a file from elsewhere could hold views and triggers."""
        pragmas = "application_id", "user_version"
        application, version = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas)
        if application != _APPLICATION:
            raise ValueError(f"{self.path} is a database and no bank: name the folder or file of one.")
        if version != _VERSION:
            raise ValueError(f"{self.path} has version {version}; {_VERSION} is known: pip install -U smn_peft.")
        found = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT 3").fetchall()
        if {sql for (sql,) in found} != {_SCHEMA, _OWN}:
            raise AdapterFileError(f"{self.path} does not hold a bank's table: it is damaged. Fetch the bank again.")

    def _rows(self, query: str, *values: object, seconds: float = _MAX_SECONDS) -> list[tuple[Any, ...]]:
        """All rows of a query, of one state of the bank; ValueError if it was closed."""
        with self._lock:
            if self._closed:
                raise ValueError(f"The bank {self.path} is closed.")
            if self._connection is None:  # there was a fork, or another copy was fetched
                self._connection, self._counted = self._reader(), None
            self._deadline = time.monotonic() + seconds
            with self._explained():
                return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """Commit the block's changes at its end, undo them if it raises or the process dies.

        PermissionError if the bank is read-only, StoreBusyError if another process writes for longer than `timeout`.
        """
        with self._writer() as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                raise StoreBusyError(
                    f"Another process is writing to {self.path}, which only one can, and was not done within "
                    f"{self._timeout:g} s: try again, or wait longer (timeout=, --timeout). Nothing was changed."
                ) from error
            connection.execute(f"PRAGMA busy_timeout = {int(1000 * _PATIENCE)}")
            yield connection
            connection.execute("COMMIT")
            self._empty_log(connection, _MAX_LOG)

    @contextmanager
    def _writer(self) -> Iterator[sqlite3.Connection]:
        """A connection for changes, in write-ahead mode where that is safe; threads take turns."""
        if self.read_only:
            raise PermissionError(f"The bank {self.path} was opened read-only: open it without, or a copy of it.")
        with self._writing, self._explained():
            connection, process = self._connect("rw", self._timeout), os.getpid()
            try:
                if not _is_on_network(self._file):
                    with suppress(sqlite3.OperationalError):  # locked: the change is as safe without
                        connection.execute("PRAGMA journal_mode = WAL")
                yield connection
            finally:
                if os.getpid() == process:
                    connection.close()
                else:  # a child, forked during the change: to close it would undo what the parent is writing
                    _orphans.append(connection)

    def _empty_log(self, connection: sqlite3.Connection, limit: int) -> None:
        if (log := self._log()) is not None and log.st_size > limit:
            with suppress(sqlite3.Error):
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _size(self) -> int:
        """Bytes on disk, with the write-ahead log's."""
        log = self._log()
        return self._file.stat().st_size + (log.st_size if log else 0)

    def _before_fork(self, held: ExitStack) -> None:
        """Disconnect: a connection must not cross a fork. Parent and child open their own."""
        held.enter_context(self._lock)
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _after_fork(self) -> None:
        self._writing = threading.Lock()  # another thread of the parent may have it

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OverflowError) as error:
            raise _explanation(error, self.path) from error


def _is_on_network(path: Path) -> bool:
    """Whether processes of other hosts may have the file open, with which the write-ahead mode shares nothing."""
    with suppress(OSError, ValueError):
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text("utf-8").splitlines()]
        return max((len(point), kind) for point, kind in mounts if path.is_relative_to(point))[1].startswith(_NETWORK)
    return False


TaskSource: TypeAlias = DiskStore | MemorySource
"""Where a bank's adapters lie."""


def _is_text(name: object) -> bool:
    """Whether SQLite takes it: text without lone surrogates."""
    return isinstance(name, str) and name.encode(errors="ignore").decode() == name


def _id_of(connection: sqlite3.Connection, name: str) -> int | None:
    found = connection.execute("SELECT id FROM task WHERE name = ?", (name,)).fetchone() if _is_text(name) else None
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


def open_store(
    where: str | os.PathLike[str] | RemoteFile,
    *,
    read_only: bool = False,
    revision: str | None = None,
    timeout: float = 5.0,
) -> DiskStore:
    """Open a bank of this disk (see [`DiskStore`]), or read-only a copy of one elsewhere, fetched if need be.

    `where` is the URL of a file, as fsspec takes it; or "user/name" on the Hub if there is no such folder and no
    folder "user", and `revision` a branch, tag or commit there. FileNotFoundError if there is no such bank, or none in
    the cache while offline.
    """
    if not isinstance(where, RemoteFile):
        if not is_remote(where):
            return DiskStore(where, read_only=read_only, timeout=timeout)
        where = RemoteFile(str(where), revision)
    return DiskStore(where.fetch(), read_only=True, timeout=timeout, copy=where)
