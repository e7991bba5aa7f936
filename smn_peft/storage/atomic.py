# SPDX-License-Identifier: Apache-2.0
"""Write a file so that the old one stays whole until the new one is."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

__all__ = ["atomic_write", "to_disk"]

_TRIES = 100


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
        mode = _mode(path)
        file, temporary = _created(path, 0o666 if mode is None else 0o600)
    except OSError as error:
        message = f"Cannot write {path}: {error.strerror}. Free some space or choose another folder"
        raise OSError(error.errno, message) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(
                error.errno, f"Cannot write {path}: {error.strerror}. The old file, if any, is untouched"
            ) from error
        raise


def to_disk(path: str | os.PathLike[str]) -> None:
    """Wait until what was written to a file, or into a folder's list of names, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _created(path: Path, mode: int) -> tuple[IO[bytes], Path]:
    """A new file beside the path; what the process's umask takes from `mode` is the system's affair."""

    def opened(name: str, flags: int) -> int:
        return os.open(name, flags, mode)

    for _ in range(_TRIES):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with suppress(FileExistsError):
            return open(temporary, "xb", opener=opened), temporary
    raise FileExistsError(errno.EEXIST, f"{_TRIES} temporary names are taken")


def _mode(path: Path) -> int | None:
    """Permissions of the file that is replaced; None if there is none."""
    with suppress(OSError):
        return path.stat().st_mode & 0o777
    return None
