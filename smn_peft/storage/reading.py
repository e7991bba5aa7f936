# SPDX-License-Identifier: Apache-2.0
"""Open files that came from elsewhere: regular files only, since a FIFO blocks and a device never ends."""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import Any, BinaryIO

__all__ = ["MAX_JSON", "check_regular", "open_regular", "read_bytes", "read_json"]

MAX_JSON = 16 << 20
"""Bytes of the largest JSON file that is read: the class names of ImageNet-21k take one million."""

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading in binary; what is no regular file is refused at once, without waiting for a writer.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is a FIFO, a device, a socket or a folder.
    """
    # O_NONBLOCK so that opening a FIFO returns; it changes nothing for regular files.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EOPNOTSUPP):  # a socket cannot be opened
            raise _refused(path, stat.S_IFSOCK) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _refused(path, mode)
    return open(descriptor, "rb")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse a path that a library is about to open itself, as [`open_regular`] does; nothing is opened.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is a FIFO, a device, a socket or a folder.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise _refused(path, mode)


def read_bytes(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """Read a regular file whole.

    Args:
        path: The file.
        limit: Bytes that it may have; None for any number.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is no regular file, or larger than `limit`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise ValueError(f"{path} has {size:,} bytes; such a file has {limit:,} at most, so it is none.")
        # Not more than was checked, should the file be growing.
        return file.read() if limit is None else file.read(limit)


def read_json(path: str | os.PathLike[str], limit: int = MAX_JSON) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        limit: Bytes that it may have.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is no regular file, larger than `limit`, nested too deeply, or no JSON.
    """
    data = read_bytes(path, limit)
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: it is nested too deeply. Copy it again.") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Copy it again.") from error


def _refused(path: str | os.PathLike[str], mode: int) -> ValueError:
    kind = _KINDS.get(stat.S_IFMT(mode), "no file")
    return ValueError(f"{path} is {kind} and no regular file: put the file itself there.")
