# SPDX-License-Identifier: Apache-2.0
"""The task that is live between calls: made live, left for another while somebody uses the model, and put back."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .cache import BankStats
from .live import LiveModel
from .task import Task

__all__ = ["ActiveTask"]


class ActiveTask:
    """Who has `lock` may use the model, and finds it as the last call of [`activate`] left it.

    Attributes:
        lock: Held while the model is used; decoding a task does without it.
    """

    def __init__(
        self, live: LiveModel, find: Callable[[str | Task | None], Task | None], stats: BankStats, *, exclusive: bool
    ) -> None:
        """Begin with the base.

        Args:
            live: The model.
            find: Looks a task up; KeyError for an unknown name.
            stats: Where switches are counted.
            exclusive: Leave what is live where no task is active.
        """
        self.lock = threading.RLock()
        self._live, self._find, self._stats, self._exclusive = live, find, stats, exclusive
        self._active: tuple[str, Task] | None = None

    def activate(self, name: str | None) -> None:
        """Make a task live until further notice; None for the base."""
        with self.lock:
            task = self._find(name)
            self._switch(task)
            self._active = None if task is None else (str(name), task)

    def replace(self, name: str, other: str | None) -> None:
        """If this is the active task, activate another, or the one that has its name now."""
        with self.lock:
            if self._active is not None and self._active[0] == name:
                self.activate(other)

    @contextmanager
    def instead(self, name: str | None) -> Iterator[None]:
        """Another active task while this lasts."""
        with self.lock:
            before = self._active
            self.activate(name)
            try:
                yield
            finally:
                self._active = before
                self._put_back()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Whatever is made live while this lasts, the active task is live afterwards."""
        with self.lock:
            generation = self._live.generation
            try:
                yield
            finally:
                self._stats.switches += self._live.generation - generation
                self._put_back()

    def _switch(self, task: Task | None) -> None:
        generation = self._live.generation
        self._live.switch(task)
        self._stats.switches += self._live.generation - generation

    def _put_back(self) -> None:
        """The active task as the source has it now; the base where it is gone."""
        if self._active is None:
            return None if self._exclusive else self._switch(None)
        name, task = self._active
        try:
            task = self._find(name) or task
        except KeyError:
            warnings.warn(f"The task {name!r} was active and is gone from the bank: the base is live.", stacklevel=5)
            self._active = None
            return self._switch(None)
        except (OSError, RuntimeError, ValueError):  # it cannot be read anew: what was read is still good
            pass
        self._active = name, task
        self._switch(task)
