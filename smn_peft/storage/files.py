# SPDX-License-Identifier: Apache-2.0
"""Read files that came from elsewhere, regular ones only and within a limit, and replace files whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

MAX_JSON = 16 << 20
"""Bytes of the largest JSON file that is read: the class names of ImageNet-21k take one million."""
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


class AdapterFileError(ValueError):
    """An adapter's file, coded masks or config that cannot be trusted: truncated, damaged or hostile."""


def check_regular(path: str | os.PathLike[str]) -> None:
    """ValueError if a path is a FIFO, a device, a socket or a folder; FileNotFoundError if there is nothing."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise ValueError(f"{path} is {kind} and no regular file: put the file itself there.")


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; errors as of [`check_regular`]."""
    check_regular(path)
    # Without waiting for a writer, should it have become a FIFO meanwhile.
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))


def read_bytes(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """Read a whole file; ValueError if it is not a regular one, or has more than `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise ValueError(f"{path} has {size:,} bytes; such a file has {limit:,} at most, so it is none.")
        return file.read(-1 if limit is None else limit)  # not more than was checked, should the file be growing


def read_json(path: str | os.PathLike[str], limit: int = MAX_JSON) -> Any:
    """Read a JSON file of at most `limit` bytes; ValueError as of [`read_bytes`], or if it is not JSON."""
    data = read_bytes(path, limit)
    try:
        return json.loads(data)
    except (RecursionError, ValueError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is damaged: {reason}. Copy it again.") from error


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write to a temporary file beside `path` and rename it to `path` when the block ends without an error.

    The bytes are on the disk before the rename, and the old file's permissions stay. After an error (a full disk, an
    exception in the block) the temporary file is removed and `path` is unchanged.

    Raises:
        OSError: If the disk refuses, or there is no such folder; the message names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    mode = path.stat().st_mode & 0o777 if os.path.exists(path) else None

    def create(name: str, flags: int) -> int:
        return os.open(name, flags, 0o666 if mode is None else 0o600)  # less the umask; private until it is whole

    try:
        with open(temporary, "xb", opener=create) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        fix = "The old file, if any, is untouched: free some space or choose another folder"
        raise OSError(error.errno, f"Cannot write {path}: {error.strerror}. {fix}") from error


def to_disk(path: str | os.PathLike[str]) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
