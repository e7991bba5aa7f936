# SPDX-License-Identifier: Apache-2.0
"""Shard files: ordinary safetensors of one or many adapters, written once, mapped, never changed."""

from __future__ import annotations

import json
import os
import re
import stat
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from ...storage import AdapterFileError, atomic_write
from .locks import ForkLock
from .record import ALIGNMENT, Record

__all__ = ["SHARD_BYTES", "SHARD_TASKS", "NewShard", "Shards", "is_shard_name", "sync_folder"]

SHARD_BYTES = 1 << 26
"""Bytes after which a shard takes no further adapter."""
SHARD_TASKS = 512
"""Adapters after which it takes no further one: the header of a safetensors file has a limit too."""
_MAPPED = 32  # shards held open; each is one mapping of address space and no file handle
_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_UNFINISHED = re.compile(rf"\.{_NAME.pattern}\.[a-z0-9_]{{8}}")  # the temporary names of atomic_write


def is_shard_name(file: object) -> bool:
    """Whether this can be the name of a shard: an index from elsewhere names no other file."""
    return isinstance(file, str) and _NAME.fullmatch(file) is not None


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class NewShard:
    """A shard that was written and that no index names yet.

    Attributes:
        file: Its name.
        size: Its bytes.
        header: CRC-32 of everything before the first tensor.
        header_size: Bytes before the first tensor.
        starts: Where each adapter starts in the file.
    """

    file: str
    size: int
    header: int
    header_size: int
    starts: tuple[int, ...]


class Shards:
    """The folder of shards: writes them, maps them, removes them. Safe from any thread."""

    def __init__(self, folder: Path) -> None:
        """Bind a folder; it need not exist."""
        self.folder = folder
        self._lock = ForkLock()
        self._mapped: OrderedDict[str, Tensor] = OrderedDict()

    def write(self, records: Sequence[tuple[int, Record]]) -> NewShard:
        """Write adapters as one shard, on the disk when this returns.

        Args:
            records: Adapters by their ids; tensors are named ``"<id>/<key>"``.

        Raises:
            OSError: If the disk refuses.
        """
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, position = [], 0
        for number, record in records:
            starts.append(position)
            for entry in record.entries:
                offsets = [position + entry.start, position + entry.end]
                header[f"{number}/{entry.key}"] = {
                    "dtype": entry.dtype,
                    "shape": entry.shape,
                    "data_offsets": offsets,
                }
            position += record.size
            if padding := -record.size % ALIGNMENT:
                offsets = [position, position + padding]
                header[f"{number}/"] = {"dtype": "U8", "shape": [padding], "data_offsets": offsets}
                position += padding
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        head = struct.pack("<Q", len(text)) + text
        file = f"{uuid4().hex}.safetensors"
        with atomic_write(self.folder / file) as stream:
            stream.write(head)
            for _, record in records:
                for part in record.parts:
                    stream.write(part)
                stream.write(bytes(-record.size % ALIGNMENT))
        try:
            sync_folder(self.folder)
        except BaseException:
            self.remove([file])
            raise
        places = tuple(len(head) + start for start in starts)
        return NewShard(file, len(head) + position, zlib.crc32(head), len(head), places)

    def map(self, file: str, size: int) -> Tensor:
        """A shard's bytes, uint8 (size,), mapped copy-on-write: read when they are used, and never written back.

        Args:
            file: Its name.
            size: Its bytes, as the index says.

        Raises:
            AdapterFileError: If it has another size, or is no plain file.
            FileNotFoundError: If there is no such shard.
        """
        with self._lock:
            mapped = self._mapped.get(file)
            if mapped is None:
                path = self.folder / file
                found = path.stat()
                if not stat.S_ISREG(found.st_mode):
                    raise AdapterFileError(f"{path} is no plain file")
                if found.st_size != size:
                    raise AdapterFileError(f"{path} has {found.st_size} bytes, the index says {size}")
                try:
                    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
                except RuntimeError as error:  # removed in between, or cut
                    raise FileNotFoundError(f"{path} cannot be mapped: {error}") from error
                self._mapped[file] = mapped
            self._mapped.move_to_end(file)
            while len(self._mapped) > _MAPPED:
                self._mapped.popitem(last=False)
            return mapped

    def remove(self, files: Iterable[str]) -> None:
        """Remove shards that no index names; who has one mapped keeps its bytes. Other files are left alone."""
        for file in files:
            if not (is_shard_name(file) or _UNFINISHED.fullmatch(str(file))):
                continue
            with self._lock:
                self._mapped.pop(file, None)
            with suppress(OSError):  # what cannot go is swept by the next writer
                (self.folder / file).unlink()

    def sweep(self, known: Iterable[str]) -> None:
        """Remove what a writer left that did not come to its end; a file of another name is not the bank's.

        Raises:
            ValueError: If the folder is a link: what it leads to may be another bank's.
        """
        if self.folder.is_symlink():
            raise ValueError(
                f"{self.folder} is a link, and a bank writes only to a folder of its own: move the shards here, or "
                "link to the bank's whole folder."
            )
        if self.folder.is_dir():
            there, named = {e.name for e in os.scandir(self.folder) if e.is_file(follow_symlinks=False)}, set(known)
            if named <= there:  # else index and folder do not belong together, and what is unknown may be needed
                self.remove(there - named)

    def close(self) -> None:
        """Let go of all mappings that no tensor uses."""
        with self._lock:
            self._mapped.clear()
