# SPDX-License-Identifier: Apache-2.0
"""Write a file so that the old one stays whole until the new one is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

__all__ = ["atomic_write"]


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`, and rename it to `path` when the block ends without an error.

    The bytes are on the disk before the rename; after an error (a full or read-only disk, an exception in the block)
    the temporary file is removed and `path` is as it was.

    Args:
        path: The file to write; its folder must exist.

    Yields:
        A binary file to write to.

    Raises:
        OSError: If the disk refuses; the message names `path`.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        message = f"Cannot write {path}: {error.strerror}. Free some space or choose another folder"
        raise OSError(error.errno, message) from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode(path))
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(
                error.errno, f"Cannot write {path}: {error.strerror}. The old file, if any, is untouched"
            ) from error
        raise


def _mode(path: Path) -> int:
    """Permissions of the file that is replaced, or what `open` would give a new one."""
    with suppress(OSError):
        return path.stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
