# SPDX-License-Identifier: Apache-2.0
"""SQLite's errors as the package's own, each with what to do about it."""

from __future__ import annotations

import os
from pathlib import Path

from ..storage import AdapterFileError

__all__ = ["StoreBusyError", "explanation"]


class StoreBusyError(RuntimeError):
    """Another process is writing to the bank."""


def explanation(error: Exception, path: Path) -> Exception:
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
