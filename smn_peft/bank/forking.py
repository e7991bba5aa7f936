# SPDX-License-Identifier: Apache-2.0
"""What is done about locks and connections when a process forks."""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import ExitStack
from typing import Any

__all__ = ["forkable"]

forkable: weakref.WeakSet[Any] = weakref.WeakSet()
"""What must not be forked while other threads use it.

`_before_fork(held)` enters the locks that a child must find free, which are held for short whiles and none inside
another; `_after_fork()` is called in the child, where only the thread that forked is left, under these locks.
"""
_forking = threading.RLock()
_held = ExitStack()


def _before_fork() -> None:
    _held.enter_context(_forking)
    for resource in list(forkable):
        resource._before_fork(_held)


def _after_fork_in_child() -> None:
    for resource in list(forkable):
        resource._after_fork()
    _held.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_held.close, after_in_child=_after_fork_in_child)
