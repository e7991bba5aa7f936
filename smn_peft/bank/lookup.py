# SPDX-License-Identifier: Apache-2.0
"""`TaskLookup`: from a name to the decoded task, through the memory of what was decoded before."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from .cache import TaskCache
from .check import BaseCheck
from .live import LiveModel
from .names import BASE_NAME
from .reading import task_from_tensors
from .source import StoredAdapter, TaskSource, unknown_task
from .task import Task

__all__ = ["TaskLookup"]


class TaskLookup:
    """Tasks of a source over a base, each decoded and checked when it is asked for."""

    def __init__(self, source: TaskSource, live: LiveModel, cache: TaskCache) -> None:
        """Decode nothing yet."""
        self._source, self._live, self._cache = source, live, cache
        self._check = BaseCheck(live)
        self._last_config: dict[str, Any] = {}

    def decode(self, name: str, stored: StoredAdapter) -> Task:
        """An adapter as a task; ValueError if it does not belong to the base."""
        task = task_from_tensors(name, stored.tensors, self._live, *self._shared(stored.config))
        self._check(task)
        return task

    def _shared(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """A config of the values of the one before, where they are equal, and the bytes of what it has of its own."""
        last, result, own = self._last_config, {}, 0
        for key, value in config.items():
            known = last.get(key)
            if type(value) is type(known) and value == known:
                result[key] = known
            else:
                result[key] = value
                own += _size(value)
        if not own and result.keys() == last.keys():
            return last, 0
        self._last_config = result = {sys.intern(key): value for key, value in result.items()}
        return result, own + sys.getsizeof(result)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a task."""
        try:
            return name in self._source
        except UnicodeError:  # a surrogate alone, which no store can look for
            return False

    def check_known(self, name: str) -> None:
        """KeyError for an unknown name."""
        if name not in self:
            raise unknown_task(name, len(self._source))

    def task(self, name: str) -> Task:
        """A task, decoded if it is not; KeyError for an unknown name."""
        self.check_known(name)
        version = self._source.version(name)
        return self._cache.get(name, version, lambda: self.decode(name, self._source.read(name)))

    def __call__(self, task: str | Task | None) -> Task | None:
        """A task by its name, or as it was looked up before; None for the base."""
        if task is None or task == BASE_NAME:
            return None
        return self.task(task) if isinstance(task, str) else task


def _size(value: Any) -> int:
    """Bytes of a value out of JSON."""
    parts = value if isinstance(value, (list, tuple)) else ()
    if isinstance(value, Mapping):
        parts = (*value.keys(), *value.values())
    return sys.getsizeof(value) + sum(_size(part) for part in parts)
