# SPDX-License-Identifier: Apache-2.0
"""`run_lock`: one run at a time in an output folder; the system gives the lock back however the process ends."""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["run_lock"]

_NAME = ".run.lock"
_HELD: set[int] = set()


@contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Hold the folder's lock, with the owner's host and process in it; it is removed at the end.

    Raises:
        RuntimeError: If another run holds it; the message names that.
    """
    try:
        import fcntl
    except ImportError:  # a system without locks of this kind
        yield
        return
    path = Path(folder) / _NAME
    handle = _opened(path)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(
                    f"{folder} is in use by {_owner(path)}: wait for it, stop it, or choose another output_dir. Two "
                    "runs in one folder would delete each other's checkpoints."
                ) from None
            except OSError as error:
                warnings.warn(f"{folder} cannot be locked ({error.strerror}): start no other run in it.", stacklevel=3)
                break
            if _is_at(handle, path):
                break
            os.close(handle)  # the one who held it has removed it since it was opened
            handle = _opened(path)
        _HELD.add(handle)
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps({"host": platform.node(), "pid": os.getpid()}).encode(), 0)
        try:
            yield
        finally:
            _HELD.discard(handle)
            if _is_at(handle, path):
                path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text("utf-8"))
        return f"process {int(owner['pid'])} on {owner['host']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another run"


def _let_go() -> None:
    """Workers that outlive a run that was killed must not hold its lock."""
    while _HELD:
        os.close(_HELD.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
