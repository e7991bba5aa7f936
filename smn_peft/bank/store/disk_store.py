# SPDX-License-Identifier: Apache-2.0
"""`DiskStore`: a bank's adapters in a folder, for many readers and one writer at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ...storage import AdapterFileError
from ..source import StoredAdapter, unknown_task
from .adding import Adapter, checked, code, insert_all
from .change import Change, changing
from .compaction import Compaction, compact
from .export import write_adapter
from .index import Index
from .info import StoreInfo, TaskInfo
from .listing import store_info, task_infos, task_names
from .located import Located, naming
from .names import check_name
from .record import Record
from .shards import Shards
from .verification import TaskCheck, verify

__all__ = ["DiskStore"]

_TRIES = 8  # a shard can be compacted away between the look into the index and the file, again and again


class DiskStore:
    """Adapters in a folder: an index of one row per task, and shards that hold their tensors.

    Opening reads nothing of the tasks, and a lookup is one search in the index, however many there are. What is
    added, replaced, removed or renamed becomes visible to every process at once, or not at all if the writer fails or
    is killed. Any number of processes and threads read meanwhile; tensors that they hold stay valid, whatever becomes
    of the task.

    A [`TaskSource`]. Tensors that it gives are maps of the file, copied when they are written to: that never reaches
    the file, but whoever else in the process reads the task sees it.

    Attributes:
        path: The folder.
        read_only: Whether changes are refused.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        """See [`open`]."""
        self.path = Path(path)
        self.read_only = read_only
        self._index = Index(self.path, read_only=read_only)
        self._shards = Shards(self.path / "shards")
        self._whole: dict[int, int] = {}  # tasks whose bytes were compared with their checksum, and in which shard
        self._swept = False

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_only: bool = False) -> DiskStore:
        """Open a store; an empty one is made where there is none.

        Args:
            path: Its folder.
            read_only: Make nothing, and refuse changes.

        Raises:
            AdapterFileError: If its index is damaged.
            FileNotFoundError: If there is no store and `read_only`.
            PermissionError: If its files cannot be opened.
            ValueError: If the folder holds something else, or a later version's store.
        """
        return cls(path, read_only=read_only)

    def names(self) -> list[str]:
        """All names, sorted."""
        return task_names(self._index)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self._index.rows("SELECT 1 FROM task WHERE name = ?", name))

    def __len__(self) -> int:
        ((count,),) = self._index.rows("SELECT count(*) FROM task")
        return int(count)

    def version(self, name: str) -> int:
        """A number that no other adapter of this store has had or will have; KeyError for an unknown name."""
        found = self._index.rows("SELECT id FROM task WHERE name = ?", name)
        if not found:
            raise unknown_task(name, len(self))
        return int(found[0][0])

    def read(self, name: str) -> StoredAdapter:
        """An adapter, its tensors where they lie in the file; checked against its checksum once per process.

        Raises:
            AdapterFileError: If it is damaged, with its name and shard; other tasks are read as before.
            KeyError: If there is no such task.
            ValueError: If its format is not known.
        """
        row, data = self._find(name)
        with naming(name, self._shards.folder / row.file):
            return row.adapter(data)

    def _find(self, name: str) -> tuple[Located, Tensor]:
        """A task's row and bytes."""
        for attempt in range(_TRIES):
            found = self._index.rows(f"{Located.QUERY}name = ?", name)
            if not found:
                raise unknown_task(name, len(self))
            row = Located(*found[0])
            with naming(name, self._shards.folder / str(row.file)):
                row.check()
                if row.name != name:
                    raise AdapterFileError(f"its row in the index has the name {str(row.name)[:200]!r}")
                try:
                    data = row.data(self._shards)
                except FileNotFoundError as error:
                    if attempt == _TRIES - 1:
                        raise AdapterFileError("its shard is missing") from error
                    time.sleep(0.001 * attempt)
                    continue
                if self._whole.get(row.id) != row.shard:
                    row.check_bytes(data)
                    self._whole[row.id] = row.shard
            return row, data
        raise AssertionError

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
        """Put adapters in, all or none, into as few shards as they fit.

        Args:
            adapters: Names, and what they stand for: an adapter, its folder, or its Hub id. They are read one by one.
            replace: Put them in place of tasks of the same names.
            progress: Called after each.

        Raises:
            AdapterFileError: If an adapter is damaged.
            FileNotFoundError: If there is no such adapter.
            OSError: If the disk is full.
            StoreBusyError: If another process is writing.
            ValueError: If a name is taken, not allowed or given twice, or an adapter holds no mask.
        """
        named = checked(adapters)
        records: Iterable[tuple[str, Record]] = code(named)
        if len(named) == 1:  # before others have to wait
            records = list(records)
        with self._changing() as change:
            insert_all(change, [name for name, _ in named], records, replace=replace, progress=progress)

    def remove(self, name: str) -> None:
        """Take a task out; KeyError for an unknown one. Its bytes go with its shard, or by compaction."""
        self.remove_many([name])

    def remove_many(self, names: Iterable[str]) -> None:
        """Take tasks out, all or none; KeyError if one is unknown."""
        with self._changing() as change:
            for removed, name in enumerate(names):
                if not change.delete(name):
                    raise unknown_task(name, change.count() + removed)

    def rename(self, old: str, new: str) -> None:
        """Give a task another name.

        Raises:
            KeyError: If there is no such task.
            ValueError: If the new name is taken or not allowed.
        """
        check_name(new)
        with self._changing() as change:
            if (found := change.find(old)) is None:
                raise unknown_task(old, change.count())
            if old != new and change.find(new) is not None:
                raise ValueError(f"The bank has a task {new!r} already: remove it first.")
            change.connection.execute("UPDATE task SET name = ? WHERE id = ?", (new, found[0]))

    @contextmanager
    def _changing(self) -> Iterator[Change]:
        swept, self._swept = self._swept, False  # after a failure the next change looks for leftovers again
        with changing(self._index, self._shards, sweep=not swept) as change:
            yield change
        self._swept = True

    def info(self, name: str) -> TaskInfo:
        """What the index says of a task; KeyError for an unknown name."""
        found = task_infos(self._index, name)
        if not found:
            raise unknown_task(name, len(self))
        return found[0]

    def infos(self) -> list[TaskInfo]:
        """What the index says of every task, sorted by name."""
        return task_infos(self._index)

    def summary(self) -> StoreInfo:
        """The store as a whole."""
        return store_info(self._index)

    def verify(self) -> Iterator[TaskCheck]:
        """Check every task, down to the decoded masks; see [`verification.verify`]."""
        return verify(self._index, self._shards)

    def compact(self, progress: Callable[[int, int], object] | None = None) -> Compaction:
        """Merge small shards and drop what was removed; see [`compaction.compact`]."""
        return compact(self._index, self._shards, progress)

    def export(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Write an adapter's folder, as it came in: config to the letter, tensors to the bit.

        Raises:
            AdapterFileError: If it is damaged.
            FileExistsError: If the folder holds an adapter.
            KeyError: If there is no such task.
        """
        row, data = self._find(name)
        with naming(name, self._shards.folder / row.file):
            adapter = row.adapter(data)
        write_adapter(folder, adapter, row.config)

    def close(self) -> None:
        """Let go of the files; tensors that were read stay valid."""
        self._index.close()
        self._shards.close()

    def __enter__(self) -> DiskStore:
        """Use the store, and close it afterwards."""
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
