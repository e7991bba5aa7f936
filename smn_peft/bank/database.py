# SPDX-License-Identifier: Apache-2.0
"""The SQLite file of a bank: connections, transactions, and SQLite's errors with their fix."""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..storage.files import AdapterFileError

__all__ = ["VERSION", "Database", "StoreBusyError", "forkable"]

VERSION = 1
"""Version of the schema, in the file's `user_version`."""
_APPLICATION = 0x534D4E42  # "SMNB", in the file's `application_id`
# Ids are never given twice: an id stands for one content. The blob is last: what a listing reads lies before it.
_SCHEMA = """CREATE TABLE task (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, facts TEXT NOT NULL,
config BLOB NOT NULL, blob BLOB NOT NULL)"""
_OWN = "CREATE TABLE sqlite_sequence(name,seq)"
_PATIENCE = 30.0  # seconds that a reader waits for a lock, which is held for milliseconds
_WRITER_WAIT = 5.0  # seconds that a second writer waits for the first
_STEPS, _MAX_SECONDS = 1_000_000, 60.0  # of a query: a hostile file can have a tree that never ends
_MAX_LOG = 1 << 24  # bytes of the write-ahead log that a change may leave
_NETWORK = ("nfs", "cifs", "smb", "ceph", "lustre", "9p", "afs", "gpfs", "beegfs", "fuse.")


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
    if "too big" in text:
        return ValueError(f"A row of {path} would be too large ({text}): SQLite holds up to 1e9 bytes.")
    return AdapterFileError(f"{path} is damaged ({text}): fetch the bank again, or build it anew.")


class Database:
    """A bank's file, see [`DiskStore`], for many readers and one writer. Safe from any thread, and after a fork.

    While it is written the file is in SQLite's write-ahead mode, so that readers go on; when the last process closes
    it, it is one plain file again. On a network disk, where that mode is unsafe, readers wait for commits instead.
    """

    def __init__(self, path: Path, *, read_only: bool, immutable: bool = False) -> None:
        self.path = Path(os.path.realpath(path))
        self.read_only = read_only
        self._immutable = immutable
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._closed = False
        self._deadline = 0.0
        if not self.path.is_file() or not self.path.stat().st_size:
            self._create()
        self._check_log()
        self._connection: sqlite3.Connection | None = self._reader()
        forkable.add(self)

    def _create(self) -> None:
        if self.read_only:
            raise FileNotFoundError(f"{self.path.parent} holds no bank: name its folder, or make one: smn bank build.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained(), closing(self._connect("rwc", _PATIENCE)) as connection:
            connection.execute("PRAGMA page_size = 4096")
            connection.execute("PRAGMA auto_vacuum = NONE")
            connection.execute("BEGIN IMMEDIATE")
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:  # else one was faster
                connection.execute(_SCHEMA)
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute("COMMIT")

    def _check_log(self) -> None:
        """Refuse a file that was put beside another copy's log, which SQLite would play into it.

        The file says whether it has a log. Reading it drops this process's locks on it, so only the first may.
        """
        before = self._log()
        opened = {other.path for other in list(forkable) if isinstance(other, Database)}
        if before is None or not before.st_size or self.path in opened:
            return
        with self.path.open("rb") as file:
            header = file.read(20)
        after = self._log()  # another process may have closed the bank meanwhile
        if header[18:] == b"\1\1" and after and (before.st_ino, before.st_ctime) == (after.st_ino, after.st_ctime):
            raise AdapterFileError(
                f"{self.path}-wal belongs to another copy of {self.path.name}, perhaps the one that this was put in "
                "place of: move it away, then open the bank again."
            )

    def _log(self) -> os.stat_result | None:
        """The write-ahead log's size and times, if there is one."""
        with suppress(FileNotFoundError):
            return os.stat(f"{self.path}-wal")
        return None

    def _is_writable(self) -> bool:
        return not self._immutable and os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)

    def _reader(self) -> sqlite3.Connection:
        """A connection for reading. Where it can, it may write: to undo what a killed writer left."""
        if self._immutable:
            return self._checked("ro&immutable=1")
        if self._is_writable():
            return self._checked("rw")
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
        name = f"{self.path.as_uri()}?mode={mode}"
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
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION:
            raise ValueError(f"{self.path} is a database and no bank: name the folder or file of one.")
        if version != VERSION:
            raise ValueError(
                f"{self.path} has version {version}; this smn_peft reads {VERSION}: pip install -U smn_peft."
            )
        found = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT 3").fetchall()
        if {sql for (sql,) in found} != {_SCHEMA, _OWN}:
            raise AdapterFileError(f"{self.path} does not hold a bank's table: it is damaged. Fetch the bank again.")

    def rows(self, query: str, *values: object, seconds: float = _MAX_SECONDS) -> list[tuple[Any, ...]]:
        """All rows of a query, of one state of the bank; ValueError if it was closed."""
        with self._lock:
            if self._closed:
                raise ValueError(f"The bank {self.path} is closed.")
            if self._connection is None:  # there was a fork
                self._connection = self._reader()
            self._deadline = time.monotonic() + seconds
            with self._explained():
                return self._connection.execute(query, values).fetchall()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Commit the block's changes at its end, undo them if it raises or the process dies.

        PermissionError if the bank is read-only, StoreBusyError if another process writes for longer than seconds.
        """
        with self._writer() as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                raise StoreBusyError(
                    f"Another process is writing to {self.path}, which only one can: try again when it is done, or "
                    "end it. Nothing was changed."
                ) from error
            connection.execute(f"PRAGMA busy_timeout = {int(1000 * _PATIENCE)}")
            yield connection
            connection.execute("COMMIT")
            if (log := self._log()) is not None and log.st_size > _MAX_LOG:
                with suppress(sqlite3.Error):
                    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextmanager
    def _writer(self) -> Iterator[sqlite3.Connection]:
        """A connection for changes, in write-ahead mode where that is safe; threads take turns."""
        if self.read_only:
            raise PermissionError(f"The bank {self.path} was opened read-only: open it without, or a copy of it.")
        with self._writing, self._explained():
            connection, process = self._connect("rw", _WRITER_WAIT), os.getpid()
            try:
                if not _is_on_network(self.path):
                    with suppress(sqlite3.OperationalError):  # locked: the change is as safe without
                        connection.execute("PRAGMA journal_mode = WAL")
                yield connection
            finally:
                if os.getpid() == process:
                    connection.close()
                else:  # a child, forked during the change: to close it would undo what the parent is writing
                    _orphans.append(connection)

    def vacuum(self) -> None:
        """Give the room of removed rows back; readers go on."""
        with self._writer() as connection:
            connection.execute("VACUUM")
            with suppress(sqlite3.Error):
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def copy(self, path: Path) -> None:
        """Write the bank as it is now to a new file, without free pages; readers and writers go on."""
        with self._explained(), closing(self._reader()) as connection:
            connection.execute("PRAGMA query_only = OFF")
            connection.set_progress_handler(None, 0)
            connection.execute("VACUUM INTO ?", (str(path),))

    def size(self) -> int:
        """Bytes on disk, with the write-ahead log's."""
        log = self._log()
        return self.path.stat().st_size + (log.st_size if log else 0)

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

    def before_fork(self, held: ExitStack) -> None:
        """Disconnect: a connection must not cross a fork. Parent and child open their own."""
        held.enter_context(self._lock)
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def after_fork(self) -> None:
        """Forget that another thread of the parent was writing."""
        self._writing = threading.Lock()

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


# --- Forks -----------------------------------------------------------------------------------------------------------

_orphans: list[sqlite3.Connection] = []


forkable: weakref.WeakSet[Any] = weakref.WeakSet()
"""What must not be forked while other threads use it.

`before_fork(held)` enters the locks that a child must find free, which are held for short whiles and none inside
another; `after_fork()` is called in the child, where only the thread that forked is left, under these locks.
"""
_forking = threading.RLock()
_held = ExitStack()


def _before_fork() -> None:
    _held.enter_context(_forking)
    for resource in list(forkable):
        resource.before_fork(_held)


def _after_fork_in_child() -> None:
    for resource in list(forkable):
        resource.after_fork()
    _held.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_held.close, after_in_child=_after_fork_in_child)
