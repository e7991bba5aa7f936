# SPDX-License-Identifier: Apache-2.0
"""Decoded tasks in memory, the least recently used out first, within a budget of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .task import Task

__all__ = ["BankStats", "TaskCache"]


@dataclass
class BankStats:
    """What a bank has done since it was opened.

    Attributes:
        hits: Lookups whose task was decoded already.
        misses: Lookups that had to decode.
        evictions: Decoded tasks that made room, or were too large to be kept.
        switches: Times that the model's weights were rewritten.
        resident_bytes: Bytes of decoded tasks that are held now.
        resident: Number of decoded tasks that are held now.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    switches: int = 0
    resident_bytes: int = 0
    resident: int = 0


class TaskCache:
    """Tasks by name, each valid for one version of its adapter."""

    def __init__(self, budget: int, stats: BankStats) -> None:
        """Hold up to `budget` bytes; pinned tasks count, and stay."""
        self.budget, self.stats = budget, stats
        self.pinned: set[str] = set()
        self._entries: OrderedDict[str, tuple[object, Task]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, name: str, version: object, decode: Callable[[], Task]) -> Task:
        """The task, decoded if it is not held; two threads that ask at once may both decode, and both are right."""
        with self.lock:
            held = self._entries.get(name)
            if held is not None and held[0] == version:
                self._entries.move_to_end(name)
                self.stats.hits += 1
                return held[1]
            self.stats.misses += 1
        task = decode()
        with self.lock:
            self._drop(name)
            self._entries[name] = version, task
            self._count(task, 1)
            self._shrink()
        return task

    def drop(self, name: str) -> None:
        """Let go of a task; one that comes in its place is pinned if it was."""
        with self.lock:
            self._drop(name)

    def forget(self, name: str) -> bool:
        """Let go of a name, and tell whether it was pinned."""
        with self.lock:
            self._drop(name)
            pinned = name in self.pinned
            self.pinned.discard(name)
            return pinned

    @contextmanager
    def pinning(self, name: str) -> Iterator[None]:
        """Keep what is decoded under a name from now on, unless the block fails."""
        new = name not in self.pinned
        self.pinned.add(name)
        try:
            yield
        except BaseException:
            if new:
                self.pinned.discard(name)
            raise

    def clear(self) -> None:
        """Forget all."""
        with self.lock:
            for name in list(self._entries):
                self._drop(name)
            self.pinned.clear()

    def _drop(self, name: str) -> None:
        if name in self._entries:
            self._count(self._entries.pop(name)[1], -1)

    def _shrink(self) -> None:
        for name in [name for name in self._entries if name not in self.pinned]:
            if self.stats.resident_bytes <= self.budget:
                return
            self._drop(name)
            self.stats.evictions += 1

    def _count(self, task: Task, sign: int) -> None:
        self.stats.resident_bytes += sign * task.nbytes
        self.stats.resident += sign
