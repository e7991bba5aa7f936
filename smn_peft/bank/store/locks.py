# SPDX-License-Identifier: Apache-2.0
"""`ForkLock`: a lock that a forked child finds open, whichever of the parent's threads had it."""

from __future__ import annotations

import os
import threading
import weakref

__all__ = ["ForkLock"]


class ForkLock:
    """A `threading.Lock` for ``with``."""

    def __init__(self) -> None:
        """Make an open lock."""
        self._lock = threading.Lock()
        _all.add(self)

    def reopen(self) -> None:
        """Forget who has it."""
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


_all: weakref.WeakSet[ForkLock] = weakref.WeakSet()


def _reopen_all() -> None:
    for lock in _all:
        lock.reopen()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reopen_all)
