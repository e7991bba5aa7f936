# SPDX-License-Identifier: Apache-2.0
"""Banks across `os.fork`: a child finds every lock free and every weight whole, whatever other threads were doing."""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

__all__ = ["survive_forks"]


class Forkable(Protocol):
    """What has locks that a fork must not happen under."""

    def locks(self) -> list[AbstractContextManager[Any]]:
        """Locks that are held for short whiles, none of them inside another."""

    def after_fork(self) -> None:
        """In the child, where only the thread that forked is left."""


_known: weakref.WeakSet[Forkable] = weakref.WeakSet()
_forking = threading.RLock()
_held = ExitStack()


def survive_forks(bank: Forkable) -> None:
    """Take care of a bank at every fork for as long as it lives."""
    _known.add(bank)


def _before() -> None:
    _held.enter_context(_forking)
    for bank in list(_known):
        for lock in bank.locks():
            _held.enter_context(lock)


def _after_in_child() -> None:
    for bank in list(_known):
        bank.after_fork()
    _held.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_held.close, after_in_child=_after_in_child)
